"""What happened since the last record: losses, steps that were skipped, images, seconds."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from training.ranks import Ranks

Batch = TypeVar("Batch")


class Meter:
    """Counts kept on the device, so that no step waits for it.

    loss_sum, loss_count    of the good steps since the last record, this rank's
    bad_steps, bad_in_row   steps with a loss or gradient that was not finite: of the whole run, and the last ones in a row
    """

    def __init__(self, device: torch.device):
        zero = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self.loss_sum, self.loss_count, self.bad_steps, self.bad_in_row = (zero.clone() for _ in range(4))
        self._seen = torch.zeros((), dtype=zero.dtype, pin_memory=device.type == "cuda")
        self.restart()

    def restart(self) -> None:
        """Start the clock and the count of images."""
        self.clock, self.images, self.seconds_waited = time.perf_counter(), 0, 0.0

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """Count a step with this loss; bad, 0 or 1, says whether it was skipped."""
        self.loss_sum += torch.where(bad > 0, 0, loss)
        self.loss_count += 1 - bad
        self.bad_steps += bad
        self.bad_in_row.add_(1).mul_(bad)

    def recent_bad_steps(self) -> int:
        """bad_in_row, on a GPU as it was some steps ago: it is copied here and not waited for."""
        self._seen.copy_(self.bad_in_row, non_blocking=True)
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

    def record(self, ranks: Ranks, seconds: float) -> dict[str, float | int | None]:
        """Mean loss over all ranks, skipped steps, speed over so many seconds; and start again."""
        loss_sum, loss_count = self.loss_sums(ranks)
        found = {
            "train_loss": float(f"{loss_sum / loss_count:.8g}") if loss_count else None,
            "bad_steps": int(self.bad_steps),
            "img_per_s": round(self.images / seconds, 1),
            "data_wait_share": round(self.seconds_waited / seconds, 4),
        }
        self.loss_sum.zero_()
        self.loss_count.zero_()
        self.restart()
        return found

    def loss_sums(self, ranks: Ranks) -> list[float]:
        return ranks.sum(torch.stack([self.loss_sum, self.loss_count])).tolist()

    def restore(self, loss_sums: list[float], bad_steps: list[int], rank: int) -> None:
        if rank == 0:  # the others' shares are in these sums
            self.loss_sum.fill_(loss_sums[0])
            self.loss_count.fill_(loss_sums[1])
        self.bad_steps.fill_(bad_steps[0])
        self.bad_in_row.fill_(bad_steps[1])
