"""The state of a run: taken, taken over, read from a checkpoint and held against the config of now.

`run` is train.py's Trainer. Every rank takes and takes over; what is written is rank 0's.
"""

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
from config import MAY_CHANGE, SPLITS, as_json_line
from mistakes import Mistake, as_mistake, one_line
from training.meter import BINS
from training.optimizers import restore_moments
from training.run_folder import BEST

log = logging.getLogger("train")
SAME_CLUSTERS = 0.01  # share of images that may change their cluster when it is found again: of other images nearly all do
AUTO = (
    ("train_cfg", "precision"),
    ("train_cfg", "compile"),
    ("time_aware_net", "num_groups"),
)  # a resume keeps what was chosen
OF_DISTANCE = ("metric_features", "metric_samples", "sampler", "sample_timesteps")  # where they agree, distances compare


def take_state(run) -> dict | None:
    """A copy, on the CPU, of everything that resuming and sampling need; None on the ranks that do not write."""
    sums = run.meter.loss_sums(run.ranks)
    _check_finite(run, run.averages.tensors())
    if run.ranks.rank:
        return None
    return _copied(
        {
            **_head(run),
            "closed": run.closed,
            "world": run.ranks.world,
            "records": run.records,
            "best_loss": run.best_loss,
            "loss_sums": sums[:2],
            "loss_by_t": sums[2:],
            "bad_steps": [int(run.meter.bad_steps), int(run.meter.bad_in_row)],
            "quality": run.quality.state(),
            "frozen": [name for name, p in run.model.named_parameters() if not p.requires_grad],
            "model": run.model.state_dict(),
            "ema": run.ema.state_dict(),
            **({"power_ema": run.averages.state()} if run.averages.power else {}),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
        }
    )


def take_snapshot(run) -> dict | None:
    """A copy of the power-function averages, on the CPU, in half precision, if one is due; None on ranks that do not write."""
    if run.step not in run.averages.snapshot_steps:
        return None
    averages = [{name: p.half() for name, p in average.items()} for average in run.averages.state()]
    _check_finite(run, [p for average in averages for p in average.values()])
    if run.ranks.rank:
        return None
    buffers = {name: value for name, value in run.ema.state_dict().items() if name not in averages[0]}
    return _copied({**_head(run), "buffers": buffers, "power_ema": averages})


def _head(run) -> dict:
    """What every file with weights says of them: checkpoint.ABOUT_MODEL."""
    images = run.train_data.images
    return {
        "config": run.config,
        "shape": list(run.shape),
        "class_names": run.class_names,
        "class_counts": run.class_counts,
        "conditions": list(images.conditions),
        "is_float": images.is_float,
        "cluster_centres": images.centres,
        "train_images": len(images),
        "step": run.step,
        "epoch": run.epoch,
    }


def _check_finite(run, tensors: list[Tensor]) -> None:
    if not torch.stack(torch._foreach_norm(tensors)).isfinite().all():
        raise Mistake(f"the weights at step {run.step} are not finite, and were not written to {run.folder.path}")


def _copied(state: Any) -> Any:
    """Nested dictionaries and lists with every tensor copied to the CPU; from a GPU without waiting for it."""
    if isinstance(state, Tensor):
        copy = torch.empty_like(state, device="cpu", pin_memory=state.device.type == "cuda")
        return copy.copy_(state, non_blocking=True)
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state


