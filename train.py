"""Train a diffusion model.

    python train.py configs/Digits_den.json                                    # on CUDA if there is one, else on the CPU
    python train.py configs/Digits_den.json --resume                           # go on where the run stopped
    python train.py configs/Digits_den.json --set train_cfg.lr=1e-4 train_cfg.model_save_dirpath=models/try
    torchrun --nproc_per_node=4 train.py configs/CIFAR10_den.json              # one process a GPU

A run's state is a function of (seed, rank, step): each step draws its data order, flips, t, eps and dropout from a generator
seeded by these three alone. So a run that was stopped and resumed does what the run that never stopped does.

In the folder of the run: last.pth, best.pth, epoch_N.pth, train.log, metrics.jsonl, epoch_N.png (samples).
"""

import argparse
import contextlib
import copy
import fcntl
import itertools
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import checkpoint
from config import MAY_CHANGE, TrainConfig, build_dataset, build_diffusion, build_train_config, load_config, shown
from dataset import ArrayDataset, ImageDataset, ImageError
from evaluation.pictures import grid, save_png
from files import whole_file
from gaussian_diffusion import GaussianDiffusion
from training.muon import Muon

log = logging.getLogger("train")
SAMPLES = 64  # in a picture
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what the network runs in
WEIGHTS, ORDER, TRANSFORMS, STEP, VALIDATION, PICTURE, SAMPLING = range(1, 8)  # what a seed is for


def mixed_seed(purpose: int, *parts: int) -> int:
    """One seed of a purpose and the numbers that go with it; any difference in them gives an unrelated seed."""
    return int(np.random.SeedSequence((purpose, *parts)).generate_state(1, np.uint64)[0] >> 1)


class Stopped(Exception):
    """A signal, whose number this holds, asked the run to stop."""


class BadNumbers(Exception):
    """Loss or gradient was not finite for too many steps, or the weights are not."""


class Stopper:
    """Turns the first SIGINT or SIGTERM into a number that the run looks at between steps; the second acts at once."""

    signal = 0  # none yet

    def __enter__(self) -> "Stopper":
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: object) -> None:
        if "TORCHELASTIC_RUN_ID" in os.environ and not self.signal:
            self.signal = number
            return  # torchrun passes on what a terminal has sent to every process already: the next one is the same
        self.signal = self.signal or number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Ranks:
    """This process among those that torchrun started; one process without it."""

    def __init__(self, device: str | None, alone: bool = False):
        self.world, self.rank = (1, 0) if alone else (int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)))
        self.device = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
        self.cpu_group = None
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.cpu_group = dist.new_group(backend="gloo")  # for words that must not wait for the GPU

    def largest(self, value: float) -> float:
        """The largest of the ranks' values, known to all."""
        if self.world == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.cpu_group)
        return values.item()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, items: list) -> list:
        """The items of all ranks, on rank 0; on the others, their own."""
        if self.world == 1:
            return items
        gathered = [None] * self.world if self.rank == 0 else None
        dist.gather_object(items, gathered, group=self.cpu_group)
        return [item for part in gathered for item in part] if self.rank == 0 else items

    def autocast(self, precision: str) -> contextlib.AbstractContextManager:
        """Let the network, and nothing else, run in the precision."""
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        dtype = PRECISIONS[precision]
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()


def _device(name: str | None, local_rank: int) -> torch.device:
    """The device of --device, by default CUDA where there is one; ValueError if it is not to be had."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such kind of device; try cuda or cpu") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: CUDA is not available here; try --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    try:
        torch.zeros(1, device=device).tolist()
    except Exception:  # each kind of device has its own way to be missing
        raise ValueError(f"--device {name}: is not available here; try --device cpu") from None
    return device


def compile_network(net: nn.Module, device: torch.device, option: str) -> None:
    """Let torch compile the network at its first call. A compiler that is missing shows here, as a ValueError."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each kind of device has its own compiler, and its own errors
        raise ValueError(f"{option}: cannot compile here ({str(error).strip().splitlines()[0]})") from None
    net.compile()


