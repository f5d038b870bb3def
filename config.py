"""From JSON to objects. The constructors are the schema: every key is checked against the signature that it will be passed to.

A config is read, never changed: `load_config` gives a resolved one, with every default written out, from which the `build_*`
functions make objects. Whatever is wrong is a ValueError that gives the key's path, the nearest valid key, and what is allowed.
"""

import difflib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

import beta_schedule
import dataset
import time_aware_module
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake


def _by_name(*classes: type) -> dict[str, type]:
    return {cls.__name__: cls for cls in classes}


SCHEDULES = _by_name(
    beta_schedule.ConstantSchedule,
    beta_schedule.LinearSchedule,
    beta_schedule.SqrtSchedule,
    beta_schedule.QuadraticSchedule,
    beta_schedule.SineSchedule,
    beta_schedule.SigmoidSchedule,
    beta_schedule.CosineSchedule,
)
NETWORKS = _by_name(time_aware_module.TimeAwareUNet, time_aware_module.TimeAwareMLP)
DATASETS = _by_name(dataset.Digits, dataset.FashionMNIST, dataset.CIFAR10, dataset.CelebA_HQ_256, dataset.ImageFolder)
TRANSFORMS = _by_name(*dataset.TRANSFORMS)
MOST_PARAMETERS = 4 * 10**9  # of a network: 16 GB in float32
MOST_PIXELS = 2**14  # and the most of every other number that a transform takes


@dataclass(frozen=True)
class TrainConfig:
    """The section train_cfg."""

    epochs: int  # passes over the training data
    batch_size: int  # images a step, over all ranks and all of grad_accum
    lr: float  # the optimizer's learning rate, once warm
    model_save_dirpath: str  # folder of the run: checkpoints, log, metrics.jsonl, pictures
    record_period: int = 100  # steps between log lines
    max_steps: int | None = None  # end there if that is sooner, also inside an epoch
    valid_images: int | None = None  # of the validation set, evenly spread over it; null for all
    save_period: int = 0  # epochs between epoch_N.pth, 0 for none
    save_best: bool = True  # keep best.pth, the least validation loss
    save_minutes: float = 5.0  # minutes between saves of last.pth and best.pth; 0: after each epoch
    sample_period: int = 1  # epochs between pictures of samples, 0 for none
    sample_timesteps: int = 20  # network calls of such a picture (DPM-Solver++)
    seed: int = 0  # of the weights, the data's order and every draw
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for the weights of hidden layers, Adam for the rest
    warmup_steps: int = 0  # steps over which the learning rate rises from 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after that; the latter two end at 0
    variance_lr: float = 1e-3  # learning rate of a learnable reverse variance, in log sigma^2 a step
    grad_clip: float = 1.0  # largest norm of the network's gradient, 0 for any
    grad_accum: int = 1  # parts that a batch is split into, one forward and backward pass each
    ema_decay: float = 0.9999  # of the averaged weights, per step; shorter at first
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"  # of the network; the maths is float32 always
    compile: bool | Literal["auto"] = "auto"  # torch.compile the network
    activation_checkpointing: bool = False  # trade time for memory in the U-Net
    chunk_size: int | None = None  # timesteps in one network call of the full loss, null for as many as make 128 rows
    cache_gb: float = 4.0  # a data set up to this size is decoded once and kept, in GB
    num_workers: int = 2  # processes that decode images
    max_bad_steps: int = 10  # steps in a row with a non-finite loss or gradient, after which the run stops

    def __post_init__(self):
        for name in ("epochs", "batch_size", "record_period", "sample_timesteps", "grad_accum", "max_bad_steps"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("lr", "variance_lr"):
            self._require(name, 0 < getattr(self, name) <= 1, "must be above 0 and at most 1")
        for name in ("save_period", "save_minutes", "sample_period", "warmup_steps", "grad_clip", "cache_gb", "num_workers"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        self._require("seed", 0 <= self.seed < 2**63, "must lie in 0..2^63 - 1")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "must be at least 0 and below 1")
        for name in ("max_steps", "valid_images", "chunk_size"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "must be null or at least 1")
        self._require("num_workers", self.num_workers <= 1024, "must be at most 1024")
        name = self.model_save_dirpath
        self._require("model_save_dirpath", name.strip() != "" and "\0" not in name, "must name a folder")

    def _require(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise Mistake(f"{name} = {getattr(self, name)!r}: {allowed}")


# What --resume may change: nothing that the weights depend on.
MAY_CHANGE = {"epochs", "max_steps", "record_period", "save_period", "save_best", "save_minutes", "sample_period"}
MAY_CHANGE |= {"sample_timesteps", "model_save_dirpath", "num_workers", "cache_gb", "max_bad_steps"}


# Checks


def _nearest(name: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Allowed: {', '.join(allowed)}"


def _matches(value: Any, kind: Any) -> bool:
    """Is a JSON value of the type that an annotation names?"""
    origin, args = get_origin(kind), get_args(kind)
    if kind in (Any, inspect.Parameter.empty):
        return True
    if origin is Literal:
        return value in args
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, arg) for arg in args)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    kind = origin or kind
    if kind is Callable:  # a transform, which stands in JSON as its name and arguments
        return isinstance(value, dict)
    if not isinstance(kind, type):
        return False
    if issubclass(kind, Sequence) and kind is not str:
        return isinstance(value, list) and all(_matches(item, args[0] if args else Any) for item in value)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    """An annotation in the words of JSON."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(arg) for arg in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_describe(arg) for arg in args))
    if origin and issubclass(origin, Sequence):
        return f"a list, each {_describe(args[0])}" if args else "a list"
    words = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        dict: "an object",
    }
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def shown(value: Any) -> str:
    """A value as JSON, in one line that is not long; a checkpoint may hold what JSON cannot, and lists of lists without end."""
    text = ""
    for part in json.JSONEncoder(default=repr, skipkeys=True, check_circular=False).iterencode(value):
        text += part
        if len(text) > 80:
            return text[:80] + "..."
    return text


def _object(path: str, value: Any, required: Sequence[str], optional: Sequence[str] = ()) -> dict:
    """value, if it is a JSON object with all the required keys and none but the optional ones besides."""
    if not isinstance(value, Mapping):
        raise Mistake(f"{path or 'the config'}: must be an object with the keys {', '.join(required)}")
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in (*required, *optional):
            name = shown(str(key))[1:-1]  # in one line
            raise Mistake(f"{prefix}{name}: unknown key; {_nearest(str(key)[:80], (*required, *optional))}")
    for key in required:
        if key not in value:
            raise Mistake(f"{prefix}{key}: missing")
    return dict(value)


def _arguments(path: str, function: Callable, given: Any, without: Sequence[str] = ()) -> dict:
    """given with the function's defaults filled in; every key and type checked against its signature."""
    hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name not in without}
    required = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
    given = _object(path, given, required, [name for name in parameters if name not in required])
    for name, value in given.items():
        kind = hints.get(name, Any)
        if not _matches(value, kind):
            raise Mistake(f"{path}.{name} = {shown(value)}: must be {_describe(kind)}")
    return {name: given[name] if name in given else _plain(p.default) for name, p in parameters.items()}


