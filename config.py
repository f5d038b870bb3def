"""From JSON to objects. The constructors are the schema: every key is checked against the signature that it will be passed to.

A config is read, never changed: `load_config` gives a resolved one, with every default written out, from which the `build_*`
functions make objects. Whatever is wrong is a Mistake that gives the key's path, the nearest valid key, and what is allowed.

A network, schedule, data set or transform of your own is named by its file and class, `"name": "my_net.MyUNet"`: see `find`.
What its code raises is not a Mistake, and keeps its traceback.
"""

import copy
import difflib
import functools
import importlib.util
import inspect
import json
import math
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

import beta_schedule
import dataset
import time_aware_module
from diffusion_process import DiffusionProcess
from discrete_diffusion import DiscreteDiffusion
from gaussian_diffusion import GaussianDiffusion
from mistakes import OWN, Mistake, as_mistake


def _public(module: types.ModuleType, base: type, prefix: str = "") -> dict[str, type]:
    """The classes under base of a module, by name."""
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type) and value is not base}
    return {name: cls for name, cls in classes.items() if issubclass(cls, base) and name.startswith(prefix) and name[0] != "_"}


SCHEDULES = _public(beta_schedule, beta_schedule.BetaSchedule)
NETWORKS = _public(time_aware_module, nn.Module, "TimeAware")
DIFFUSIONS = {"GaussianDiffusion": GaussianDiffusion, "DiscreteDiffusion": DiscreteDiffusion}  # without a name: the first
SPLITS = ("train", "valid", "test")
MAX_CLUSTERS = 2**12
MAX_PARAMETERS = 4 * 10**9  # of a network: 16 GB in float32
MAX_PIXELS = 2**14  # of a transform's size, and the bound of every other number that it takes


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes; ge and le belong to them, gt and lt do not."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.ge <= value <= self.le and self.gt < value < self.lt

    def __str__(self) -> str:
        ends = [("at least", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt)]
        text = " and ".join(f"{word} {end}" for word, end in ends if math.isfinite(end))
        return f"of {text}" if text.startswith("at") else text


