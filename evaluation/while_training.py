"""What looks at a model while it trains: its loss on the validation set, pictures of samples, and metrics within their share of
the run's time.

`run` is train.py's Trainer; what is looked at are its averaged weights. No draw here changes one of the training.
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from config import find
from dataset import evenly, rows_of
from evaluation.metrics import METRICS, Evaluation, build_metric, measure_each
from evaluation.pictures import grid, save_png
from evaluation.sampling import condition_by_row, condition_of, draw
from mistakes import Mistake, as_mistake
from samplers import SAMPLERS
from training import speed
from training.seeds import PICTURE, VALIDATION, mixed_seed
from training.state import take_state

log = logging.getLogger("train")
SAMPLES = 64  # in a picture
STRIPS, FRAMES = 8, 11  # samples whose way is shown, and states of each
FIRST_PICTURE = 30.0  # seconds of training until the first picture, if no epoch has ended by then that gets one
BATCH_SIZE = 64  # samples that are drawn at a time to be measured
# What a setting of the metrics is called in a config
KEYS = {"metrics": "train_cfg.metrics", "features": "train_cfg.metric_features", "n": "train_cfg.metric_samples"}
KEYS |= {"images": "train_cfg.metric_samples", "terms": "train_cfg.sample_timesteps"}


@torch.no_grad()
def valid_loss(run) -> float:
    """Mean loss on the validation set, over all ranks, with the same t and eps every time."""
    run.ranks.copy_first(run.averages.buffers())  # which are saved
    total, count = torch.zeros((), device=run.device), 0
    for i, (pixels, condition) in enumerate(run.valid_data.epoch(0)):
        run.stopper.check()
        torch.manual_seed(mixed_seed(VALIDATION, run.cfg.seed, run.ranks.rank, i))
        x0 = run.ema.x0_of(run.valid_data.images.to_float(pixels))
        total += run.ema(x0, run.cfg.chunk_size, condition=condition) * len(pixels)
        count += len(pixels)
    total, count = run.ranks.sum(torch.stack([total, torch.full_like(total, count)])).tolist()
    if not math.isfinite(total) and run.ranks.rank == 0:
        log.warning(f"the validation loss at step {run.step} is not finite, so these weights do not count as the best")
    return total / count


# Pictures


def how_to_sample(run) -> dict[str, Any]:
    """Options of a trajectory: train_cfg.sampler, but of symbols there is one alone; train_cfg.sample_timesteps, at most T; and
    images are kept in [-1, 1].
    """
    sampler = "ddpm" if run.ema.n_levels else find(run.cfg.sampler, SAMPLERS, FunctionType, "train_cfg.sampler")
    steps = min(run.cfg.sample_timesteps, run.ema.T)
    return {"sampler": sampler, "timesteps": steps, "clip_x0": not run.train_data.images.is_float}


@torch.no_grad()
def _try_sampler(run, how: dict[str, Any]) -> None:
    """Draw one sample by a sampler of one's own: what it does wrong is to be known before the first step."""
    with torch.random.fork_rng(devices=[]), speed.autocast(run.device, run.cfg.precision), as_mistake("train_cfg.sampler: "):
        run.ema.sample((1, *run.shape), **how, condition=run.train_data.example(1))