def _plain(default: Any) -> Any:
    """A default as JSON holds it."""
    return list(default) if isinstance(default, tuple) else default


def _from_registry(path: str, name: Any, registry: Mapping[str, Callable]) -> Callable:
    if not isinstance(name, str) or name not in registry:
        raise Mistake(f"{path} = {shown(name)}: unknown; {_nearest(str(name)[:80], list(registry))}")
    return registry[name]


def _named(path: str, value: Any, registry: Mapping[str, Callable]) -> dict:
    """{"name": ..., "kwargs": {...}}, resolved."""
    value = _object(path, value, ["name"], ["kwargs"])
    cls = _from_registry(f"{path}.name", value["name"], registry)
    return {"name": value["name"], "kwargs": _arguments(f"{path}.kwargs", cls, value.get("kwargs", {}))}


def _dataset(path: str, value: Any) -> dict:
    """The section dataset, resolved. A transform keeps just the arguments given: not all its defaults are JSON's."""
    value = _object(path, value, ["name", "train", "valid"], ["test"])
    cls = _from_registry(f"{path}.name", value["name"], DATASETS)
    resolved = {"name": value["name"]}
    for split in ("train", "valid", "test"):
        if split not in value:
            continue
        section = _arguments(f"{path}.{split}", cls, value[split])
        for i, transform in enumerate(section["pipeline"]):
            _check_sizes(**_named(f"{path}.{split}.pipeline.{i}", transform, TRANSFORMS), path=f"{path}.{split}.pipeline.{i}")
        resolved[split] = section
    return resolved


