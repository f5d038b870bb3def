"""The dashboards, read back from their own files: by TensorBoard's reader, and from the log of Weights & Biases."""

import errno
import json
import logging
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import PATIENCE
from runs import metrics, tiny

import train
from training import loggers

pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
pytest.importorskip("wandb", reason="needs wandb: pip install wandb")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from wandb.proto.wandb_internal_pb2 import Record

BOTH = 'train_cfg.loggers=["tensorboard","wandb"]'
OFFLINE = (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"))
ALONE = (*OFFLINE, ("WANDB_SERVICE", ""))  # of a child, which must not share the process that serves these tests
BLOCK = 1 << 15


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in OFFLINE:
        monkeypatch.setenv(name, value)


def expected(folder: Path) -> dict[str, dict[int, float]]:
    """The numbers of metrics.jsonl: {name: {step: value}}, with the index after a slash for each of a list."""
    curves: dict[str, dict[int, float]] = {}
    for line in metrics(folder):
        for key, value in line.items():
            for name, number in [(f"{key}/{i}", x) for i, x in enumerate(value)] if isinstance(value, list) else [(key, value)]:
                if number is not None and key not in ("step", "time"):
                    curves.setdefault(name, {})[line["step"]] = number
    return curves


def tensorboard(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def wandb_records(folder: Path) -> list[Record]:
    """What the one folder of Weights & Biases holds, once its process has closed the file, a little after the run."""
    deadline = time.monotonic() + PATIENCE
    while True:
        records = [Record.FromString(data) for path in folder.glob("wandb/offline-run-*/*.wandb") for data in log_records(path)]
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.05)


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a log of LevelDB's format, in parts within blocks of 32 KiB, after 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little is left of the block for a header
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb_rows(folder: Path) -> list[dict]:
    rows = [record.history.item for record in wandb_records(folder) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def assert_both_equal_the_records(folder: Path) -> None:
    """Point by point, each step once, in order; TensorBoard's numbers are of single precision."""
    curves, accumulator, rows = expected(folder), tensorboard(folder), wandb_rows(folder)
    assert set(accumulator.Tags()["scalars"]) == set(curves)
    assert [row["_step"] for row in rows] == [line["step"] for line in metrics(folder)]
    for name, curve in curves.items():
        points = accumulator.Scalars(name)
        assert [point.step for point in points] == list(curve)
        assert [point.value for point in points] == pytest.approx(list(curve.values()), rel=1e-6)
        assert {row["_step"]: row[name] for row in rows if name in row} == curve
    times = [line["time"] for line in metrics(folder)]
    assert [point.wall_time for point in accumulator.Scalars("lr")] == times
    assert [row["_timestamp"] for row in rows] == times


def test_a_picture_from_inside_an_epoch_is_none_of_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.while_training.FIRST_PICTURE", 0.0)
    early = ("train_cfg.sample_period=2", 'train_cfg.loggers=["tensorboard"]')
    assert train.main(tiny(tmp_path / "a", *early)) == 0
    assert (tmp_path / "a" / "first.png").exists()
    assert [image.step for image in tensorboard(tmp_path / "a").Images("samples")] == [8]


def test_both_get_the_records_the_pictures_and_the_config(tmp_path):
    folder = tmp_path / "a"
    assert train.main(tiny(folder, BOTH)) == 0
    assert_both_equal_the_records(folder)
    accumulator = tensorboard(folder)
    for name, stem in {"samples": "", "trajectory": "_strip"}.items():
        images = accumulator.Images(name)
        assert [image.step for image in images] == [4, 8]
        rows = [row for row in wandb_rows(folder) if f"{name}/path" in row]
        assert [row["_step"] for row in rows] == [4, 8]
        for epoch, image, row in zip((1, 2), images, rows, strict=True):
            png = (folder / f"epoch_{epoch}{stem}.png").read_bytes()
            assert (image.height, image.width) == (row[f"{name}/height"], row[f"{name}/width"])
            assert (image.width, image.height) == struct.unpack(">II", png[16:24])
            (copy,) = folder.glob(f"wandb/offline-run-*/files/{row[f'{name}/path']}")
            assert copy.read_bytes() == png
    config = train.load_config(tiny(folder)[0], tiny(folder, BOTH)[4:])
    text = make_ndarray(accumulator.Tensors("config/text_summary")[0].tensor_proto).item().decode()
    assert json.loads(text)["time_aware_net"] == config["time_aware_net"]
    (run,) = (record.run for record in wandb_records(folder) if record.HasField("run"))
    given = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert given["time_aware_net"] == config["time_aware_net"]
    assert run.run_id == (folder / "wandb_id").read_text()


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_its_curves_without_a_duplicate_or_a_gap(start, work):
    """Killed between two checkpoints: some records are taken back, and some had not reached a dashboard."""
    more = [BOTH, "train_cfg.record_period=1", "train_cfg.save_minutes=0", "train_cfg.num_workers=0", "train_cfg.epochs=8"]
    child = start("train", tiny(Path("run"), *more), environment=ALONE)
    child.wait_for(lambda: (work / "run" / "metrics.jsonl").exists() and len(metrics_so_far(work / "run")) >= 11)
    child.send(signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    name = (work / "run" / "wandb_id").read_text()
    start("train", tiny(Path("run"), *more, flags=("--resume",)), environment=ALONE).end().assert_ended(0)
    assert [line["step"] for line in metrics(work / "run")] == list(range(1, 33))
    assert_both_equal_the_records(work / "run")
    assert (work / "run" / "wandb_id").read_text() == name


def test_a_page_that_stays_open_while_a_run_goes_on_has_each_point_once(tmp_path):
    only = 'train_cfg.loggers=["tensorboard"]'
    assert train.main(tiny(tmp_path / "a", only, "train_cfg.max_steps=6")) == 0
    accumulator = tensorboard(tmp_path / "a")
    assert [point.step for point in accumulator.Scalars("lr")] == [3, 4, 6]
    assert train.main(tiny(tmp_path / "a", only, flags=("--resume",))) == 0
    accumulator.Reload()
    assert [point.step for point in accumulator.Scalars("lr")] == list(expected(tmp_path / "a")["lr"])


def metrics_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_dashboard_that_is_turned_on_later_gets_all_of_the_run_and_overwrite_begins_another(tmp_path):
    folder = tmp_path / "a"
    assert train.main(tiny(folder, "train_cfg.max_steps=5", "train_cfg.lr_schedule=constant")) == 0
    assert train.main(tiny(folder, "train_cfg.lr_schedule=constant", BOTH, flags=("--resume",))) == 0
    assert_both_equal_the_records(folder)
    name = (folder / "wandb_id").read_text()
    assert train.main(tiny(folder, "train_cfg.max_steps=1", BOTH, flags=("--overwrite",))) == 0
    assert (folder / "wandb_id").read_text() != name
    assert [point.step for point in tensorboard(folder).Scalars("lr")] == [1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    for module in ("torch.utils.tensorboard", "tensorboard") if name == "tensorboard" else ("wandb.sdk", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    assert train.main(tiny(tmp_path / "a", f'train_cfg.loggers=["{name}"]')) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f'train.py: train_cfg.loggers: "{name}" needs a package: pip install {name}')
    assert not (tmp_path / "a").exists()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture
def caught(caplog, monkeypatch):
    monkeypatch.setattr(train.log, "propagate", True)
    return caplog


def test_a_dashboard_on_a_full_disk_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, caught):
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, calls = RecordWriter.write, []

    def full(self, data):
        calls.append(1)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    assert train.main(tiny(tmp_path / "a", BOTH)) == 0
    assert warnings(caught) == [
        "tensorboard: cannot write, and the run goes on without it ([Errno 28] No space left on device)"
    ]
    assert [line["step"] for line in metrics(tmp_path / "a")] == [3, 4, 6, 8]
    assert [row["_step"] for row in wandb_rows(tmp_path / "a")] == [3, 4, 6, 8]


def test_a_dashboard_without_a_login_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, caught):
    monkeypatch.setenv("HOME", str(tmp_path))  # where nobody is logged in
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("wandb.setup", lambda _: type("Setup", (), {"settings": type("S", (), {"mode": "online"})}))
    monkeypatch.setattr("wandb.login", lambda **_: False)
    assert train.main(tiny(tmp_path / "a", BOTH)) == 0
    (warning,) = warnings(caught)
    assert "wandb: cannot write" in warning
    assert "wandb login" in warning
    assert [point.step for point in tensorboard(tmp_path / "a").Scalars("lr")] == [3, 4, 6, 8]


def test_a_dashboard_that_takes_forever_is_waited_for_no_longer_than_said(tmp_path, monkeypatch, caught):
    gate = threading.Event()
    monkeypatch.setattr(loggers, "PATIENCE", 0.5)
    monkeypatch.setattr(loggers.TensorBoard, "add", lambda *_: gate.wait(PATIENCE))
    assert train.main(tiny(tmp_path / "a", 'train_cfg.loggers=["tensorboard"]')) == 0
    gate.set()
    assert len(metrics(tmp_path / "a")) == 4
    assert warnings(caught) == ["tensorboard: has not taken everything after 0.5 s; --resume hands it over again"]


OWN = """
class Lines:
    def __init__(self, folder, config):
        self.file = open(folder / "lines.txt", "w")

    def add(self, record):
        self.file.write(f"{record['step']}\\n")

    def close(self):
        self.file.close()
"""


def test_a_dashboard_of_ones_own_gets_the_records_and_one_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_lines.py").write_text(OWN)
    assert train.main(tiny(tmp_path / "a", 'train_cfg.loggers=["my_lines.Lines"]')) == 0
    assert (tmp_path / "a" / "lines.txt").read_text().split() == [str(line["step"]) for line in metrics(tmp_path / "a")]
    assert train.main(tiny(tmp_path / "b", 'train_cfg.loggers=["tensorbord"]')) == 2
    assert "train_cfg.loggers = \"tensorbord\": unknown; did you mean 'tensorboard'?" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_dashboard_of_ones_own_lacks_no_part_and_its_bug_shows_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_bugs.py").write_text(OWN.replace("record['step']", "record['steps']") + "\n\nclass Half:\n    add = 1\n")
    assert train.main(tiny(tmp_path / "a", 'train_cfg.loggers=["my_bugs.Half"]')) == 2
    assert "train_cfg.loggers = my_bugs.Half: has no close" in capsys.readouterr().err
    assert train.main(tiny(tmp_path / "a", 'train_cfg.loggers=["my_bugs.Lines"]')) == 0
    said = capsys.readouterr().err
    assert "my_bugs.Lines: cannot write, and the run goes on without it ('steps')" in said
    assert re.search(r'File ".*my_bugs\.py", line \d+, in add', said)
    assert "KeyError: 'steps'" in said
