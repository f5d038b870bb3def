"""Sample from a checkpoint, and measure it.

    python test.py models/Digits_den/last.pth                                  # 16 samples by all T steps
    python test.py models/Digits_den/last.pth -n 64 --sampler dpm --timesteps 20
    python test.py models/FashionMNIST_den/last.pth -n 1000 --sampler ddim --timesteps 50 --metrics bpd fd
    python test.py models/CelebA_HQ_256_den/last.pth 128 192                   # another height and width
    python test.py models/FashionMNIST_class/last.pth -n 80 --class all --guidance 2            # a row a class
    python test.py models/FashionMNIST_class/last.pth -n 1000 --class data --guidance 1,1.5,2 --metrics fd
    python test.py models/FashionMNIST_fast/last.pth -n 1000 --ema-length 0.05 0.1 0.2 --metrics fd    # of train_cfg.power_ema
    python test.py models/FashionMNIST_class/last.pth --inpaint shoe.png --mask mask.png        # white: known
    python test.py models/Digits_den/last.pth --report                         # everything on one page, to read in a browser
    torchrun --nproc_per_node=4 test.py models/CIFAR10_den/last.pth -n 50000 --batch-size 512 --pictures 64

Writes to the folder NAME_gen beside NAME.pth: 0.png, 1.png, ..., a strip of states from x_T to x_0 for each sample; strips.png,
the first eight of them; grid.png, the samples; trajectory.gif, the grid as it comes out of the noise; metrics.json, what was
measured; report.html and samples.npz, if asked for. Floats [C, H, W] have pictures of what lies in [-1, 1]; other shapes have
none, and always samples.npz. The same seed, batch size and -n give the same samples.
"""

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import MAX_VALUES, about_model, diffusion_of, load_diffusion, save
from classify import Weighting
from config import check_shape, find, with_data
from dataset import NO_CONDITION, ImageDataset, evenly, rows_of
from evaluation.edits import Edit
from evaluation.metrics import METRICS, Evaluation, build_metric, measure_each
from evaluation.pictures import grid, plain, save_gif, save_png
from evaluation.report import Report, Sampled
from evaluation.sampling import Drawn, condition_by_row, condition_of, draw, labels_in_shares
from files import as_json, whole_file
from guidance import ALWAYS, AutoGuidance, ClassifierFreeGuidance, null_of
from mistakes import Mistake, OneLineParser, as_mistake, run_script
from samplers import SAMPLERS
from training import speed
from training.averages import MAX_LENGTH, average_of
from training.ranks import Ranks, leave_ranks
from training.run_folder import EDITS
from training.seeds import STEP, mixed_seed

DEFAULTS = {"n": 16, "timesteps": None, "bpd_images": 1000, "bpd_timesteps": None}  # None: all of them
# Of a report, whose n is enough for fd: with 200 * 160 calls of the network for samples and 200 * 100 for bpd
REPORT_DEFAULTS = {"n": 160, "timesteps": 200, "bpd_images": 200, "bpd_timesteps": 100}

# Flags that no edit heeds
NOT_OF_EDITS = ("metrics", "fit_variance", "compile", "eta", "precision", "frames", "pictures", "features", "classifier")
NOT_OF_EDITS += ("npz", "weighting", "bpd_images", "bpd_timesteps")


class Job(NamedTuple):
    """What samples are drawn of, with one --ema-length and one --guidance."""

    diffusion: nn.Module  # on the device, guided if that is asked for
    state: dict  # of its checkpoint
    path: Path  # of the checkpoint
    shape: list[int]  # of a sample, [C, H, W] of an image
    options: dict  # of diffusion.trajectory
    condition: Mapping[str, Tensor]  # n rows each
    columns: int | None  # of the grid, with a row a class


def set_defaults(args: argparse.Namespace, T: int, n_classes: int | None, config: dict, conditions: list[str]) -> None:
    """Fill in the flags whose default depends on --report, and --class.

    A report has a row a class, but for clusters, of which no one knows what they are. Samples of those, and of a network that
    knows nothing without a class, are of all classes in their shares.
    """
    for name, value in (REPORT_DEFAULTS if args.report else DEFAULTS).items():
        if getattr(args, name) is None and not ("timesteps" in name and value is not None and value >= T):
            setattr(args, name, value)
    clusters = config["dataset"].get("clusters")
    if args.label is not None or not n_classes or conditions or any(getattr(args, kind) for kind in EDITS):
        return
    if args.report and args.n >= n_classes and not clusters:
        args.label = "all"
    elif clusters or not config["train_cfg"]["label_dropout"]:
        args.label = "data"