class Batches:
    """The images of a data set in an order that depends on (seed, epoch) alone, this rank's part of each batch.

    A set of up to cache_gb is decoded once and kept as uint8, on the device if it is a GPU with room; a larger one, or one with
    random transforms other than flips, is decoded by worker processes as it is needed. Of a set of more than `most` images, so
    many evenly spread ones are used. heed_signals is called while images are decoded.
    """

    def __init__(
        self,
        images: ImageDataset,
        cfg: TrainConfig,
        ranks: Ranks,
        shuffle: bool,
        most: int | None = None,
        heed_signals: Callable[[], object] = lambda: None,
    ):
        self.images, self.cfg, self.ranks, self.shuffle, self.heed_signals = images, cfg, ranks, shuffle, heed_signals
        self.numbers = torch.arange(len(images))
        if most is not None and most < len(images):
            self.numbers = torch.linspace(0, len(images) - 1, most, dtype=torch.float64).round().long()
        if len(self.numbers) < ranks.world:
            raise ValueError(f"a data set of {len(self.numbers)} images: {ranks.world} ranks need at least one each")
        whole, rest = divmod(len(self.numbers), cfg.batch_size)
        self.steps = whole + (rest >= ranks.world)  # a pass
        self.cache = None
        if not images.is_random and len(images) * math.prod(images.shape) <= cfg.cache_gb * 1e9:
            self.cache = self._decode_all()

    def _decode_all(self) -> Tensor:
        at_hand = isinstance(self.images, ArrayDataset) and not self.images.pipeline
        workers = 0 if at_hand else self.cfg.num_workers
        loader = DataLoader(_Pixels(self.images), 256, num_workers=workers)
        cache = torch.empty(len(self.images), *self.images.shape, dtype=torch.uint8)
        for i, pixels in enumerate(
            tqdm(loader, desc="decoding images", unit="batch", leave=False, disable=self.ranks.rank > 0)
        ):
            cache[256 * i : 256 * i + len(pixels)] = pixels
            self.heed_signals()
        device = self.ranks.device
        if device.type == "cuda" and cache.numel() < torch.cuda.mem_get_info(device)[0] / 4:
            cache = cache.to(device)
        return cache

    def _indices(self, epoch: int, first: int) -> Iterator[Tensor]:
        """This rank's image numbers in each batch of an epoch, from batch `first` on."""
        size, world, order = self.cfg.batch_size, self.ranks.world, self.numbers
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed_seed(ORDER, self.cfg.seed, epoch))
            order = order[torch.randperm(len(order), generator=generator)]
        for batch in order.split(size)[first : self.steps]:
            yield batch[: len(batch) // world * world][self.ranks.rank :: world]  # ranks have equal shares

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """The uint8 batches of an epoch on the device, from batch `first` on."""
        if self.cache is not None:
            for indices in self._indices(epoch, first):
                if self.cache.device == self.ranks.device:
                    yield self.cache[self._to_device(indices)]
                else:
                    yield self._to_device(self.cache[indices])
            return
        loader = DataLoader(
            _Pixels(self.images, self.cfg.seed, epoch),
            batch_sampler=[indices.tolist() for indices in self._indices(epoch, first)],
            num_workers=self.cfg.num_workers,
        )
        for pixels in loader:
            yield self._to_device(pixels)

    def _to_device(self, x: Tensor) -> Tensor:
        """x on the device, without waiting for it."""
        device = self.ranks.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class _Pixels(torch.utils.data.Dataset):
    """A data set's uint8 images; an image's random transforms depend on (seed, epoch, its number) alone."""

    def __init__(self, images: ImageDataset, seed: int = 0, epoch: int = 0):
        self.images, self.seed, self.epoch = images, seed, epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        if self.images.is_random:
            torch.manual_seed(mixed_seed(TRANSFORMS, self.seed, self.epoch, i))
        return self.images.pixels(i)


class Trainer:
    """One run: the objects it works on, its counters, and its steps."""

    def __init__(self, config: dict, ranks: Ranks, stopper: Stopper):
        self.config, self.ranks, self.stopper = config, ranks, stopper
        self.cfg = cfg = build_train_config(config)
        self.device = device = ranks.device
        self._check_batch()
        torch.manual_seed(mixed_seed(WEIGHTS, cfg.seed))
        self.model = build_diffusion(config)  # before the data, which may be a long download
        images = {split: build_dataset(config, split) for split in ("train", "valid")}
        _check_fit(self.model, images)
        self.folder = Path(cfg.model_save_dirpath)

        self.shape = images["train"].shape
        heed = self._heed_signals
        self.train_data = Batches(images["train"], cfg, ranks, shuffle=True, heed_signals=heed)
        self.valid_data = Batches(images["valid"], cfg, ranks, shuffle=False, most=cfg.valid_images, heed_signals=heed)
        self.total_steps = min(cfg.epochs * self.train_data.steps, cfg.max_steps or math.inf)
        self.model.to(device)
        if len(self.shape) == 3:
            self.model.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.net_parameters = list(self.model.time_aware_net.parameters())
        self._set_up_optimizer()
        self._set_up_speed()

        # The run's state besides the weights and the optimizer
        self.step = 0
        self.closed = 0  # step at which an epoch was last closed: validated, recorded, saved
        self.records = 0  # lines in metrics.jsonl
        self.best_loss = math.inf
        zero = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self.loss_sum, self.loss_count = zero.clone(), zero.clone()  # since the last record
        self.bad_steps, self.bad_in_row = zero.clone(), zero.clone()
        self._restart_clock()
        self.last_save = time.monotonic()

    def _check_batch(self) -> None:
        parts = self.ranks.world * self.cfg.grad_accum
        if self.cfg.batch_size % parts:
            raise ValueError(
                f"train_cfg.batch_size = {self.cfg.batch_size}: must be a multiple of {parts}, {self.ranks.world} ranks times "
                f"grad_accum = {self.cfg.grad_accum}"
            )
        if self.cfg.precision == "fp16" and self.device.type != "cuda":
            raise ValueError("train_cfg.precision = 'fp16': needs CUDA; bf16 and fp32 run on a CPU")

    def _set_up_optimizer(self) -> None:
        cfg = self.cfg
        hidden = self._hidden_matrices() if cfg.optimizer == "muon" else {}
        rest = [p for p in self.net_parameters if p not in hidden]
        groups = [{"params": rest}, {"params": list(hidden), "orthogonal": True}]
        if self.config["diffusion"]["reverse_variance"] == "learnable":
            groups.append({"params": [self.model.log_sigma_square], "lr": cfg.variance_lr})
        self.optimizer = Muon(groups, cfg.lr, fused=self.device.type in ("cpu", "cuda"))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")

    def _hidden_matrices(self) -> dict[nn.Parameter, None]:
        """The network's weights of two dimensions or more, from hidden layer to hidden layer."""
        net = self.model.time_aware_net
        layers = [getattr(net, name) for name in net.hidden_layers]
        return {p: None for layer in layers for p in layer.parameters() if p.ndim >= 2}

    def _lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step, counted from 0."""
        warm = min(1, (step + 1) / (self.cfg.warmup_steps + 1))
        done = max(0, step - self.cfg.warmup_steps) / max(1, self.total_steps - self.cfg.warmup_steps)
        return warm * {"constant": 1, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[self.cfg.lr_schedule]

    def _set_up_speed(self) -> None:
        cfg, device = self.cfg, self.device
        self.model.time_aware_net.activation_checkpointing = cfg.activation_checkpointing
        if cfg.compile:
            compile_network(self.model.time_aware_net, device, "train_cfg.compile")
        self.parallel = self.model
        if self.ranks.world > 1:
            self.parallel = DistributedDataParallel(
                self.model, [device] if device.type == "cuda" else None, broadcast_buffers=False
            )

    # Training

    def train_step(self, pixels: Tensor) -> None:
        """One update of the weights from this rank's share of a batch. Waits for nothing on the device."""
        torch.manual_seed(mixed_seed(STEP, self.cfg.seed, self.ranks.rank, self.step))
        self.x0 = x0 = self.train_data.images.to_float(pixels)
        parts = x0.chunk(self.cfg.grad_accum)
        loss = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            with self._no_sync(unless=i == len(parts) - 1), self.ranks.autocast(self.cfg.precision):
                part_loss = self.parallel(part, self.cfg.chunk_size) * (len(part) / len(x0))
            self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.clip_grad_norm_(self.net_parameters, self.cfg.grad_clip or math.inf)
        self._update(loss)

    def _no_sync(self, unless: bool) -> contextlib.AbstractContextManager:
        """Leave the exchange of gradients between ranks to the last part of a batch."""
        return contextlib.nullcontext() if unless or self.ranks.world == 1 else self.parallel.no_sync()

    def _update(self, loss: Tensor) -> None:
        """Step the optimizer and the average; where a gradient is not finite, the fused step leaves everything as it is."""
        gradients = [group["params"][-1].grad.sum() for group in self.optimizer.param_groups[2:]]  # of the variance
        bad = (~(sum(gradients, self.norm)).isfinite()).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        decay = min(self.cfg.ema_decay, self.step / (self.step + 9))  # short at first
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.loss_sum += torch.where(bad > 0, 0, loss)
        self.loss_count += 1 - bad
        self.bad_steps += bad
        self.bad_in_row.add_(1).mul_(bad)

    @property
    def epoch(self) -> int:
        """The epoch of the last step, counted from 1."""
        return math.ceil(self.step / self.train_data.steps)

    def _at_end(self) -> bool:
        """Of an epoch or of the run?"""
        return self.step % self.train_data.steps == 0 or self.step == self.total_steps

    def run(self) -> int:
        """Train to the last epoch, or until a signal: the exit code."""
        steps = self.train_data.steps
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=self.ranks.rank > 0, smoothing=0.05)
        try:
            with bar, logging_redirect_tqdm([log]):
                if self._at_end() and self.step != self.closed:  # stopped just there
                    self.close_epoch(bar)
                while self.step < self.total_steps:
                    self._restart_clock()
                    batches = self.train_data.epoch(*divmod(self.step, steps))
                    for pixels in itertools.islice(self._timed(batches), self.total_steps - self.step):
                        self.train_step(pixels)
                        self.images_done += len(pixels) * self.ranks.world
                        bar.update()
                        self._after_step(bar)
                    self.close_epoch(bar)
        except Stopped as stopped:
            self.save("last.pth")
            (number,) = stopped.args
            log.info(f"stopped at step {self.step} by {signal.Signals(number).name}; to go on, add --resume")
            return 128 + number
        log.info(f"finished: {self.epoch} epochs, {self.step} steps; the checkpoints are in {self.folder}")
        return 0

    def _after_step(self, bar: tqdm) -> None:
        due = self.step % self.cfg.record_period == 0
        if due or self.device.type == "cpu":  # elsewhere this would wait for the device
            self._check_numbers()
        if due and not self._at_end():  # which is recorded with its validation
            self.record(bar)
        minutes = (time.monotonic() - self.last_save) / 60
        if self._heed_signals(save=0 < self.cfg.save_minutes < minutes):
            self.save("last.pth")

    def _heed_signals(self, save: bool = False) -> bool:
        """Raise Stopped if any rank got a signal; else, does any rank want to save?"""
        word = self.ranks.largest(self.stopper.signal or 0.5 * save)
        if word >= 1:
            raise Stopped(int(word))
        return word > 0

    def _check_numbers(self) -> None:
        in_row = int(self.bad_in_row)
        if in_row < self.cfg.max_bad_steps:
            return
        t = torch.randint(1, self.model.T + 1, (len(self.x0),), device=self.device)
        with torch.no_grad():
            losses = self.model.loss(self.x0, t).nan_to_num(nan=math.inf)
        raise BadNumbers(
            f"loss or gradient was not finite in the last {in_row} steps, up to step {self.step}: gradient norm "
            f"{self.norm.item():g}, loss scale {self.scaler.get_scale():g}, largest loss {losses.max():g} at t = "
            f"{t[losses.argmax()]}; the last good checkpoint is {self.folder / 'last.pth'}"
        )

    def _timed(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches, with the time spent waiting for them counted."""
        while True:
            start = time.perf_counter()
            pixels = next(batches, None)
            self.seconds_waited += time.perf_counter() - start
            if pixels is None:
                return
            yield pixels

    # At the end of an epoch

    def close_epoch(self, bar: tqdm) -> None:
        epoch = self.epoch
        last = self.step == self.total_steps
        seconds = time.perf_counter() - self.clock  # of training alone
        valid_loss = self.validate()
        if self.cfg.sample_period and (epoch % self.cfg.sample_period == 0 or last):
            self.save_picture(self.folder / f"epoch_{epoch}.png")
        self.record(bar, valid_loss, seconds)
        self.closed = self.step
        if valid_loss < self.best_loss:
            self.best_loss = valid_loss
            if self.cfg.save_best:
                self.save("best.pth")
        if self.cfg.save_period and epoch % self.cfg.save_period == 0:
            self.save(f"epoch_{epoch}.pth")
        self.save("last.pth")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the averaged weights on the validation set, with the same t and eps every time."""
        sums = torch.zeros(2, device=self.device)
        for i, pixels in enumerate(self.valid_data.epoch(0)):
            self._heed_signals()
            torch.manual_seed(mixed_seed(VALIDATION, self.cfg.seed, self.ranks.rank, i))
            with self.ranks.autocast(self.cfg.precision):
                loss = self.ema(self.valid_data.images.to_float(pixels), self.cfg.chunk_size)
            sums += torch.stack([loss * len(pixels), torch.tensor(float(len(pixels)), device=self.device)])
        total, count = self.ranks.sum(sums).tolist()
        return total / count

    def save_picture(self, path: Path) -> None:
        """Samples of the averaged weights, from the same noise every time; each rank draws its share."""
        share = math.ceil(SAMPLES / self.ranks.world)
        generator = torch.Generator(self.device).manual_seed(mixed_seed(PICTURE, self.cfg.seed, self.ranks.rank))
        steps = min(self.cfg.sample_timesteps, self.ema.T)
        with self.ranks.autocast(self.cfg.precision):
            for _, x in self.ema.trajectory((share, *self.shape), "dpm", steps, clip_x0=True, generator=generator):
                self._heed_signals()
        if self.ranks.world > 1:
            shares = [torch.empty_like(x) for _ in range(self.ranks.world)]
            dist.all_gather(shares, x.contiguous())
            x = torch.cat(shares)[:SAMPLES]
        if self.ranks.rank == 0:
            save_png(path, grid(x))

    # Records and checkpoints

    def _restart_clock(self) -> None:
        self.clock, self.images_done, self.seconds_waited = time.perf_counter(), 0, 0.0

    def record(self, bar: tqdm, valid_loss: float | None = None, seconds: float | None = None) -> None:
        """Add a line to metrics.jsonl and to the log, of what happened since the last one."""
        loss_sum, loss_count = self.ranks.sum(torch.stack([self.loss_sum, self.loss_count])).tolist()
        seconds = time.perf_counter() - self.clock if seconds is None else seconds
        line = {
            "step": self.step,
            "epoch": self.epoch,
            "train_loss": float(f"{loss_sum / loss_count:.8g}") if loss_count else None,
            "valid_loss": None if valid_loss is None else float(f"{valid_loss:.8g}"),
            "lr": self.optimizer.param_groups[0]["lr"],
            "bad_steps": int(self.bad_steps),
            "img_per_s": round(self.images_done / seconds, 1),
            "data_wait_share": round(self.seconds_waited / seconds, 4),
        }
        self.loss_sum.zero_()
        self.loss_count.zero_()
        self.records += 1
        self._restart_clock()
        if self.ranks.rank:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that counts this line
        losses = f"loss {line['train_loss'] or math.nan:.5g}" + ("" if valid_loss is None else f", valid {valid_loss:.5g}")
        bar.set_postfix_str(f"epoch {line['epoch']}/{self.cfg.epochs}, {losses}, {line['img_per_s']:.0f} img/s")
        log.info(f"step {self.step}, epoch {line['epoch']}: {losses}, {line['img_per_s']:.0f} img/s")

    def save(self, name: str) -> None:
        """Write everything that resuming and sampling need. Every rank calls this; rank 0 writes."""
        sums = self.ranks.sum(torch.stack([self.loss_sum, self.loss_count])).tolist()
        self.last_save = time.monotonic()
        norms = torch.stack(torch._foreach_norm([*self.model.parameters(), *self.ema.parameters()]))
        if not norms.isfinite().all():
            raise BadNumbers(f"the weights at step {self.step} are not finite, and {self.folder / name} was not written")
        if self.ranks.rank:
            return
        state = {
            "config": self.config,
            "shape": list(self.shape),
            "step": self.step,
            "epoch": self.epoch,
            "closed": self.closed,
            "world": self.ranks.world,
            "records": self.records,
            "best_loss": self.best_loss,
            "loss_sums": sums,
            "bad_steps": [int(self.bad_steps), int(self.bad_in_row)],
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        checkpoint.save(self.folder / name, state)

    def restore(self, state: dict) -> None:
        """Become the run that save wrote, in the same folder; any of several errors if save did not write it."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self._restore_optimizer(state["optimizer"]["state"], state["step"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.closed, self.records = state["step"], state["closed"], state["records"]
        self.best_loss = state["best_loss"]
        if self.ranks.rank == 0:  # the others' shares are in these sums
            self.loss_sum.fill_(state["loss_sums"][0])
            self.loss_count.fill_(state["loss_sums"][1])
        self.bad_steps.fill_(state["bad_steps"][0])
        self.bad_in_row.fill_(state["bad_steps"][1])
        if self.ranks.world != state["world"]:
            log.warning(f"the run had {state['world']} ranks and has {self.ranks.world} now: its draws will differ")

    def _restore_optimizer(self, moments: dict, step: int) -> None:
        """The moments are the checkpoint's; rates and all else follow from the config and the step."""
        averages = [
            (p, ("momentum",) if "orthogonal" in group else ("exp_avg", "exp_avg_sq"))
            for group in self.optimizer.param_groups
            for p in group["params"]
        ]
        for i, (p, names) in enumerate(averages):
            shapes = {name: value.shape for name, value in moments.get(i, {}).items()}
            if shapes != ({"step": (), **dict.fromkeys(names, p.shape)} if step else {}):
                raise ValueError(f"optimizer: moments of shapes {shapes} for a weight of shape {list(p.shape)}")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.scheduler.last_epoch = step
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = rate * self._lr_factor(step)


def _check_fit(model: GaussianDiffusion, images: dict[str, ImageDataset]) -> None:
    """Try the network on one image of each data set; warn of a prior that is not pure noise."""
    for split, data in images.items():
        x = torch.zeros(1, *data.shape)
        try:
            with torch.no_grad():
                model.eval().predict(x, 1)
        except ValueError as error:
            raise ValueError(f"time_aware_net: does not take the images of dataset.{split}: {error}") from None
    model.train()
    alpha_bar = model.signal[-1].item() ** 2
    if alpha_bar > 0.01:
        log.warning(
            f"alpha_bar_T = {alpha_bar:.3g} is above 0.01: x_T keeps some of the image, and samples that start from N(0, I) "
            "start wrong; use more timesteps or larger betas"
        )


# The folder of a run

_held: dict[Path, int] = {}  # folders that this process has locked, and their handles


def hold(folder: Path) -> None:
    """Lock a folder until let_go or the end of the process; ValueError if another process has locked it."""
    if folder.resolve() in _held:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder}: another process trains there") from None
    except OSError as error:
        log.warning(f"{folder}: cannot be locked ({error.strerror}): nothing keeps a second process from training there")
    _held[folder.resolve()] = handle


def let_go() -> None:
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=let_go)  # or a worker process would hold the lock for a while after this one is killed

