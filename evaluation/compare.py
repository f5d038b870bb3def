"""Runs side by side: where their configs differ, and what came out of each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import checkpoint
from config import as_json_line
from evaluation.metrics import METRICS
from mistakes import Mistake
from training.run_folder import read_records
from training.state import flat

OF_LOSS = ("diffusion.", "schedule.", "dataset.", "train_cfg.valid_images", "train_cfg.seed")  # what the loss is of


def compare(paths: Sequence[str]) -> str:
    """A table with a row for each checkpoint, or folder of a run: the settings that are not the same in all, the step, the last
    validation loss up to it, and what was measured in training and by test.py.
    """
    found = [_found(Path(path)) for path in tqdm(paths, desc="reading", leave=None, delay=1)]
    configs = [settings for settings, _ in found]
    differing = [key for key in _keys(configs) if len({as_json_line(settings.get(key)) for settings in configs}) > 1]
    results = [result for _, result in found]
    names = [key.rpartition(".")[2] for key in differing]
    heads = [name if names.count(name) == 1 else key for name, key in zip(names, differing, strict=True)]
    rows = [["run", *heads, *(columns := _keys(results))]]
    for path, settings, result in zip(paths, configs, results, strict=True):
        rows.append([path, *(as_json_line(settings.get(key)).strip('"') for key in differing)])
        rows[-1] += [_word(result.get(key)) for key in columns]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if "valid loss" in columns and any(key.startswith(OF_LOSS) for key in differing):
        lines.append("(Validation losses compare only where loss, schedule and data are the same.)")
    return "\n".join(lines)


def _keys(objects: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(key for each in objects for key in each))


def _word(result: float | None) -> str:
    return "-" if result is None else f"{result:.4g}" if isinstance(result, float) else str(result)


def _found(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a checkpoint, but for the folder, as {path: value}; and what came out of it, by the head of its column."""
    state, path = checkpoint.load(path), path / "last.pth" if path.is_dir() else path
    settings = flat(state["config"])
    settings.pop("train_cfg.model_save_dirpath")
    result, records = {"step": state.get("step")}, path.with_name("metrics.jsonl")
    for record in read_records(records) if records.exists() else []:
        if record["step"] <= (state.get("step") or 0):
            result |= {"valid loss": record["valid_loss"]} if record.get("valid_loss") is not None else {}
            result |= {name: _figure(name, metric) for name, metric in (record.get("metrics") or {}).items()}
    return settings, result | _measured(path, state.get("step"))


def _measured(path: Path, step: int | None) -> dict[str, float | None]:
    """What test.py measured of a checkpoint as it is now: of an earlier step of the same file, it says nothing."""
    file = path.with_name(f"{path.stem}_gen") / "metrics.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise Mistake(f"{file}: not JSON: {error}") from error
    if found.get("settings", {}).get("step", step) != step:
        return {}
    return {f"test.py {name}": _figure(name, metric) for name, metric in found.items() if name != "settings"}


def _figure(name: str, metric: Mapping[str, Any]) -> float | None:
    """The number of a metric that says how good a model is: the one it names, or its first."""
    named = getattr(METRICS.get(name), "figure", None)
    numbers = {key: value for key, value in metric.items() if type(value) in (int, float)}
    return numbers.get(named, next(iter(numbers.values()), None))
