"""This library beside diffusers (same network, same weights) and denoising-diffusion-pytorch (its own U-Net of the same size).

    python benchmarks/peers.py             # on a GPU if there is one: minutes; on a CPU about a quarter of an hour
    python benchmarks/peers.py --quick     # seconds, a small network, nothing compiled

A training step is: noise, network, loss, backward pass, gradient clipping, optimizer, average of the weights, all from a batch
of images that lies on the device (ours as uint8, theirs as floats). A sampling step is a network call and the update of
ancestral sampling, as the library's own sampler does it. Each side has two settings:

    ours         default: train.py and test.py as they are, uncompiled. best: compiled (train_cfg.compile, --compile)
    diffusers    default: the loop of its train_unconditional.py with EMA; its DDPMPipeline. best: what its page on speed says,
                 channels_last, compiled, weights in bf16 to sample; and PyTorch's fused AdamW, the foreach variant of its EMA
    denoising-   default: the loop of its Trainer, but averaging every step, as the others do; its p_sample.
    diffusion-   best: flash_attn, compiled; and PyTorch's fused Adam, the foreach variant of its EMA
    pytorch

Equal on all sides: one process, timed in turns; nothing is synchronised inside a step; torch's switches (TF32 on, cuDNN chooses
the fastest kernels); the rule for the precision, which is train.py's "auto", asked with the side's own training step and kept
for its sampling: bf16 on a GPU that has it, on a CPU the faster of bf16 and fp32.
"""

import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import choose_precision, interleaved, median_ratio, options, set_up, start, trainer, write
from torch import Tensor, nn

from config import build_diffusion
from convert import scheduler_options, unet_options, weights_to_diffusers
from test import set_speed
from training.speed import autocast

T = 1000


class Side(NamedTuple):
    """A library in one of its settings."""

    train: Callable[[], object]  # a training step
    sample: Callable[[], object]  # args.steps sampling steps
    precision: str
    parameters: int


def ours(args, device, best: bool) -> Side:
    compiled = best and args.compile
    run = trainer(device, args.network, args.batch_size, args.image_size, timesteps=T, compile=compiled, cuda_graph="auto")
    pixels, _ = next(run.train_data.epoch(0))

    # test.py has a model of its own, from a checkpoint
    sampling = build_diffusion(run.config).to(device).eval()
    sampling.load_state_dict(run.model.state_dict())
    precision = set_speed(sampling, torch.zeros(pixels.shape, device=device), run.cfg.precision, compiled, run.ranks)
    times = list(range(T, T - args.steps, -1))

    def sample():
        with autocast(device, precision):
            return sampling.sample(pixels.shape, "ddpm", times, clip_x0=True)

    return Side(lambda: run.train_step(pixels), sample, precision, count(run.model))


def of_diffusers(args, device, best: bool) -> Side:
    import diffusers
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    source = trainer(torch.device("cpu"), args.network, args.batch_size, args.image_size, timesteps=T, precision="fp32")
    net_kwargs = source.config["time_aware_net"]["kwargs"]

    def network():
        unet = diffusers.UNet2DModel(**unet_options(net_kwargs, args.image_size)).to(device)
        unet.load_state_dict(weights_to_diffusers(source.model.time_aware_net))
        return unet.to(memory_format=torch.channels_last) if best else unet

    unet, scheduler = network().train(), diffusers.DDPMScheduler(**scheduler_options(source.config))
    settings = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
    optimizer = torch.optim.AdamW(unet.parameters(), **settings, fused=True if best else None)
    warmup = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100000)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75, foreach=best)
    ema.to(device)
    x0 = images(args, device)

    def loss() -> Tensor:
        noise = torch.randn_like(x0)
        t = torch.randint(0, T, (len(x0),), device=device).long()
        return F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample.float(), noise)

    precision = choose_precision(loss, unet, device)

    def train():
        with autocast(device, precision):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    frozen = network().eval()
    low = best and precision == "bf16"  # its page on speed: load the pipeline in low precision, without autocast
    if low:
        frozen.to(torch.bfloat16)
    if best and args.compile:
        unet.compile(mode=args.peer_compile_mode)
        frozen.compile(mode=args.peer_compile_mode)
    pipeline = diffusers.DDPMPipeline(frozen, diffusers.DDPMScheduler(**scheduler_options(source.config)))
    pipeline.set_progress_bar_config(disable=True)

    def sample():
        with autocast(device, "fp32" if low else precision):
            return pipeline(args.batch_size, num_inference_steps=args.steps, output_type="pt")

    return Side(train, sample, precision, count(unet))


