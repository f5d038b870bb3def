"""The folder of a run: who may write there, what is in it, its log and its records."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import checkpoint
from files import as_json, whole_file
from mistakes import Mistake
from training.averages import snapshots

log = logging.getLogger("train")
PATTERNS = ("last.pth", "best.pth", "best_fd.pth", "epoch_*.pth", "power_*.pth", "epoch_*.png", "metrics.jsonl", "train.log")
PATTERNS += tuple(f"{name}_step_[0-9]*.pth" for name in ("last", "best", "best_fd"))
PATTERNS += ("first.png", "first_strip.png", ".*.part", "tensorboard/events.out.tfevents.*", "wandb_id")
BEST = ("best.pth", "best_fd.pth")
RESULTS = ("*_fitted.pth", "*_ema[0-9]*.pth")  # of test.py, which --overwrite deletes with the run
RESULTS += tuple(f"*_gen/{name}" for name in ("*.png", "trajectory.gif", "samples.npz", "metrics.json", "report.html"))
EDITS = ("inpaint", "from", "interpolate", "upscale", "colour")
RESULTS += tuple(f"*_{edit}/{name}" for edit in EDITS for name in ("[0-9]*.png", "grid.png"))

_locked: dict[int, Path] = {}  # the handles by which this process has locked folders, and the folders


def _unlock_all() -> None:
    while _locked:
        os.close(_locked.popitem()[0])


os.register_at_fork(after_in_child=_unlock_all)  # or a worker process would keep the lock for a while after this one is killed


class RunFolder:
    """The folder train_cfg.model_save_dirpath, which one process at a time may write to; writes: does this rank?

    resume_from  the checkpoint that the run goes on from, None for a new run
    doomed       patterns of the files that `open` deletes for a new run; without any, it refuses where a run is
    """

    def __init__(self, path: str, writes: bool):
        self.path, self.writes, self.log_file = Path(os.path.expanduser(path)), writes, None
        self.resume_from: Path | None = None
        self.doomed: tuple[str, ...] = ()
        self.handle: int | None = None  # by which it is locked
        if not writes:
            log.setLevel(logging.ERROR)  # one rank tells what goes on

    def claim(self, resume: str | None, overwrite: bool) -> None:
        """Lock it, if it is there, and refuse what would harm the run in it. resume and overwrite are the Trainer's.

        Where torchrun has started the script again (--max-restarts), the run that is there is its own: it is not overwritten.
        """
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        self.doomed = (*PATTERNS, *RESULTS) if overwrite and not restarted else ()
        there = _first_existing(self.path)
        if not there.is_dir():
            raise Mistake(f"train_cfg.model_save_dirpath = {self.path}: {there} is not a folder")
        if self.writes and not os.access(there, os.W_OK):
            raise Mistake(f"train_cfg.model_save_dirpath = {self.path}: {there} cannot be written to")
        if self.writes and self.path.exists():
            self.lock()  # before anything in it is read
        if resume is None:
            self._refuse_a_second()
        else:
            self.resume_from = self._named(Path(resume)) if resume else self._own_last()

    def _named(self, path: Path) -> Path:
        """The checkpoint that --resume gives by its name, or by that of its folder."""
        path = path / "last.pth" if path.is_dir() else path
        if not path.exists():
            raise Mistake(f"--resume {path}: no such checkpoint")
        if self.files() and path.resolve().parent != self.path.resolve():
            raise Mistake(f"--resume {path}: is of another folder than {self.path}, which holds a run already")
        return path

    def _own_last(self) -> Path | None:
        """The last.pth that is here; None, with a warning, where no more of a run is left than its log."""
        last = self.path / "last.pth"
        if last.exists() or (self.path / "best.pth").exists():  # beside which read_state names one that is good
            return last
        if kept := [each.name for each in self.files() if each.suffix in (".pth", ".png", ".jsonl")]:
            raise Mistake(
                f"{last} is not there, and {', '.join(kept[:5])} would be lost: give --resume a checkpoint, or --overwrite to "
                "start anew"
            )
        log.warning(f"{last} is not there: starting at step 0")
        self.doomed = PATTERNS if self.path.exists() else ()  # and locked; not what another process may begin meanwhile
        return None

    def _refuse_a_second(self) -> None:
        """Mistake if there is a run that a new one would delete unasked."""
        if self.files() and not self.doomed:
            raise Mistake(
                f"{self.path} holds a run already: add --resume to go on with it, --overwrite to delete it and start anew, or "
                "--set train_cfg.model_save_dirpath=FOLDER for another folder"
            )

    def files(self) -> list[Path]:
        return [path for pattern in PATTERNS for path in self.path.glob(pattern)]

    def lock(self) -> None:
        """Keep every other process out until `close`, or the end of this one; Mistake if one is in.

        Where another Trainer of this process has the folder, both have it, and the lock lasts until both are closed.
        """
        if self.handle is not None:
            return
        path = self.path.resolve()
        held = [handle for handle, folder in _locked.items() if folder == path]
        handle = os.dup(held[0]) if held else os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Mistake(f"{self.path}: another process trains there") from None
        except OSError as error:
            log.warning(f"{self.path}: cannot be locked ({error.strerror}): nothing keeps a second process from training there")
        self.handle, _locked[handle] = handle, path

    def open(self, records: int | None, step: int) -> int:
        """Make it ready: empty for a new run (records None); metrics.jsonl cut back to so many lines, and it and the
        snapshots of the averages to those up to step, for one that goes on. The number of lines that are left.
        """
        if not self.writes:
            return 0
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        if records is None:
            self._refuse_a_second()  # which another process may have begun since
            doomed = self.doomed if self.files() else ()  # where no run is, test.py's files are no run's
            for path in {path for pattern in doomed for path in self.path.glob(pattern)}:  # each once
                path.unlink()
        kept = 0 if records is None else self._go_on(records, step)
        self.log_file = _LogFile(self.path / "train.log", encoding="utf-8")
        self.log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self.log_file)
        return kept

    def _go_on(self, records: int, step: int) -> int:
        """Have what the run had that is gone on with; what it did after that is no part of it. The number of its records."""
        kept = []
        if (metrics := self.resume_from.with_name("metrics.jsonl")).exists():
            kept = [each for each in read_records(metrics) if each["step"] <= step and "valid_loss" in each][:records]
            with whole_file(self.path / "metrics.jsonl") as file:
                file.writelines(f"{as_json(record)}\n".encode() for record in kept)
        old = self.resume_from.parent
        for path, taken in snapshots(self.path).items():
            if taken > step:
                path.unlink()
        later = [] if self.in_place() else [self.path / name for name in (*BEST, "last.pth")]
        for path, taken in _taken(later).items():
            if taken > step:
                aside = path.rename(path.with_stem(f"{path.stem}_step_{taken}"))
                log.warning(f"{path}: is of step {taken}, and the run goes on from step {step}; kept as {aside.name}")
        missing = [old / name for name in BEST if not (self.path / name).exists()]
        for path, taken in (snapshots(old) | _taken(missing)).items():
            if taken <= step and not (self.path / path.name).exists():
                with whole_file(self.path / path.name) as file, open(path, "rb") as source:
                    shutil.copyfileobj(source, file)
        return len(kept)

    def in_place(self) -> bool:
        """Is last.pth gone on with? Then best.pth is of a later step only by a kill between the two."""
        return self.resume_from is not None and self.resume_from.resolve() == (self.path / "last.pth").resolve()

    def keeps(self, name: str, step: int) -> bool:
        """Is there a best checkpoint of that name when a run goes on from a step?"""
        old = self.resume_from.parent
        there = self.in_place() and (self.path / name).exists()
        return there or any(taken <= step for taken in _taken([old / name]).values())

    def add_record(self, record: dict) -> None:
        """Append a line to metrics.jsonl, and see it to the disk: before the checkpoint that counts it."""
        if not self.writes:
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(as_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the log and let other processes in."""
        if self.log_file:
            log.removeHandler(self.log_file)
            with contextlib.suppress(OSError):
                self.log_file.close()
        if _locked.pop(self.handle, None):
            os.close(self.handle)
        self.handle = None


def read_records(path: Path) -> list[dict]:
    """The records in a metrics.jsonl, without the lines that are none: a crash may have cut one short, others are foreign."""
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
    return records


def _taken(checkpoints: Iterable[Path]) -> dict[Path, int]:
    """The checkpoints that are there, but for broken ones, and the step of each."""
    taken = {}
    for path in checkpoints:
        with contextlib.suppress(Mistake):  # also where there is none
            taken[path] = checkpoint.load(path).get("step", 0)
    return taken


class _LogFile(logging.FileHandler):
    """A log file that stops the run when it cannot be written, as any other file does."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def _first_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    try:
        return next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:  # too long a name
        raise Mistake(f"train_cfg.model_save_dirpath = {str(folder)[:80]}: {error.strerror}") from error
