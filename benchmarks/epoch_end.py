"""What the end of an epoch adds to the training of CIFAR10: validation, records, picture and checkpoints, as a share of it.

    python benchmarks/epoch_end.py                               # on a GPU configs/CIFAR10_den.json as it is: minutes
    python benchmarks/epoch_end.py --network cifar10 --batch-size 128 --device cpu       # the same on a CPU: an hour
    python benchmarks/epoch_end.py --quick                       # seconds, a small network

The trainer is train.py's own, with random images in the place of the data set. An epoch is not run: a training step and some
batches of the validation are timed, and counted as often as they are in 50,000 training and 10,000 validation images (or the
config's valid_images); a picture's network calls likewise. The rest happens less often or by the clock, as the config says, and
counts for its share of an epoch: pictures every sample_period epochs, epoch_N.pth every save_period, best.pth and last.pth
every save_minutes. Of best.pth, every epoch takes a copy, as if each were the best so far. A checkpoint costs the copy, for
which the steps wait, and what the thread that writes it slows them down.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import NETWORKS, ROOT, interleaved, options, random_images, start, synchronize, write
from tqdm import tqdm

from config import load_config
from train import Trainer
from training.speed import autocast
from training.state import take_state
from training.writer import Writer

CONFIG = ROOT / "configs" / "CIFAR10_den.json"
TRAINING_IMAGES, VALIDATION_IMAGES = 50000, 10000  # of the data set
TARGET = 5  # % of an epoch


@contextmanager
def trainer(args: argparse.Namespace, device: torch.device) -> Iterator[Trainer]:
    """train.py's trainer of the config on args.batches random batches, its folder open, on the disk where checkpoints go."""
    (ROOT / "models").mkdir(exist_ok=True)
    with (
        random_images(args.batches * args.batch_size, args.image_size) as images,
        tempfile.TemporaryDirectory(dir=ROOT / "models") as folder,
    ):
        network = [f"time_aware_net.kwargs.{key}={json.dumps(value)}" for key, value in NETWORKS[args.network].items()]
        split = json.dumps({"root": images, "pipeline": [{"name": "RandomHorizontalFlip"}]})
        data = ["dataset.name=ImageFolder", f"dataset.train={split}", f'dataset.valid={{"root": "{images}"}}']
        run = [f"train_cfg.batch_size={args.batch_size}", f"train_cfg.sample_timesteps={args.picture_calls}"]
        run += [f"train_cfg.model_save_dirpath={folder}", "train_cfg.num_workers=0"]
        made = Trainer(load_config(CONFIG, [*network, *data, *run]), str(device))
        made.folder.open(None, 0)
        made.writer, made.begun = Writer(), (time.monotonic(), 0)
        try:
            yield made
        finally:
            made.writer.close()
            made.folder.close()


def seconds_of(device: torch.device, rounds: int, action: Callable[[], object]) -> float:
    """Median over the rounds, after one to warm up."""
    return statistics.median(interleaved({"once": action}, device, rounds, warmup=1)["once"])


def slowdown(run: Trainer, pixels: torch.Tensor, step: float, rounds: int) -> float:
    """Seconds that writing a checkpoint adds to the training steps meanwhile: the median over the rounds."""
    added = []
    for _ in range(rounds):
        state = take_state(run)
        synchronize(run.device)
        begin, steps = time.perf_counter(), 0
        run.writer.save(run.folder.path / "last.pth", state)
        while run.writer.jobs.unfinished_tasks:
            run.train_step(pixels)
            synchronize(run.device)
            steps += 1
        added.append(time.perf_counter() - begin - steps * step)
    return statistics.median(added)


def measure(args: argparse.Namespace, run: Trainer) -> tuple[float, float, dict[str, float]]:
    """Seconds of a training step, of an epoch's steps, and of each thing that an epoch's end does, once."""
    (pixels, _), device, cfg = next(run.train_data.epoch(0)), run.device, run.cfg
    inner = 10 if device.type == "cuda" else 1
    step = seconds_of(device, args.rounds, lambda: [run.train_step(pixels) for _ in range(inner)]) / inner
    waited = seconds_of(device, args.rounds, lambda: run.train_step(pixels))  # for each step, as slowdown does
    valid_images = min(VALIDATION_IMAGES, cfg.valid_images or VALIDATION_IMAGES)
    calls = load_config(CONFIG)["train_cfg"]["sample_timesteps"]
    path, bar = run.folder.path / "epoch_1.png", tqdm(disable=True)
    with autocast(device, cfg.precision):
        validation = seconds_of(device, args.rounds, run.validate) / run.valid_data.steps
        picture = seconds_of(device, args.rounds, lambda: run.save_picture(path))
    parts = {
        f"validation, {valid_images} images": validation * math.ceil(valid_images / cfg.batch_size),
        "record": seconds_of(device, args.rounds, lambda: run.record(bar, 0.0)),
        "picture": picture * calls / cfg.sample_timesteps,
        "copy of the state": seconds_of(device, args.rounds, lambda: take_state(run)),
        "steps slowed down by writing": slowdown(run, pixels, waited, args.rounds),
    }
    return step, step * math.ceil(TRAINING_IMAGES / cfg.batch_size), parts


def table(run: Trainer, epoch: float, parts: dict[str, float]) -> list[dict]:
    """Each part, how often it comes in an epoch, and its share of the epoch's steps."""
    cfg = run.cfg
    by_clock = epoch / (60 * cfg.save_minutes) if cfg.save_minutes else 1.0
    by_epoch = 1 / cfg.save_period if cfg.save_period else 0.0
    times = dict.fromkeys(parts, 1.0) | {
        "picture": 1 / cfg.sample_period if cfg.sample_period else 0.0,
        "copy of the state": 1 + by_clock,  # of best.pth and last.pth; epoch_N.pth shares the first
        "steps slowed down by writing": min(1, by_clock) + by_clock + by_epoch,  # best.pth no more often than it is copied
    }
    rows = [
        {
            "part": name,
            "ms once": 1000 * once,
            "times an epoch": times[name],
            "ms an epoch": 1000 * once * times[name],
            "% of an epoch": 100 * once * times[name] / epoch,
        }
        for name, once in parts.items()
    ]
    total = {key: sum(row[key] for row in rows) for key in ("ms an epoch", "% of an epoch")}
    return [*rows, {"part": f"all (target: at most {TARGET} %)"} | total]


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, help="of the validation, timed for all")
    parser.add_argument("--picture-calls", type=int, help="network calls of a picture, timed for all")
    args = parser.parse_args(argv)
    device = start(
        args,
        cpu={"network": "small", "batch_size": 16, "rounds": 5, "batches": 4, "picture_calls": 4},
        cuda={"network": "cifar10", "batch_size": 128, "rounds": 7, "batches": 20, "picture_calls": 20},
        quick={"network": "small", "batch_size": 4, "rounds": 1, "batches": 2, "picture_calls": 1},
    )
    with trainer(args, device) as run:
        step, epoch, parts = measure(args, run)
        size = Path(run.folder.path / "last.pth").stat().st_size
        facts = {
            "precision": run.cfg.precision,
            "compiled": run.cfg.compile,
            "batch": run.cfg.batch_size,
            "ms a step": 1000 * step,
            "seconds an epoch": epoch,
            "checkpoint, MB": size / 1e6,
        }
        write("epoch_end", args, device, {"An epoch's steps": [facts], "What its end adds": table(run, epoch, parts)})


if __name__ == "__main__":
    main()
