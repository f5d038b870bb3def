"""What happened since the last record: losses, steps that were skipped, images, seconds."""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import TypeVar

import torch
from torch import Tensor

from training.ranks import Ranks

Batch = TypeVar("Batch")
LEAD = 10  # steps that the host may be ahead of a GPU: enough for it never to wait, and a signal is heard soon
YEAR = 365 * 24 * 3600  # seconds
BINS = 8  # of equal width in t, for the loss by noise level


class Meter:
    """Counts kept on the device, so that no step waits for it.

    loss_sum, loss_count    of the good steps since the last record, this rank's
    by_t                    [2, BINS]: the losses of the samples whose t fell into a bin, summed, and how many there were; where
                            the model has a weight for each t, both of them weighted, as in the loss
    bad_steps, bad_in_row   steps with a loss or gradient that was not finite: of the whole run, and the last ones in a row
    """

    def __init__(self, device: torch.device, T: int, time_weight: Tensor | None = None):
        self._on_cuda = device.type == "cuda"
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.loss_sum, self.loss_count, self.bad_steps, self.bad_in_row = (zero.clone() for _ in range(4))
        self.by_t = zero.repeat(2, BINS)
        bins = (torch.arange(-1, T) * BINS // T).clamp(min=0)  # at t in 0..T, of which 0 does not occur
        self._bin_of = torch.eye(BINS)[bins].to(zero)  # [T + 1, BINS]: 1, or t's weight, in the bin of t
        if time_weight is not None:
            self._bin_of[1:] *= time_weight.to(zero)[:, None]
        self._seen = torch.zeros((), dtype=zero.dtype, pin_memory=self._on_cuda)
        self._looks = deque()  # on CUDA, an event at each of the last LEAD looks
        self.restart()

    def restart(self) -> None:
        """Start the clock and the count of images."""
        self.clock, self.images, self.seconds_waited = time.perf_counter(), 0, 0.0

    def add(self, loss: Tensor, bad: Tensor, terms: Iterable[tuple[Tensor, Tensor] | None] = ()) -> None:
        """Count a step with this loss; bad, 0 or 1, says whether it was skipped. terms: `last_terms` of each part's forward."""
        for t, losses in filter(None, terms):
            losses_and_ones = torch.stack([losses, torch.ones_like(losses)]).to(self.by_t.dtype)
            self.by_t += torch.where(bad > 0, 0, losses_and_ones @ self._bin_of.index_select(0, t))
        self.loss_sum += torch.where(bad > 0, 0, loss)
        self.loss_count += 1 - bad
        self.bad_steps += bad
        self.bad_in_row.add_(1).mul_(bad)

    def recent_bad_steps(self, now: bool) -> int:
        """bad_in_row; on a GPU, unless `now`, as it was up to LEAD looks ago, which is all that the host waits for."""
        if now:  # where the device is waited for anyway
            return int(self.bad_in_row)
        if len(self._looks) == LEAD:
            self._looks.popleft().synchronize()
        self._seen.copy_(self.bad_in_row, non_blocking=True)
        if self._on_cuda:
            self._looks.append(torch.cuda.current_stream().record_event())
        return int(self._seen)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for them counted."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def elapsed(self) -> float:
        """Seconds on the clock, once the device has done what it was given."""
        self.bad_steps.item()
        return time.perf_counter() - self.clock

    def record(self, ranks: Ranks, seconds: float) -> dict[str, float | int | None]:
        """Mean loss over all ranks, skipped steps, speed over so many seconds; and start again."""
        loss_sum, loss_count, *by_t = self.loss_sums(ranks)
        found = {
            "train_loss": _mean(loss_sum, loss_count),
            "loss_by_t": [_mean(*pair) for pair in zip(by_t[:BINS], by_t[BINS:], strict=True)] if any(by_t) else None,
            "bad_steps": int(self.bad_steps),
            "img_per_s": round(self.images / seconds, 1) if self.images else None,  # no step since the run went on
            "data_wait_share": round(self.seconds_waited / seconds, 4) if self.images else None,
        }
        for sums in (self.loss_sum, self.loss_count, self.by_t):
            sums.zero_()
        self.restart()
        return found

    def loss_sums(self, ranks: Ranks) -> list[float]:
        """Over all ranks: loss_sum, loss_count, and the 2 BINS numbers of by_t."""
        return ranks.sum(torch.cat([torch.stack([self.loss_sum, self.loss_count]), self.by_t.flatten()])).tolist()

    def restore(self, loss_sums: list[float], bad_steps: list[int], rank: int) -> None:
        if rank == 0:  # the others' shares are in these sums
            loss_sum, loss_count, *by_t = loss_sums
            self.loss_sum.fill_(loss_sum)
            self.loss_count.fill_(loss_count)
            self.by_t.copy_(torch.tensor(by_t, dtype=self.by_t.dtype).view_as(self.by_t))
        self.bad_steps.fill_(bad_steps[0])
        self.bad_in_row.fill_(bad_steps[1])


def _mean(total: float, count: float) -> float | None:
    return rounded(total / count) if count else None


def in_words(line: dict) -> str:
    """What a person reads of a line of metrics.jsonl while the run goes on."""
    loss, valid_loss, speed = line["train_loss"], line["valid_loss"], line["img_per_s"]
    words = f"loss {math.nan if loss is None else loss:.5g}" + ("" if valid_loss is None else f", valid {valid_loss:.5g}")
    words += f", {line['bad_steps']} steps skipped" if line["bad_steps"] else ""
    return words + ("" if speed is None else f", {speed:.0f} img/s")


def rounded(value: float | None) -> float | None:
    """To eight digits; None for what JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.8g}")


def end_time(now: datetime, seconds: float, done: int, left: int) -> str:
    """When so many steps that are left will be done, if `done` took these seconds: "14:32", "Wed 14:32", "24 Nov 14:32"."""
    if (more := seconds / done * left) > YEAR:
        return f"in {more / YEAR:.0f} years or so"
    end = now + timedelta(seconds=more)
    days = (end.date() - now.date()).days
    return end.strftime("%H:%M" if days == 0 else "%a %H:%M" if days < 7 else "%d %b %H:%M")
