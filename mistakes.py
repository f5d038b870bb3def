"""A user's mistake ends a script in one line; whatever else goes wrong is a bug, and keeps its traceback.

The library's files raise ValueError for a bad argument. Where the argument came from a user (a config, a flag, a file),
`as_mistake` makes that a Mistake. Only Mistakes, and what the system says of files, come out as one line.
"""

import argparse
import contextlib
import os
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

# Modules whose ValueErrors say what is wrong with an argument
LIBRARY = {"beta_schedule", "time_aware_module", "samplers", "diffusion_process", "gaussian_diffusion", "discrete_diffusion"}
LIBRARY |= {"classify", "guidance", "editing", "mistakes", "dataset", "image_files", "config", "checkpoint"}
LIBRARY |= {"evaluation", "training"}
RANK_DELAY = 5.0  # seconds that a rank waits before it tells of a failure: torchrun has ended it by then, if another told of it
OWN: set[str] = set()  # modules of the user's own, which config.find has imported


class Mistake(ValueError):
    """What the user can mend; the message says where it is and what is allowed."""


@contextlib.contextmanager
def as_mistake(where: str = "") -> Iterator[None]:
    """Turn a ValueError of the library's own into a Mistake, its message after the words of where.

    One that was raised in other code, such as a researcher's network, is a bug there and passes.
    """
    try:
        yield
    except ValueError as error:
        if not isinstance(error, Mistake) and not _raised_by_the_library(error):
            raise
        raise Mistake(f"{where}{error}") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its class where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _module(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__", "").split(".")[0]


def _raised_by_the_library(error: ValueError) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return _module(frame) in LIBRARY


def _passed_own_code(error: OSError) -> bool:
    return any(_module(frame) in OWN - LIBRARY for frame, _ in traceback.walk_tb(error.__traceback__))


class _DefaultsFormatter(argparse.HelpFormatter):
    """Adds to an option's help the default that it does not say itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, [], argparse.SUPPRESS) or action.default is False or "default" in action.help
        return action.help + ("" if silent else " (by default %(default)s)")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage. An option is its whole name: `--o` is not `--overwrite`."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=_DefaultsFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


class _Console:
    """An output stream whose reader may go away, as `tee` does at Ctrl-C: what is said then is lost, and nothing else."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lost():
            # which need not have every letter, as a file's name need not be UTF-8
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._lost():
            self._stream.flush()

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def run_script(script: str, work: Callable[[], int | None]) -> int:
    """work's exit code (None is 0); 2 with one line for a Mistake, 1 for an error of the system's, 130 for Ctrl-C."""
    out, err = (stream and _Console(stream) for stream in (sys.stdout, sys.stderr))  # None where it is closed
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return _told_once(script, work) or 0
        except Mistake as mistake:
            print(f"{script}: {_message(mistake)}", file=sys.stderr)
            return 2
        except OSError as error:
            if _passed_own_code(error):
                raise
            print(f"{script}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{script}: stopped by SIGINT", file=sys.stderr)
            return 130


def _told_once(script: str, work: Callable[[], int | None]) -> int | None:
    """work(), of which only the first rank tells a failure at once; and of a lost rank, nothing but that it is lost."""
    rank = os.environ.get("RANK", "0")
    try:
        return work()
    except Exception as error:
        lost = isinstance(error, RuntimeError) and re.search("by peer|remote process exited", str(error))  # by gloo, NCCL
        if lost or rank != "0":
            time.sleep(RANK_DELAY)
        if not lost:
            raise
    print(f"{script}: rank {rank} has lost another rank, whose own output says why", file=sys.stderr)
    return 1


def _message(mistake: Mistake) -> str:
    """The message; of a mistake found in a worker process, whose message is a traceback, the traceback's last one."""
    marker = f"{Mistake.__module__}.{Mistake.__qualname__}: "
    message = str(mistake).rsplit(marker, 1)[-1].strip()
    return " ".join(message.split("\n")) or type(mistake).__name__