@dataclass(frozen=True)
class TrainConfig:
    """The section train_cfg."""

    epochs: Annotated[int, Range(ge=1)]  # passes over the training data
    batch_size: Annotated[int, Range(ge=1)]  # images a step, over all ranks and all of grad_accum
    lr: Annotated[float, Range(gt=0, le=1)]  # the optimizer's learning rate, once warm
    model_save_dirpath: str  # folder of the run: checkpoints, log, metrics.jsonl, pictures
    record_period: Annotated[int, Range(ge=1)] = 100  # steps between log lines
    max_steps: Annotated[int, Range(ge=1)] | None = None  # end there if that is sooner, also inside an epoch
    valid_images: Annotated[int, Range(ge=1)] | None = None  # of the validation set, evenly spread over it; null for all
    save_period: Annotated[int, Range(ge=0)] = 0  # epochs between epoch_N.pth, 0 for none
    save_best: bool = True  # keep best.pth, the least validation loss
    save_minutes: Annotated[float, Range(ge=0)] = 5.0  # minutes between saves of last.pth and best.pth, 0: after each epoch
    sample_period: Annotated[int, Range(ge=0)] = 1  # epochs between pictures of samples, 0 for none
    sampler: str = "dpm"  # of such a picture and of the metrics' samples, or a function of your own; of symbols always "ddpm"
    sample_timesteps: Annotated[int, Range(ge=1)] = 20  # steps of it
    loggers: tuple[str, ...] = ()  # "tensorboard", "wandb", or your own: they get what metrics.jsonl gets, and the pictures
    metric_period: Annotated[int, Range(ge=0)] = 0  # epochs between measurements of the averaged weights, 0 for none
    metrics: tuple[str, ...] = ("fd", "bpd")  # that are taken then: as test.py --metrics; best_fd.pth has the least distance
    metric_samples: Annotated[int, Range(ge=1)] = 500  # images in them: drawn in sample_timesteps, and of the valid split
    metric_features: Literal["classifier", "inception"] = "classifier"  # that fd is taken in
    metric_share: Annotated[float, Range(gt=0, le=1)] = 0.05  # of the run's time that they may take; rarer where it is more
    init: str | None = None  # a checkpoint whose averaged weights a new run starts with, as far as they fit
    seed: Annotated[int, Range(ge=0, le=2**63 - 1)] = 0  # of the weights, the data's order and every draw
    optimizer: str = "adam"  # or "muon", for the weights of hidden layers, with Adam for the rest; or a class of your own
    muon_momentum: Annotated[float, Range(ge=0, lt=1)] = 0.95  # of muon's average gradient; less suits a run of few steps
    warmup_steps: Annotated[int, Range(ge=0)] = 0  # steps over which the learning rate rises from 0
    lr_schedule: str = "constant"  # after that; "linear" and "cosine" end at 0; or a function of your own
    variance_lr: Annotated[float, Range(gt=0, le=1)] = 1e-3  # of a learnable reverse variance, in log sigma^2 a step
    grad_clip: Annotated[float, Range(ge=0)] = 1.0  # largest norm of the network's gradient, 0 for any
    grad_accum: Annotated[int, Range(ge=1)] = 1  # parts that a batch is split into, one forward and backward pass each
    ema_decay: Annotated[float, Range(ge=0, lt=1)] = 0.9999  # of the averaged weights, per step; shorter at first
    power_ema: Sequence[Annotated[float, Range(ge=1e-5, le=0.28)]] = ()  # lengths sigma_rel of power-function averages besides
    power_ema_snapshots: Annotated[int, Range(ge=1)] = 32  # of those, evenly spread over the run, for the averages between them
    label_dropout: Annotated[float, Range(ge=0, lt=1)] = 0.1  # share of samples whose label, or null_condition, is hidden
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"  # of the network; the maths is float32 always
    compile: bool | Literal["auto"] = "auto"  # torch.compile the network
    cuda_graph: bool | Literal["auto"] = "auto"  # on one GPU, launch all that a step does at once; the results are the same
    activation_checkpointing: bool = False  # trade time for memory in the U-Net
    chunk_size: Annotated[int, Range(ge=1)] | None = None  # timesteps a network call of the full loss, null for 128 rows' worth
    cache_gb: Annotated[float, Range(ge=0)] = 4.0  # a data set up to this size is decoded once and kept, in GB
    num_workers: Annotated[int, Range(ge=0, le=1024)] = 2  # processes that decode images
    max_bad_steps: Annotated[int, Range(ge=1)] = 10  # steps in a row with a non-finite loss or gradient; then the run stops

    def __post_init__(self):
        unusable = any(c == "\0" or "\ud800" <= c <= "\udfff" for c in self.model_save_dirpath)  # the latter are not UTF-8
        if not self.model_save_dirpath.strip() or unusable:
            raise ValueError(f"model_save_dirpath = {self.model_save_dirpath!r}: must name a folder")


# What --resume may change: how long a run is, what it shows, how it is computed, but for the precision, and where its data are.
MAY_CHANGE = {"epochs", "max_steps", "record_period", "save_period", "save_best", "save_minutes", "sample_period"}
MAY_CHANGE |= {"sampler", "sample_timesteps", "model_save_dirpath", "num_workers", "cache_gb", "max_bad_steps", "loggers"}
MAY_CHANGE |= {"metric_period", "metrics", "metric_samples", "metric_features", "metric_share", "power_ema_snapshots"}
MAY_CHANGE |= {"cuda_graph", "compile", *(f"dataset.{split}.{key}" for split in SPLITS for key in ("root", "file"))}
RETIRED = ("references",)  # keys of train_cfg that older versions wrote into every checkpoint: of training alone


# Checks


