"""What a race looks like: its table over the seeds, the samples of each racer, and the curve against the budget.

A row is a dictionary of the race's results; `name` tells who ran, `names` are those of the recipes, in the order shown.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from arenas import Arena
from common import ROOT
from PIL import Image, ImageDraw

from dataset import from_uint8
from evaluation.pictures import grid, new_figure, save_png

FOLDER = ROOT / "models" / "race"  # samples and our checkpoints, not in git
SAME = ("racer", "budget", "n", "calls")  # of rows that differ in the seed alone


def samples_path(arena: Arena, name: str, budget: float, seed: int = 0) -> Path:
    return FOLDER / arena.stem / f"{name.replace('/', '_')}_{budget:g}{f'_seed{seed}' if seed else ''}.pt"


def over_seeds(rows: Sequence[dict]) -> list[dict]:
    """One row for all seeds of a racer at a budget: the mean distance, and the least and the largest."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in SAME), []).append(row)
    means = []
    for key, group in groups.items():
        distances = [row["distance"] for row in group]
        mean = {"distance": statistics.mean(distances), "least": min(distances), "largest": max(distances)}
        measured = [name for name in ("steps", "seconds", "nearest") if all(name in row for row in group)]
        rest = {name: statistics.mean(row[name] for row in group) for name in measured}
        means.append(dict(zip(SAME, key, strict=True)) | {"seeds": len(group)} | mean | rest)
    return means


def picture(arena: Arena, rows: Sequence[dict], names: Sequence[str], path: Path) -> None:
    """The first samples of each racer's first seed, at the largest budget of which there are some here."""

    def file(row: dict) -> Path:
        return samples_path(arena, row["racer"], row["budget"], row["seed"])

    order = sorted(rows, key=lambda row: (row["budget"], row["n"], -row["seed"]))
    last = {row["racer"]: row for row in order if file(row).exists()}
    last = {name: last[name] for name in names if name in last}
    samples = [torch.load(file(row), weights_only=True)[:14] for row in last.values()]
    drawn = grid(from_uint8(torch.cat(samples)), 14)
    labelled = Image.new("RGB", (drawn.width + 130, drawn.height), "white")
    labelled.paste(drawn.convert("RGB"), (130, 0))
    write = ImageDraw.Draw(labelled)
    for i, (name, row) in enumerate(last.items()):
        text = f"{name}\n{row['budget']:g} s\ndistance {row['distance']:.1f}"
        write.text((4, 12 + i * drawn.height // len(last)), text, fill="black")
    save_png(path, labelled)


def plot(means: Sequence[dict], names: Sequence[str], data: tuple[str, float], path: Path) -> None:
    """Distance against budget with the spread of the seeds, and the distance of data: what it is of, and how much.

    Of the rows with the most samples and calls: distances of other numbers do not compare.
    """
    most = max((row["n"], row["calls"]) for row in means)
    means = [row for row in means if (row["n"], row["calls"]) == most and row["racer"] in names]
    figure = new_figure(figsize=(6, 4))
    axes = figure.subplots()
    for name in names:
        points = sorted((row for row in means if row["racer"] == name), key=lambda row: row["budget"])
        if points:
            middle = [row["distance"] for row in points]
            spread = [[row["distance"] - row["least"] for row in points], [row["largest"] - row["distance"] for row in points]]
            axes.errorbar([row["budget"] for row in points], middle, spread, fmt="o-", capsize=4, label=name)
    axes.axhline(data[1], color="grey", linestyle=":", label=data[0])
    budgets = sorted({row["budget"] for row in means})
    axes.set(xscale="log", yscale="log", xticks=budgets, xticklabels=[f"{budget:g}" for budget in budgets])
    axes.set(xlabel="seconds of training", ylabel="Fréchet distance to the real images")
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=100)
