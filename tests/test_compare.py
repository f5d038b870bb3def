"""Runs side by side: `python checkpoint.py RUN...`."""

import json
import shutil

import pytest
from runs import tiny

import checkpoint
import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of one epoch, a and b, which differ in lr and patch size, and a checkpoint of a's second epoch."""
    folder = tmp_path_factory.mktemp("runs")
    metrics = [
        'train_cfg.metrics=["bpd"]',
        "train_cfg.metric_period=2",
        "train_cfg.metric_share=1",
        "train_cfg.metric_samples=10",
    ]
    a = tiny(folder / "a", "train_cfg.lr=0.25", "train_cfg.save_period=1", "train_cfg.sample_period=0", *metrics)
    assert train.main(a) == 0
    b = tiny(
        folder / "b", "train_cfg.lr=0.001", "train_cfg.epochs=1", "train_cfg.sample_period=0", "diffusion.loss_mode=min_snr"
    )
    assert train.main(b) == 0
    (folder / "b" / "last_gen").mkdir()
    measured = {"fd": {"samples": 10, "distance": 12.5}, "my.Metric": {"words": "x", "score": 3}, "settings": {"n": 10}}
    (folder / "b" / "last_gen" / "metrics.json").write_text(json.dumps(measured))
    return folder


def table(capsys, *runs) -> dict[str, list[str]]:
    """The columns by their heads, as printed."""
    assert checkpoint.main([str(run) for run in runs]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("(")]
    starts = [0, *(i for i in range(2, len(lines[0])) if lines[0][i - 2 : i] == "  " and lines[0][i] != " ")]
    ends = [*starts[1:], None]
    cells = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines]
    return dict(zip(cells[0], zip(*cells[1:], strict=True), strict=True))


def test_a_table_has_what_differs_and_what_came_out(folder, capsys):
    found = table(capsys, folder / "a", folder / "b" / "last.pth")
    records = [json.loads(line) for line in (folder / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [
        f"{records[-1]['valid_loss']:.4g}",
        f"{json.loads((folder / 'b' / 'metrics.jsonl').read_text().splitlines()[-1])['valid_loss']:.4g}",
    ]
    assert found.pop("run") == (f"{folder}/a", f"{folder}/b/last.pth")
    assert list(found.pop("valid loss")) == losses
    assert found.pop("lr") == ("0.25", "0.001")
    assert found.pop("loss_mode") == ("simple", "min_snr")
    assert found.pop("epochs") == ("2", "1")
    assert found.pop("step") == ("8", "4")
    assert found.pop("bpd") == (f"{records[-1]['metrics']['bpd']['total']:.4g}", "-")
    assert found.pop("test.py fd") == ("-", "12.5")
    assert found.pop("test.py my.Metric") == ("-", "3")
    assert {"metrics", "metric_period", "save_period"} <= found.keys()
    assert not {"model_save_dirpath", "batch_size"} & found.keys()


def test_an_earlier_checkpoint_has_the_loss_of_its_own_step(folder, capsys):
    found = table(capsys, folder / "a" / "epoch_1.pth", folder / "a" / "epoch_2.pth")
    records = [json.loads(line) for line in (folder / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [f"{record['valid_loss']:.4g}" for record in records if record["valid_loss"] is not None]
    assert len(losses) == 2
    assert found == {
        "run": tuple(f"{folder}/a/epoch_{epoch}.pth" for epoch in (1, 2)),
        "step": ("4", "8"),
        "valid loss": tuple(losses),
        "bpd": ("-", f"{records[-1]['metrics']['bpd']['total']:.4g}"),
    }


def test_a_record_that_a_crash_cut_short_is_left_out(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "a", tmp_path / "cut")
    before = table(capsys, run, folder / "b")["valid loss"]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "valid_loss": 0.')
    assert table(capsys, run, folder / "b")["valid loss"] == before


def test_what_test_py_measured_of_an_earlier_step_is_not_of_this_one(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "b", tmp_path / "b")
    file = run / "last_gen" / "metrics.json"
    for step, seen in ((4, True), (3, False)):
        file.write_text(json.dumps({"fd": {"distance": 12.5}, "settings": {"step": step}}))
        assert ("test.py fd" in table(capsys, folder / "a", run)) == seen
    file.write_text('{"fd": ')
    assert checkpoint.main([str(run)]) == 2
    assert f"{file}: not JSON" in capsys.readouterr().err


def test_settings_that_differ_in_their_last_digit_differ(folder, tmp_path, capsys):
    state = checkpoint.load(folder / "b")
    for name, decay in (("c", 0.99991), ("d", 0.99992)):
        (tmp_path / name).mkdir()
        state["config"]["train_cfg"]["ema_decay"] = decay
        checkpoint.save(tmp_path / name / "last.pth", state)
    assert table(capsys, tmp_path / "c", tmp_path / "d")["ema_decay"] == ("0.99991", "0.99992")


def test_losses_that_do_not_compare_are_said_and_what_is_no_checkpoint_is_named(folder, capsys):
    assert checkpoint.main([str(folder / "a"), str(folder / "b")]) == 0
    assert (
        capsys.readouterr()
        .out.rstrip()
        .endswith("(Validation losses compare only where loss, schedule and data are the same.)")
    )
    assert checkpoint.main([str(folder / "a"), str(folder / "a" / "epoch_1.pth")]) == 0
    assert "compare only" not in capsys.readouterr().out
    assert checkpoint.main([str(folder / "a"), str(folder / "a" / "metrics.jsonl")]) == 2
    assert "metrics.jsonl: cut short, damaged, or not a checkpoint" in capsys.readouterr().err
