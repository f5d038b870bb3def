"""What each trainer has to show for the same compute: samples of a data set after so many seconds of training.

    python benchmarks/race.py --threads 1                                  # all racers but plain, 1500 s each: hours
    python benchmarks/race.py --budget 375 750 1500 --seeds 0 1 2          # rows are added to the file; a table over the seeds
    python benchmarks/race.py --racers ours ddp-tuned --classes            # the networks learn the labels, samples are guided
    python benchmarks/race.py --racers ours --set train_cfg.lr=1e-3        # an ablation: a row of its own
    python benchmarks/race.py --data emoji                                 # which benchmarks/emoji.py makes; or both
    python benchmarks/race.py --data digits --racers ours plain            # what the fast recipe gains on a small set
    python benchmarks/race.py --data CIFAR10 --racers ours plain           # the same on a network of 35.7 million, for a GPU
    python benchmarks/race.py --data my.json --plain other.json --racers ours plain      # two recipes of yours, on your data
    python benchmarks/race.py --quick                                      # a minute, to see that it runs

The budget is of time.process_time of the racer's own process, so that a busy machine is fair (on CUDA: seconds of the
clock, with the device waited for every 50 steps). The clock runs while the racer trains; reading and decoding the data is
outside. Then -n samples are drawn, with at most --calls network calls each, and get the Fréchet distance to the validation
images, with the training images where those are few, in the features of one classifier for all, and the mean distance to
the nearest training image, which shows copies (arenas.py).

Equal for all: the process's switches (TF32 on, cuDNN chooses the fastest kernels, freed memory is kept), nothing compiled, and
the rule for the precision, train.py's "auto", asked with the racer's own step: bf16 on a GPU that has it, on a CPU the faster
of bf16 and fp32.

    ours        configs/FashionMNIST_fast.json, or what arenas.py names for the data, through train.py's own Trainer,
                validation and checkpoints included, without its pictures. Its learning rate falls to 0 with the clock
    plain       the same with the plain config for the data: a network of the noise, the simple loss (Ho et al. 2020) and Adam
    ddp         denoising-diffusion-pytorch: its Unet of dim 16, multipliers 1, 2, 4, objective pred_v, and the loop and
                defaults of its Trainer: batch 16, Adam, EMA 0.995 every 10 steps, horizontal flips; its DDIM
    diffusers   UNet2DModel 32, 32, 64 (attention at the lowest resolution) and the recipe of train_unconditional.py: batch
                16, AdamW, 500 warm-up steps, cosine decay over 100 epochs, no EMA; its DDPMPipeline with
                the scheduler --diffusers-sampler
    ddp-tuned   the same with twenty times the learning rate, which falls to 0 at the end of the budget, objective pred_x0,
                min-SNR weights, an EMA of decay 1 - (1 + step)^-0.75 at every step, no flips (every shoe looks to the left),
                and as many clusters as ours
    diffusers-tuned
                the same with ten times the learning rate, which falls to 0, that EMA, the cosine schedule and velocity,
                normalisations in 8 groups, and its DDPMScheduler

With --classes, ours has n_classes and ddp is the module classifier_free_guidance of its package, with the same settings but for
the schedule, which is cosine; both hide a tenth of the labels. Samples are of the classes in the training images' shares, and
guided, with two calls a step. Which weight suits a network depends on how far it has come, so each run has its own: --guidance,
or of 1.25, 1.5, 2, 3, 4, 6, 8 and 12, as far as it pays, the one whose first 500 samples are nearest to training images that
the classifier was not trained on. The validation images have no part in it. diffusers' script and pipeline know no labels.
With --interval, ours is guided at those times alone, which the peers' packages do not offer.
Without --classes, no racer sees the labels; the classes of ours and of ddp-tuned are --clusters of alike images
(dataset.clusters), by default as many as our config has, and the budget pays for finding them.

A peer's run is one run of the largest budget where its learning rate does not know the end: samples are drawn on the way.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from arenas import ARENAS, OWN, Arena, Measure
from common import ROOT, choose_precision, counted, device_name, result_path, set_up, show, steps_within, synchronize, versions
from race_pictures import SAME, over_seeds, picture, plot, samples_path
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_diffusion
from config import load_config
from dataset import from_uint8, to_uint8
from evaluation.features import N_FEATURES
from evaluation.sampling import labels_in_shares
from guidance import ALWAYS, ClassifierFreeGuidance
from mistakes import run_script
from samplers import SAMPLERS
from train import Trainer
from training.speed import autocast, has_bfloat16

PEER_BATCH, DDP_DIM = 16, 16
OF_OUR_CONFIG = -1  # clusters: as many as our config for the data has
WAIT_STEPS = 50  # on CUDA, steps between two looks at the clock
GUIDANCE, CHOSEN_BY = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0), 500  # its weights, and the samples that choose one


@dataclass
class Finish:
    """What a racer has at the end of a budget."""

    budget: float
    seconds: float  # really used
    steps: int
    batch_size: int
    parameters: int
    gflop: float  # of a training step
    calls: int  # network calls a sample, at most
    precision: str
    sample: Callable[[int, float | None], Tensor]  # a batch of float images in [-1, 1], by a weight of guidance if labelled


class Clock:
    """Seconds of computing while it runs: of this process on a CPU; on CUDA of the clock, with the device waited for."""

    def __init__(self, device: torch.device):
        self.device, self.total, self.since = device, 0.0, None

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter() if self.device.type == "cuda" else time.process_time()

    def start(self) -> None:
        self.since = self.now()

    def stop(self) -> float:
        self.total += self.now() - self.since
        return self.total

    def used(self) -> float:
        """Seconds so far, between start and stop; on CUDA those of before, for a look would wait for the device."""
        return self.total + (self.now() - self.since if self.device.type == "cpu" else 0)


# The racers: each yields a Finish for every budget


class _Timed(Trainer):
    """train.py's trainer, but for the length of its run: as with the tuned peers, the clock says how far the learning rate has
    fallen, and when it ends. A hundredth of the budget is left for the last validation.
    """

    def __init__(self, config: dict, device: str, clock: Clock, budget: float):
        super().__init__(config, device, overwrite=True)
        self.clock, self.seconds, self.most_steps = clock, 0.99 * budget - clock.total, self.total_steps
        self.before = clock.total

    def _after_step(self, bar: tqdm) -> None:
        super()._after_step(bar)
        if self.device.type == "cuda" and self.step % WAIT_STEPS:  # a look at the clock would wait for the device
            return
        self.clock.stop()
        self.clock.start()
        steps = self.step * self.seconds / (self.clock.total - self.before)
        bar.total = self.total_steps = min(max(self.step, round(steps)), self.most_steps)


def ours(args: argparse.Namespace, device: torch.device) -> Iterator[Finish]:
    yield from _of_config(args.arena.config, args, device)


def plain(args: argparse.Namespace, device: torch.device) -> Iterator[Finish]:
    yield from _of_config(args.plain or args.arena.plain, args, device)


def _of_config(path: Path, args: argparse.Namespace, device: torch.device) -> Iterator[Finish]:
    for budget in args.budget:
        folder = samples_path(args.arena, args.name, budget, args.seed).with_suffix("")
        settings = [
            *args.arena.settings,
            "train_cfg.precision=auto",
            "train_cfg.compile=false",
            "train_cfg.sample_period=0",
            *args.set,
            f"train_cfg.model_save_dirpath={folder}",
            "train_cfg.max_steps=null",  # the clock ends a run
        ]
        settings += ["train_cfg.epochs=1000000", f"train_cfg.seed={args.seed}"]
        clock = Clock(device)
        clock.total = args.arena.seconds
        if clock.total >= budget:
            sys.exit(f"{args.name}: to find the clusters took {clock.total:.0f} s of {budget:g}")
        run = _Timed(load_config(path, settings), args.device, clock, budget)
        clock.start()
        run.run()
        seconds = clock.stop()
        diffusion = load_diffusion(folder / "last.pth")[0].to(device)
        yield _finish_of(args, budget, seconds, run, diffusion)


def _finish_of(args: argparse.Namespace, budget: float, seconds: float, run: Trainer, diffusion) -> Finish:
    steps, precision = steps_within(diffusion, args.sampler, args.calls // _calls_a_step(args)), run.cfg.precision
    x0 = torch.zeros(run.cfg.batch_size, *run.shape, device=run.device)
    net = diffusion.time_aware_net

    def sample(n: int, guidance: float | None) -> Tensor:
        condition = {"label": _labels(args.arena, n, run.device)} if args.labelled else None
        diffusion.time_aware_net = ClassifierFreeGuidance(net, guidance, args.interval) if args.labelled else net
        with autocast(run.device, precision):
            return diffusion.sample((n, *run.shape), args.sampler, steps, clip_x0=True, condition=condition)

    flops = counted(lambda: run.model(x0).backward())
    size = sum(p.numel() for p in run.parameters)
    return Finish(budget, seconds, run.step, run.cfg.batch_size, size, flops / 1e9, args.calls, precision, sample)


def ddp(args: argparse.Namespace, device: torch.device) -> Iterator[Finish]:
    import denoising_diffusion_pytorch as peer
    from denoising_diffusion_pytorch import classifier_free_guidance as peer_with_classes
    from ema_pytorch import EMA

    first = _first_images(args, device)
    settings = {"image_size": first.shape[-1], "timesteps": 1000, "sampling_timesteps": args.calls // _calls_a_step(args)}
    more = {}
    if args.labelled:
        peer, more = peer_with_classes, {"num_classes": args.arena.n_classes, "cond_drop_prob": 0.1}
        settings["ddim_sampling_eta"] = 0.0  # as without classes
    unet = peer.Unet(dim=args.dim or DDP_DIM, dim_mults=(1, 2, 4), channels=first.shape[1], **more)
    settings |= {"objective": {"eps": "pred_noise", "x0": "pred_x0", "v": "pred_v"}[args.predicts or "v"]}
    settings |= {
        "beta_schedule": args.noise or ("cosine" if args.labelled else "sigmoid"),
        "min_snr_loss_weight": bool(args.min_snr),
    }
    diffusion = peer.GaussianDiffusion(unet, **settings).to(device)

    def loss_of(x0: Tensor, labels: Tensor) -> Tensor:
        return diffusion(x0 / 2 + 0.5, **({"classes": labels} if args.labelled else {}))

    labels = _labels(args.arena, args.batch, device)
    precision = choose_precision(lambda: loss_of(first, labels), diffusion, device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=args.lr or 1e-4, betas=(0.9, 0.99))
    ema = {"update_every": 1, "update_after_step": 0, "power": args.ema_power} if args.ema_power else {"update_every": 10}
    ema = EMA(diffusion, beta=0.9999 if args.ema_power else 0.995, **ema).to(device)

    def step(x0: Tensor, labels: Tensor, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = (args.lr or 1e-4) * rate
        if not args.no_flips:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        with autocast(device, precision):
            loss = loss_of(x0, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def sample(n: int, guidance: float | None) -> Tensor:
        how = {"batch_size": n}
        if args.labelled:
            how = {"classes": _labels(args.arena, n, device), "cond_scale": guidance, "rescaled_phi": 0.0}
        with autocast(device, precision):
            return ema.ema_model.eval().sample(**how).float() * 2 - 1

    yield from _race(args, device, unet, precision, loss_of, step, sample)


def of_diffusers(args: argparse.Namespace, device: torch.device) -> Iterator[Finish]:
    import diffusers
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    first = _first_images(args, device)
    unet = diffusers.UNet2DModel(
        sample_size=first.shape[-1],
        in_channels=first.shape[1],
        out_channels=first.shape[1],
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=args.groups or 32,
    ).to(device)
    predicts = args.predicts or "eps"
    noising = diffusers.DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2" if args.noise == "cosine" else "linear",
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[predicts],
    )
    alpha_bar = noising.alphas_cumprod.to(device)
    settings = {"lr": args.lr or 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
    optimizer = torch.optim.AdamW(unet.parameters(), **settings)
    steps = 100 * len(args.arena.images("train")[0]) // args.batch
    warmup = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=steps)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, power=args.ema_power) if args.ema_power else None

    def loss_of(x0: Tensor, labels: Tensor) -> Tensor:
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=device).long()
        out = unet(noising.add_noise(x0, noise, t), t).sample.float()
        target = {"eps": lambda: noise, "x0": lambda: x0, "v": lambda: noising.get_velocity(x0, noise, t)}[predicts]()
        if not args.min_snr:
            return F.mse_loss(out, target)
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        weight = snr.clamp(max=5) / {"eps": snr, "x0": 1, "v": snr + 1}[predicts]  # as its examples have it
        return (weight * F.mse_loss(out, target, reduction="none").flatten(1).mean(1)).mean()

    precision = choose_precision(lambda: loss_of(first, _labels(args.arena, args.batch, device)), unet, device)

    def step(x0: Tensor, labels: Tensor, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = warmup.get_last_lr()[0] * rate
        with autocast(device, precision):
            loss = loss_of(x0, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        if ema:
            ema.step(unet.parameters())

    def sample(n: int, guidance: None) -> Tensor:
        kinds = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}
        scheduler = kinds[args.diffusers_sampler or "ddim"].from_config(noising.config)
        pipeline = diffusers.DDPMPipeline(unet.eval(), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        if ema:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
        with autocast(device, precision):
            images = pipeline(n, num_inference_steps=args.calls, output_type="np").images
        if ema:
            ema.restore(unet.parameters())
        unet.train()
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    yield from _race(args, device, unet, precision, loss_of, step, sample)


def _race(args, device, net, precision, loss_of, step, sample) -> Iterator[Finish]:
    """A peer's run: shuffled batches until each budget is used up."""
    first, labels = _first_images(args, device), _labels(args.arena, args.batch, device)
    flops = counted(lambda: loss_of(first, labels).backward())
    net.zero_grad()
    parameters, steps, clock = sum(p.numel() for p in net.parameters()), 0, Clock(device)
    clock.total = args.arena.seconds
    batches = _batches(args, device)
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"
    with tqdm(total=max(args.budget), desc=args.name, bar_format=form) as bar:
        for budget in sorted(args.budget):
            while clock.total < budget:
                ready = list(itertools.islice(batches, WAIT_STEPS))  # outside the clock
                clock.start()
                for x0, labels in ready:
                    step(x0, labels, max(0.0, 1 - clock.used() / budget) if args.falls else 1.0)
                    steps += 1
                    if clock.used() >= budget:
                        break
                bar.update(min(clock.stop(), bar.total) - bar.n)
            yield Finish(budget, clock.total, steps, args.batch, parameters, flops / 1e9, args.calls, precision, sample)


