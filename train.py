"""Train a diffusion model.

    python train.py configs/Digits_den.json                                    # on CUDA if there is one, else on the CPU
    python train.py configs/Digits_den.json --resume                           # go on where the run stopped
    python train.py configs/Digits_den.json --set train_cfg.lr=1e-4 train_cfg.model_save_dirpath=models/try
    torchrun --nproc_per_node=4 train.py configs/CIFAR10_den.json              # one process a GPU

    Trainer(load_config("configs/Digits_den.json")).run()                      # the same from Python

A run's state is a function of (seed, rank, step): by these each step draws its flips, t, eps and dropout, each epoch its order.
So a run that was stopped and resumed does what the run that never stopped does.

In its folder: last.pth, best.pth, best_fd.pth, epoch_N.pth, power_STEP.pth, first.png, epoch_N.png, metrics.jsonl, train.log.
"""

import copy
import logging
import math
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config import build_dataset, build_diffusion, build_train_config, load_config
from dataset import NO_CONDITION, rows_of
from evaluation.while_training import Quality, first_picture, save_samples, valid_loss
from guidance import hide, null_of
from mistakes import OneLineParser, run_script
from training import speed
from training.averages import Averages
from training.batches import Batches, draw_hidden, parts_of
from training.checks import bad_numbers, check_fit, check_ranks, check_resume, check_settings
from training.graph import launcher
from training.loggers import Loggers
from training.meter import Meter, end_time, in_words, rounded
from training.optimizers import build_optimizer, lr_schedule, step_unless
from training.ranks import Ranks, leave_ranks
from training.run_folder import RunFolder
from training.seeds import STEP, WEIGHTS, mixed_seed
from training.signals import Stopped, Stopper
from training.state import freeze_as_before, read_state, restore_state, start_weights, take_snapshot, take_state
from training.writer import Writer

log = logging.getLogger("train")


