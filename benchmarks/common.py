"""What the benchmarks share: their options, a trainer to measure, interleaved timing, tables and result files.

Equal on every side of every comparison: torch's switches (TF32 on, cuDNN's choice of the fastest kernel on), set once by
`set_up`, and the rule for the precision, train.py's "auto", which is asked with each side's own step (`choose_precision`).
"""

import argparse
import bisect
import contextlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import resolve
from gaussian_diffusion import GaussianDiffusion
from train import Trainer
from training import speed
from training.ranks import Ranks
from training.speed import device_name

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = {"attention": [False, True, False, False]}  # at 16 x 16, of 32 x 32
# "cifar10" is the network of Ho et al. 2020, appendix B: 35,746,307 parameters
NETWORKS = {"cifar10": {"base_channels": 128} | ATTENTION, "small": {"base_channels": 32, "num_groups": 8} | ATTENTION}
PACKAGES = ("torch", "torchvision", "numpy", "diffusers", "denoising-diffusion-pytorch")


def options(description: str, **defaults: object) -> argparse.ArgumentParser:
    """The options of every benchmark. A default of None is chosen by `start`, for the device."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU, by default torch's own choice")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    parser.add_argument("--network", choices=NETWORKS, help="cifar10: that of the paper; small: a quarter of its width")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, help="timings of each thing, of which the median is shown")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), help="folder of the JSON file")
    parser.set_defaults(**defaults)
    return parser


def start(args: argparse.Namespace, cpu: Mapping, cuda: Mapping, quick: Mapping) -> torch.device:
    """Fill in what was left open, by device; the device."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {args.device}: CUDA is not available here")
    for name, value in (quick if args.quick else cuda if device.type == "cuda" else cpu).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    set_up(args)
    print(f"{device_name(device)}, torch {torch.__version__}, {args.network} network, batch {args.batch_size}", flush=True)
    return device


def set_up(args: argparse.Namespace) -> None:
    """Threads and torch's switches: once in a process, the same for all that it measures."""
    if args.threads:
        torch.set_num_threads(args.threads)
    speed.set_flags("tf32")


# What is measured


def config(network: str, batch_size: int, root: str, *, timesteps: int = 1000, loss_mode: str = "simple", **train_cfg) -> dict:
    """A resolved config of configs/CIFAR10_den.json's kind, for a folder of images."""
    images = {"root": root}
    fixed = {"epochs": 1000000, "lr": 2e-4, "num_workers": 0, "compile": False, "cuda_graph": False, "model_save_dirpath": root}
    return resolve(
        {
            "schedule": {"name": "LinearSchedule", "kwargs": {"timesteps": timesteps}},
            "time_aware_net": {"name": "TimeAwareUNet", "kwargs": {"n_channels": 3} | NETWORKS[network]},
            "diffusion": {"loss_mode": loss_mode},
            "dataset": {"name": "ImageFolder", "train": images, "valid": images},
            "train_cfg": {"batch_size": batch_size} | fixed | train_cfg,
        }
    )


@contextlib.contextmanager
def random_images(count: int, size: int, grey: bool = False, classes: int = 1) -> Iterator[str]:
    """A folder of `count` random images, in a folder a class; it is gone afterwards."""
    with tempfile.TemporaryDirectory() as root:
        pixels = np.random.default_rng(0).integers(0, 256, (count, size, size) if grey else (count, size, size, 3), np.uint8)
        for i, image in enumerate(pixels):
            folder = Path(root) / str(i % classes)
            folder.mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
        yield root


def trainer(device: torch.device, network: str, batch_size: int, image_size: int, **more) -> Trainer:
    """train.py's own trainer on random images, with random weights: also where training starts from zeros."""
    with random_images(batch_size, image_size) as root:
        made = Trainer(config(network, batch_size, root, **more), str(device))
        made.folder.close()
    with torch.no_grad():
        for parameter in made.parameters:
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape))  # drawn on the CPU: the same everywhere
    return made


def choose_precision(loss: Callable[[], Tensor], net: nn.Module, device: torch.device) -> str:
    """The precision of a side by train.py's rule, asked with that side's own step: loss() and its backward pass."""

    def step(precision: str) -> None:
        with speed.autocast(device, precision):
            value = loss()
        value.backward()
        net.zero_grad()

    return speed.choose_precision("auto", step, Ranks(str(device), alone=True), "precision")


def steps_within(diffusion: GaussianDiffusion, sampler: str, calls: int) -> int:
    """The most steps of a sampler for which a sample takes no more than so many network calls, at least 1."""
    counts = range(1, min(calls, diffusion.T) + 1)
    return max(1, bisect.bisect_right(counts, calls, key=lambda count: diffusion.network_calls(count, sampler)))


# Timing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    steps: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, inner: int = 1, warmup: int = 4
) -> dict[str, list[float]]:
    """Seconds of each step, timed in turns A B C A B C, so that a change of the machine's speed meets all of them.

    Each time is the mean over `inner` calls in a row: on a GPU several, so that calls overlap as they do in use.
    """
    for name, step in steps.items():
        begin = time.perf_counter()
        for _ in range(warmup):
            step()
        synchronize(device)
        print(f"  {name}: warm after {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(inner):
                step()
            synchronize(device)
            seconds[name].append((time.perf_counter() - begin) / inner)
    return seconds


def median_ratio(a: Iterable[float], b: Iterable[float]) -> float:
    """Median over the rounds of a / b: each quotient is of two neighbours in time."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


# Results


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def counted(step: Callable[[], object]) -> int:
    """Floating-point operations of a step; a multiplication with its addition counts as two."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def result_path(name: str, device: torch.device, quick: bool, folder: str | Path = ROOT / "benchmarks" / "results") -> Path:
    """NAME-DEVICE.json; what a quick run measures has a file of its own."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = Path(folder) / f"{name}-{slug}{'-quick' if quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def show(title: str, rows: list[dict]) -> None:
    """Print rows as a Markdown table."""
    print(f"\n{title}\n\n{markdown(rows)}", flush=True)


def markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table, with every key of a row in its head."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(key, "") for key in head] for row in rows]
    table = [head, *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in cells)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write(name: str, args: argparse.Namespace, device: torch.device, tables: dict[str, list[dict]]) -> None:
    """Print the tables and write them to NAME-DEVICE.json."""
    for title, rows in tables.items():
        show(title, rows)
    path = result_path(name, device, args.quick, args.results)
    result = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "versions": versions(),
        "settings": {name: value for name, value in vars(args).items() if name != "results"},
        "tables": tables,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{path}")
