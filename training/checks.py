"""What can be known to be wrong before the first step, and what to say when the numbers go wrong later."""

import copy
import inspect
import logging
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from config import TrainConfig
from dataset import DATASETS, ImageDataset, ImageFolder, are_among, evenly, rows_of, shared_images
from diffusion_process import Condition, DiffusionProcess, check_losses
from gaussian_diffusion import GaussianDiffusion
from guidance import hide, null_of
from mistakes import Mistake, as_mistake
from training.batches import parts_of
from training.optimizers import fall_of, optimizer_of
from training.ranks import Ranks, buffers_kept

log = logging.getLogger("train")
READ, READ_VALUES = 1000, 2**24  # rows of floats that are read to see their scale, and values in them, at most
SCALES = 4  # how much more or less than 1 that may be


def check_settings(cfg: TrainConfig, ranks: Ranks) -> None:
    """Mistake if no optimizer or fall of its rate has that name, or a batch is not shared out evenly by ranks and parts."""
    optimizer_of(cfg), fall_of(cfg)
    parts = ranks.world * cfg.grad_accum
    if cfg.batch_size % parts:
        raise Mistake(
            f"train_cfg.batch_size = {cfg.batch_size}: must be a multiple of {parts}, {ranks.world} ranks times "
            f"grad_accum = {cfg.grad_accum}"
        )


def check_resume(state: dict | None, ranks: Ranks) -> None:
    """Mistake if the ranks do not all go on from the same step: their collective calls would not match."""
    step = -1 if state is None else state["step"]
    if ranks.largest(step) != -ranks.largest(-step):
        raise Mistake("--resume: not all ranks see that checkpoint: put train_cfg.model_save_dirpath where all of them see it")


def check_ranks(run, images: dict[str, ImageDataset]) -> None:
    """Mistake if the ranks of a Trainer differ in what steps and batches follow from: they would wait for each other."""
    found = {f"train_cfg.{key}": value for key, value in run.config["train_cfg"].items() if key != "model_save_dirpath"}
    for split, data in images.items():
        told = ({} if data.labels is None else {"labels": data.labels}) | dict(data.conditions)
        sums = {name: zlib.crc32(rows.contiguous().view(torch.uint8).numpy()) for name, rows in told.items()}
        given = "".join(f" with {name} of checksum {number:08x}" for name, number in sums.items())
        found[f"dataset.{split}"] = f"{len(data)} images{given}"
    everyone = run.ranks.gather_everywhere([found])
    for key, value in found.items():
        if any(each[key] != value for each in everyone):
            values = ", ".join(str(each[key]) for each in everyone)
            raise Mistake(f"{key}: must be the same on all ranks, and is {values}")


def _check_labels(n_classes: int | None, images: dict[str, ImageDataset]) -> None:
    """Mistake if a network of n_classes is to be trained on labels that are not there, or not its."""
    if n_classes is None:
        return
    for split, data in images.items():
        if data.labels is None:
            raise Mistake(f"time_aware_net.kwargs.n_classes = {n_classes}: dataset.{split} has no labels")
        least, largest = int(data.labels.min()), int(data.labels.max())
        if not 0 <= least <= largest < n_classes:
            raise Mistake(
                f"time_aware_net.kwargs.n_classes = {n_classes}: dataset.{split} has labels from {least} to {largest}"
            )
    names, valid_names = images["train"].class_names, images["valid"].class_names
    if names is not None and len(names) != n_classes:
        raise Mistake(f"time_aware_net.kwargs.n_classes = {n_classes}: dataset.train has {len(names)} classes")
    if not are_among(valid_names, names):
        raise Mistake(f"dataset.valid: has the classes {valid_names}, and dataset.train {names}")


def _check_conditions(net: nn.Module, images: dict[str, ImageDataset]) -> None:
    """Mistake if the data give conditions that the network's forward does not take, or only some of the data give them."""
    takes = inspect.signature(net.forward).parameters
    told = {split: list(data.conditions) for split, data in images.items()}
    if told["train"] != told["valid"]:
        raise Mistake(f"dataset.valid: has the conditions {told['valid']}, and dataset.train {told['train']}")
    any_name = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    xt_and_t, others = list(takes)[:2], list(takes)[2:]
    if unknown := [name for name in told["train"] if name in xt_and_t or not (any_name or name in others)]:
        raise Mistake(f"time_aware_net: its forward takes no {', '.join(unknown)}, a condition of dataset.train")
    null = getattr(net, "null_condition", None)
    if not (null is None or isinstance(null, Mapping)):
        raise Mistake(f"time_aware_net: its null_condition is a {type(null).__name__}: must be a dictionary by name")
    for name in null or {}:
        if name not in told["train"]:
            raise Mistake(f"time_aware_net: its null_condition names {name}, and dataset.train gives no such condition")


