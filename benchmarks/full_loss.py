"""Time and peak memory of a training pass, simple and full, as T grows.

    python benchmarks/full_loss.py         # minutes
    python benchmarks/full_loss.py --quick

Each setting runs in a process of its own, in float32, with TF32 on a GPU. Its peak memory is read from outside: VmHWM of
/proc/PID/status on a CPU, which holds all of Python and PyTorch ("base" is the peak before the first call of the network); on a
GPU what PyTorch allocated there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import NETWORKS, options, set_up, start, synchronize, write

from beta_schedule import LinearSchedule
from diffusion_process import CHUNK_ROWS
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareUNet


def worker(args: argparse.Namespace) -> None:
    """Measure one setting, say so on stdout, and stay until the parent has read this process's peak memory."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    set_up(args)
    torch.manual_seed(0)
    net = TimeAwareUNet(3, **NETWORKS[args.network]).to(device, memory_format=torch.channels_last)
    net.activation_checkpointing = args.activation_checkpointing
    x0 = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1
    base = torch.cuda.memory_allocated(device) / 2**20 if cuda else _peak_mib("self")
    # a first pass with the shapes of the calls to come
    first = max(1, CHUNK_ROWS // args.batch_size) if args.worker == "full" else 2
    for T, timed in ((min(first, args.timesteps), False), (args.timesteps, True)):
        diffusion = GaussianDiffusion(LinearSchedule(T), net, loss_mode=args.worker).to(device)
        seconds = []
        for _ in range(args.rounds if timed else 1):
            synchronize(device)
            begin = time.perf_counter()
            diffusion(x0, args.chunk_size).backward()
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
            diffusion.zero_grad()
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None
    print(json.dumps({"seconds": statistics.median(seconds), "base MiB": base, "peak MiB": peak}), flush=True)
    sys.stdin.read()


def _peak_mib(pid: int | str) -> float:
    """Peak resident memory of a process, as the kernel keeps it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(args: argparse.Namespace, loss: str, timesteps: int) -> dict:
    """One setting in a fresh process."""
    rounds = args.rounds if loss == "simple" else max(1, args.rounds * 10 // timesteps)
    command = [sys.executable, __file__, "--worker", loss, "--timesteps", timesteps, "--rounds", rounds]
    for name in ("device", "network", "batch_size", "image_size", "threads", "chunk_size"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", getattr(args, name)]
    command += ["--activation-checkpointing"] if args.activation_checkpointing else []
    with subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{loss}, T = {timesteps}: the measuring process failed")
        result = json.loads(line)
        if result["peak MiB"] is None:
            result["peak MiB"] = _peak_mib(process.pid)
        process.stdin.close()
    print(f"  {loss}, T = {timesteps}: {result['seconds']:.3g} s", file=sys.stderr, flush=True)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--timesteps", type=int, nargs="+", default=[10, 50, 100, 1000], help="each T to measure")
    parser.add_argument("--chunk-size", type=int, help="timesteps in one network call of the full loss")
    parser.add_argument("--worker", choices=("simple", "full"), help=argparse.SUPPRESS)
    parser.add_argument("--activation-checkpointing", action="store_true", help="in the U-Net, for every setting")
    args = parser.parse_args(argv)
    if args.worker:
        args.timesteps = args.timesteps[0]
        return worker(args)
    device = start(
        args,
        cpu={"network": "small", "batch_size": 4, "rounds": 20},
        cuda={"network": "cifar10", "batch_size": 16, "rounds": 20},
        quick={"network": "small", "batch_size": 4, "rounds": 3},
    )
    if args.quick:
        args.timesteps = [10, 50]
        args.image_size = 16
    rows = []
    for loss in ("simple", "full"):
        for timesteps in args.timesteps:
            result = measure(args, loss, timesteps)
            rows.append({"loss": loss, "T": timesteps, **result})
    simple, full = ({row["T"]: row for row in rows if row["loss"] == loss} for loss in ("simple", "full"))
    short = min(args.timesteps, key=lambda T: abs(T - 50))
    ratios = [
        {
            "T": T,
            "time of full / T simple losses": full[T]["seconds"] / (T * simple[T]["seconds"]),
            f"peak memory / that of full at T = {short}": full[T]["peak MiB"] / full[short]["peak MiB"],
        }
        for T in args.timesteps
    ]
    write("full_loss", args, device, {"Forward and backward pass": rows, "Ratios": ratios})


if __name__ == "__main__":
    main()
