"""Dashboards that get what metrics.jsonl gets, by the same names and steps, and the pictures: TensorBoard, Weights & Biases.

metrics.jsonl is the truth. When a run goes on, it is cut back to the records of the checkpoint, and a dashboard gets all of it
again, in the place of what it had. So its curves have no duplicate and no gap, however the run ended.

A dashboard has a thread of its own that nothing waits for. If it fails, that is one line, and the run goes on without it.
"""

import contextlib
import importlib
import json
import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from config import find
from files import whole_file
from mistakes import Mistake
from training.run_folder import read_records

log = logging.getLogger("train")
PATIENCE = 30.0  # seconds, of the end of a run for a dashboard that has not taken everything yet


def numbers(record: dict | list, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a record with their names, such as "loss_by_t/0" and "metrics/fd/distance"."""
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        if isinstance(value, dict | list):
            yield from numbers(value, f"{path}{key}/")
        elif isinstance(value, int | float) and f"{path}{key}" not in ("step", "time"):
            yield f"{path}{key}", value


def pictures(folder: Path, record: dict) -> dict[str, Path]:
    """Those that were drawn at the end of the epoch that a record closes, by name."""
    if record["valid_loss"] is None:
        return {}
    named = {"samples": folder / f"epoch_{record['epoch']}.png", "trajectory": folder / f"epoch_{record['epoch']}_strip.png"}
    return {name: path for name, path in named.items() if path.exists()}


class TensorBoard:
    """Event files in the folder tensorboard of the run: `tensorboard --logdir FOLDER`."""

    package = "torch.utils.tensorboard"  # whether it is there is known before the run

    def __init__(self, folder: Path, config: dict):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.folder, self.summary, self.Event = folder, summary, event_pb2.Event
        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        # Earlier files stay, since a page that is open would never get past one that is gone. This one is written from this
        # thread, not by a SummaryWriter, whose own thread would print what goes wrong.
        self.writer = RecordWriter(open(place / f"events.out.tfevents.{time.time_ns()}", "wb"))  # noqa: SIM115
        self._write(file_version="brain.Event:2")
        self._write(session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))  # forget what was read before
        text = "\n".join(f"    {line}" for line in json.dumps(config, indent=4).splitlines())
        self._write(summary=summary.text("config", text))
        bins = {"train_loss": ["Multiline", ["loss_by_t/.*"]]}
        self._write(summary=summary.custom_scalars({"by noise level, least to most": bins}))

    def _write(self, wall_time: float | None = None, **event: Any) -> None:
        wall_time = time.time() if wall_time is None else wall_time
        self.writer.write(self.Event(wall_time=wall_time, **event).SerializeToString())

    def add(self, record: dict) -> None:
        parts = [self.summary.scalar(name, value) for name, value in numbers(record)]
        for name, path in pictures(self.folder, record).items():
            parts.append(self.summary.image(name, np.asarray(Image.open(path)), dataformats="HWC"))
        for part in parts:
            self._write(record.get("time"), step=record["step"], summary=part)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is in the file wandb_id of the run's folder.

    It is begun anew with the same id each time, and gets everything again, which `wandb sync` and the server put in place of
    what they had by that id. (Going on with a run cannot take records back, and is not to be had offline.)
    """

    package = "wandb.sdk"

    def __init__(self, folder: Path, config: dict):
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=PATIENCE)
        if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ValueError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
        self.folder, self.Image = folder, wandb.Image
        if not (folder / "wandb_id").exists():
            with whole_file(folder / "wandb_id") as file:
                file.write(secrets.token_hex(4).encode())
        name = (folder / "wandb_id").read_text()
        for path in folder.glob(f"wandb/offline-run-*-{name}"):
            shutil.rmtree(path)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gaussian-diffusion"),
            id=name,
            name=folder.resolve().name,
            dir=str(folder.resolve()),  # its process has another current folder
            config=config,
            settings=settings,
        )
        kept = f"kept in {Path(self.run.dir).parent}, which `wandb sync` uploads"
        log.info(f"wandb: {kept if self.run.settings.mode == 'offline' else self.run.url}")

    def add(self, record: dict) -> None:
        images = {name: self.Image(str(path)) for name, path in pictures(self.folder, record).items()}
        moment = {"_timestamp": record["time"]} if "time" in record else {}
        self.run.log({**dict(numbers(record)), **images, **moment}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Loggers:
    """The dashboards of these names, none where the list is empty. Mistake if one, or its package, is not there."""

    def __init__(self, names: Sequence[str], config: dict):
        self.classes = {name: find(name, LOGGERS, object, "train_cfg.loggers") for name in names}
        for name, cls in self.classes.items():
            if lacking := [part for part in ("add", "close") if not hasattr(cls, part)]:
                raise Mistake(f"train_cfg.loggers = {name}: has no {', '.join(lacking)}")
        self.config, self.threads = config, []
        for name in set(names) & set(LOGGERS):
            try:
                importlib.import_module(LOGGERS[name].package)
            except ImportError as error:
                raise Mistake(f'train_cfg.loggers: "{name}" needs a package: pip install {name} ({error})') from None

    def open(self, folder: Path) -> None:
        """Begin, with the records that metrics.jsonl holds."""
        for name, cls in self.classes.items():
            self.threads.append(_Thread(name, lambda cls=cls: cls(folder, self.config)))
        if self.threads and (folder / "metrics.jsonl").exists():
            for record in read_records(folder / "metrics.jsonl"):
                self.add(record)

    def add(self, record: dict) -> None:
        """Hand a record over; its pictures are there already."""
        for thread in self.threads:
            if thread.is_alive():
                thread.records.put(record)

    def close(self) -> None:
        """Give them a while to take what they have not taken yet."""
        for thread in self.threads:
            thread.records.put(None)
        deadline = time.monotonic() + PATIENCE
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning(f"{thread.name}: has not taken everything after {PATIENCE:g} s; --resume hands it over again")
        self.threads = []


class _Thread(threading.Thread):
    """What hands records to a dashboard, in turn, until there is None."""

    def __init__(self, name: str, make: Callable[[], Any]):
        super().__init__(name=name, daemon=True)
        self.make, self.records = make, queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        try:
            dashboard = self.make()
            while (record := self.records.get()) is not None:
                dashboard.add(record)
            dashboard.close()
        except Exception as error:  # each dashboard has its own, and none may end the run
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            bug = error if self.name not in LOGGERS else None  # of the user's own, whose traceback says where
            with contextlib.suppress(OSError):  # a full disk may be the log's, too
                log.warning(f"{self.name}: cannot write, and the run goes on without it ({reason[:200]})", exc_info=bug)
