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
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from checkpoint import MOST_VALUES, load_diffusion, save
from config import build_dataset
from dataset import ImageDataset
from evaluation.metrics import cached_classifier, frechet_distance, image_statistics, inception_features
from evaluation.pictures import grid, save_gif, save_png
from files import whole_file
from gaussian_diffusion import Bound, GaussianDiffusion, SamplerName
from train import PRECISIONS, SAMPLING, STEP, VALIDATION, OneLineParser, Ranks, compile_network, mixed_seed

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
    with tqdm(total=len(mine) * calls, desc="sampling", unit="call", disable=ranks.rank > 0) as bar:
        for first in mine:
            count = min(args.batch_size, args.n - first)
            generator = torch.Generator(ranks.device).manual_seed(mixed_seed(SAMPLING, args.seed, first))
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
    save_png(folder / "strips.png", grid(strips[:8].flatten(0, 1), columns=strips.shape[1]))
    save_png(folder / "grid.png", grid(samples))
    save_gif(folder / "trajectory.gif", [grid(frame) for frame in animation.unbind(1)])


# Metrics


def shares(images: ImageDataset, count: int, args: argparse.Namespace, ranks: Ranks, what: str) -> Iterator[Tensor]:
    """This rank's batches of `count` images spread evenly over a data set, floats on the device."""
    batches = torch.tensor(evenly(count, len(images))).split(args.batch_size)[ranks.rank :: ranks.world]
    for batch in tqdm(batches, desc=what, unit="batch", disable=ranks.rank > 0):
        yield images.to_float(torch.stack([images.pixels(i) for i in batch.tolist()])).to(ranks.device)


def fit_variance(diffusion: GaussianDiffusion, state: dict, args: argparse.Namespace, ranks: Ranks) -> None:
    """Fit the reverse variance to training images, the same on every rank, and save NAME_fitted.pth."""
    alone = Ranks(args.device, alone=True)
    images = list(shares(build_dataset(state["config"], "train"), args.fit_variance, args, alone, "reading images"))
    generator = torch.Generator(ranks.device).manual_seed(mixed_seed(STEP, args.seed))
    diffusion.fit_reverse_variance(images, generator=generator)
    path = Path(args.checkpoint)
    if ranks.rank == 0:
        save(path.with_stem(path.stem + "_fitted"), state | {"model" if args.raw else "ema": diffusion.state_dict()})


def bits_per_dimension(diffusion: GaussianDiffusion, state: dict, args: argparse.Namespace, ranks: Ranks) -> dict[str, float]:
    """The bound in bits per dimension on images of the valid split: its parts, and the total's standard error."""
    valid = build_dataset(state["config"], "valid")
    bounds = []
    for i, x0 in enumerate(shares(valid, args.bpd_images, args, ranks, "bits per dimension")):
        generator = torch.Generator(ranks.device).manual_seed(mixed_seed(VALIDATION, args.seed, ranks.rank, i))
        bound = diffusion.variational_bound(x0, discretized=True, timesteps=args.bpd_timesteps, generator=generator)
        bounds.append(torch.stack(bound).cpu() / math.log(2))
    bounds = torch.cat(ranks.gather(bounds), dim=1)  # [4, images]
    means = dict(zip(Bound._fields, bounds.mean(1).tolist(), strict=True))
    return means | {"standard_error": bounds[-1].std().item() / bounds.shape[1] ** 0.5, "images": bounds.shape[1]}