def _check_sizes(path: str, name: str, kwargs: dict) -> None:
    """ValueError if a transform is given a size below 1, or a number that no image has memory for."""
    for key, value in kwargs.items():
        for number in value if isinstance(value, list) else [value]:
            least = 1 if key == "size" else -MOST_PIXELS
            if isinstance(number, int | float) and not least <= number <= MOST_PIXELS:
                raise Mistake(f"{path}.kwargs.{key} = {shown(value)}: must lie in {least}..{MOST_PIXELS}")


def resolve(config: Any) -> dict:
    """A config with every default written out; ValueError if a key is unknown, missing or of the wrong type."""
    config = _object("", config, ["schedule", "time_aware_net", "diffusion", "dataset", "train_cfg"])
    resolved = {
        "schedule": _named("schedule", config["schedule"], SCHEDULES),
        "time_aware_net": _named("time_aware_net", config["time_aware_net"], NETWORKS),
        "diffusion": _arguments("diffusion", GaussianDiffusion, config["diffusion"], ["schedule", "time_aware_net"]),
        "dataset": _dataset("dataset", config["dataset"]),
        "train_cfg": _arguments("train_cfg", TrainConfig, config["train_cfg"]),
    }
    build_train_config(resolved)  # for its ranges
    return resolved


def _once(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object, if no key of it stands there twice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise Mistake(f"{key}: stands twice in one object")
    return dict(pairs)


def _override(config: Any, assignment: str) -> None:
    """Carry out `section.key=value`; a value that is not JSON is a string, a number in the path counts the items of a list."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise Mistake(f"--set {assignment}: must look like train_cfg.lr=1e-4")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        raise Mistake(f"--set {path}: {error}") from None
    *parents, last = path.split(".")
    try:
        for key in parents:
            config = config.setdefault(key, {}) if isinstance(config, dict) else config[int(key)]
        config[last if isinstance(config, dict) else int(last)] = value
    except (TypeError, ValueError, IndexError):
        raise Mistake(f"--set {assignment[:80]}: the config has no such place") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """The resolved config of a JSON file, with overrides such as "train_cfg.lr=1e-4"."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise Mistake(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a key twice, bytes that are not UTF-8, brackets too deep
        raise Mistake(f"{path}: {error}") from None
    for assignment in overrides:
        _override(config, assignment)
    return resolve(config)


# Builders


def _build(path: str, function: Callable, kwargs: Mapping[str, Any], **more: Any) -> Any:
    """function(**kwargs, **more), with the path put before what it finds wrong."""
    try:
        return function(**kwargs, **more)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        separator = "." if line.split(" ")[0].split(".")[0] in kwargs else ": "
        raise Mistake(f"{path}{separator}{line}") from None


def build_train_config(config: Mapping) -> TrainConfig:
    return _build("train_cfg", TrainConfig, config["train_cfg"])


def build_dataset(config: Mapping, split: str) -> dataset.ImageDataset:
    """The data set of a split: "train", "valid" or "test"."""
    section = dict(config["dataset"][split])
    path = f"dataset.{split}"
    section["pipeline"] = [
        _build(f"{path}.pipeline.{i}.kwargs", TRANSFORMS[transform["name"]], transform.get("kwargs", {}))
        for i, transform in enumerate(section["pipeline"])
    ]
    return _build(path, DATASETS[config["dataset"]["name"]], section)


def network_without_memory(config: Mapping) -> nn.Module:
    """The network on the device meta, where only shapes are known."""
    net = config["time_aware_net"]
    with torch.device("meta"):
        net = _build("time_aware_net.kwargs", NETWORKS[net["name"]], net["kwargs"])
    size = sum(p.numel() for p in net.parameters())
    if size > MOST_PARAMETERS:
        raise Mistake(f"time_aware_net.kwargs: a network of {size:.3g} parameters; at most {MOST_PARAMETERS:.3g} are allowed")
    return net


def build_diffusion(config: Mapping) -> GaussianDiffusion:
    """The process and its network, with new weights drawn from the global generator."""
    schedule, net = config["schedule"], config["time_aware_net"]
    schedule = _build("schedule.kwargs", SCHEDULES[schedule["name"]], schedule["kwargs"])
    network_without_memory(config)  # is it too large?
    net = _build("time_aware_net.kwargs", NETWORKS[net["name"]], net["kwargs"])
    return _build("diffusion", GaussianDiffusion, config["diffusion"], schedule=schedule, time_aware_net=net)