def _check_call(model: GaussianDiffusion, x: Tensor, condition: Condition) -> None:
    """Call the network; Mistake if it writes into what it was given, with which samplers go on."""
    t, before = torch.ones(1, dtype=torch.long), x.clone()
    model._net(x, t, condition)
    if not torch.equal(x, before) or t.item() != 1:
        raise Mistake("it writes into xt or t, which it may only read: xt + 1 is a new tensor, and xt += 1 is not")
    model.predict(x, t, condition)


def _check_no_label(run, x: Tensor, condition: dict[str, Tensor]) -> None:
    try:
        _check_call(run.model, x, condition | {"label": torch.tensor([run.n_classes])})
    except IndexError as error:
        raise Mistake(
            f"it fails at label = {run.n_classes}, n_classes, which stands for no label ({error}): make room for one more, or "
            "set train_cfg.label_dropout to 0"
        ) from error


def _check_null_condition(run, x: Tensor, condition: dict[str, Tensor]) -> None:
    """Call the network as it is called where what its null_condition names is hidden."""
    null = {name: value for name, value in null_of(run.model.time_aware_net).items() if name != "label"}
    try:
        untold = hide(condition, null, torch.tensor([True]))
    except (RuntimeError, TypeError) as error:  # shapes that do not fit, what is no number
        raise Mistake(f"its null_condition must be numbers, or tensors like a row: {error}") from error
    for name, rows in untold.items():
        given = condition[name]
        if rows.shape != given.shape or rows.dtype != given.dtype:
            found, must = (f"{each.dtype} {list(each.shape)}" for each in (rows, given))
            raise Mistake(f"its null_condition makes {found} of {must}, one row of {name!r}: must keep it")
    _check_call(run.model, x, untold)


def check_fit(run, images: dict[str, ImageDataset]) -> None:
    """Try the network of a Trainer on one image of each data set; warn of images that are no validation, and of a prior that is
    no noise.
    """
    if images["train"].is_float != images["valid"].is_float:
        raise Mistake(f"dataset.valid: holds {images['valid'].noun}, and dataset.train {images['train'].noun}")
    for split, data in images.items():
        if type(data).to_float is not ImageDataset.to_float:
            _check_to_float(split, data)
        if data.is_float:
            _check_floats(split, data, run.model)
    _check_network(run, images)
    _warn_of_images(run, images)
    if run.model.n_levels:  # what is left of x_0 at T is part of p(x_T)
        return
    alpha_bar = run.model.signal_scale[-1].item() ** 2
    if alpha_bar > 0.01:
        log.warning(
            f"alpha_bar_T = {alpha_bar:.3g} is above 0.01: x_T keeps some of the image, and samples that start from N(0, I) "
            "start wrong; use more timesteps or larger betas"
        )


def _check_network(run, images: dict[str, ImageDataset]) -> None:
    model, net, n_classes = run.model, run.model.time_aware_net, run.n_classes
    if n_classes is None and run.config["time_aware_net"]["kwargs"].get("n_classes") is not None:
        raise Mistake("time_aware_net: takes n_classes and does not keep it as self.n_classes, so that it would get no labels")
    if not hasattr(net, "n_classes") and "label" in inspect.signature(net.forward).parameters:
        log.warning("time_aware_net: takes a label, and gets none, since it has no attribute n_classes")
    _check_labels(n_classes, images)
    _check_conditions(net, images)
    if any(map(is_lazy, model.parameters())):
        raise Mistake("time_aware_net: has lazy layers, whose shapes its config does not say: no checkpoint could be read")
    for split, data in images.items():
        condition = rows_of(data.condition(n_classes), slice(1))
        says = as_mistake(f"time_aware_net: does not fit the images of dataset.{split}: ")
        with torch.no_grad(), torch.random.fork_rng(devices=[]), says:
            x = model.eval().q_sample(model.x0_of(torch.zeros(1, *data.shape)), model.T)  # also beyond [-1, 1]
            _check_call(model, x, condition)
            if n_classes is not None and run.cfg.label_dropout:
                _check_no_label(run, x, condition)
            if getattr(net, "null_condition", None):
                _check_null_condition(run, x, condition)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), buffers_kept(model), as_mistake("diffusion: "):
        x0, twice = model.x0_of(torch.zeros(2, *images["train"].shape)), torch.zeros(2, dtype=torch.long)
        loss = model.loss(x0, model.T, condition=rows_of(images["train"].condition(n_classes), twice))
        check_losses("loss", loss, torch.ones(2))
    if not any(p.requires_grad for p in model.parameters()):
        raise Mistake("time_aware_net: has no weights to train")
    model.train()


