"""Sample from a checkpoint.

    python test.py models/Digits_den/last.pth                                  # 16 samples by all T steps
    python test.py models/Digits_den/last.pth -n 64 --sampler dpm --timesteps 20
    python test.py models/CelebA_HQ_256_den/last.pth 128 192                   # another height and width
    torchrun --nproc_per_node=4 test.py models/CIFAR10_den/last.pth -n 50000 --batch-size 512 --pictures 64

Writes to the folder NAME_gen beside NAME.pth: 0.png, 1.png, ..., a strip of states from x_T to x_0 for each sample; grid.png;
trajectory.gif, the grid as it comes out of the noise. The same seed and batch size give the same pictures.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_diffusion
from gaussian_diffusion import GaussianDiffusion, SamplerName
from pictures import grid, save_gif, save_png
from train import PRECISIONS, Ranks, mixed_seed

GIF_FRAMES = 50


def evenly(count: int, among: int) -> list[int]:
    """At most `count` indices spread evenly over 0..among - 1, both ends included."""
    return torch.linspace(0, among - 1, min(count, among), dtype=torch.float64).round().int().tolist()


def draw(diffusion: GaussianDiffusion, shape: list[int], args: argparse.Namespace, ranks: Ranks) -> list[tuple]:
    """(strips [b, frames, C, H, W], animation [b, frames, C, H, W], samples [b, C, H, W]) of each batch, all of them on rank 0.

    Strips and animation are of the first --pictures samples. Each batch has its own generator, so ranks may share them out.
    """
    calls = len(diffusion.steps(args.timesteps, args.sampler))
    strip_at, gif_at = evenly(args.frames, calls + 1), evenly(GIF_FRAMES, calls + 1)
    batches = range(0, args.n, args.batch_size)
    mine = batches[ranks.rank :: ranks.world]
    drawn = []
    with ranks.autocast(args.precision), tqdm(total=len(mine) * calls, desc="sampling", disable=ranks.rank > 0) as bar:
        for first in mine:
            count = min(args.batch_size, args.n - first)
            generator = torch.Generator(ranks.device).manual_seed(mixed_seed(args.seed, first))
            states = diffusion.trajectory(
                (count, *shape), args.sampler, args.timesteps, args.eta, clip_x0=not args.no_clip, generator=generator
            )
            strip, frames, x = [], [], None
            for i, (_, x) in enumerate(states):
                shown = x[: max(0, args.pictures - first)]
                strip += [shown.cpu()] if i in strip_at else []
                frames += [shown.cpu()] if i in gif_at else []
                bar.update(i > 0)
            drawn.append((first, torch.stack(strip, 1), torch.stack(frames, 1), x.cpu()))
    return [parts for _, *parts in sorted(ranks.gather(drawn), key=lambda parts: parts[0])]


def save_pictures(folder: Path, strips: Tensor, animation: Tensor, samples: Tensor) -> None:
    for i, strip in enumerate(strips):
        save_png(folder / f"{i}.png", grid(strip, columns=len(strip)))
    save_png(folder / "grid.png", grid(samples))
    save_gif(folder / "trajectory.gif", [grid(frame) for frame in animation.unbind(1)])


def run(args: argparse.Namespace) -> None:
    ranks = Ranks(args.device)
    diffusion, state = load_diffusion(args.checkpoint, ema=not args.raw)
    diffusion.to(ranks.device)
    if args.compile:
        diffusion.time_aware_net.compile()
    shape = state["shape"][:1] + (args.size or state["shape"][1:])
    strips, animation, samples = (torch.cat(parts) for parts in zip(*draw(diffusion, shape, args, ranks), strict=True))
    if ranks.rank:
        return
    folder = Path(args.checkpoint).with_suffix("").with_name(Path(args.checkpoint).stem + "_gen")
    folder.mkdir(exist_ok=True)
    save_pictures(folder, strips, animation, samples)
    print(f"{folder}/0.png .. {len(strips) - 1}.png, grid.png, trajectory.gif")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sample from a checkpoint.", epilog="See the head of test.py for examples.")
    parser.add_argument("checkpoint")
    parser.add_argument(
        "size", nargs="*", type=int, metavar="H W", help="height and width, by default those of the training images"
    )
    parser.add_argument("-n", type=int, default=16, help="number of samples")
    parser.add_argument("-s", "--seed", type=int, default=0)
    parser.add_argument("--sampler", default="ddpm", choices=get_args(SamplerName))
    parser.add_argument("--timesteps", type=int, help="network calls a sample, by default T")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the sampler ddim: 0 none, 1 as much as ddpm")
    parser.add_argument("--no-clip", action="store_true", help="do not keep each predicted x_0 in [-1, 1]")
    parser.add_argument("--frames", type=int, default=11, help="states in a strip")
    parser.add_argument(
        "--pictures", type=int, default=64, help="samples that get a strip, a place in the grid and the animation"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--raw", action="store_true", help="the weights themselves instead of their average")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ...; by default CUDA where there is one")
    args = parser.parse_args(argv)
    try:
        for name in ("n", "frames", "pictures", "batch_size"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} = {getattr(args, name)}: must be at least 1")
        if len(args.size) not in (0, 2) or min(args.size, default=1) < 1:
            raise ValueError(f"H W = {' '.join(map(str, args.size))}: must be two numbers of at least 1, or none")
        run(args)
    except (ValueError, OSError) as error:
        print("test.py:", error, file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
