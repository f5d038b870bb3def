"""Cost of a training step and a sampling step against image size, batch, T, and processes.

    python benchmarks/scaling.py           # minutes
    python benchmarks/scaling.py --quick

One of the four is varied at a time. Processes are started by torchrun, over gloo on a CPU (its threads shared out between them)
and NCCL on GPUs: once with the whole batch fixed, once with the batch of each process fixed. The precision is what "auto" finds
for each setting, for training and sampling alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch
from common import interleaved, options, set_up, start, trainer, write

from training.ranks import leave_ranks
from training.speed import autocast

CALLS = 4  # network calls of a sampling run


def measure(args: argparse.Namespace, device: torch.device, batch_size: int, image_size: int, timesteps: int = 1000) -> dict:
    """Median milliseconds of a step of each kind."""
    run = trainer(device, args.network, batch_size, image_size, timesteps=timesteps)
    pixels, _ = next(run.train_data.epoch(0))
    inner = 5 if device.type == "cuda" else 1

    def sample():
        with autocast(device, run.cfg.precision):
            run.model.sample(pixels.shape, "ddpm", min(CALLS, timesteps), clip_x0=True)

    steps = {"train": lambda: run.train_step(pixels), "sample": sample}
    seconds = interleaved(steps, device, args.rounds, inner)
    train, sampling = (statistics.median(seconds[name]) for name in steps)
    sampling /= min(CALLS, timesteps)
    return {
        "precision": run.cfg.precision,
        "training ms": 1000 * train,
        "training images / s": batch_size / train,
        "sampling ms": 1000 * sampling,
        "sampling images / s": batch_size / sampling,
    }


def worker(args: argparse.Namespace) -> None:
    """One of the processes that torchrun started: a training step of the whole batch, over all of them."""
    set_up(args)
    run = trainer(torch.device(args.device), args.network, args.batch_size, args.image_size)
    pixels, _ = next(run.train_data.epoch(0))
    times = interleaved({"train": lambda: run.train_step(pixels)}, run.device, args.rounds)["train"]
    if run.ranks.rank == 0:
        print(json.dumps(statistics.median(times)), flush=True)
    leave_ranks()


def of_processes(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Seconds of a training step by 1, 2, 4, ... processes."""
    most = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count()
    counts = [n for n in (1, 2, 4, 8) if n <= most]
    rows = []
    for fixed in ("whole batch", "batch a process"):
        for n in counts:
            batch = args.batch_size * (n if fixed == "batch a process" else 1)
            threads = max(1, torch.get_num_threads() // n)
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__, "--worker"]
            sizes = ["--batch-size", batch, "--image-size", args.image_size, "--rounds", args.rounds, "--threads", threads]
            command = [sys.executable, *launch, *sizes, "--network", args.network, "--device", device.type]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, check=True)
            seconds = json.loads(done.stdout.strip().splitlines()[-1])
            rows.append(
                {"fixed": fixed, "processes": n, "threads each": threads, "batch": batch, "training ms": 1000 * seconds}
            )
            rows[-1]["training images / s"] = batch / seconds
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args)
    device = start(
        args,
        cpu={"network": "small", "batch_size": 8, "rounds": 7},
        cuda={"network": "cifar10", "batch_size": 64, "rounds": 7},
        quick={"network": "small", "batch_size": 4, "rounds": 2},
    )
    base = args.image_size
    sizes = [base // 2, base, 2 * base] if not args.quick else [base // 2, base]
    batches = [args.batch_size // 4, args.batch_size // 2, args.batch_size, 2 * args.batch_size]
    tables = {
        "Image size": [{"size": size} | measure(args, device, args.batch_size, size) for size in sizes],
        "Batch": [{"batch": batch} | measure(args, device, batch, base) for batch in batches],
        "T": [{"T": T} | measure(args, device, args.batch_size, base, T) for T in (10, 100, 1000, 4000)],
        "Processes": of_processes(args, device),
    }
    write("scaling", args, device, tables)


if __name__ == "__main__":
    main()