def save_samples(run, path: Path) -> None:
    """Samples from the same noise every time, of which each rank draws its share: a row a class, of the first 16; or where the
    data have conditions, samples by those of valid images.

    With train_cfg.loggers also the way of the first ones from x_T to x_0, beside path as NAME_strip.png.
    """
    share = math.ceil(SAMPLES / run.ranks.world)
    condition, columns = condition_by_row(run.n_classes, share * run.ranks.world)
    if run.valid_data.images.conditions:
        condition, columns = condition_of(run.valid_data.images, run.n_classes, share * run.ranks.world), None
    condition = rows_of(condition, slice(run.ranks.rank * share, (run.ranks.rank + 1) * share), run.device)
    generator = torch.Generator(run.device).manual_seed(mixed_seed(PICTURE, run.cfg.seed, run.ranks.rank))
    how = run.quality.how | {"generator": generator, "condition": condition}
    states = []
    for _, x in run.ema.trajectory((share, *run.shape), **how):
        run.stopper.check()
        states += [run.ema.values_of(x[:STRIPS].clone())] if run.cfg.loggers else []
    whole_rows = SAMPLES if columns is None else min(SAMPLES, columns * run.n_classes)
    x = torch.cat(run.ranks.gather([run.ema.values_of(x).cpu()]))[:whole_rows]
    if run.ranks.rank:
        return
    save_png(path, grid(x, columns))
    if states:
        strips = torch.stack([states[i] for i in evenly(FRAMES, len(states))], 1)
        save_png(path.with_stem(f"{path.stem}_strip"), grid(strips.flatten(0, 1), columns=strips.shape[1]))


def first_picture(run) -> None:
    """Draw one inside an epoch, if none has been drawn for so long; several ranks, whose clocks differ, wait for its end."""
    waited = time.monotonic() - run.begun[0] > FIRST_PICTURE
    if run.pictured or not waited or not run.sample_period or run.ranks.world > 1:
        return
    begin = time.perf_counter()
    with speed.autocast(run.device, run.cfg.precision):
        run.save_picture(run.folder.path / "first.png")
    run.meter.clock += time.perf_counter() - begin  # which counts training alone


# Metrics


