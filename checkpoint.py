"""Checkpoints: saved whole or not at all, read without running what they hold, enough by themselves to rebuild a model.

A checkpoint is one dictionary of tensors and plain values, which training/state.py makes. `FORMAT` marks it as ours.

    python checkpoint.py models/*/last.pth                        # a table: where their configs differ, and what came out
"""

import math
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch

from config import as_json_line, build_diffusion, check_shape, network_without_memory, resolve
from files import whole_file
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake, as_mistake, one_line

FORMAT = "pytorch-gaussian-diffusion"
VERSION = 1
ABOUT_MODEL = ("config", "shape", "is_float", "class_names", "class_counts", "conditions", "cluster_centres", "train_images")
ABOUT_MODEL += ("step", "epoch")
PLAIN = (type(None), bool, int, float, str, torch.Tensor)
MAX_VALUES = 2**28  # in the images worked on at a time: 1 GiB of float32
# What torch.save writes of tensors and plain values; what torch allows beyond that may ask for any amount of memory.
SAVED = re.compile(r"torch [A-Z]\w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")


def save(path: str | Path, state: Mapping) -> None:
    """Write state, tensors and plain values, to path; Mistake if it holds anything else, which load would refuse."""
    if isinstance(state.get("shape"), tuple):  # as a torch.Size is
        state = {**state, "shape": list(state["shape"])}
    _check_plain(state, "state")
    with whole_file(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)


def _check_plain(value: object, where: str) -> None:
    if type(value) in (dict, OrderedDict, list, tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(key, where)
            _check_plain(item, f"{where}.{key}")
    elif type(value) not in PLAIN:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        instead = "give its state_dict()" if isinstance(value, torch.nn.Module) else "make it a plain number or text"
        raise Mistake(f"{where}: is of type {kind}, which a checkpoint cannot hold: {instead}")


def load(path: str | Path) -> dict:
    """The state that save wrote, of a folder its last.pth, on the CPU; Mistake if the file is missing, damaged or not ours."""
    path = Path(path) / "last.pth" if Path(path).is_dir() else path
    if not Path(path).is_file():
        raise Mistake(f"{path}: no such checkpoint")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Mistake(f"{path}: cut short, damaged, or not a checkpoint ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise Mistake(f"{path}: not a checkpoint of this library, as checkpoint.save writes them")
    version = state.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise Mistake(f"{path}: of version {as_json_line(version)}, where this library reads version {VERSION}")
    try:
        state["config"] = resolve(state.get("config"), stored=True)
    except Mistake as error:
        raise Mistake(f"{path}: {error}") from error
    shape = state.get("shape")
    sizes = shape if isinstance(shape, list) and all(isinstance(size, int) and size >= 1 for size in shape) else []
    if not sizes or (len(sizes) != 3 and not state.get("is_float")) or math.prod(sizes) > MAX_VALUES:
        allowed = f"must be that of x_0, [C, H, W] unless is_float says True, at most {MAX_VALUES:,} values"
        raise Mistake(f"{path}: shape = {as_json_line(shape)}: {allowed}")
    return state


def about_model(state: Mapping) -> dict:
    """What a state says of its model, without the weights and what resuming needs; None for what it does not say."""
    return {name: state.get(name) for name in ABOUT_MODEL}


def _check_archive(path: str | Path) -> None:
    """Mistake if a part is packed, damaged, or names what save never writes."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = [name for name in names if name.lower().endswith("data.pkl")]
        if pickled != [f"{names[0].split('/')[0]}/data.pkl"] or min(part.header_offset for part in archive.infolist()):
            raise Mistake("torch would read another part of it than is looked at here")
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise Mistake("it is packed, and could hold any amount")
        if damaged := archive.testzip():
            raise Mistake(f"its part {damaged} is damaged")
        for opcode, argument, _ in pickletools.genops(archive.read(*pickled)):
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not SAVED.fullmatch(str(argument)):
                raise Mistake(f"it names {argument}")


def _check_weights(state: Mapping, weights: Mapping) -> None:
    """Mistake if weights are not of the config's network, or it takes no images of the shape; takes no memory."""
    net = network_without_memory(state["config"])
    for name, expected in net.state_dict(prefix="time_aware_net.").items():
        found, expected = (getattr(value, "shape", None) for value in (weights.get(name), expected))  # None of an extra state
        if found != expected:
            found = "missing" if found is None else f"of shape {list(found)}"
            raise Mistake(f"{name}: {found}, which the config makes {expected and list(expected)}")
    check_shape(state["config"], state["shape"])


def load_diffusion(path: str | Path, ema: bool = True) -> tuple[GaussianDiffusion, dict]:
    """The model of a checkpoint, with its averaged weights (ema) or the raw ones, in eval mode; and the checkpoint's state."""
    state = load(path)
    return diffusion_of(state, path, ema), state


def diffusion_of(state: Mapping, path: str | Path, ema: bool = True) -> GaussianDiffusion:
    """The model of a state that was loaded from path, as `load_diffusion` gives it."""
    weights = state.get("ema" if ema else "model")
    with as_mistake(f"{path}: "):
        if not isinstance(weights, Mapping):
            of_snapshot = (
                ": this is a snapshot of averages, of which test.py --ema-length makes one" if "buffers" in state else ""
            )
            raise Mistake(f"{'ema' if ema else 'model'}: missing{of_snapshot}")
        _check_weights(state, weights)
        diffusion = build_diffusion(state["config"])
    try:
        diffusion.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise Mistake(f"{path}: {one_line(error)}") from error
    return diffusion.eval()


def main(argv: list[str] | None = None) -> int:
    """Print a table of checkpoints."""
    from evaluation.compare import compare
    from mistakes import OneLineParser, run_script

    parser = OneLineParser(description="Compare runs: where their configs differ, and what came out of each.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a checkpoint, or a run's folder for its last.pth")
    args = parser.parse_args(argv)
    return run_script("checkpoint.py", lambda: print(compare(args.runs)))


if __name__ == "__main__":
    sys.exit(main())