def _warn_of_images(run, images: dict[str, ImageDataset]) -> None:
    for split, data in images.items():
        root = getattr(data, "root", None) if isinstance(data, ImageFolder) else None  # a subclass may have none
        if root and run.folder.path.resolve().is_relative_to(Path(root).resolve()):
            log.warning(f"{run.folder.path}: lies among the images of dataset.{split}: its pictures will be some of them")
        is_own = type(data) not in DATASETS.values()
        twin = copy.copy(data)  # as in ImageDataset
        if is_own and not data.is_random and not torch.equal(twin.pixels(0), twin.pixels(0)):
            log.warning(f"dataset.{split}: {data.name_of(0)} changes from call to call, and may be read once: set is_random")
    train, valid = images["train"], images["valid"]
    if shared := shared_images(train, valid):
        log.warning(f"dataset.valid: {shared} of its {len(valid)} images are in dataset.train, so that training sees them")
    if train.shape != valid.shape:
        log.warning(f"dataset.valid: its images have the shape {list(valid.shape)}, and those to train on {list(train.shape)}")


def _check_to_float(split: str, data: ImageDataset) -> None:
    """Hold a to_float of one's own to its shape, by a Mistake, and to its range, by a warning."""
    with torch.random.fork_rng(devices=[]):
        x0 = data.to_float(copy.copy(data).pixels(0)[None])[0]
    if x0.shape != data.shape:
        raise Mistake(f"dataset.{split}: to_float makes {list(x0.shape)} of pixels {list(data.shape)}: must keep the shape")
    if not (data.is_float or x0.abs().max() <= 1):  # nor is nan
        log.warning(f"dataset.{split}: to_float gives {x0.min():g} to {x0.max():g}, and samples are clipped to [-1, 1]")


def _check_floats(split: str, data: ImageDataset, model: DiffusionProcess) -> None:
    """Mistake if floats are not what the model is of; a warning where their scale is not what schedules are made for."""
    if model.n_levels:
        raise Mistake(f"dataset.{split}: is of floats, and symbols are made of images")
    count, twin = max(1, min(READ, READ_VALUES // data.shape.numel())), copy.copy(data)
    with torch.random.fork_rng(devices=[]):
        x0 = data.to_float(torch.stack([twin.pixels(i) for i in evenly(count, len(data))]))
    seen, scale = f"{x0.min():g} to {x0.max():g}", x0.double().square().mean().sqrt().item()
    if not math.isfinite(scale):
        raise Mistake(f"dataset.{split}: not all of its floats are finite")
    if getattr(model, "bounded", False) and not x0.abs().max() <= 1:
        raise Mistake(f"diffusion.bounded = true: x_0 must lie in [-1, 1], and dataset.{split} holds {seen}")
    if not 1 / SCALES <= scale <= SCALES:
        log.warning(
            f"dataset.{split}: its floats, {seen}, have a root mean square of {scale:.3g}, and schedules are made for about 1: "
            "scale them"
        )


@torch.no_grad()
def bad_numbers(run) -> Mistake:
    """What a Trainer knows of its last steps, whose loss or gradient was not finite."""
    x0, t = run.x0, torch.randint(1, run.model.T + 1, (len(run.x0),), device=run.device)
    parts = parts_of(len(x0), run.cfg.grad_accum)
    losses = torch.cat([run.model.loss(x0[part], t[part], condition=rows_of(run.condition, part)) for part in parts])
    worst = losses.nan_to_num(nan=math.inf).argmax()
    images = "" if x0.isfinite().all() else ", of images that are not finite themselves"
    return Mistake(
        f"loss or gradient was not finite in the last {int(run.meter.bad_in_row)} steps, up to step {run.step}: gradient norm "
        f"{run.norm.item():g}, loss scale {run.scaler.get_scale():g}, largest loss {losses[worst]:g} at t = "
        f"{t[worst]}{images}; the last good checkpoint is {run.folder.path / 'last.pth'}"
    )