def pictured(args: argparse.Namespace, n_classes: int | None, columns: int | None) -> tuple[list[int], int | None]:
    """Numbers of the samples that get a picture, and the columns of the grid: with a row a class, as many of each as fit."""
    if columns is None:
        return list(range(min(args.n, args.pictures))), columns
    kept = max(1, min(columns, args.pictures // n_classes))
    rows = range(min(n_classes, args.pictures))
    return [row * columns + i for row in rows for i in range(kept)], kept


def check_writable(folder: Path) -> None:
    """OSError if nothing can be written there: now, and not after hours of sampling."""
    (folder / ".test.part").touch()
    (folder / ".test.part").unlink(missing_ok=True)  # another rank may have been here


def make_folder(folder: Path, count: int) -> None:
    """A folder for the pictures 0.png to count - 1, without the later ones of another call."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.png"):
        if path.stem.isdecimal() and int(path.stem) >= count:
            path.unlink()


def save_pictures(folder: Path, drawn: Drawn, shown: list[int], columns: int | None) -> None:
    for i, strip in enumerate(drawn.strips):
        save_png(folder / f"{i}.png", grid(strip, columns=len(strip)))
    save_png(folder / "strips.png", grid(drawn.strips[:8].flatten(0, 1), columns=drawn.strips.shape[1]))
    save_png(folder / "grid.png", grid(drawn.samples[shown], columns))
    save_gif(folder / "trajectory.gif", [grid(frame, columns) for frame in drawn.animation.unbind(1)])
    print(f"{folder}: 0.png .. {len(drawn.strips) - 1}.png, strips.png, grid.png, trajectory.gif")


def save_arrays(path: Path, drawn: Drawn, shown: list[int], job: Job) -> None:
    """The numbers of what is drawn: samples [n, ...], their labels [n] and other conditions; and of the samples
    `pictured` the states [pictures, frames, ...] at the times [frames].
    """
    times = [*job.diffusion.steps(job.options["timesteps"], job.options["sampler"]), 0]
    at = evenly(drawn.strips.shape[1], len(times))
    arrays = {"samples": drawn.samples, "states": drawn.strips, "pictured": torch.tensor(shown)}
    arrays |= {"times": torch.tensor(times)[at]}
    arrays |= {"labels" if name == "label" else f"condition_{name}": rows for name, rows in job.condition.items()}
    with whole_file(path) as file:
        np.savez(file, **{name: _numpy(array) for name, array in arrays.items()})
    print(f"{path}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}")


def _numpy(array: Tensor) -> np.ndarray:
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()  # which numpy has not


def fit_variance(evaluation: Evaluation, state: dict, count: int, target: Path) -> None:
    """Fit the reverse variance to training images, the same on every rank, and save it with the weights it was fitted to."""
    ranks, seed = evaluation.ranks, mixed_seed(STEP, evaluation.seed)
    torch.manual_seed(seed)  # of their flips
    images = list(evaluation.images("train", count, Ranks(str(ranks.device), alone=True)))  # and their labels
    generator = torch.Generator(ranks.device).manual_seed(seed)
    evaluation.diffusion.fit_reverse_variance(images, generator=generator)
    if ranks.rank == 0:
        fitted = sum(len(x0) for x0, _ in images)
        save(target, about_model(state) | {"ema": evaluation.diffusion.state_dict(), "fitted": fitted})


def set_speed(
    diffusion: nn.Module, x0: Tensor, asked: str, compiled: bool, ranks: Ranks, condition: Mapping = NO_CONDITION
) -> str:
    """The precision to sample images like x0 in, by a condition's first rows; the network is compiled if that is asked for."""
    condition = rows_of(condition, slice(len(x0)), x0.device)
    speed.channels_last(diffusion)
    speed.set_flags(asked)
    precision = speed.choose_precision(asked, speed.probe_call(diffusion, x0, condition), ranks, "--precision")
    speed.set_flags(precision)
    if compiled:
        speed.check_compiler(ranks.device, "--compile")
        diffusion.time_aware_net.compile()
    return precision


def labels_of(
    name: str | None, n: int, n_classes: int | None, class_names: list[str] | None, counts: list[int] | None
) -> tuple[dict[str, Tensor], int | None]:
    """The labels [n] that --class asks for, by number or by name or all in turn, and the columns of the grid; none without.

    counts are those of the training images of each class.
    """
    if name is None:
        return {}, None
    if n_classes is None:
        raise Mistake(f"--class {name}: this network has no classes")
    if name == "all":
        if n < n_classes:
            raise Mistake(f"-n {n}: --class all needs at least one sample for each of the {n_classes} classes")
        return condition_by_row(n_classes, n, max_rows=n_classes)
    if name == "data":
        if counts is None:
            raise Mistake("--class data: the checkpoint is older, and does not say how many images of each class there were")
        return {"label": labels_in_shares(counts, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]}, None
    number = class_names.index(name) if class_names and name in class_names else int(name) if name.isdecimal() else -1
    if not 0 <= number < n_classes:
        known = f", be one of {', '.join(class_names)}" if class_names else ""
        raise Mistake(f"--class {name}: must lie in 0..{n_classes - 1}{known}, or be all or data")
    return {"label": torch.full((n,), number)}, None


def _kind(diffusion: nn.Module, state: dict) -> tuple:
    """What two models must share for the output of one to mean that of the other."""
    names = ("prediction", "n_levels", "transition")  # of which a diffusion of numbers has the first, one of symbols the others
    n_classes = getattr(diffusion.time_aware_net, "n_classes", None)
    told = n_classes, state.get("conditions") or [], bool(state.get("is_float"))
    return *(getattr(diffusion, name, None) for name in names), state["config"]["schedule"], state["shape"], told


def guide(diffusion: nn.Module, state: dict, weight: float, interval: list[int] | None, weaker: str | None) -> None:
    """Wrap the network in guidance: by another checkpoint, or by itself where it is told less."""
    config, net, interval = state["config"], diffusion.time_aware_net, tuple(interval or ALWAYS)
    if weaker:
        other, other_state = load_diffusion(weaker)
        names = [each["class_names"] for each in (state, other_state) if each.get("class_names")]  # older ones may not say
        if _kind(other, other_state) != _kind(diffusion, state) or names[1:] not in ([], names[:1]):
            what = "prediction, schedule, shape or kind of data, classes or conditions"
            raise Mistake(f"--guide {weaker}: is of another {what} than what it is to guide")
        weaker_net = other.time_aware_net.to(next(diffusion.buffers()).device)
    with as_mistake("--guidance: "):
        guided = AutoGuidance(net, weaker_net, weight, interval) if weaker else ClassifierFreeGuidance(net, weight, interval)
    if not weaker and not null_of(net).keys() & {"label", *(state.get("conditions") or [])}:
        raise Mistake(f"--guidance: the network was told none of {', '.join(null_of(net))}, its null_condition")
    if not weaker and not config["train_cfg"]["label_dropout"]:
        raise Mistake("--guidance: the network was trained with train_cfg.label_dropout = 0, and knows nothing without a label")
    diffusion.time_aware_net = guided


def edit_of(args: argparse.Namespace, shape: list[int], ranks: Ranks) -> Edit | None:
    """The edit that the flags ask for, if they do."""
    asked = {kind: getattr(args, kind) for kind in EDITS if getattr(args, kind)}
    if len(asked) > 1 or bool(args.mask) != ("inpaint" in asked):
        raise Mistake("--inpaint needs --mask, and only one of --" + ", --".join(EDITS) + " can be done at once")
    if not asked:
        return None
    [(kind, paths)] = asked.items()
    if ranks.world > 1:
        raise Mistake(f"--{kind}: is done by one process; start test.py without torchrun")
    strength = 0.5 if args.strength is None else args.strength
    return Edit(kind, paths if isinstance(paths, list) else [paths], shape, args.mask, strength)


def save_edited(folder: Path, given: Tensor, samples: Tensor) -> None:
    """0.png, 1.png, ... of the samples, pixel for pixel, and grid.png with what was given before them."""
    make_folder(folder, len(samples))
    for i, x in enumerate(samples):
        save_png(folder / f"{i}.png", plain(x))
    save_png(folder / "grid.png", grid(torch.cat([given, samples]), columns=8))
    print(f"{folder}: 0.png .. {len(samples) - 1}.png, grid.png (first what was given)")


def edit_images(args: argparse.Namespace, edit: Edit, job: Job) -> None:
    """Draw what an edit asks for, and save it beside the checkpoint."""
    speed.set_flags("fp32")
    heeded = ("timesteps", "clip_x0", "sampler") if edit.kind == "from" else ("timesteps", "clip_x0")
    how = {name: job.options[name] for name in heeded}
    samples = edit.samples(job.diffusion, args.n, args.batch_size, args.seed, job.condition, **how)
    save_edited(job.path.with_name(f"{job.path.stem}_{edit.kind}"), edit.picture(), samples)


def refuse_for(what: str, args: argparse.Namespace, names: Sequence[str], only: str) -> None:
    """Mistake if a flag of these names asks of a model what only one of other data can do."""
    for name in names:
        if getattr(args, name):
            raise Mistake(f"--{name.replace('_', '-')}: this checkpoint is of {what}, and this is only for {only}")


def evaluation_of(args: argparse.Namespace, job: Job, ranks: Ranks, datasets: dict[str, ImageDataset]) -> Evaluation:
    """What the flags ask to measure of the model and of its samples, before these are drawn."""
    names = ("n", "batch_size", "seed", "bpd_images", "bpd_timesteps", "weighting", "features", "classifier")
    how = {name: getattr(args, name) for name in names}
    how |= {"shape": job.shape, "datasets": datasets}
    how |= {"class_names": job.state.get("class_names"), "centres": job.state.get("cluster_centres")}
    how |= {"conditions": job.state.get("conditions") or []}  # older networks were told none
    how |= {"is_float": bool(job.state.get("is_float"))}  # and were of images
    return Evaluation(job.diffusion, job.state["config"], ranks, **how)


def load_model(args: argparse.Namespace, ema_length: float | None, ranks: Ranks) -> tuple[nn.Module, dict, Path]:
    """The model, its checkpoint's state and path; with a length those of that average, which is not saved yet."""
    path = Path(args.checkpoint)
    path = path / "last.pth" if path.is_dir() else path
    if ema_length is None:
        diffusion, state = load_diffusion(path, ema=not args.raw)
        return diffusion, state | {"config": with_data(state["config"], args.set)}, path
    state, error = average_of(path, ema_length)
    state["config"] = with_data(state["config"], args.set)
    path = path.with_name(f"{path.stem}_ema{ema_length:g}.pth")
    if ranks.rank == 0:
        print(f"{path}: the average of length {ema_length:g} after step {state['step']}; its profile is off by {error:.2%}")
    return diffusion_of(state, path), state, path


def run_each(args: argparse.Namespace) -> None:
    """Sample and measure with each --ema-length and each --guidance, and say with which the first metric is least."""
    each = itertools.product(args.ema_length or [None], args.guidance or [None])
    ranks, datasets = Ranks(args.device), {}
    figures = {(length, weight): run(args, length, weight, ranks, datasets) for length, weight in each}
    found = {which: figure for which, figure in figures.items() if figure is not None and math.isfinite(figure)}
    if len(figures) > 1 and found:
        best = min(found, key=found.get)
        flags = [f"{flag} {x:g}" for flag, x in zip(("--ema-length", "--guidance"), best, strict=True) if x is not None]
        print(f"least {args.metrics[0]}: {found[best]:.4f}, with {' '.join(flags)}")


def job_of(args: argparse.Namespace, ema_length: float | None, weight: float | None, ranks: Ranks) -> Job:
    """Load the model, and check what the flags ask of its samples."""
    diffusion, state, path = load_model(args, ema_length, ranks)
    diffusion.to(ranks.device)
    n_classes, conditions = getattr(diffusion.time_aware_net, "n_classes", None), state.get("conditions") or []
    set_defaults(args, diffusion.T, n_classes, state["config"], conditions)
    if args.size and len(state["shape"]) != 3:
        raise Mistake(f"H W = {' '.join(map(str, args.size))}: the samples, {state['shape']}, are no images")
    shape = state["shape"][:1] + (args.size or state["shape"][1:])
    count = args.n if args.interpolate else min(args.n, args.batch_size)
    if count * math.prod(shape) > MAX_VALUES:
        raise Mistake(f"{count} samples of {shape} at a time: must be at most {MAX_VALUES:,} values; see -n, --batch-size")
    check_shape(state["config"], shape)
    if diffusion.n_levels:  # which have no variance to fit, and no states that lead to an edit
        refuse_for("symbols", args, ("fit_variance", *EDITS), "numbers")
    if state.get("is_float"):
        refuse_for("floats", args, ("report", *EDITS), "images")
    sampler = args.sampler if diffusion.n_levels else find(args.sampler, SAMPLERS, FunctionType, "--sampler")
    clip_x0 = not (args.no_clip or state.get("is_float"))
    options = {"sampler": sampler, "timesteps": args.timesteps, "eta": args.eta, "clip_x0": clip_x0}
    with as_mistake():
        diffusion.trajectory((1, *shape), **options)  # checks the options, and computes nothing yet
    if conditions and (args.label is not None or any(getattr(args, kind) for kind in EDITS)):
        names = ", ".join(conditions)
        raise Mistake(f"this network is told {names}, which samples take from valid images: leave out --class and edits")
    labels, columns = labels_of(args.label, args.n, n_classes, state.get("class_names"), state.get("class_counts"))
    if n_classes and not (labels or conditions or state["config"]["train_cfg"]["label_dropout"]):
        raise Mistake("--class: the network was trained with train_cfg.label_dropout = 0, and knows nothing without a label")
    if weight is not None:
        guide(diffusion, state, weight, args.interval, args.guide)
        if not (labels or conditions or args.guide):
            raise Mistake("--guidance: exaggerates a class; add --class (a number, a name, all or data), or --guide WEAKER")
    return Job(diffusion, state, path, shape, options, labels, columns)


def run(
    args: argparse.Namespace, ema_length: float | None, weight: float | None, ranks: Ranks, datasets: dict[str, ImageDataset]
) -> float | None:
    """Do what the flags ask for, with one length and one weight; the figure of the first metric, if rank 0 has one.

    datasets are those that were built before, by split.
    """
    job = job_of(args, ema_length, weight, ranks)
    edit, evaluation = edit_of(args, job.shape, ranks), evaluation_of(args, job, ranks, datasets)
    if job.state.get("conditions"):
        job = job._replace(condition=condition_of(evaluation.dataset("valid"), evaluation.n_classes, args.n))
    metrics = {name: build_metric(name, evaluation, "--metrics") for name in args.metrics}
    check_writable(job.path.parent)
    if ema_length is not None and ranks.rank == 0:
        save(job.path, job.state)
    if edit:
        edit_images(args, edit, job)
        return None
    report, chain = None, ()
    if args.report:
        steps = job.options["timesteps"], job.options["sampler"]
        chain = [*job.diffusion.steps(*steps), 0], job.diffusion.network_calls(*steps)  # first: a sampler of one's own may fail
        report = Report(evaluation, metrics, job.path, job.state, args.command)
    x0 = job.diffusion.x0_of(torch.zeros(min(args.n, args.batch_size, speed.PROBE_ROWS), *job.shape, device=ranks.device))
    precision = set_speed(job.diffusion, x0, args.precision, args.compile, ranks, job.condition)
    shown, columns = pictured(args, evaluation.n_classes, job.columns)
    with speed.autocast(ranks.device, precision):
        if args.fit_variance:
            target = job.path.with_stem(f"{job.path.stem}{'_raw' if args.raw else ''}_fitted")
            fit_variance(evaluation, job.state, args.fit_variance, target)
        how = job.options | {name: getattr(args, name) for name in ("batch_size", "seed", "frames")}
        start = time.perf_counter()
        with as_mistake():  # of a sampler of one's own
            drawn = draw(job.diffusion, args.n, job.shape, **how, pictures=shown, condition=job.condition, ranks=ranks)
        seconds = time.perf_counter() - start
    if bad := int((~drawn.samples.isfinite()).sum()):  # of all samples on rank 0, which the other ranks need not hear of
        raise Mistake(f"--sampler {args.sampler}: {bad} values of the samples are not finite")
    evaluation.samples, evaluation.condition = drawn.samples, job.condition
    weight_name = f"_guidance{weight:g}" if len(args.guidance or []) > 1 else ""
    folder = job.path.with_name(f"{job.path.stem}{weight_name}_gen")
    if ranks.rank == 0:
        make_folder(folder, len(drawn.strips))
        is_image = len(job.shape) == 3
        if is_image:
            save_pictures(folder, drawn, shown, columns)
        if args.npz or not is_image:
            save_arrays(folder / "samples.npz", drawn, shown, job)
    settings = vars(args) | {"ema_length": ema_length, "guidance": weight}
    settings |= {"step": job.state.get("step"), "precision": precision}
    results = measure(metrics, folder / "metrics.json", settings, precision, ranks)
    if report and ranks.rank == 0:
        sampled = Sampled(drawn, evaluation.labels, columns, *chain, seconds, in_words(args, precision, weight))
        report.write(folder / "report.html", sampled, results)
    first = args.metrics[0] if args.metrics and ranks.rank == 0 else None
    return results[first].get(getattr(metrics[first], "figure", None)) if first in results else None


def in_words(args: argparse.Namespace, precision: str, weight: float | None) -> str:
    """How the samples are drawn."""
    steps = "all steps" if args.timesteps is None else f"{args.timesteps} steps"
    words = [f"{args.sampler} in {steps}", precision]
    words += [f"eta {args.eta:g}"] if args.eta else []
    words += ["raw weights"] if args.raw else []
    words += [] if weight is None else [f"guidance {weight:g}"]
    return ", ".join(words)


def measure(metrics: dict, path: Path, settings: dict, precision: str, ranks: Ranks) -> dict[str, dict]:
    """Measure one after the other. What is measured is written and printed before the next thing is tried."""
    results = {}
    for name, found in measure_each(metrics, ranks, precision):
        results[name] = found
        if ranks.rank == 0:
            with whole_file(path) as file:
                file.write(as_json(results | {"settings": settings}, indent=4).encode())
            print(metrics[name].describe(found))
    return results


def numbers(text: str) -> list[float]:
    """With commas between them: of numbers with spaces, a checkpoint that follows would be one more."""
    return [float(number) for number in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description="Sample from a checkpoint.", epilog="See the head of test.py for examples.")
    add = parser.add_argument
    add("checkpoint")
    add("size", nargs="*", type=int, metavar="H W", help="height and width, by default those of the training images")
    add("-n", type=int, help="number of samples, by default 16, of a report 160")
    add("-s", "--seed", type=int, default=0, help="of all that is drawn")
    add("--sampler", default="ddpm", help=f"{', '.join(SAMPLERS)}, or a function of your own as my_file.my_sampler")
    add("--timesteps", type=int, help="steps a sample, by default T, of a report 200; heun has two network calls in each")
    add("--eta", type=float, default=0.0, help="noise of the sampler ddim: 0 none, 1 as much as ddpm")
    add("--no-clip", action="store_true", help="do not keep each predicted x_0 of images in [-1, 1]")
    add("--class", dest="label", help="a number, a name, all for a row of each, or data for their shares there")
    add(
        "--guidance",
        type=numbers,
        metavar="WEIGHT",
        help="1 is the network alone, more exaggerates what it is told; 1,1.5,2 for samples with each",
    )
    add("--guide", metavar="WEAKER.pth", help="guide away from this checkpoint instead of from what it says untold")
    add("--interval", type=int, nargs=2, metavar=("LOW", "HIGH"), help="times in which the guidance acts")
    add("--inpaint", metavar="IMAGE", help="draw anew what --mask leaves black")
    add("--mask", metavar="IMAGE", help="of --inpaint: white where the image is known")
    add("--from", metavar="IMAGE", help="noise it to --strength of T, and sample from there")
    add("--strength", type=float, help="of --from, by default 0.5: 0 gives the image back, 1 forgets it")
    add("--interpolate", metavar="IMAGE", nargs=2, help="-n images from one to the other")
    add("--upscale", metavar="IMAGE", help="images of which this small one is the average")
    add("--colour", metavar="IMAGE", help="colour images of which this is the grey")
    add("--frames", type=int, default=11, help="states in a strip")
    add("--pictures", type=int, default=64, help="samples that get a strip, a place in the grid and the animation")
    add(
        "--npz",
        action="store_true",
        help="write samples.npz as well: the numbers of the samples, and of the states of the strips",
    )
    add("--batch-size", type=int, default=64, help="samples in one call of the network")
    add("--metrics", nargs="+", default=[], help=f"{', '.join(METRICS)}, or a class of your own as my_file.MyMetric")
    add("--report", action="store_true", help="write report.html: pictures, curves, bpd, fd, copies, config")
    add("--bpd-images", type=int, help="images of the valid split for bpd and accuracy, by default 1000, of a report 200")
    add("--bpd-timesteps", type=int, help="timesteps of each that are evaluated, unbiased; by default all T, of a report 100")
    add("--weighting", default="bound", choices=get_args(Weighting), help="of accuracy: noisy suits images")
    add("--features", default="classifier", choices=["classifier", "inception"], help="what fd is taken in")
    add("--classifier", help="its file, by default models/classifier_DATASET_....pth")
    add("--fit-variance", type=int, metavar="N", help="first fit sigma_t^2 to N training images; saves NAME_fitted.pth")
    add("--raw", action="store_true", help="the weights themselves instead of their average")
    add(
        "--ema-length",
        nargs="+",
        type=float,
        metavar="LENGTH",
        help="the power-function average of this length instead, or each",
    )
    add("--set", nargs="+", action="extend", default=[], metavar="dataset.KEY=VALUE", help="where the data are now")
    add("--precision", default="fp32", choices=["auto", *speed.PRECISIONS], help="of the network")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", help="cuda, cuda:1, cpu, ...; by default CUDA where there is one")
    args = parser.parse_intermixed_args(argv)
    args.command = shlex.join(["python", "test.py", *(sys.argv[1:] if argv is None else argv)])

    def work() -> None:
        _check(args, parser.get_default)
        run_each(args)

    try:
        return run_script("test.py", work)
    finally:
        leave_ranks()


def _check(args: argparse.Namespace, default: Callable[[str], object]) -> None:
    """Mistake if the flags do not go together; default(name) is what a flag is if it is not given."""
    for name in ("n", "frames", "pictures", "batch_size", "bpd_images", "fit_variance"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise Mistake(f"--{name.replace('_', '-')} = {getattr(args, name)}: must be at least 1")
    if len(args.size) not in (0, 2) or min(args.size, default=1) < 1:
        raise Mistake(f"H W = {' '.join(map(str, args.size))}: must be two numbers of at least 1, or none")
    if args.guidance is None and (args.guide or args.interval):
        raise Mistake("--guide and --interval need --guidance WEIGHT")
    if args.guidance is not None and args.fit_variance:
        raise Mistake("--fit-variance is of the network itself: leave out --guidance")
    if args.ema_length and args.raw:
        raise Mistake("--raw and --ema-length are weights of two kinds")
    if any(not 0 < length <= MAX_LENGTH for length in args.ema_length or []):
        raise Mistake(f"--ema-length {' '.join(map(str, args.ema_length))}: must be above 0 and at most {MAX_LENGTH:.4f}")
    if not all(map(math.isfinite, args.guidance or [])):
        raise Mistake(f"--guidance {','.join(map(str, args.guidance))}: a weight must be a finite number")
    edits = [f"--{kind}" for kind in EDITS if getattr(args, kind)]
    for flag, values in (("--ema-length", args.ema_length), ("--guidance", args.guidance)):
        if len(values or []) > 1 and (edits or not args.metrics):
            of_edits = f", and {edits[0]} has none" if edits else ""
            raise Mistake(f"{flag} with several values needs --metrics to tell them apart{of_edits}")
    if args.strength is not None and not getattr(args, "from"):
        raise Mistake("--strength is of --from")
    if args.seed < 0:
        raise Mistake(f"--seed = {args.seed}: must be at least 0")
    if edits:
        _check_edit(args, edits, default)


def _check_edit(args: argparse.Namespace, edits: list[str], default: Callable[[str], object]) -> None:
    """Mistake if a flag does not go together with the edits that are asked for."""
    ignored = [name for name in NOT_OF_EDITS if getattr(args, name) != default(name)]
    ignored += ["sampler"] if args.sampler != default("sampler") and not getattr(args, "from") else []
    if ignored:
        raise Mistake(f"{edits[0]}: leave out {', '.join('--' + name.replace('_', '-') for name in ignored)}")
    if args.interpolate and args.label in ("all", "data"):
        raise Mistake(f"--interpolate: is of one class, not of --class {args.label}")
    if args.interpolate and args.n == 1:
        raise Mistake("-n 1: --interpolate needs at least 2, the two ends")
    if args.report:
        raise Mistake(f"--report is of samples: leave out {', '.join(edits)}")


if __name__ == "__main__":
    sys.exit(main())