def _nearest(name: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Allowed: {', '.join(allowed) or 'none'}"


def _matches(value: Any, kind: Any) -> bool:
    """Is a JSON value of the type that an annotation names?"""
    origin, args = get_origin(kind), get_args(kind)
    if kind in (Any, inspect.Parameter.empty):
        return True
    if origin is Annotated:
        return _matches(value, args[0]) and all(value in values for values in args[1:] if isinstance(values, Range))
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
    if not isinstance(kind, type):
        return False
    if kind is tuple and args and args[-1] is not Ellipsis:
        return isinstance(value, list) and len(value) == len(args) and all(map(_matches, value, args))
    if issubclass(kind, Sequence) and kind is not str:
        return isinstance(value, list) and all(_matches(item, args[0] if args else Any) for item in value)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    """An annotation in the words of JSON."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join([_describe(args[0]), *(str(values) for values in args[1:] if isinstance(values, Range))])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(json.dumps(arg) for arg in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_describe(arg) for arg in args))
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {', '.join(map(_describe, args))}"
    if origin is dict:
        return f"an object, each value {_describe(args[1])}"
    if origin and issubclass(origin, Sequence):
        return f"a list, each {_describe(args[0])}" if args else "a list"
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "an object"}
    words[type(None)] = "null"
    name = getattr(kind, "__name__", str(kind))
    return words.get(kind, name if kind in (list, tuple) else f"a {name}, which JSON does not have; annotate what it has")


def as_json_line(value: Any) -> str:
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
        keys = f" with the keys {', '.join(required)}" if required else ""
        raise Mistake(f"{path or 'the config'}: must be an object{keys}")
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in (*required, *optional):
            name = as_json_line(str(key))[1:-1]  # in one line
            near = _nearest(str(key)[:80], (*required, *optional))
            if not path and key in TrainConfig.__dataclass_fields__:
                near = f"did you mean 'train_cfg.{key}'?"
            raise Mistake(f"{prefix}{name}: unknown key; {near}")
    for key in required:
        if key not in value:
            raise Mistake(f"{prefix}{key}: missing")
    return dict(value)


def _arguments(path: str, function: Callable, given: Any, without: Sequence[str] = (), untyped: Sequence[str] = ()) -> dict:
    """given with the function's defaults filled in; every key and type checked against its signature.

    A default fits, whatever its annotation says (`x: int = None`); one that JSON does not hold is left to the function.
    """
    try:
        hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function, include_extras=True)
    except NameError as error:
        raise Mistake(f"{path}: an annotation cannot be read: {error}") from error
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name not in without}
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    required = [name for name, p in named.items() if p.default is p.empty]
    optional = [name for name in named if name not in required]
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()) and isinstance(given, Mapping):
        optional += [name for name in given if name not in named]
    given = _object(path, given, required, optional)
    defaults = {name: p.default for name, p in named.items() if _is_plain(p.default)}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    for name, value in given.items():
        kind = hints.get(name, Any) if name in named and name not in untyped else Any
        is_default = name in defaults and type(value) is type(defaults[name]) and value == defaults[name]
        if not is_default and not _matches(value, kind):
            raise Mistake(f"{path}.{name} = {as_json_line(value)}: must be {_describe(kind)}")
    resolved = defaults | given
    return {name: resolved[name] for name in (*named, *given) if name in resolved}  # in the order of the signature


def _is_plain(value: Any) -> bool:
    """Can JSON hold it, and a checkpoint? Neither numpy's float64 nor a member of an Enum, which are a float and a str, too."""
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return type(value) in (types.NoneType, bool, int, float, str)


def find(name: Any, registry: Mapping[str, Callable], base: type, where: str = "name") -> Callable:
    """What a config calls name: an entry of the registry or, by a dotted name such as "my_net.MyUNet", one of the user's own.

    base is the class that one's own must be a subclass of, or types.FunctionType where it must be a function, or
    functools.partial of one. It is imported from a file below the current folder, my_net.py or my_net/__init__.py, as
    `import my_net` would there. Mistake if there is none; what the file itself raises passes.

    The name may come from a checkpoint, which must not choose what runs. So the file is looked for before anything is imported,
    a module that Python would find elsewhere (os, torch, what is in site-packages) is refused, and so is what the file itself
    has only imported from there (subprocess.Popen). A checkpoint can have a file of the current folder imported and a class
    that such a file defines built, and nothing else: start the scripts in a folder whose Python files are your own.
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    if not isinstance(name, str) or "." not in name:
        known, own = _nearest(str(name)[:80], list(registry)), "my_name" if base is types.FunctionType else "MyName"
        raise Mistake(f'{where} = {as_json_line(name)}: unknown; {known}, or your own as "my_file.{own}"')
    module, _, attribute = name.rpartition(".")
    where = f"{where} = {as_json_line(name)}"
    _check_is_in_this_folder(module, where)
    OWN.add(module.split(".")[0])
    found = vars(importlib.import_module(module)).get(attribute)
    if found is None:
        raise Mistake(f"{where}: {module} has no {attribute}")
    written = found.func if isinstance(found, functools.partial) else found
    fits = issubclass(found, base) if isinstance(found, type) else base is types.FunctionType and isinstance(written, base)
    if not fits:
        kinds = {types.FunctionType: "a function", object: "a class", Callable: "a class whose objects can be called"}
        raise Mistake(f"{where}: must be {kinds.get(base, f'a subclass of {base.__module__}.{base.__qualname__}')}")
    source = written.__module__
    if source.split(".")[0] not in (module.split(".")[0], "samplers"):  # as what has moved, and is imported where it was
        _check_is_in_this_folder(source, f"{where}: comes from {source}, and not from a file of yours")
        OWN.add(source.split(".")[0])
    return found


def _check_is_in_this_folder(module: str, where: str) -> None:
    """Mistake unless `import module` would run a file below the current folder. Imports nothing."""
    folder, (top, *rest) = Path.cwd(), module.split(".")
    file = folder.joinpath(top, *rest)
    is_name = len(module) < 200 and all(part.isidentifier() for part in (top, *rest))
    if not is_name or not (file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()):
        raise Mistake(f"{where}: no file {'/'.join((top, *rest))[:80]}.py in the current folder, {folder}")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()  # the file may be newer than the last look
    spec = importlib.util.find_spec(top)  # which would import the parents of a dotted name
    places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    ours = {(folder / place).resolve() for place in (f"{top}.py", f"{top}/__init__.py", top)}
    if not places or not all(Path(place).resolve() in ours for place in places):
        raise Mistake(f"{where}: Python knows another {top} ({', '.join(places)}); rename your file")


def _is_own(name: str) -> bool:
    """Is it the name of something of the user's own?"""
    return isinstance(name, str) and "." in name


def _named(path: str, value: Any, registry: Mapping[str, Callable], base: type) -> dict:
    """{"name": ..., "kwargs": {...}}, resolved."""
    value = _object(path, value, ["name"], ["kwargs"])
    cls = find(value["name"], registry, base, f"{path}.name")
    return {"name": value["name"], "kwargs": _arguments(f"{path}.kwargs", cls, value.get("kwargs", {}))}


def _diffusion(path: str, value: Any) -> dict:
    """The section diffusion, resolved: the arguments of the class that its "name" says, beside it."""
    name, value = _split_name(value)
    given = {} if name is None else {"name": name}
    return given | _arguments(path, _diffusion_class(name), value, ["schedule", "time_aware_net"])


def _split_name(value: Any) -> tuple[Any, Any]:
    """The name in a section and what stands beside it."""
    if not isinstance(value, Mapping):
        return None, value
    return value.get("name"), {key: item for key, item in value.items() if key != "name"}


def _diffusion_class(name: Any) -> type[DiffusionProcess]:
    return find("GaussianDiffusion" if name is None else name, DIFFUSIONS, DiffusionProcess, "diffusion.name")


def _dataset(path: str, value: Any, stored: bool) -> dict:
    """The section dataset, resolved.

    clusters    None, or a number: the classes are so many clusters of alike training images, whatever labels they have
    """
    value = _object(path, value, ["name", "train", "valid"], ["test", "clusters"])
    clusters = value.get("clusters")
    if clusters is not None and (type(clusters) is not int or not 2 <= clusters <= MAX_CLUSTERS):
        raise Mistake(f"{path}.clusters = {as_json_line(clusters)}: must be null or lie in 2..{MAX_CLUSTERS}")
    if stored and _is_own(value["name"]):
        return value
    cls = find(value["name"], dataset.DATASETS, dataset.ImageDataset, f"{path}.name")
    splits = [split for split in SPLITS if split in value]
    resolved = {split: _split(f"{path}.{split}", cls, value[split], stored) for split in splits}
    return {"name": value["name"], **resolved, "clusters": clusters}


def _split(path: str, cls: type, value: Any, stored: bool = False) -> dict:
    """The arguments of a data set, resolved, without the transforms that do what happens anyway."""
    section = _arguments(path, cls, value, untyped=["pipeline"])
    pipeline = section.pop("pipeline", None)
    if "pipeline" in value and not isinstance(pipeline, list):
        raise Mistake(f"{path}.pipeline = {as_json_line(pipeline)}: must be a list of transforms")
    if pipeline is None:
        return section
    transforms = [_transform(f"{path}.pipeline.{i}", transform, stored) for i, transform in enumerate(pipeline)]
    return section | {"pipeline": [transform for transform in transforms if transform is not None]}


def _transform(path: str, value: Any, stored: bool) -> dict | None:
    """{"name": ..., "kwargs": {...}}, or None for one that does what happens anyway; the arguments may stand beside the name.

    It keeps just the arguments given: not all its defaults are JSON's.
    """
    if not isinstance(value, Mapping) or "name" not in value or "kwargs" in value:
        value = _object(path, value, ["name"], ["kwargs"])
    name, beside = value["name"], {key: argument for key, argument in value.items() if key not in ("name", "kwargs")}
    kwargs = beside or value.get("kwargs", {})
    place = path if beside else f"{path}.kwargs"
    if not (stored and _is_own(name)):
        cls = find(name, dataset.TRANSFORMS, Callable, f"{path}.name")
        _arguments(place, cls, kwargs)
        if not _is_own(name):
            _check_sizes(place, kwargs)
    if name == "Normalize":
        _check_normalize(place, **kwargs)
    if name in ("ToTensor", "Normalize"):
        return None
    return {"name": name, "kwargs": kwargs} if beside or "kwargs" in value else {"name": name}


def _check_normalize(path: str, mean: list, std: list, inplace: bool = False) -> None:
    for key, values in (("mean", mean), ("std", std)):
        if not values or any(value != 0.5 for value in values):
            raise Mistake(
                f"{path}.{key} = {as_json_line(values)}: must be 0.5 in every channel, since images are always scaled to "
                "[-1, 1], the range of the sampler, the bound and the pictures"
            )


def _check_sizes(path: str, kwargs: dict) -> None:
    """Mistake if a transform is given a size below 1, or a number that no image has memory for."""
    for key, value in kwargs.items():
        for number in value if isinstance(value, list) else [value]:
            least = 1 if key == "size" else -MAX_PIXELS
            if isinstance(number, int | float) and not least <= number <= MAX_PIXELS:
                raise Mistake(f"{path}.{key} = {as_json_line(value)}: must lie in {least}..{MAX_PIXELS}")


def resolve(config: Any, stored: bool = False) -> dict:
    """A config with every default written out; Mistake if a key is unknown, missing or of the wrong type.

    stored: it comes out of a checkpoint. A data set or transform of the user's own is then left as it stands, to be looked at
    by build_dataset, so that a checkpoint can be sampled where the data's code is not. What is RETIRED is left out.
    """
    config = _object("", config, ["schedule", "time_aware_net", "diffusion", "dataset", "train_cfg"])
    if stored and isinstance(config["train_cfg"], dict):
        config["train_cfg"] = dict(config["train_cfg"])
        for key in RETIRED:
            if value := config["train_cfg"].pop(key, None):
                warnings.warn(f"train_cfg.{key} = {value}: this version has it no more; training goes on without", stacklevel=2)
    resolved = {
        "schedule": _named("schedule", config["schedule"], SCHEDULES, object),
        "time_aware_net": _named("time_aware_net", config["time_aware_net"], NETWORKS, nn.Module),
        "diffusion": _diffusion("diffusion", config["diffusion"]),
        "dataset": _dataset("dataset", config["dataset"], stored),
        "train_cfg": _arguments("train_cfg", TrainConfig, config["train_cfg"]),
    }
    build_train_config(resolved)  # a Mistake where what it checks itself is wrong
    return resolved


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
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
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        raise Mistake(f"--set {path}: {error}") from error
    *parents, last = path.split(".")
    try:
        for key in parents:
            config = config.setdefault(key, {}) if isinstance(config, dict) else config[int(key)]
        config[last if isinstance(config, dict) else int(last)] = value
    except (TypeError, ValueError, IndexError) as error:
        raise Mistake(f"--set {assignment[:80]}: the config has no such place") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """The resolved config of a JSON file, with overrides such as "train_cfg.lr=1e-4"."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise Mistake(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a key twice, bytes that are not UTF-8, brackets too deep
        raise Mistake(f"{path}: {error}") from error
    for assignment in overrides:
        _override(config, assignment)
    return resolve(config)


def with_data(config: dict, overrides: Sequence[str]) -> dict:
    """A checkpoint's config with overrides of its section dataset: other data, or the same elsewhere."""
    config = copy.deepcopy(config)
    for assignment in overrides:
        if not assignment.startswith("dataset."):
            raise Mistake(f"--set {assignment}: of a checkpoint, only where its data are can be set: dataset.valid.root=FOLDER")
        _override(config, assignment)
    return resolve(config, stored=True)


# Builders


BLAMED = (ValueError, OverflowError)  # what a constructor of the library's raises for an argument out of range


def _build(path: str, cls: Callable, kwargs: Mapping[str, Any], blamed: Any = BLAMED, **more: Any) -> Any:
    """cls(**kwargs, **more), with the path put before what it finds wrong, an error of the kind blamed; others pass."""
    try:
        return cls(**kwargs, **more)
    except blamed as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        separator = "." if line.split(" ")[0].split(".")[0] in kwargs else ": "
        raise Mistake(f"{path}{separator}{line}") from error


def _build_named(path: str, config: Mapping, registry: Mapping[str, Callable], base: type, blamed: Any = BLAMED) -> Any:
    """The object of {"name": ..., "kwargs": {...}}. Of the user's own classes, only a Mistake is taken for one."""
    cls = find(config["name"], registry, base, f"{path}.name")
    return _build(f"{path}.kwargs", cls, config.get("kwargs", {}), Mistake if _is_own(config["name"]) else blamed)


def build_train_config(config: Mapping) -> TrainConfig:
    return _build("train_cfg", TrainConfig, config["train_cfg"])


def build_dataset(config: Mapping, split: str, centres: Tensor | None = None) -> dataset.ImageDataset:
    """The data set of a split: "train", "valid" or "test"; with dataset.clusters, its classes are the clusters.

    centres  [clusters, n]: of the clusters that a run had found; else they are found among the training images
    """
    if config["dataset"].get("clusters") is None:
        return _build_split(config, split)
    if centres is None:
        train = _clustered(json.dumps(config["dataset"]))
        if split == "train":
            return copy.copy(train)  # what a caller sets on it leaves the kept one as it is
        centres = train.centres
    images = _build_split(config, split)
    dataset.give_clusters(images, centres)
    return images


@functools.lru_cache(maxsize=1)
def _clustered(section: str) -> dataset.ImageDataset:
    """The training images of a section dataset with their clusters, found once for all splits."""
    section = json.loads(section)
    train = _build_split({"dataset": section}, "train")
    dataset.find_clusters(train, section["clusters"])
    return train


def _build_split(config: Mapping, split: str) -> dataset.ImageDataset:
    path = f"dataset.{split}"
    cls = find(config["dataset"]["name"], dataset.DATASETS, dataset.ImageDataset, "dataset.name")
    section = _split(path, cls, config["dataset"][split])
    if "pipeline" in section:
        section["pipeline"] = [
            _build_named(f"{path}.pipeline.{i}", transform, dataset.TRANSFORMS, Callable, (ValueError, TypeError, KeyError))
            for i, transform in enumerate(section["pipeline"])
        ]
    images = _build(path, cls, section, Mistake)  # a ValueError may be of a transform of the user's own
    dataset.check_dataset(images, path)
    return images


def network_without_memory(config: Mapping) -> nn.Module:
    """The network on the device meta, where only shapes are known; one of the user's own is built before it goes there."""
    if _is_own(config["time_aware_net"]["name"]):
        return _build_network(config).to("meta")
    with torch.device("meta"):
        net = _build_network(config)
    size = sum(p.numel() for p in net.parameters())
    if size > MAX_PARAMETERS:
        raise Mistake(f"time_aware_net.kwargs: a network of {size:.3g} parameters; at most {MAX_PARAMETERS:.3g} are allowed")
    return net


def check_shape(config: Mapping, shape: Sequence[int]) -> None:
    """Mistake if the network takes no x_0 of the shape, [C, H, W] of an image; takes no memory.

    One of the user's own is not asked, nor is one that a diffusion of the user's own calls, as its _net may give it more.
    """
    if not any(_is_own(config[section].get("name")) for section in ("time_aware_net", "diffusion")):
        with as_mistake():
            x = torch.empty(1, *shape, device="meta")
            network_without_memory(config)(x, torch.ones(1, dtype=torch.long, device="meta"))


def _build_network(config: Mapping) -> nn.Module:
    return _build_named("time_aware_net", config["time_aware_net"], NETWORKS, nn.Module)


def build_schedule(config: Mapping) -> Any:
    """The schedule, of which nothing is asked but alpha_bar, a float64 tensor [T]."""
    schedule = _build_named("schedule", config["schedule"], SCHEDULES, object)
    if not isinstance(getattr(schedule, "alpha_bar", None), Tensor):
        raise Mistake(f"schedule.name = {as_json_line(config['schedule']['name'])}: must have alpha_bar, a float64 tensor [T]")
    return schedule


def build_diffusion(config: Mapping, net: nn.Module | None = None) -> GaussianDiffusion | DiscreteDiffusion:
    """The process and its network, with new weights drawn from the global generator; or with net in the network's place."""
    schedule, (name, settings) = build_schedule(config), _split_name(config["diffusion"])
    if net is None:
        if not _is_own(config["time_aware_net"]["name"]):
            network_without_memory(config)  # is it too large?
        net, clusters = _build_network(config), config["dataset"].get("clusters")
        if clusters and getattr(net, "n_classes", None) != clusters:
            raise Mistake(f"dataset.clusters = {clusters}: time_aware_net.kwargs.n_classes must be {clusters}, too")
    with as_mistake("diffusion: ") if _is_own(name) else nullcontext():  # its own ValueErrors pass
        how, blamed = {"schedule": schedule, "time_aware_net": net}, () if _is_own(name) else BLAMED
        diffusion = _build("diffusion", _diffusion_class(name), settings, blamed, **how)
    if getattr(net, "n_levels", diffusion.n_levels) != diffusion.n_levels:
        given, must = map(as_json_line, (net.n_levels, diffusion.n_levels))
        raise Mistake(f"time_aware_net.kwargs.n_levels = {given}: must be {must}, as in the section diffusion")
    return diffusion
