"""SIGINT, SIGTERM, SIGHUP and SIGUSR1, looked at between steps."""

import os
import signal
import time

from training.ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, what a cluster sends, a closed terminal
SIGNALS += (signal.SIGUSR1,)  # what Slurm's --signal=USR1@120 sends two minutes before the end
RANKS_PERIOD = 10  # looks, at most, from one exchange between ranks to the next: it costs more than a look


class Stopped(Exception):
    """A signal, whose number this holds, asked the run to stop."""

    @property
    def number(self) -> int:
        return self.args[0]


class Stopper:
    """Turns the first of SIGNALS into a number that the run looks at between steps; the second acts at once.

    SIGHUP stays ignored where it is, as under nohup.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.signal, self.looks = ranks, 0, 0  # signal 0: none yet
        self.period, self.told = 1, time.monotonic()  # looks from word to word, and when the last one was

    def __enter__(self) -> "Stopper":
        heeded = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def _handle(self, number: int, frame: object) -> None:
        if _under_torchrun() and not self.signal:
            self.signal = number
            return  # the next one is the same
        self.signal = self.signal or number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)

    def check(self, save: bool = False) -> bool:
        """Raise Stopped if any rank got a signal; else, does any rank want to save? All ranks call this equally often."""
        self.looks += 1
        if self.ranks.world > 1 and self.looks < self.period:
            return False
        word = self.ranks.largest(self.signal or 0.5 * save)
        if self.ranks.world > 1:  # a look may be a step of seconds, and what sent a signal waits for no more than 30
            seconds = self.ranks.largest((time.monotonic() - self.told) / self.looks)
            self.period = min(RANKS_PERIOD, 1 + int(1 / seconds)) if seconds else RANKS_PERIOD
            self.looks, self.told = 0, time.monotonic()
        if word >= 1:
            raise Stopped(int(word))
        return word > 0

    def __exit__(self, kind: type | None, *_: object) -> None:
        stopped = kind is Stopped and _under_torchrun()  # and saves now, when the same signal may come again
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if stopped else handler)


def _under_torchrun() -> bool:
    """It passes on what a terminal has sent to every process already."""
    return "TORCHELASTIC_RUN_ID" in os.environ