class Trainer:
    """One run: the objects it works on, its counters, and its steps. Nothing is written before `run`.

    config         resolved, from config.load_config; not changed
    device         "cpu", "cuda", "cuda:1", ...; None for CUDA where there is one
    resume         None: a new run. "": go on from last.pth. A path: go on from that checkpoint
    overwrite      delete the run that is in the folder
    deterministic  only kernels that give the same bits each time
    """

    def __init__(
        self,
        config: dict,
        device: str | None = None,
        resume: str | None = None,
        overwrite: bool = False,
        deterministic: bool = False,
    ):
        self.config = config = copy.deepcopy(config)
        self.ranks = Ranks(device)
        self.device = self.ranks.device
        self.stopper = Stopper(self.ranks)
        self.folder = RunFolder(config["train_cfg"]["model_save_dirpath"], writes=self.ranks.rank == 0)
        try:
            self.folder.claim(resume, overwrite)
            self._set_up(deterministic)
        except BaseException:
            self.folder.close()
            raise

    def _set_up(self, deterministic: bool) -> None:
        state = read_state(self.folder.resume_from, self.config) if self.folder.resume_from else None
        check_resume(state, self.ranks)
        self.cfg = build_train_config(self.config)
        check_settings(self.cfg, self.ranks)
        self.loggers = Loggers(() if self.ranks.rank else self.cfg.loggers, self.config)
        with self.stopper:
            self._build_model_and_data((state or {}).get("cluster_centres"))
        freeze_as_before(self.model, state)
        recording = speed.prepare(self, deterministic)
        self.parallel = self.ranks.parallel(self.model, lambda model: speed.loss_of_two(self, model))
        self.optimizer = build_optimizer(self.cfg, self.model, self.device)
        self.scheduler = lr_schedule(self.cfg, lambda: self.total_steps, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.cfg.precision == "fp16")
        self._start_counters()
        self.work = launcher(self, recording)
        self.quality = Quality(self)
        self.resumed = self.pictured = state is not None
        if state:
            restore_state(self, state)

    def _build_model_and_data(self, centres: Tensor | None) -> None:
        cfg = self.cfg
        torch.manual_seed(mixed_seed(WEIGHTS, cfg.seed))
        self.model = build_diffusion(self.config)  # before the data, which may be a long download
        start_weights(self)
        images = self.ranks.in_turn(lambda: {split: build_dataset(self.config, split, centres) for split in ("train", "valid")})
        self.n_classes = getattr(self.model.time_aware_net, "n_classes", None)
        check_ranks(self, images)
        check_fit(self, images)
        self.shape, self.class_names = images["train"].shape, images["train"].class_names
        self.sample_period = cfg.sample_period if len(self.shape) == 3 else 0  # what is no image has no picture
        self.class_counts = self.n_classes and images["train"].labels.bincount(minlength=self.n_classes).tolist()
        how = {"n_classes": self.n_classes, "check_signals": self.stopper.check}
        self.train_data = Batches(images["train"], cfg, self.ranks, shuffle=True, **how)
        self.valid_data = Batches(images["valid"], cfg, self.ranks, shuffle=False, max_images=cfg.valid_images, **how)
        self.total_steps = min(cfg.epochs * self.train_data.steps, cfg.max_steps or math.inf)
        self.model.to(self.device)
        speed.channels_last(self.model)
        self.ema = copy.deepcopy(self.model).eval()

    def _start_counters(self) -> None:
        """The run's state besides the weights and the optimizer."""
        self.step = 0
        self.closed = 0  # step at which an epoch was last closed: validated, recorded
        self.records = 0  # lines in metrics.jsonl
        self.best_loss = math.inf
        self.best = {}  # the states that best.pth and best_fd.pth get with the next last.pth
        self.last_save = time.monotonic()
        self.meter = Meter(self.device, self.model.T, self.model.time_weight)
        self.parameters = list(self.model.time_aware_net.parameters())
        self.besides = [p for name, p in self.model.named_parameters() if not name.startswith("time_aware_net.")]
        self.averages = Averages(self)

    # Training

    def train_step(self, pixels: Tensor, condition: Mapping[str, Tensor] = NO_CONDITION) -> None:
        """One update of the weights from this rank's share of a batch. Waits for nothing on the device."""
        torch.manual_seed(mixed_seed(STEP, self.cfg.seed, self.ranks.rank, self.step))
        self.condition = condition
        self.x0, self.norm = self.work(pixels, *condition.values())
        self.scheduler.step()
        self.step += 1
        self.averages.update(self.step)

    def _work(self, pixels: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """What a step does on the device, but for the averages; CUDA may replay it (training/graph.py). x_0 and the norm."""
        x0, condition = self.model.x0_of(self.train_data.images.to_float(pixels)), dict(zip(self.condition, rows, strict=True))
        net = self.model.time_aware_net
        hidden = draw_hidden(condition, null_of(net), self.cfg.label_dropout)
        loss, terms = torch.zeros((), device=self.device), []
        for part in parts_of(len(x0), self.cfg.grad_accum):
            told = hide(rows_of(condition, part), null_of(net), hidden[part])
            exchange = part.stop == len(x0) or self.ranks.world == 1  # of gradients between ranks: once a step
            with nullcontext() if exchange else self.parallel.no_sync(), speed.autocast(self.device, self.cfg.precision):
                part_loss = self.parallel(x0[part], self.cfg.chunk_size, condition=told) * (len(x0[part]) / len(x0))
            self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            terms.append(self.model.last_terms)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.cfg.grad_clip or math.inf)
        self._update(loss, norm, terms)
        return x0, norm

    @torch.no_grad()
    def _update(self, loss: Tensor, norm: Tensor, terms: list[tuple[Tensor, Tensor] | None]) -> None:
        """Step the optimizer; where a gradient is not finite, everything stays as it is."""
        total = sum((p.grad.sum() for p in self.besides if p.grad is not None), norm)
        bad = (~total.isfinite()).float()
        step_unless(bad, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.meter.add(loss, bad, terms)

    @property
    def epoch(self) -> int:
        """The epoch of the last step, counted from 1."""
        return math.ceil(self.step / self.train_data.steps)

    def _at_end(self) -> bool:
        """Of an epoch or of the run?"""
        return self.step % self.train_data.steps == 0 or self.step == self.total_steps

    def run(self) -> None:
        """Train to the last step. A signal ends it early: everything is saved, and Stopped raised."""
        self.writer, self.begun = Writer(), (time.monotonic(), self.step)
        try:
            self.records = self.folder.open(self.records if self.resumed else None, self.step)
            self.loggers.open(self.folder.path)
            bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=self.ranks.rank > 0, smoothing=0.05)
            with self.stopper, bar, logging_redirect_tqdm([log]):
                if not self.folder.in_place():
                    self.save_last(take_state(self))  # so that --resume always finds one
                    self.writer.wait()
                self._run(bar)
                self.writer.wait()
            log.info(f"finished: {self.step} steps, in epoch {self.epoch}; the checkpoints are in {self.folder.path}")
        except Stopped as stopped:
            self.save_last(take_state(self))
            self.writer.wait()
            log.info(f"stopped at step {self.step} by {signal.Signals(stopped.number).name}; to go on, add --resume")
            raise
        finally:
            try:
                if not self.writer.error:
                    self._write_best()
            finally:
                for each in (self.writer, self.loggers, self.train_data, self.valid_data, self.folder):
                    each.close()

    def _run(self, bar: tqdm) -> None:
        if self._at_end() and self.step != self.closed:  # stopped just there
            self.close_epoch(bar)
        while self.step < self.total_steps:
            self.meter.restart()
            batches = self.train_data.epoch(*divmod(self.step, self.train_data.steps))
            for pixels, condition in self.meter.timed(batches):
                self.train_step(pixels, condition)
                self.meter.images += len(pixels) * self.ranks.world
                bar.update()
                self._after_step(bar)
                if self.step >= self.total_steps:
                    break
            self.close_epoch(bar)

    def _after_step(self, bar: tqdm) -> None:
        if self.meter.recent_bad_steps(self._at_end()) >= min(self.cfg.max_bad_steps, self.total_steps):
            raise bad_numbers(self)
        self.writer.check()
        self._write(f"power_{self.step}.pth", take_snapshot(self))  # before the last.pth that counts the step
        if self.step % self.cfg.record_period == 0 and not self._at_end():  # which is recorded with its validation
            self.record(bar)
        first_picture(self)
        if self.stopper.check(save=0 < self.cfg.save_minutes < (time.monotonic() - self.last_save) / 60):
            self.save_last(take_state(self))

    # At the end of an epoch

    def close_epoch(self, bar: tqdm) -> None:
        epoch, last, cfg = self.epoch, self.step == self.total_steps, self.cfg
        seconds = self.meter.elapsed()  # of training alone
        with speed.autocast(self.device, cfg.precision):  # once, so that the frozen weights are cast once
            loss = self.validate()
            if self.sample_period and (epoch % self.sample_period == 0 or last):
                self.save_picture(self.folder.path / f"epoch_{epoch}.png")
        self.record(bar, loss, seconds, self.quality.measure(epoch, last))
        self.closed = self.step
        better, due = loss < self.best_loss, cfg.save_period and epoch % cfg.save_period == 0
        self.best_loss = loss if better else self.best_loss  # min() may keep a nan
        save_last = last or not cfg.save_minutes
        names = ["best.pth"] * (better and cfg.save_best) + ["best_fd.pth"] * self.quality.better
        state = take_state(self) if names or due or save_last else None
        self.best |= dict.fromkeys(names, state)
        if due:
            self._write(f"epoch_{epoch}.pth", state)
        if save_last:
            self.save_last(state)

    def validate(self) -> float:
        """Mean loss of the averaged weights on the validation set, with the same t and eps every time."""
        return valid_loss(self)

    def save_picture(self, path: Path) -> None:
        """Samples of the averaged weights."""
        save_samples(self, path)
        if not self.pictured:
            log.info(f"{path}: the first samples, after {self.step} steps")
        self.pictured = True

    # Records and checkpoints

    def record(self, bar: tqdm, valid: float | None = None, seconds: float | None = None, metrics: dict | None = None) -> None:
        """Add a line to metrics.jsonl and to the log, of what happened since the last one."""
        seconds = self.meter.elapsed() if seconds is None else seconds
        line = {
            "step": self.step,
            "epoch": self.epoch,
            "time": round(time.time(), 3),
            "valid_loss": rounded(valid),
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.meter.record(self.ranks, seconds),
        } | ({"metrics": metrics} if metrics else {})
        self.records += 1
        self.folder.add_record(line)
        self.loggers.add(line)
        words = in_words(line | {"valid_loss": valid})  # also where it is not finite
        seconds, done = time.monotonic() - self.begun[0], self.step - self.begun[1]
        ends = f", ends {end_time(datetime.now(), seconds, done, self.total_steps - self.step)}" if done else ""
        bar.set_postfix_str(f"epoch {line['epoch']}/{math.ceil(self.total_steps / self.train_data.steps)}, {words}{ends}")
        log.info(f"step {self.step}, epoch {line['epoch']}: {words}")

    def _write(self, name: str, state: dict | None) -> None:
        if state:
            self.writer.save(self.folder.path / name, state)

    def _write_best(self) -> None:
        while self.best:
            self._write(*self.best.popitem())

    def save_last(self, state: dict) -> None:
        """Write last.pth, and before it best.pth and best_fd.pth if there are better ones."""
        self._write_best()
        self._write("last.pth", state)
        self.last_save = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description="Train a diffusion model.", epilog="See the head of train.py for examples.")
    parser.add_argument("config", help="JSON file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override config keys")
    parser.add_argument("-s", "--seed", type=int, help="the same as --set train_cfg.seed=SEED")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ...; by default CUDA where there is one")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--resume", nargs="?", const="", metavar="CHECKPOINT", help="go on from last.pth, or from CHECKPOINT")
    way.add_argument("--overwrite", action="store_true", help="delete the run in the folder and start anew")
    parser.add_argument("--deterministic", action="store_true", help="use deterministic kernels only, where that costs time")
    args = parser.parse_args(argv)
    args.set += [] if args.seed is None else [f"train_cfg.seed={args.seed}"]

    def work() -> int:
        log.setLevel(logging.INFO)
        log.handlers = [logging.StreamHandler()]
        try:
            trainer = Trainer(load_config(args.config, args.set), args.device, args.resume, args.overwrite, args.deterministic)
        except Stopped as stopped:
            log.info(f"stopped before the first step by {signal.Signals(stopped.number).name}; nothing was written")
            return 128 + stopped.number
        where = f"{trainer.device}, {trainer.ranks.world} ranks" if trainer.ranks.world > 1 else trainer.device
        size = sum(p.numel() for p in trainer.parameters)
        images = f"{len(trainer.train_data.images)} {trainer.train_data.images.noun} {list(trainer.shape)}"
        log.info(f"{args.config}: {size:,} parameters, {images}, {trainer.total_steps} steps on {where}")
        try:
            trainer.run()
        except Stopped as stopped:
            return 128 + stopped.number
        return 0

    try:
        return run_script("train.py", work)
    finally:
        leave_ranks()


if __name__ == "__main__":
    sys.exit(main())
