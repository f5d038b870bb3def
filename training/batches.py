"""Batches of images and what is told of them: in an order that the seed fixes, shared out between ranks.

The images are decoded once, or by worker processes as they are needed.
"""

import copy
import gc
import math
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import TrainConfig
from dataset import ImageDataset, rows_of
from mistakes import Mistake
from training.ranks import Ranks
from training.seeds import ORDER, TRANSFORMS, mixed_seed

Batch = tuple[Tensor, dict[str, Tensor]]  # pixels [b, C, H, W], or floats, and the condition with a row for each
WORKERS_PAY_FROM = 2.0  # seconds of decoding all: to start worker processes takes about as long
GRACE = 30  # seconds that a worker lives on after SIGTERM


def draw_hidden(condition: Mapping[str, Tensor], null: Mapping[str, float | Tensor], p: float) -> Tensor:
    """[B] booleans, by one coin a sample, true with probability p: what null names is not told. Empty if it names nothing.

    So one network learns both with and without (Ho & Salimans 2022, algorithm 1). Drawn from the device's global generator.
    """
    named = [rows for name, rows in condition.items() if name in null]
    return torch.rand(len(named[0]), device=named[0].device) < p if named else torch.empty(0, dtype=torch.bool)


def parts_of(rows: int, count: int) -> list[slice]:
    """0..rows - 1 in `count` parts of one size, but for the last; as Tensor.chunk, fewer where the rows are."""
    size = math.ceil(rows / count)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class Batches:
    """Images of a data set with their condition, in an order of (seed, epoch) alone: this rank's part of each batch.

    A set of up to cache_gb is decoded once and kept, on the device if it is a GPU with room; a larger one, or one with
    random transforms other than flips, is decoded by worker processes as it is needed. Of a set of more than max_images, so
    many evenly spread ones are used. The condition holds the labels if the network has n_classes. check_signals is called while
    images are decoded.
    """

    def __init__(
        self,
        images: ImageDataset,
        cfg: TrainConfig,
        ranks: Ranks,
        shuffle: bool,
        max_images: int | None = None,
        n_classes: int | None = None,
        check_signals: Callable[[], object] = lambda: None,
    ):
        self.images, self.cfg, self.ranks, self.shuffle, self.check_signals = images, cfg, ranks, shuffle, check_signals
        self.condition = images.condition(n_classes)
        self.numbers = torch.arange(len(images))
        if max_images is not None and max_images < len(images):
            self.numbers = torch.linspace(0, len(images) - 1, max_images, dtype=torch.float64).round().long()
        if len(self.numbers) < ranks.world:
            raise Mistake(f"a data set of {len(self.numbers)} images: {ranks.world} ranks need at least one each")
        whole, rest = divmod(len(self.numbers), cfg.batch_size)
        self.steps = whole + (rest >= ranks.world)  # a pass
        self.cache, self.loader = None, None
        self.dtype = torch.float32 if images.is_float else torch.uint8
        size = len(self.numbers) * math.prod(images.shape) * self.dtype.itemsize
        if not images.is_random and size <= cfg.cache_gb * 1e9:
            self.cache = self._decode_all()
            self.condition = rows_of(self.condition, self.numbers, self.cache.device)
            self.numbers = torch.arange(len(self.numbers))  # from now on of the images in the cache

    def _decode_all(self) -> Tensor:
        last = self.numbers[-3:].tolist()  # the first has been read before, and a slow disk would not show
        quick = min(map(self._seconds, last)) * len(self.numbers) < WORKERS_PAY_FROM
        workers = 0 if quick else self.cfg.num_workers
        sampler = self.numbers.tolist()  # of max_images, no others
        loader = DataLoader(_Pixels(self.images), 256, sampler=sampler, num_workers=workers, worker_init_fn=_leave_alone)
        cache = torch.empty(len(self.numbers), *self.images.shape, dtype=self.dtype)
        bar = tqdm(loader, desc=f"decoding {self.images.noun}", unit="batch", leave=False, disable=self.ranks.rank > 0)
        for part, pixels, rows in zip(cache.split(256), bar, self.numbers.split(256), strict=True):
            part.copy_(pixels)
            if self.images.is_float and not (finite := pixels.flatten(1).isfinite().all(1)).all():
                raise Mistake(f"{self.images.name_of(rows[~finite][0].item())}: is not finite")
            self.check_signals()
        device = self.ranks.device
        size = cache.nbytes + sum(rows.nbytes for rows in self.condition.values())  # which goes along
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
            cache = cache.to(device)
        return cache

    def _seconds(self, i: int) -> float:
        """That image i takes to decode: by a copy, so that no file that it opens is open, and shared, in every worker."""
        images, begin = copy.copy(self.images), time.perf_counter()
        images.pixels(i)
        return time.perf_counter() - begin

    def indices(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """This rank's image numbers in each batch of an epoch, from batch `first` on."""
        size, world, order = self.cfg.batch_size, self.ranks.world, self.numbers
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed_seed(ORDER, self.cfg.seed, epoch))
            order = order[torch.randperm(len(order), generator=generator)]
        for batch in order.split(size)[first : self.steps]:
            yield batch[: len(batch) // world * world][self.ranks.rank :: world]  # ranks have equal shares

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch on the device, from batch `first` on."""
        if self.cache is None:
            yield from self._decoded(epoch, first)
            return
        for indices in self.indices(epoch, first):
            if self.cache.device == self.ranks.device:
                indices = self._to_device(indices)
            yield self._to_device(self.cache[indices]), self._condition_of(indices)

    def _condition_of(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: self._to_device(rows[indices]) for name, rows in self.condition.items()}

    def example(self, n: int) -> dict[str, Tensor]:
        """The condition of the first n images on the device, over again where there are fewer."""
        return rows_of(self.condition, torch.arange(n) % len(self.numbers), self.ranks.device)

    def _decoded(self, epoch: int, first: int) -> Iterator[Batch]:
        """The same from the worker processes, which live as long as this object does."""
        if self.loader is None:
            self.loader = DataLoader(
                _Pixels(self.images, self.cfg.seed),
                batch_sampler=[],  # filled anew for each epoch, while the workers stay
                num_workers=self.cfg.num_workers,
                pin_memory=self.ranks.device.type == "cuda",
                persistent_workers=self.cfg.num_workers > 0,
                worker_init_fn=_live_on,
            )
            self._end_workers = weakref.finalize(self, _end_workers, self.loader)  # at the latest when Python ends
        parts = list(self.indices(epoch, first))
        self.loader.batch_sampler[:] = [[(epoch, i) for i in part.tolist()] for part in parts]
        for part, pixels in zip(parts, self.loader, strict=True):
            yield pixels.to(self.ranks.device, non_blocking=True), self._condition_of(part)

    def close(self) -> None:
        """End the worker processes, also where an error's traceback still refers to them; another epoch starts new ones."""
        if self.loader is not None:
            self._end_workers()
        self.loader = None

    def _to_device(self, x: Tensor) -> Tensor:
        """x on the device, without waiting for it."""
        device = self.ranks.device
        if device.type == "cuda" and x.device != device:
            return x.pin_memory().to(device, non_blocking=True)
        return x.to(device)


def _end_workers(loader: DataLoader) -> None:
    """Let the workers of a DataLoader end, which has no public way to it. By a signal, they would live on for GRACE seconds."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


def _leave_alone(worker: int) -> None:
    """Let a worker, which was forked, collect none of its parent's garbage: a CUDA graph in it would end the worker."""
    gc.freeze()


def _live_on(worker: int) -> None:
    """Let a worker outlive for GRACE seconds the signals that a terminal, timeout or a cluster sends to all processes.

    Its parent heeds them, and a worker's death would end it before it has saved.
    """
    _leave_alone(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))  # which then ends it


class _Pixels(torch.utils.data.Dataset):
    """A data set's pixels, by number or (epoch, number), on which two alone an image's random transforms depend."""

    def __init__(self, images: ImageDataset, seed: int = 0):
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        if self.images.is_random:
            torch.manual_seed(mixed_seed(TRANSFORMS, self.seed, epoch, i))
        return self.images.pixels(i)