def of_denoising_diffusion_pytorch(args, device, best: bool) -> Side:
    import denoising_diffusion_pytorch as peer
    from ema_pytorch import EMA

    def network():
        unet = peer.Unet(dim=64 if args.network == "cifar10" else 16, dim_mults=(1, 2, 4, 8), flash_attn=best)
        diffusion = peer.GaussianDiffusion(unet, image_size=args.image_size, timesteps=T, objective="pred_noise")
        return diffusion.to(device)

    diffusion = network()
    x0 = images(args, device) / 2 + 0.5
    precision = choose_precision(lambda: diffusion(x0), diffusion, device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True if best else None)
    ema = EMA(diffusion, beta=0.995, update_every=1, update_after_step=0, use_foreach=best).to(device)

    def train():
        with autocast(device, precision):
            loss = diffusion(x0)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    frozen = network().eval()
    if best and args.compile:
        for each in (diffusion, frozen):
            each.model.compile(mode=args.peer_compile_mode)

    def sample():
        img = torch.randn_like(x0)
        with autocast(device, precision):
            for t in range(T - 1, T - 1 - args.steps, -1):
                img, _ = frozen.p_sample(img, t)
        return img

    return Side(train, sample, precision, count(diffusion))


def images(args, device) -> torch.Tensor:
    return torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


SIDES = {"ours": ours, "diffusers": of_diffusers, "denoising-diffusion-pytorch": of_denoising_diffusion_pytorch}


def build(args, device) -> dict[str, Side]:
    """Each side in its settings; a peer that is not installed is left out, with a line."""
    sides = {}
    for name, make in SIDES.items():
        for setting in ("default", "best")[: 2 if args.compile or device.type == "cuda" else 1]:
            try:
                sides[f"{name}, {setting}"] = make(args, device, setting == "best")
            except ModuleNotFoundError as error:
                print(f"{name}: left out ({error}); pip install -r requirements-bench.txt", file=sys.stderr)
                break
    set_up(args)  # a Trainer sets torch's switches for its own precision
    return sides


def table(sides: dict[str, Side], seconds: dict[str, list[float]], calls: int, images_per_call: int) -> list[dict]:
    """Medians, and how many times faster each of ours is: medians of the quotients within a round."""
    rows = []
    mine = [name for name in seconds if name.startswith("ours")]
    for name, times in seconds.items():
        middle = statistics.median(times) / calls
        row = {"side": name, "precision": sides[name].precision}
        row |= {"ms / step": 1000 * middle, "images / s": images_per_call / middle}
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        row["quartiles"] = f"{1000 * quartiles[0] / calls:.1f} - {1000 * quartiles[2] / calls:.1f}"
        row["parameters"] = sides[name].parameters
        rows.append(row | {f"speed of {me} / this": median_ratio(times, seconds[me]) for me in mine})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="sampling steps in one timing")
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=False, help="compile nothing")
    parser.add_argument("--peer-compile-mode", default="default", help="torch.compile's mode for the peers: max-autotune, ...")
    parser.set_defaults(compile=None)
    args = parser.parse_args(argv)
    device = start(
        args,
        cpu={"network": "cifar10", "batch_size": 8, "rounds": 11, "steps": 4, "compile": True},
        cuda={"network": "cifar10", "batch_size": 128, "rounds": 11, "steps": 20, "compile": True},
        quick={"network": "small", "batch_size": 4, "rounds": 3, "steps": 2, "compile": False},
    )
    torch.manual_seed(0)
    sides = build(args, device)
    inner = 10 if device.type == "cuda" else 1
    training = interleaved({name: side.train for name, side in sides.items()}, device, args.rounds, inner)
    sampling = interleaved({name: side.sample for name, side in sides.items()}, device, args.rounds)
    tables = {
        "Training step": table(sides, training, 1, args.batch_size),
        "Sampling step": table(sides, sampling, args.steps, args.batch_size),
    }
    write("peers", args, device, tables)


if __name__ == "__main__":
    main()
