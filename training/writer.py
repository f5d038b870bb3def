"""Checkpoints written by a thread: whole or not at all, in the order in which they were handed over."""

import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

import checkpoint

log = logging.getLogger("train")


class Writer:
    """A thread that saves checkpoints while training goes on. What goes wrong there is raised at the next call here."""

    def __init__(self):
        self.jobs: queue.Queue = queue.Queue(maxsize=1)  # one waits at the most, so that memory holds few copies
        self.error: BaseException | None = None
        self.raised = False
        self.thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            path, state, copied = job
            try:
                if copied:
                    copied.synchronize()
                if self.error is None:  # after a failure nothing newer may be written
                    checkpoint.save(path, state)
            except BaseException as error:
                self.error = error
            finally:
                self.jobs.task_done()

    def save(self, path: Path, state: Mapping) -> None:
        """Save a state, just taken, to path, soon."""
        self.check()
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self.jobs.put((path, state, copied))

    def check(self) -> None:
        """Raise what went wrong since the last call."""
        if self.error is not None:
            self.raised = True
            raise self.error

    def wait(self) -> None:
        """Return once everything handed over is on the disk."""
        self.jobs.join()
        self.check()

    def close(self) -> None:
        """End the thread, after what it has to do, and see it gone: the interpreter must not end while it runs."""
        self.jobs.put(None)
        self.thread.join()
        if self.error is not None and not self.raised:
            log.error(f"not all of the run is on the disk: {self.error}")
