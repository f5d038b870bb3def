"""Checkpoints: saved whole or not at all, read without running what they hold, enough by themselves to rebuild a model.

A checkpoint is one dictionary of tensors and plain values; train.py says what is in it. `FORMAT` marks it as ours.
"""

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from config import build_diffusion, resolve
from gaussian_diffusion import GaussianDiffusion

FORMAT = "pytorch-gaussian-diffusion"
VERSION = 1


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open path for writing so that it appears, or replaces what was there, only once everything is on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save hides a full disk behind its own error
        if not isinstance(error.__context__, OSError):
            raise
        raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming, too
    finally:
        os.close(folder)


def save(path: str | Path, state: Mapping) -> None:
    """Write state, tensors and plain values, to path."""
    with whole_file(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)


def load(path: str | Path) -> dict:
    """The state that save wrote, on the CPU; ValueError names a file that is missing, damaged or not ours."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is packed, and could hold any amount")
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cut short, damaged, or not a checkpoint ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this library")
    if state.get("version") != VERSION:
        raise ValueError(f"{path}: of version {state.get('version')}, where this library reads version {VERSION}")
    try:
        state["config"] = resolve(state.get("config"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(isinstance(size, int) and 1 <= size <= 2**16 for size in shape)
    ):
        raise ValueError(f"{path}: shape = {str(shape)[:80]}: must be a list of sizes, each in 1..65536")
    return state


def load_diffusion(path: str | Path, ema: bool = True) -> tuple[GaussianDiffusion, dict]:
    """The model of a checkpoint, with its averaged weights (ema) or the raw ones, in eval mode; and the checkpoint's state."""
    state = load(path)
    try:
        diffusion = build_diffusion(state["config"])
        diffusion.load_state_dict(state["ema" if ema else "model"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return diffusion.eval(), state