class Quality:
    """train_cfg.metrics, every metric_period epochs and at the end, unless the run would then have spent more than metric_share
    of its time on them. Refuses, when made, what cannot be measured.

    seconds       that measuring took
    best_fd       least Fréchet distance, and better: is it the last one measured?
    """

    def __init__(self, run):
        self.run, self.metrics = run, {}
        self.seconds, self.best_fd, self.better = 0.0, math.inf, False
        self.began = time.monotonic()  # less the time that the run took before it was resumed
        self.expected: float | None = None  # seconds of the next measurement
        self.told = False
        self.how = how_to_sample(run)
        if self.how["sampler"] not in (*SAMPLERS, *SAMPLERS.values()):
            _try_sampler(run, self.how)
        if run.cfg.metric_period:
            self.evaluation = self._evaluation()
            self.metrics = {name: build_metric(name, self.evaluation, KEYS["metrics"]) for name in run.cfg.metrics}
            return
        for name in run.cfg.metrics:  # a slip is told, though none is measured
            try:
                find(name, METRICS, object, KEYS["metrics"])
            except Mistake as mistake:
                log.warning(mistake)

    def _evaluation(self) -> Evaluation:
        run, cfg = self.run, self.run.cfg
        terms = min(cfg.sample_timesteps, run.ema.T - 1) or None  # of the bound, so that an image costs as much as a sample
        how = {"n": cfg.metric_samples, "batch_size": BATCH_SIZE, "seed": cfg.seed, "features": cfg.metric_features}
        how |= {"bpd_images": cfg.metric_samples, "bpd_timesteps": terms, "datasets": {"valid": run.valid_data.images}}
        how |= {"centres": run.train_data.images.centres, "shape": run.shape, "names": KEYS}
        how |= {"conditions": list(run.train_data.images.conditions)}
        evaluation = Evaluation(run.ema, run.config, run.ranks, **how)
        if run.ranks.world == 1:  # ranks look for signals equally often or not at all
            evaluation.check = run.stopper.check
        return evaluation

    def measure(self, epoch: int, last: bool) -> dict[str, dict]:
        """What each metric found, if they are due and their share allows it; on ranks other than the first without what only
        that one knows.
        """
        cfg, self.better = self.run.cfg, False
        if not cfg.metric_period or not (last or epoch % cfg.metric_period == 0) or self._too_long(epoch):
            return {}
        self.run.save_last(take_state(self.run))  # a metric may fail, or outlast the patience of what sent a signal
        begin, metrics = time.monotonic(), self.metrics
        without_samples = {name: each for name, each in metrics.items() if not getattr(each, "uses_samples", True)}
        if len(without_samples) < len(metrics) and self._draw(cfg.metric_samples):
            metrics = without_samples
        results = {}
        for name, found in measure_each(metrics, self.run.ranks, cfg.precision):
            results[name] = found
            if self.run.ranks.rank == 0:
                log.info(self.metrics[name].describe(found))
        self.evaluation.samples, self.evaluation.condition = None, {}
        self._note_best(results)
        self.expected = time.monotonic() - begin
        self.seconds += self.expected
        return results

    def _note_best(self, found: dict[str, dict]) -> None:
        """Is it the least distance so far? The first rank's word counts, since all of them save together."""
        distance = found.get("fd", {}).get("distance", math.inf)
        self.better = self.run.ranks.largest(float(distance < self.best_fd)) > 0
        self.best_fd = distance if distance < self.best_fd else self.best_fd  # min() may keep a nan

    def _draw(self, n: int) -> bool:
        """Give the evaluation n samples, all on rank 0, each with the condition of a valid image.

        True, with a warning, where they are not finite: nothing can be measured of them then, and training goes on.
        """
        run = self.run
        condition = condition_of(run.valid_data.images, run.n_classes, n)
        how = self.how | {"batch_size": BATCH_SIZE, "seed": run.cfg.seed, "condition": condition}
        with speed.autocast(run.device, run.cfg.precision):
            drawn = draw(run.ema, n, run.shape, **how, ranks=run.ranks, check=self.evaluation.check)
        self.evaluation.samples, self.evaluation.condition = drawn.samples, condition
        bad = run.ranks.largest(float(not drawn.samples.isfinite().all())) > 0
        if bad and run.ranks.rank == 0:
            log.warning(f"samples at step {run.step} are not finite: the metrics that look at them are left out")
        return bad

    def _cost(self, metric: object) -> float:
        """Of an image, in samples: the bound takes about as long as one, and a class as many calls as it says, at most."""
        if not hasattr(metric, "calls"):
            return 1
        return metric.calls / self.run.ema.network_calls(self.how["timesteps"], self.how["sampler"])

    def _too_long(self, epoch: int) -> bool:
        """Would measuring now take the time spent on it above its share? Said once."""
        share, n = self.run.cfg.metric_share, self.run.cfg.metric_samples
        if self.expected is None:  # one batch a rank tells
            begin, batch = time.monotonic(), BATCH_SIZE * self.run.ranks.world
            self._draw(min(n, batch))
            probe = time.monotonic() - begin
            self.seconds += probe
            self.expected = probe * math.ceil(n / batch) * sum(map(self._cost, self.metrics.values()))
        part = (self.seconds + self.expected) / (time.monotonic() - self.began + self.expected)
        too_long = self.run.ranks.largest(float(part > share)) > 0
        if too_long and not self.told and self.run.ranks.rank == 0:
            self.told = True
            log.info(
                f"metrics: left out after epoch {epoch}, and later when need be: they would have taken {100 * part:.0f} % of "
                f"the run's time, where train_cfg.metric_share allows {100 * share:g} %; fewer metric_samples take less"
            )
        return too_long

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        seconds, run_seconds = (self.seconds, time.monotonic() - self.began) if self.metrics else (0.0, 0.0)
        return {"seconds": seconds, "run_seconds": run_seconds, "best_fd": self.best_fd}

    def restore(self, state: Mapping[str, float]) -> None:
        self.seconds, self.best_fd = state.get("seconds", 0.0), state.get("best_fd", math.inf)  # older ones have none
        self.began = time.monotonic() - state.get("run_seconds", 0.0)