def feature_extractor(state: dict, args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """The one that --features names; the classifier is trained on the training images, once, and kept beside the data."""
    if args.features == "inception":
        return inception_features(device)
    train, name = build_dataset(state["config"], "train"), state["config"]["dataset"]["name"]
    if train.labels is None:
        raise ValueError(f"--features classifier: {name} has no labels to train one on; --features inception needs none")
    path = Path(args.classifier or f"models/classifier_{name}.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = torch.stack([train.pixels(i) for i in range(len(train))])
    return cached_classifier(path, images, train.labels, name, device=device)


def frechet(samples: Tensor, state: dict, args: argparse.Namespace, ranks: Ranks) -> dict[str, object]:
    """The Fréchet distance of the samples to all images of the valid split."""
    extractor = feature_extractor(state, args, ranks.device)
    valid = build_dataset(state["config"], "valid")
    real = image_statistics(shares(valid, len(valid), args, Ranks(args.device, alone=True), "real features"), extractor)
    made = image_statistics(samples.split(args.batch_size), extractor)
    return {"distance": frechet_distance(made, real), "samples": made.count, "real": real.count, "features": extractor.name}


def run(args: argparse.Namespace) -> None:
    ranks = Ranks(args.device)
    diffusion, state = load_diffusion(args.checkpoint, ema=not args.raw)
    diffusion.to(ranks.device)
    if args.compile or ranks.device.type == "cuda":  # uncompiled on a CPU it is slower
        diffusion.to(memory_format=torch.channels_last)
    if args.compile:
        compile_network(diffusion.time_aware_net, ranks.device, "--compile")
    shape = state["shape"][:1] + (args.size or state["shape"][1:])
    count = min(args.n, args.batch_size)
    if count * math.prod(shape) > MOST_VALUES:
        raise ValueError(f"{count} images of {shape} at a time: must be at most {MOST_VALUES:,} values; see --batch-size")
    folder = Path(args.checkpoint).with_suffix("").with_name(Path(args.checkpoint).stem + "_gen")
    folder.parent.joinpath(f".{folder.name}.part").touch()  # writable? now, and not after hours of sampling
    folder.parent.joinpath(f".{folder.name}.part").unlink()
    with ranks.autocast(args.precision):
        if args.fit_variance:
            fit_variance(diffusion, state, args, ranks)
        strips, animation, samples = (torch.cat(parts) for parts in zip(*draw(diffusion, shape, args, ranks), strict=True))
        results = {"bpd": bits_per_dimension(diffusion, state, args, ranks)} if "bpd" in args.metrics else {}
    if ranks.rank:
        return
    if "fd" in args.metrics:
        results["fd"] = frechet(samples, state, args, ranks)
    folder.mkdir(exist_ok=True)
    save_pictures(folder, strips, animation, samples[: args.pictures])
    print(f"{folder}: 0.png .. {len(strips) - 1}.png, strips.png, grid.png, trajectory.gif")
    if results:
        with whole_file(folder / "metrics.json") as file:
            file.write(json.dumps(results | {"settings": vars(args)}, indent=4).encode())
        print_table(results, args)


def print_table(results: dict, args: argparse.Namespace) -> None:
    if "bpd" in results:
        bpd = results["bpd"]
        parts = " + ".join(f"{name} {bpd[name]:.4f}" for name in Bound._fields[:-1])
        print(
            f"bits per dimension  {bpd['total']:.4f} +- {bpd['standard_error']:.4f} on {bpd['images']} valid images ({parts})"
        )
    if "fd" in results:
        fd, sampler = results["fd"], f"{args.sampler}, {args.timesteps or 'all'} steps"
        print(f"Fréchet distance    {fd['distance']:.4f} of {fd['samples']} samples ({sampler}) to {fd['real']} valid images,")
        print(f"                    in the features of the {fd['features']}")


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description="Sample from a checkpoint.", epilog="See the head of test.py for examples.")
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
    parser.add_argument("--metrics", nargs="+", default=[], choices=["bpd", "fd"], help="bits per dimension, Fréchet distance")
    parser.add_argument("--bpd-images", type=int, default=1000, help="images of the valid split for bpd")
    parser.add_argument("--bpd-timesteps", type=int, help="timesteps of each that are evaluated, unbiased; by default all T")
    parser.add_argument("--features", default="classifier", choices=["classifier", "inception"], help="what fd is taken in")
    parser.add_argument("--classifier", help="its file, by default models/classifier_DATASET.pth")
    parser.add_argument(
        "--fit-variance", type=int, metavar="N", help="first fit sigma_t^2 to N training images; saves NAME_fitted.pth"
    )
    parser.add_argument("--raw", action="store_true", help="the weights themselves instead of their average")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ...; by default CUDA where there is one")
    args = parser.parse_args(argv)
    try:
        for name in ("n", "frames", "pictures", "batch_size", "bpd_images", "fit_variance"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} = {getattr(args, name)}: must be at least 1")
        if len(args.size) not in (0, 2) or min(args.size, default=1) < 1:
            raise ValueError(f"H W = {' '.join(map(str, args.size))}: must be two numbers of at least 1, or none")
        if args.seed < 0:
            raise ValueError(f"--seed = {args.seed}: must be at least 0")
        run(args)
    except ValueError as error:
        print("test.py:", error, file=sys.stderr)
        return 2
    except OSError as error:
        print("test.py:", error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("test.py: stopped by SIGINT", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