def restore_state(run, state: dict) -> None:
    """Make run the one that this state was taken of, if it has the same data."""
    _check_data(run, state)
    try:
        run.model.load_state_dict(state["model"])
        run.ema.load_state_dict(state["ema"])
        run.averages.restore(state.get("power_ema", []))
        restore_moments(run.optimizer, state["optimizer"], state["step"])
        run.scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise Mistake(f"{run.folder.resume_from}: is not the state of a run ({reason})") from error
    run.step, run.closed, run.records = state["step"], state["closed"], state["records"]
    keeps = {name: run.ranks.largest(float(not run.folder.keeps(name, run.step))) == 0 for name in BEST}  # for all ranks
    lost = math.isnan(state["best_loss"]) or not keeps["best.pth"]  # older runs kept a nan
    run.best_loss = math.inf if lost else state["best_loss"]
    loss_sums = state["loss_sums"] + state.get("loss_by_t", [0] * 2 * BINS)  # older checkpoints have no loss by t
    run.meter.restore(loss_sums, state["bad_steps"], run.ranks.rank)
    then, now = (config["train_cfg"] for config in (state["config"], run.config))
    same = all(then.get(key) == now.get(key) for key in OF_DISTANCE) and keeps["best_fd.pth"]
    run.quality.restore(state.get("quality", {}) | ({} if same else {"best_fd": math.inf}))
    run.scheduler.last_epoch = run.step
    for group, rate, factor in zip(run.optimizer.param_groups, run.scheduler.base_lrs, run.scheduler.lr_lambdas, strict=True):
        group["lr"] = rate * factor(run.step)
    if run.ranks.world != state["world"]:
        log.warning(f"the run had {state['world']} ranks and has {run.ranks.world} now: its draws will differ")


def _check_data(run, state: dict) -> None:
    """Mistake if the data are not those of the run; a warning where it has more or fewer training images."""
    head = _head(run)
    for name, found in {name: head[name] for name in ("shape", "class_names", "conditions", "is_float")}.items():
        if state.get(name) not in (None, found):  # older checkpoints may not say
            raise Mistake(f"{run.folder.resume_from}: the data are not the run's: {name} {state[name]} then, {found} now")
    if state.get("class_counts") not in (None, run.class_counts):
        found_again = run.config["dataset"].get("clusters") and state.get("cluster_centres") is None  # as older runs do
        if found_again and _moved(state["class_counts"], run.class_counts) > SAME_CLUSTERS:
            raise Mistake(f"{run.folder.resume_from}: the training images are not the run's, and so its clusters are lost")
        log.warning("the training images are not those of the run: a class has more or fewer of them now")
    elif state.get("train_images") not in (None, images := len(run.train_data.images)):
        log.warning(f"the training images are not those of the run: {state['train_images']} then, {images} now")


def start_weights(run) -> None:
    """Put the averaged weights of the checkpoint train_cfg.init into the network of a new run, where name and shape fit."""
    path = run.cfg.init
    if path is None or run.folder.resume_from:
        return
    with as_mistake("train_cfg.init: "):
        pretrained, state = checkpoint.load_diffusion(path)
    net = run.model.time_aware_net
    ours, theirs = net.state_dict(), pretrained.time_aware_net.state_dict()
    shapes = {name: getattr(value, "shape", None) for name, value in ours.items()}  # None of an extra state
    fitting = {name: value for name, value in theirs.items() if shapes.get(name, 0) == getattr(value, "shape", None)}
    if not fitting:
        raise Mistake(f"train_cfg.init = {path}: none of its weights has the name and the shape of one of this network")
    net.load_state_dict(ours | fitting)
    new = [name for name in ours if name not in fitting]
    news = f"; new are {len(new)} of {len(ours)}: {', '.join(new[:5])}{', ...' if new[5:] else ''}" if new else ""
    log.log(logging.WARNING if new else logging.INFO, f"{path}: the weights of its step {state.get('step')}{news}")
    if (there := getattr(pretrained, "prediction", None)) != getattr(run.model, "prediction", None):
        log.warning(f"{path}: its network predicts something else: diffusion.prediction = {there!r} there")


def freeze_as_before(model: nn.Module, state: Mapping | None) -> None:
    """Train those weights alone that the run trained; older checkpoints do not say which."""
    if state and "frozen" in state:
        for name, p in model.named_parameters():
            p.requires_grad_(name not in state["frozen"])


