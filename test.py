"""Sample from a checkpoint, and measure it.

    python test.py models/Digits_den/last.pth                                  # 16 samples by all T steps
    python test.py models/Digits_den/last.pth -n 64 --sampler dpm --timesteps 20
    python test.py models/FashionMNIST_den/last.pth -n 1000 --sampler ddim --timesteps 50 --metrics bpd fd
    python test.py models/CelebA_HQ_256_den/last.pth 128 192                   # another height and width
    torchrun --nproc_per_node=4 test.py models/CIFAR10_den/last.pth -n 50000 --batch-size 512 --pictures 64

Writes to the folder NAME_gen beside NAME.pth: 0.png, 1.png, ..., a strip of states from x_T to x_0 for each sample; strips.png,
the first eight of them; grid.png, the samples; trajectory.gif, the grid as it comes out of the noise; metrics.json, what was
measured. The same seed and batch size give the same pictures.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor

from checkpoint import MAX_VALUES, load_diffusion, save
from config import check_shape, find
from discrete_diffusion import to_symbols
from evaluation.metrics import METRICS, Evaluation
from evaluation.pictures import grid, save_gif, save_png
from evaluation.sampling import Drawn, draw
from files import whole_file
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake, OneLineParser, as_mistake, run_script
from samplers import SAMPLERS
from training import speed
from training.ranks import Ranks, leave_ranks
from training.seeds import STEP, mixed_seed


def save_pictures(folder: Path, drawn: Drawn, pictures: int) -> None:
    for i, strip in enumerate(drawn.strips):
        save_png(folder / f"{i}.png", grid(strip, columns=len(strip)))
    save_png(folder / "strips.png", grid(drawn.strips[:8].flatten(0, 1), columns=drawn.strips.shape[1]))
    save_png(folder / "grid.png", grid(drawn.samples[:pictures]))
    save_gif(folder / "trajectory.gif", [grid(frame) for frame in drawn.animation.unbind(1)])


def fit_variance(evaluation: Evaluation, state: dict, count: int, target: Path, weights: str) -> None:
    """Fit the reverse variance to training images, the same on every rank, and save it with the rest of the checkpoint."""
    ranks = evaluation.ranks
    images = list(evaluation.images("train", count, Ranks(str(ranks.device), alone=True)))
    generator = torch.Generator(ranks.device).manual_seed(mixed_seed(STEP, evaluation.seed))
    evaluation.diffusion.fit_reverse_variance(images, generator=generator)
    if ranks.rank == 0:
        save(target, state | {weights: evaluation.diffusion.state_dict()})


def set_speed(diffusion: GaussianDiffusion, x0: Tensor, asked: str, compiled: bool, ranks: Ranks) -> str:
    """The precision to sample images like x0 in; the network is compiled if that is asked for."""
    if compiled or ranks.device.type == "cuda":  # uncompiled on a CPU it is slower
        diffusion.to(memory_format=torch.channels_last)
    speed.set_flags(asked)
    precision = speed.choose_precision(asked, speed.probe_call(diffusion, x0, ranks.device), ranks, "--precision")
    speed.set_flags(precision)
    if compiled:
        speed.check_compiler(ranks.device, "--compile")
        diffusion.time_aware_net.compile()
    return precision


def run(args: argparse.Namespace) -> None:
    ranks, path = Ranks(args.device), Path(args.checkpoint)
    diffusion, state = load_diffusion(path, ema=not args.raw)
    diffusion.to(ranks.device)
    shape = state["shape"][:1] + (args.size or state["shape"][1:])
    if (values := min(args.n, args.batch_size) * math.prod(shape)) > MAX_VALUES:
        raise Mistake(f"images of {shape}: {values:,} values at a time, must be at most {MAX_VALUES:,}; see --batch-size")
    check_shape(state["config"], shape)
    sampler = args.sampler if diffusion.n_levels else find(args.sampler, SAMPLERS, FunctionType, "--sampler")
    options = {"sampler": sampler, "timesteps": args.timesteps, "eta": args.eta, "clip_x0": not args.no_clip}
    with as_mistake():
        diffusion.trajectory((1, *shape), **options)  # checks the options, and computes nothing yet
    evaluation = Evaluation(
        diffusion,
        state["config"],
        ranks,
        args.n,
        args.batch_size,
        args.seed,
        args.bpd_images,
        args.bpd_timesteps,
        args.features,
        args.classifier,
    )
    metrics = {name: find(name, METRICS, object, "--metrics")(evaluation) for name in args.metrics}
    folder = path.with_name(f"{path.stem}_gen")
    folder.parent.joinpath(f".{folder.name}.part").touch()  # writable? now, and not after hours of sampling
    folder.parent.joinpath(f".{folder.name}.part").unlink()
    if args.fit_variance and diffusion.n_levels:
        raise Mistake("--fit-variance: a diffusion of symbols has no reverse variance")
    x0 = torch.zeros(min(args.n, args.batch_size, speed.PROBE_ROWS), *shape, device=ranks.device)
    x0 = to_symbols(x0, diffusion.n_levels)
    precision = set_speed(diffusion, x0, args.precision, args.compile, ranks)
    with speed.autocast(ranks.device, precision):
        if args.fit_variance:
            target = path.with_stem(f"{path.stem}_fitted")
            fit_variance(evaluation, state, args.fit_variance, target, "model" if args.raw else "ema")
        how = {name: getattr(args, name) for name in ("batch_size", "seed", "pictures", "frames")}
        drawn = draw(diffusion, args.n, shape, **options, **how, ranks=ranks)
    evaluation.samples = drawn.samples
    if ranks.rank == 0:
        folder.mkdir(exist_ok=True)
        save_pictures(folder, drawn, args.pictures)
        print(f"{folder}: 0.png .. {len(drawn.strips) - 1}.png, strips.png, grid.png, trajectory.gif")
    results = {}
    for name, metric in metrics.items():
        if ranks.rank and not metric.uses_model:
            continue
        with speed.autocast(ranks.device, precision if metric.uses_model else "fp32"):
            results[name] = metric.measure()
        if ranks.rank == 0:  # what is measured is written before the next thing is tried
            with whole_file(folder / "metrics.json") as file:
                file.write(json.dumps(results | {"settings": vars(args)}, indent=4).encode())
            print(metric.describe(results[name]))


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description="Sample from a checkpoint.", epilog="See the head of test.py for examples.")
    parser.add_argument("checkpoint")
    parser.add_argument(
        "size", nargs="*", type=int, metavar="H W", help="height and width, by default those of the training images"
    )
    parser.add_argument("-n", type=int, default=16, help="number of samples")
    parser.add_argument("-s", "--seed", type=int, default=0)
    parser.add_argument(
        "--sampler", default="ddpm", help=f"{', '.join(SAMPLERS)}, or a function of your own as my_file.my_sampler"
    )
    parser.add_argument("--timesteps", type=int, help="steps a sample, by default T; heun has two network calls in each")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the sampler ddim: 0 none, 1 as much as ddpm")
    parser.add_argument("--no-clip", action="store_true", help="do not keep each predicted x_0 in [-1, 1]")
    parser.add_argument("--frames", type=int, default=11, help="states in a strip")
    parser.add_argument(
        "--pictures", type=int, default=64, help="samples that get a strip, a place in the grid and the animation"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--metrics", nargs="+", default=[], help=f"{', '.join(METRICS)}, or a class of your own as my_file.MyMetric"
    )
    parser.add_argument("--bpd-images", type=int, default=1000, help="images of the valid split for bpd")
    parser.add_argument("--bpd-timesteps", type=int, help="timesteps of each that are evaluated, unbiased; by default all T")
    parser.add_argument("--features", default="classifier", choices=["classifier", "inception"], help="what fd is taken in")
    parser.add_argument("--classifier", help="its file, by default models/classifier_DATASET.pth")
    parser.add_argument(
        "--fit-variance", type=int, metavar="N", help="first fit sigma_t^2 to N training images; saves NAME_fitted.pth"
    )
    parser.add_argument("--raw", action="store_true", help="the weights themselves instead of their average")
    parser.add_argument("--precision", default="fp32", choices=["auto", *speed.PRECISIONS])
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ...; by default CUDA where there is one")
    args = parser.parse_args(argv)

    def work() -> None:
        _check(args)
        run(args)

    try:
        return run_script("test.py", work)
    finally:
        leave_ranks()


def _check(args: argparse.Namespace) -> None:
    for name in ("n", "frames", "pictures", "batch_size", "bpd_images", "fit_variance"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise Mistake(f"--{name.replace('_', '-')} = {getattr(args, name)}: must be at least 1")
    if len(args.size) not in (0, 2) or min(args.size, default=1) < 1:
        raise Mistake(f"H W = {' '.join(map(str, args.size))}: must be two numbers of at least 1, or none")
    if args.seed < 0:
        raise Mistake(f"--seed = {args.seed}: must be at least 0")


if __name__ == "__main__":
    sys.exit(main())
