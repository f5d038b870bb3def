"""The 17 grey levels of the digits as numbers and as symbols: bits per dimension and samples for the same core-minutes.

    python benchmarks/discrete.py                       # 5 core-minutes of training each; draws samples/discrete*.png
    python benchmarks/discrete.py --minutes 2 --only gaussian-numbers absorbing
    python benchmarks/discrete.py --quick

Every row has the U-Net of configs/Digits_d3pm.json, but for its first and last convolution, and as many steps as the minutes
hold at its own speed. The bound is of the probability of the 17 levels for all: of numbers by equation 13 of Ho et al. 2020
with 17 levels for 256, after the reverse variance is fitted on training images. It is measured on the 180 images of the valid
split, at --bound-timesteps of the timesteps (unbiased); its standard error is that of the mean over the images.
"""

import argparse
import copy
import math
import statistics
import tempfile
import time

import torch
from common import ROOT, write
from torch import Tensor

from config import build_dataset, load_config
from dataset import evenly
from discrete_diffusion import to_symbols, to_values
from evaluation.pictures import grid, save_png
from train import Trainer

LEVELS = 17
COSINE = {"name": "CosineSchedule", "kwargs": {}}
COARSE = {"name": "LinearSchedule", "kwargs": {"start": 0.001, "end": 0.02}}  # sigma_1 is a quarter of the levels' distance
WALK = {"name": "LinearSchedule", "kwargs": {"start": 0.002, "end": 0.02}}
BOUND, HYBRID = {"loss_mode": "bound"}, {"loss_mode": "hybrid"}
# name: schedule, section diffusion, logits of the network
SETTINGS = {
    "gaussian-numbers": (COSINE, {"prediction": "denoising"}, None),
    "gaussian-numbers-x0": (COSINE, {"prediction": "reconstruction"}, None),
    "gaussian-numbers-coarse": (COARSE, {"prediction": "denoising"}, None),
    "uniform": (COSINE, {"transition": "uniform", **BOUND}, "free"),
    "absorbing": (COSINE, {"transition": "absorbing", **BOUND}, "free"),
    "absorbing-logistic": (COSINE, {"transition": "absorbing", **BOUND}, "logistic"),
    "gaussian": (WALK, {"transition": "gaussian", **BOUND}, "free"),
    "gaussian-logistic": (WALK, {"transition": "gaussian", **BOUND}, "logistic"),
    "gaussian-logistic-hybrid": (WALK, {"transition": "gaussian", **HYBRID}, "logistic"),
}
TRAJECTORIES = ("uniform", "absorbing", "gaussian")


def config_of(name: str, folder: str, timesteps: int) -> dict:
    """The resolved config of a setting."""
    config = load_config(ROOT / "configs" / "Digits_den.json", [f"train_cfg.model_save_dirpath={folder}/{name}"])
    schedule, diffusion, logits = SETTINGS[name]
    config = copy.deepcopy(config | {"schedule": schedule, "diffusion": diffusion})
    config["schedule"]["kwargs"]["timesteps"] = timesteps
    if logits:
        config["diffusion"] = {"name": "DiscreteDiffusion", "n_levels": LEVELS, **diffusion}
        config["time_aware_net"]["kwargs"] |= {"n_levels": LEVELS, "logits": logits}
    config["train_cfg"] |= {"epochs": 10**6, "sample_period": 0, "save_minutes": 60.0, "save_best": False}
    config["train_cfg"] |= {"precision": "fp32", "compile": False}
    return config


def steps_in(config: dict, minutes: float) -> int:
    """How many training steps the core-minutes hold, by the processor time of twenty of them."""
    probe = Trainer(config, "cpu")
    seconds = []
    for batch in probe.train_data.epoch(0):
        begin = time.process_time()
        probe.train_step(*batch)
        seconds.append(time.process_time() - begin)
        if len(seconds) == 20:
            break
    probe.folder.close()
    return max(1, round(60 * minutes / statistics.median(seconds)))


def trained(name: str, args: argparse.Namespace, folder: str) -> tuple[torch.nn.Module, int]:
    """The averaged model of a setting after --minutes, and its number of steps."""
    config = config_of(name, folder, args.timesteps)
    steps = steps_in(config, args.minutes)
    config["train_cfg"] |= {"max_steps": steps}
    trainer = Trainer(config, "cpu")
    trainer.run()
    return trainer.ema.eval(), steps


def bits(model: torch.nn.Module, train: Tensor, valid: Tensor, args: argparse.Namespace) -> Tensor:
    """Bits per dimension of each image of valid [B, 1, 8, 8], whose values are levels."""
    how = {"timesteps": args.bound_timesteps, "generator": torch.Generator().manual_seed(0)}
    if model.n_levels:
        bound = model.variational_bound(to_symbols(valid, LEVELS), **how)
    else:
        model.fit_reverse_variance(train.split(32), generator=torch.Generator().manual_seed(1))
        bound = model.variational_bound(valid, discretized=LEVELS, **how)
    return bound.total / math.log(2)


def samples(model: torch.nn.Module, count: int, frames: int) -> tuple[Tensor, Tensor]:
    """Samples [count, 1, 8, 8], and `frames` states of the first one, from noise to image."""
    generator = torch.Generator().manual_seed(2)
    shown, strip = evenly(frames, model.T + 1), []
    for i, (_, x) in enumerate(model.trajectory((count, 1, 8, 8), generator=generator, clip_x0=True)):
        if i in shown:
            strip.append(model.values_of(x[:1]))
    return model.values_of(x), torch.cat(strip)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Digits as numbers and as symbols.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), help="folder of the JSON file")
    parser.add_argument("--minutes", type=float, default=5.0, help="of one core, for training each")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--timesteps", type=int, default=1000, help="T")
    parser.add_argument("--bound-timesteps", type=int, default=200)
    parser.add_argument("--fit-images", type=int, default=64)
    parser.add_argument("--pictures", help="folder of the PNGs, by default samples, of a quick run models")
    args = parser.parse_args(argv)
    if args.quick:
        args.minutes, args.timesteps, args.bound_timesteps, args.fit_images = 0.02, 20, 4, 2
    torch.set_num_threads(args.threads)
    rows, sheets, strips = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(args.only[0], folder, args.timesteps)
        train, valid = (build_dataset(config, split) for split in ("train", "valid"))
        train, valid = (torch.stack([images[i] for i in range(len(images))]) for images in (train, valid))
        train, valid = (to_values(to_symbols(x, LEVELS), LEVELS) for x in (train, valid))
        for name in args.only:
            model, steps = trained(name, args, folder)
            found = bits(model, train[: args.fit_images], valid, args)
            error = (found.std() / len(found) ** 0.5).item()
            row = {"setting": name, "steps": steps, "bits per dimension": found.mean().item(), "standard error": error}
            rows.append(row | {"parameters": sum(p.numel() for p in model.time_aware_net.parameters())})
            print(rows[-1], flush=True)
            drawn, strip = samples(model, 16, 16)
            sheets.append(drawn)
            strips += [strip] if name in TRAJECTORIES else []
    write("discrete", args, torch.device("cpu"), {"Digits, 17 levels": rows})
    folder = ROOT / (args.pictures or ("models" if args.quick else "samples"))
    save_png(folder / "discrete.png", grid(torch.cat([valid[:16], *sheets]), 16))  # real ones, then a row a setting
    if strips:
        save_png(folder / "discrete_trajectories.png", grid(torch.cat(strips), 16))  # a row a transition


if __name__ == "__main__":
    main()
