"""The scripts in child processes that can be given faults, and the run that most tests of faults start from.

They are children of a fork server that has imported the scripts once, so that a kill hits the run and not the imports.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from runs import tiny

import test as sampling
import train
from training import run_folder

SCRIPTS = {"train": train, "test": sampling}
SERVER = multiprocessing.get_context("forkserver")
PATIENCE = 120  # seconds, of a child that should end at once but shares its core
KEEN = ["train_cfg.save_minutes=1e-9", "train_cfg.save_period=1", "train_cfg.num_workers=0"]  # a save after every step


class Faults(NamedTuple):
    signal_after: tuple[float, int] | None = None  # seconds of CPU time from set-up on, and what comes then
    kill_at: int = 0  # file operation in its folder at which it is killed
    fill_at: int = 0  # file operation in its folder from which on no file grows beyond 16 KiB
    signals_at: str = ""  # method of train.Trainer in whose second call SIGTERM comes twice
    unprivileged: bool = False  # let root, too, be bound by permissions
    environment: tuple[tuple[str, str], ...] = ()


def act_at_file_operation(folder: str, at: int, act: Callable[[], None]) -> None:
    """Act before the at-th creation, renaming or removal of a file below folder."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writing or event in ("os.rename", "os.remove", "os.mkdir")) and folder in str(Path(str(args[0])).absolute()):
            count += 1
            if count == at:
                act()

    sys.addaudithook(hook)


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))  # a checkpoint's write beyond raises OSError, the output fits


def drop_privileges() -> None:
    """Take away what lets root pass permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110
    assert libc.capset(header, data) == 0


def signal_after(seconds: float, number: int) -> None:
    """By its CPU time, so that the moment does not depend on what else the machine does."""
    if number != signal.SIGKILL:  # in whose place SIGPROF is as good: it ends a process that does not expect it at once
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def signal_twice_in(name: str) -> None:
    method, calls = getattr(train.Trainer, name), []

    def signalling(self, *args):
        calls.append(1)
        if len(calls) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return method(self, *args)

    setattr(train.Trainer, name, signalling)


def _child(script: str, argv: list[str], folder: str, output: str, faults: Faults) -> None:
    os.chdir(folder)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{script}.py", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    torch.set_num_threads(1)
    os.environ.update(faults.environment)
    if faults.unprivileged:
        drop_privileges()
    if faults.kill_at:
        act_at_file_operation(folder, faults.kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if faults.fill_at:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # by this thread, the only one that may
        act_at_file_operation(folder, faults.fill_at, fill_disk)
    if faults.signals_at:
        signal_twice_in(faults.signals_at)
    begun, open_folder = [], run_folder.RunFolder.open

    def opening(*args):
        begun.append(time.process_time())
        if faults.signal_after:
            signal_after(*faults.signal_after)
        return open_folder(*args)

    run_folder.RunFolder.open = opening
    code = SCRIPTS[script].main(argv)
    if begun:
        Path(f"{output}.seconds").write_text(str(time.process_time() - begun[0]))
    sys.exit(code)


class Outcome(NamedTuple):
    code: int
    output: str  # stdout and stderr

    def assert_ended(self, code: int, *words: str) -> None:
        """It ended with this code, its last line has these words, and nothing of Python's was printed."""
        last = (self.output.strip().splitlines() or [""])[-1].rsplit("\r", 1)[-1]
        assert self.code == code, self.output
        assert not re.search(r"Traceback|Logging error|Exception ignored|terminate called", self.output), self.output
        assert all(word in last for word in words), self.output


class Child:
    """A script running in a folder."""

    def __init__(self, script: str, argv: list[str], folder: Path, faults: Faults):
        self.output = folder.parent / f"output{len(list(folder.parent.glob('output*')))}"
        self.output.touch()
        self.process = SERVER.Process(target=_child, args=(script, argv, str(folder), str(self.output), faults))
        self.process.start()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait_for(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not there() and self.process.is_alive():
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.005)

    def wait_for_output(self, text: str) -> None:
        self.wait_for(lambda: text in self.output.read_text())

    def end(self) -> Outcome:
        self.process.join(PATIENCE)
        text = self.output.read_text(errors="replace")
        assert not self.process.is_alive(), f"still running after {PATIENCE} s: {text}"
        return Outcome(self.process.exitcode, text)


def run_argv(*more: str, flags: tuple[str, ...] = ()) -> list[str]:
    return tiny(Path("run"), *KEEN, *more, flags=flags)


RESUME = run_argv(flags=("--resume",))
ENDLESS = "train_cfg.epochs=100000"


class Whole(NamedTuple):
    folder: Path
    seconds: float  # of CPU time that it took once its folder was open


def image_folder(folder: Path, count: int) -> list[str]:
    """Settings of a data set of grey images just made."""
    folder.mkdir()
    for i in range(count):
        Image.new("L", (8, 8), i % 256).save(folder / f"{i:04}.png")
    section = json.dumps({"root": str(folder), "mode": "L"})
    return ["dataset.name=ImageFolder", f"dataset.train={section}", f"dataset.valid={section}"]


def files(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