def _batches(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled training images with their labels, without end."""
    images, labels = args.arena.images("train")
    while True:
        for indices in torch.randperm(len(images)).split(args.batch):
            yield from_uint8(images[indices]).to(device), labels[indices].to(device)


def _labels(arena: Arena, n: int, device: torch.device) -> Tensor:
    """n classes [n] in the training images' shares: drawn by chance, they would add to the distance what the samples lack."""
    return labels_in_shares(arena.images("train")[1].bincount().tolist(), n, torch.rand(()).item()).to(device)


def _calls_a_step(args: argparse.Namespace) -> int:
    return 2 if args.labelled and args.guidance != 1 else 1


def _first_images(args: argparse.Namespace, device: torch.device) -> Tensor:
    return from_uint8(args.arena.images("train")[0][: args.batch]).to(device)


RACERS: dict[str, tuple[Callable, dict]] = {
    "ours": (ours, {"clusters": OF_OUR_CONFIG}),
    "plain": (plain, {}),
    "ddp": (ddp, {}),
    "ddp-tuned": (
        ddp,
        {"clusters": OF_OUR_CONFIG, "lr": 2e-3, "predicts": "x0", "ema_power": 0.75, "no_flips": 1, "falls": 1, "min_snr": 1},
    ),
    "diffusers": (of_diffusers, {}),
    "diffusers-tuned": (
        of_diffusers,
        {
            "lr": 1e-3,
            "ema_power": 0.75,
            "groups": 8,
            "diffusers_sampler": "ddpm",
            "falls": 1,
            "predicts": "v",
            "noise": "cosine",
        },
    ),
}
SEARCHED = (
    "lr",
    "batch",
    "dim",
    "ema_power",
    "falls",
    "predicts",
    "min_snr",
    "noise",
    "no_flips",
    "groups",
    "diffusers_sampler",
    "guidance",
    "clusters",
)  # of the racers


# The race


def worker(args: argparse.Namespace) -> None:
    """Train and sample as one racer, in this process; a line of JSON and a file of samples for each budget."""
    device = torch.device(args.device)
    set_up(args)
    racer, recipe = RACERS[args.racers[0]]
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.batch = args.batch or PEER_BATCH
    args.arena = Arena(args.data[0], args.root, args.classes)
    if args.clusters == OF_OUR_CONFIG:
        args.clusters = load_config(args.arena.config, args.arena.roots)["dataset"]["clusters"]
    if args.clusters and not args.classes:
        args.arena = replace(args.arena, clusters=args.clusters)
    args.labelled = args.classes or args.arena.clusters is not None
    torch.manual_seed(args.seed)
    for budgets in [[budget] for budget in args.budget] if args.falls else [args.budget]:
        args.budget = budgets
        for finish in racer(args, device):
            _show_samples(args, finish, device)


def _show_samples(args: argparse.Namespace, finish: Finish, device: torch.device) -> None:
    """Draw samples into a file, and print a line of JSON; the race's own random state stays as it is."""
    chosen, clock = args.guidance if args.labelled else None, Clock(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if args.labelled and chosen is None:
            chosen = _chosen_guidance(args, finish, Measure(replace(args.arena, clusters=None), device))
        clock.start()
        samples = _draw(args, finish, args.n, chosen)
        seconds = clock.stop()
    path = samples_path(args.arena, args.name, finish.budget, args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(samples, path)
    row = {name: value for name, value in vars(finish).items() if name != "sample"}
    print(json.dumps(row | {"guidance": chosen, "sampling s": seconds, "samples": str(path)}), flush=True)


def _chosen_guidance(args: argparse.Namespace, finish: Finish, measure: Measure) -> float:
    """The weight before the first with which samples are further from training images that the features were not trained on."""
    chosen, least = None, math.inf
    for weight in GUIDANCE:
        distance = measure.to_unseen(_draw(args, finish, min(CHOSEN_BY, args.n), weight))
        print(f"guidance {weight:g}: {distance:.2f} to unseen training images", file=sys.stderr, flush=True)
        if distance >= least:
            break
        chosen, least = weight, distance
    return chosen


def _draw(args: argparse.Namespace, finish: Finish, n: int, guidance: float | None) -> Tensor:
    """The first n samples of the seed, uint8."""
    torch.manual_seed(args.seed)
    batches = []
    for first in tqdm(range(0, n, 100), desc="sampling", unit="batch"):
        with torch.no_grad():
            batches.append(to_uint8(finish.sample(min(100, n - first), guidance)).cpu())
    return torch.cat(batches)


def rows_of(args: argparse.Namespace, name: str, racer: str, seed: int, measure: Measure) -> Iterator[dict]:
    """Run a racer in a process of its own, and measure what it brings."""
    # fmt: off
    command = [sys.executable, __file__, "--worker", "--racers", racer, "--name", name, "--device", args.device,
               "--seed", str(seed), "-n", str(args.n), "--sampler", args.sampler, "--calls", str(args.calls),
               "--budget", *map(str, args.budget), "--data", measure.arena.name, "--root", args.root]
    # fmt: on
    command += ["--classes"] if args.classes else []
    for option in ("threads", "plain", *SEARCHED):
        if getattr(args, option) is not None:
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    command += ["--interval", *map(str, args.interval), "--set", *args.set]
    environment = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            samples = torch.load(row.pop("samples"), weights_only=True)
            yield {"racer": name, "seed": seed, **measure(samples), "n": args.n} | row | {"date": time.strftime("%Y-%m-%d")}
    if process.returncode:
        sys.exit(f"{name}: its process failed")


def compete(args: argparse.Namespace, arena: Arena, device: torch.device) -> None:
    """The race on one arena: its rows, printed and added to those there, and the pictures."""
    machine, stem = device_name(device), arena.stem
    if device.type == "cpu":  # of which some are several times faster, and their rows do not compare
        machine += f" {'with' if has_bfloat16(device) else 'without'} bfloat16"
        stem += "_bf16" if has_bfloat16(device) else ""
    measure, path = Measure(arena, device), result_path(stem, device, args.quick)
    old = json.loads(path.read_text()) if path.exists() else {"rows": []}
    ends = measure.of_data(args.n)
    changed = [*args.set, *(f"{name}={getattr(args, name)}" for name in SEARCHED if getattr(args, name) is not None)]
    changed += [] if args.interval == ALWAYS else ["interval={:g}-{:g}".format(*args.interval)]
    for racer, seed in itertools.product(args.racers, args.seeds):
        name = args.name or " ".join([racer, *changed])
        for row in rows_of(args, name, racer, seed, measure):
            print(f"{arena.name}, {name}, seed {seed}, {row['budget']:g} s: {row['distance']:.2f}", file=sys.stderr, flush=True)
            old = json.loads(path.read_text()) if path.exists() else old  # another race may have written meanwhile
            kept = [each for each in old["rows"] if any(each[key] != row[key] for key in (*SAME, "seed"))]
            made = {"date": row["date"], "device": machine, "versions": versions()}
            scale = old.get("ends", {}) | {str(args.n): ends}
            about = {"features": measure.extractor.name, "real images": measure.real.count}
            result = {**about, "ends": scale, **made, "rows": [*kept, row]}
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = json.loads(path.read_text())["rows"]
    rows.sort(key=lambda row: (row["racer"] not in RACERS, row["racer"], row["budget"], row["seed"]))
    show(f"Fréchet distance of n samples to {measure.real.count} images, in the features of the {measure.extractor.name}", rows)
    show("The same over the seeds", over_seeds(rows))
    print("\n" + ", ".join(f"{name}: {value:.3g}" for name, value in ends.items()))
    if not args.quick and name in RACERS:  # and not a variant of one
        picture(arena, rows, list(RACERS), ROOT / "samples" / f"{arena.stem}.png")
        plot(over_seeds(rows), list(RACERS), next(iter(ends.items())), ROOT / "samples" / f"{arena.stem}_curve.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--racers", nargs="+", default=[name for name in RACERS if name != "plain"], choices=RACERS)
    parser.add_argument(
        "--data",
        nargs="+",
        default=["FashionMNIST"],
        help=f"{', '.join(ARENAS)}, or our config for data of your own, which have labels",
    )
    parser.add_argument("--plain", metavar="CONFIG", help="of the racer plain, by default that of the data")
    parser.add_argument("--root", default=str(ROOT / "data"), help="folder of the data sets")
    parser.add_argument("--budget", nargs="+", type=float, default=[1500.0], help="seconds of training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU, by default torch's own choice")
    parser.add_argument("-n", type=int, default=1000, help="samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--sampler", default="dpm", choices=SAMPLERS, help="ours")
    parser.add_argument("--calls", type=int, default=25, help="network calls a sample, of every racer")
    parser.add_argument("--diffusers-sampler", choices=["ddpm", "ddim", "dpm"], help="by default ddim")
    parser.add_argument("--lr", type=float, help="of a peer, for the search")
    parser.add_argument("--batch", type=int, help="of a peer")
    parser.add_argument("--dim", type=int, help="of ddp's network")
    parser.add_argument("--ema-power", type=float, help="of a peer: average the weights by 1 - (1 + step)^-POWER")
    parser.add_argument("--falls", type=int, choices=[0, 1], help="of a peer: its learning rate falls to 0 over the budget")
    parser.add_argument("--predicts", choices=["eps", "x0", "v"], help="of a peer: what its network predicts")
    parser.add_argument("--min-snr", type=int, choices=[0, 1], help="of a peer: min-SNR weights of the loss")
    parser.add_argument("--noise", choices=["linear", "cosine"], help="of a peer: its schedule of noise")
    parser.add_argument("--no-flips", type=int, choices=[0, 1], help="of ddp")
    parser.add_argument("--groups", type=int, help="of diffusers' normalisations")
    parser.add_argument("--classes", action="store_true", help="networks learn the labels; samples are of the data's classes")
    parser.add_argument(
        "--clusters", type=int, help="without --classes: so many clusters of images are the classes; 0 for none"
    )
    parser.add_argument(
        "--guidance", type=float, help="with classes or clusters: the weight, else the run's best; 1 is one call"
    )
    parser.add_argument("--interval", nargs=2, type=float, default=ALWAYS, help="ours: times in which the guidance acts")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override keys of our config")
    parser.add_argument("--name", help="of the row, by default the racer and what is overridden")
    parser.add_argument("--quick", action="store_true", help="10 seconds and 200 samples each")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args)
    if args.quick:
        args.budget, args.n = [10.0], 200
    if (args.classes or args.clusters) and any(RACERS[racer][0] is of_diffusers for racer in args.racers):
        parser.error("--classes, --clusters: the training script and the pipeline of diffusers know no labels; see --racers")
    of_all = ("guidance", "clusters")
    of_peers = [f"--{name.replace('_', '-')}" for name in SEARCHED if name not in of_all and getattr(args, name) is not None]
    if of_peers and {"ours", "plain"} & set(args.racers):
        parser.error(f"{', '.join(of_peers)}: of the peers, and ours has --set; see --racers")
    if not args.interval[0] <= args.interval[1]:
        parser.error("--interval: must be two times, the lower one first")
    if args.interval != ALWAYS and not {"ours", "plain"}.issuperset(args.racers):
        parser.error("--interval: of ours and plain, and the peers' packages have none; see --racers")
    if unknown := [data for data in args.data if data not in ARENAS and not data.endswith(OWN)]:
        parser.error(f"--data {' '.join(unknown)}: must be of {', '.join(ARENAS)}, or a config, with the extension {OWN}")
    arenas = [Arena(data, args.root, args.classes) for data in args.data]
    without = [arena.name for arena in arenas if not arena.files.plain]
    if "plain" in args.racers and without and not args.plain:
        parser.error(f"--racers plain: there is no plain config for {', '.join(without)}; give one with --plain")
    if args.plain and any(arena.data_of(arena.config) != arena.data_of(args.plain) for arena in arenas):
        parser.error(f"--plain {args.plain}: is of other data than --data {' '.join(args.data)}")
    if args.name and len(args.racers) > 1:
        parser.error("--name: is of the rows of one racer; see --racers")
    if args.n <= N_FEATURES:
        parser.error(f"-n {args.n}: the distance needs more samples than features, at least {N_FEATURES + 1}")
    device = torch.device(args.device)
    set_up(args)
    for arena in arenas:
        compete(args, arena, device)


if __name__ == "__main__":
    sys.exit(run_script("race.py", main))