RUN_FILES = ("last.pth", "best.pth", "epoch_*.pth", "epoch_*.png", "metrics.jsonl", "train.log", ".*.part")


def run_files(folder: Path) -> list[Path]:
    return [path for pattern in RUN_FILES for path in folder.glob(pattern)]


def _flat(value: object, path: str = "") -> dict[str, object]:
    """A nested config as {path: value}."""
    if isinstance(value, dict) and value:
        return {key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{path}.{name}".lstrip(".")).items()}
    return {path: value}


def _check_counters(state: dict) -> None:
    """ValueError if a plain value is not such as save writes."""
    for name, least in {"step": 0, "closed": 0, "records": 0, "world": 1}.items():
        if type(state.get(name)) is not int or not least <= state[name] < 2**63:
            raise ValueError(f"{name}: must be a whole number of at least {least}")
    if type(state.get("best_loss")) is not float or math.isnan(state["best_loss"]):
        raise ValueError("best_loss: must be a number")
    for name in ("loss_sums", "bad_steps"):
        pair = state.get(name)
        if not isinstance(pair, list) or [type(value) in (int, float) for value in pair] != [True, True]:
            raise ValueError(f"{name}: must be two numbers")


def read_state(path: Path, config: dict) -> dict:
    """The state to resume from, if its config differs from this one only where a run may change."""
    try:
        state = checkpoint.load(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_newest_good(path)}") from None
    try:
        _check_counters(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    old, new = _flat(state["config"]), _flat(config)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    refused = [key for key in changed if key.removeprefix("train_cfg.") not in MAY_CHANGE]
    if refused:
        differences = ", ".join(f"{key} ({shown(old.get(key))} then, {shown(new.get(key))} now)" for key in refused)
        may = ", ".join(sorted(MAY_CHANGE))
        raise ValueError(f"--resume {path}: the config is not the run's: {differences}; only these may change: {may}")
    return state


def _newest_good(broken: Path) -> str:
    """What to resume from instead of a broken checkpoint."""
    for path in sorted(broken.parent.glob("*.pth"), key=lambda path: -path.stat().st_mtime):
        with contextlib.suppress(ValueError):
            checkpoint.load(path)
            return f"the newest good one is {path}: to go on from there, --resume {path}"
    return "there is no good one beside it"


class LogFile(logging.FileHandler):
    """A log file that stops the run when it cannot be written, as any other file does."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def open_folder(trainer: Trainer, args: argparse.Namespace, state: dict | None) -> None:
    """Make the folder ready: empty for a new run, cut back to the state's last record for a resumed one."""
    folder = trainer.folder
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder)
    if state is None:
        for path in run_files(folder):
            path.unlink()
    elif (metrics := Path(args.resume or folder / "last.pth").with_name("metrics.jsonl")).exists():
        lines = metrics.read_bytes().splitlines(keepends=True)[: state["records"]]
        with whole_file(folder / "metrics.jsonl") as file:
            file.writelines(lines)
    handler = LogFile(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)


def set_up(args: argparse.Namespace, stopper: Stopper) -> Trainer:
    """Check everything that can be checked before the first file is written; ValueError says what is wrong."""
    config = load_config(args.config, args.set)
    ranks = Ranks(args.device)
    folder = Path(config["train_cfg"]["model_save_dirpath"])
    there = _first_existing(folder)
    if not there.is_dir():
        raise ValueError(f"train_cfg.model_save_dirpath = {folder}: {there} is not a folder")
    if ranks.rank == 0 and folder.exists():
        hold(folder)  # before anything in it is read
    if args.resume and run_files(folder) and Path(args.resume).resolve().parent != folder.resolve():
        raise ValueError(f"--resume {args.resume}: is of another folder than {folder}, which holds a run already")
    if run_files(folder) and args.resume is None and not args.overwrite:
        raise ValueError(
            f"{folder} holds a run already: add --resume to go on with it, --overwrite to delete it and start anew, or "
            "--set train_cfg.model_save_dirpath=FOLDER for another folder"
        )
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    state, path = None, Path(args.resume or folder / "last.pth")
    if args.resume is not None:
        if path.exists() or args.resume or (folder / "best.pth").exists():
            state = read_state(path, config)
        else:
            log.warning(f"{path} is not there: starting at step 0")
    trainer = Trainer(config, ranks, stopper)
    if state:
        try:
            trainer.restore(state)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{path}: is not the state of a run ({reason})") from None
    if ranks.rank == 0:
        open_folder(trainer, args, state)
    if state is None or path.resolve() != (folder / "last.pth").resolve():
        trainer.save("last.pth")  # so that --resume always finds one
    return trainer


def _first_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    try:
        return next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:  # too long a name
        raise ValueError(f"train_cfg.model_save_dirpath = {str(folder)[:80]}: {error.strerror}") from None


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description="Train a diffusion model.", epilog="See the head of train.py for examples.")
    parser.add_argument("config", help="JSON file")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the config"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ...; by default CUDA where there is one")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--resume", nargs="?", const="", metavar="CHECKPOINT", help="go on from last.pth, or from CHECKPOINT")
    way.add_argument("--overwrite", action="store_true", help="delete the run in the folder and start anew")
    parser.add_argument("--deterministic", action="store_true", help="use deterministic kernels only, where that costs time")
    args = parser.parse_args(argv)

    console = logging.StreamHandler()
    log.setLevel(logging.INFO)
    log.handlers = [console]
    try:
        with Stopper() as stopper:
            try:
                trainer = set_up(args, stopper)
            except ValueError as error:
                return _mistake(error)
            except Stopped as stopped:
                log.info(f"stopped before the first step by {signal.Signals(stopped.args[0]).name}; nothing was written")
                return 128 + stopped.args[0]
            where = f"{trainer.device}, {trainer.ranks.world} ranks" if trainer.ranks.world > 1 else trainer.device
            size = sum(p.numel() for p in trainer.net_parameters)
            images = f"{len(trainer.train_data.images)} images {list(trainer.shape)}"
            log.info(f"{args.config}: {size:,} parameters, {images}, {trainer.total_steps} steps on {where}")
            return trainer.run()
    except (ImageError, BadNumbers) as error:
        return _mistake(error)
    except OSError as error:
        print("train.py:", error, file=sys.stderr)
        return 1
    finally:
        let_go()
        for handler in log.handlers[1:]:
            with contextlib.suppress(OSError):
                handler.close()
        log.handlers = [console]
        if dist.is_initialized():
            dist.destroy_process_group()


def _mistake(error: Exception) -> int:
    """Print the message, of an error in a worker process the last line of its traceback; the exit code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1].removeprefix("dataset.ImageError: ") if isinstance(error, ImageError) else lines[0]
    print("train.py:", line, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
