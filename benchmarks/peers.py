"""This library beside diffusers (same network, same weights) and denoising-diffusion-pytorch (its own U-Net of the same size).

    python benchmarks/peers.py             # on a GPU if there is one: minutes; on a CPU about a quarter of an hour
    python benchmarks/peers.py --quick     # seconds, a small network, nothing compiled

A training step is: noise, network, loss, backward pass, gradient clipping, optimizer, average of the weights, all from a batch
of images that lies on the device (ours as uint8, theirs as floats). A sampling step is a network call and the update of
ancestral sampling, as the library's own sampler does it. Each side has two settings:

    ours         default: train.py and test.py as they are. best: compiled (train_cfg.compile, --compile), bf16 on a GPU
    diffusers    default: the loop of its train_unconditional.py with EMA; its DDPMPipeline. best: what its page on speed says,
                 channels_last, compiled, bf16 on a GPU; and PyTorch's fused AdamW, the foreach variant of its EMA
    denoising-   default: the loop of its Trainer, but averaging every step, as the others do; its p_sample.
    diffusion-   best: flash_attn, compiled, bf16 on a GPU; and PyTorch's fused Adam, the foreach variant of its EMA
    pytorch

All live in one process and are timed in turns. Nothing is synchronised inside a step on any side.
"""

import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from common import interleaved, median_ratio, options, start, trainer, write
from torch import nn

from convert import scheduler_options, unet_options, weights_to_diffusers

T = 1000
Step = Callable[[], object]
PARAMETERS = {}  # of each side's network


def torch_defaults() -> None:
    """What a peer finds when it is used alone: our trainer sets these two for itself."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def low_precision(device: torch.device, best: bool):
    """bf16 where a GPU has it."""
    return torch.autocast("cuda", torch.bfloat16) if best and device.type == "cuda" else nullcontext()


def ours(args, device, best: bool) -> tuple[Step, Step]:
    precision = "bf16" if best and device.type == "cuda" else "fp32"
    made = {"precision": precision, "compile": best and args.compile}
    run = trainer(device, args.network, args.batch_size, args.image_size, timesteps=T, **made)
    PARAMETERS["ours"] = count(run.model)
    pixels = next(run.train_data.epoch(0))

    # test.py has a model of its own, from a checkpoint, compiled on its own, in the memory format that suits it
    sampling = trainer(device, args.network, args.batch_size, args.image_size, timesteps=T).model.eval()
    if not made["compile"] and device.type != "cuda":
        sampling.to(memory_format=torch.contiguous_format)
    sampling.load_state_dict(run.model.state_dict())
    if best and args.compile:
        sampling.time_aware_net.compile()
    times = list(range(T, T - args.steps, -1))

    def sample():
        with run.ranks.autocast(precision):
            return sampling.sample((args.batch_size, *run.shape), "ddpm", times, clip_x0=True)

    return lambda: run.train_step(pixels), sample


def of_diffusers(args, device, best: bool) -> tuple[Step, Step]:
    import diffusers
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    source = trainer(torch.device("cpu"), args.network, args.batch_size, args.image_size, timesteps=T)
    net_kwargs = source.config["time_aware_net"]["kwargs"]

    def network():
        unet = diffusers.UNet2DModel(**unet_options(net_kwargs, args.image_size)).to(device)
        unet.load_state_dict(weights_to_diffusers(source.model.time_aware_net))
        if best:
            unet.to(memory_format=torch.channels_last)
            if args.compile:
                unet.compile(mode=args.peer_compile_mode)
        return unet

    unet, scheduler = network().train(), diffusers.DDPMScheduler(**scheduler_options(source.config))
    settings = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
    PARAMETERS["diffusers"] = count(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), **settings, fused=True if best else None)
    warmup = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100000)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75, foreach=best)
    ema.to(device)
    x0 = images(args, device)

    def train():
        torch_defaults()
        noise = torch.randn_like(x0)
        t = torch.randint(0, T, (len(x0),), device=device).long()
        noisy = scheduler.add_noise(x0, noise, t)
        with low_precision(device, best):
            out = unet(noisy, t).sample
            loss = F.mse_loss(out.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    frozen = network().eval()
    if best and device.type == "cuda":
        frozen.to(torch.bfloat16)  # its page on speed: load the pipeline in low precision, without autocast
    pipeline = diffusers.DDPMPipeline(frozen, diffusers.DDPMScheduler(**scheduler_options(source.config)))
    pipeline.set_progress_bar_config(disable=True)

    def sample():
        torch_defaults()
        return pipeline(args.batch_size, num_inference_steps=args.steps, output_type="pt")

    return train, sample


def of_denoising_diffusion_pytorch(args, device, best: bool) -> tuple[Step, Step]:
    import denoising_diffusion_pytorch as peer
    from ema_pytorch import EMA

    def network():
        unet = peer.Unet(dim=64 if args.network == "cifar10" else 16, dim_mults=(1, 2, 4, 8), flash_attn=best)
        diffusion = peer.GaussianDiffusion(unet, image_size=args.image_size, timesteps=T, objective="pred_noise")
        if best and args.compile:
            unet.compile(mode=args.peer_compile_mode)
        return diffusion.to(device)

    diffusion = network()
    PARAMETERS["denoising-diffusion-pytorch"] = count(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True if best else None)
    ema = EMA(diffusion, beta=0.995, update_every=1, update_after_step=0, use_foreach=best).to(device)
    x0 = images(args, device) / 2 + 0.5

    def train():
        torch_defaults()
        with low_precision(device, best):
            loss = diffusion(x0)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    frozen = network().eval()

    def sample():
        torch_defaults()
        img = torch.randn_like(x0)
        with low_precision(device, best):
            for t in range(T - 1, T - 1 - args.steps, -1):
                img, _ = frozen.p_sample(img, t)
        return img

    return train, sample


def images(args, device) -> torch.Tensor:
    return torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


SIDES = {
    "ours": ours,
    "diffusers": of_diffusers,
    "denoising-diffusion-pytorch": of_denoising_diffusion_pytorch,
}


def build(args, device) -> tuple[dict[str, Step], dict[str, Step]]:
    """Each side's training steps and sampling steps; a peer that is not installed is left out, with a line."""
    train, sample = {}, {}
    for name, make in SIDES.items():
        for setting in ("default", "best")[: 2 if args.compile or device.type == "cuda" else 1]:
            try:
                train[f"{name}, {setting}"], sample[f"{name}, {setting}"] = make(args, device, setting == "best")
            except ModuleNotFoundError as error:
                print(f"{name}: left out ({error}); pip install -r requirements-bench.txt", file=sys.stderr)
                break
    return train, sample


def table(seconds: dict[str, list[float]], calls: int, images_per_call: int) -> list[dict]:
    """Medians, and how many times faster each of ours is: medians of the quotients within a round."""
    rows = []
    mine = [name for name in seconds if name.startswith("ours")]
    for name, times in seconds.items():
        middle = statistics.median(times) / calls
        row = {"side": name, "ms / step": 1000 * middle, "images / s": images_per_call / middle}
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        row["quartiles"] = f"{1000 * quartiles[0] / calls:.1f} - {1000 * quartiles[2] / calls:.1f}"
        row["parameters"] = PARAMETERS[name.split(",")[0]]
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
    train, sample = build(args, device)
    inner = 10 if device.type == "cuda" else 1
    tables = {
        "Training step": table(interleaved(train, device, args.rounds, inner), 1, args.batch_size),
        "Sampling step": table(interleaved(sample, device, args.rounds), args.steps, args.batch_size),
    }
    write("peers", args, device, tables)


if __name__ == "__main__":
    main()