def _moved(then: object, now: list[int]) -> float:
    """The share of images that must have changed their class for the counts to be so."""
    try:
        return sum(abs(a - b) for a, b in zip(then, now, strict=True)) / 2 / sum(now)
    except (TypeError, ValueError):
        return 1.0


# Reading


def read_state(path: Path, config: dict) -> dict:
    """The state to resume from, if its config differs from this one only where a run may change.

    Where config says "auto", it takes what the run has, in place.
    """
    try:
        state = checkpoint.load(path)
    except Mistake as error:
        raise Mistake(f"{error}; {_newest_good(path)}") from None
    with as_mistake(f"{path}: "):
        _check_counters(state)
    for section, key in AUTO:
        values, of_run = (each[section].get("kwargs", each[section]) for each in (config, state["config"]))
        if values.get(key) == "auto" and key in of_run:
            values[key] = of_run[key]
    old, new = flat(state["config"]), flat(config)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    refused = [key for key in changed if not (key.removeprefix("train_cfg.") in MAY_CHANGE or _is_place(key, config))]
    if refused:
        differences = ", ".join(
            f"{key} ({as_json_line(old.get(key))} then, {as_json_line(new.get(key))} now)" for key in refused
        )
        may = ", ".join(sorted(MAY_CHANGE))
        raise Mistake(f"--resume {path}: the config is not the run's: {differences}; only these may change: {may}")
    return state


def _is_place(key: str, config: dict) -> bool:
    """Does the key say where a file of NumpyArray's is? Classes and the names of conditions are held to the run's elsewhere."""
    section, _, name = key.removeprefix("dataset.").partition(".")
    return config["dataset"]["name"] == "NumpyArray" and section in SPLITS and name.split(".")[0] in ("labels", "conditions")


def flat(value: object, path: str = "") -> dict[str, object]:
    """A nested config as {path: value}."""
    if isinstance(value, dict) and value:
        return {key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{path}.{name}".lstrip(".")).items()}
    return {path: value}


def _check_counters(state: dict) -> None:
    """ValueError if a plain value is not such as a run saves."""
    if "fitted" in state:
        raise ValueError("its variance was fitted after training: a run goes on from the checkpoint that it was fitted to")
    if "closed" not in state:
        raise ValueError(
            "does not hold what a run of this version needs to go on; how a new run starts from it says README's From Python"
        )
    for name, least in {"step": 0, "closed": 0, "records": 0, "world": 1}.items():
        if type(state.get(name)) is not int or not least <= state[name] < 2**63:
            raise ValueError(f"{name}: must be a whole number of at least {least}")
    if type(state.get("best_loss")) is not float:
        raise ValueError("best_loss: must be a number")
    for name, count in {"loss_sums": 2, "bad_steps": 2, "loss_by_t": 2 * BINS}.items():
        values = state.get(name, [0] * count if name == "loss_by_t" else None)
        if not isinstance(values, list) or [type(value) in (int, float) for value in values] != [True] * count:
            raise ValueError(f"{name}: must be {count} numbers")
    frozen = state.get("frozen", [])
    if not isinstance(frozen, list) or not all(type(name) is str for name in frozen):
        raise ValueError("frozen: must be a list of names")
    quality = state.get("quality", {})
    if not isinstance(quality, dict) or any(type(value) is not float or math.isnan(value) for value in quality.values()):
        raise ValueError("quality: must be an object of numbers")


def _newest_good(broken: Path) -> str:
    """What to resume from instead of a broken checkpoint."""
    found = [path for path in broken.parent.glob("*.pth") if not path.stem.endswith("_fitted")]  # older ones do not say it
    for path in sorted(found, key=lambda path: -path.stat().st_mtime):
        with contextlib.suppress(ValueError):
            _check_counters(checkpoint.load(path))
            return f"the newest good one is {path}: to go on from there, --resume {path}"
    return "there is no good one beside it"
