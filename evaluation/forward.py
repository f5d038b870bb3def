"""The forward process to look at: the curves of schedules, the data as a network sees them, an image that turns into noise."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from beta_schedule import alpha_bar_before
from config import SCHEDULES, build_schedule, load_config
from dataset import ImageDataset, evenly
from diffusion_process import DiffusionProcess
from evaluation.pictures import grid, labelled, new_figure, stacked, text_width
from files import whole_file

FRAMES = 11  # times at which an image is shown, and images in a row
MOST_ROWS = 10  # of images
MOST_PIXELS = 2**23  # in those rows
MOST_READ = 1000  # images that are read for their range


# Schedules


def draw_schedules(configs: Sequence[str], path: Path) -> None:
    """Save a figure of beta_t, alpha_bar_t and log snr_t over t / T: of the schedules of config files, or of every schedule."""
    figure = new_figure(figsize=(12, 4.6))
    panels = figure.subplots(1, 3)
    for label, alpha_bar in _alpha_bars(configs).items():
        time = torch.arange(1, len(alpha_bar) + 1) / len(alpha_bar)
        beta = 1 - alpha_bar / alpha_bar_before(alpha_bar)
        for axes, curve in zip(panels, (beta, alpha_bar, torch.logit(alpha_bar)), strict=True):
            axes.plot(time, curve, label=label, marker="." if len(time) < 50 else "")
    for axes, title in zip(panels, ("beta", "alpha_bar", "log snr"), strict=True):
        axes.set(title=title, xlabel="t / T")
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")  # beta_T of the cosine schedule is 0.999, that of the others 0.02
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 if configs else 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _alpha_bars(configs: Sequence[str]) -> dict[str, Tensor]:
    """alpha_bar [T] by what to call it; configs that have one schedule are named together, since they have one curve."""
    if not configs:
        return {name: cls().alpha_bar for name, cls in SCHEDULES.items()}
    found: dict[str, tuple[dict, list[str]]] = {}  # of each schedule, a config and the names of all configs that have it
    for path in configs:
        config = load_config(path)
        found.setdefault(json.dumps(config["schedule"]), (config, []))[1].append(Path(path).stem)
    called = [(f"{_call(config['schedule'])}: {', '.join(names)}", config) for config, names in found.values()]
    return {textwrap.fill(label, 120): build_schedule(config).alpha_bar.double() for label, config in called}


def _call(section: dict) -> str:
    return f"{section['name']}({', '.join(f'{key}={value}' for key, value in section['kwargs'].items())})"


# Data. A process is of any network: only its forward process is asked.


def describe(images: ImageDataset, process: DiffusionProcess) -> str:
    """How many there are, their shape, their values as the network sees them, and how many are of each class."""
    read = evenly(MOST_READ, len(images))
    moments = torch.stack([_moments(_seen(images, process, i)) for i in read]).T
    mean, square = moments[2].mean(), moments[3].mean()
    lines = [
        f"{len(images)} {images.noun} {list(images.shape)}",
        f"values from {moments[0].min():.3f} to {moments[1].max():.3f}, mean {mean:.3f}, standard deviation "
        f"{(square - mean**2).sqrt():.3f}" + (f" (of {len(read)} of them)" if len(read) < len(images) else ""),
    ]
    if process.n_levels:
        lines.append(f"each value the nearest of {process.n_levels} levels")
    lines += [f"condition {name}: {list(rows.shape)}" for name, rows in images.conditions.items()]
    if images.labels is None:
        return "\n".join([*lines, "no classes"])
    names = _class_names(images)
    counts = torch.bincount(images.labels, minlength=len(names)).tolist()
    return "\n".join([*lines, f"{len(names)} classes: " + ", ".join(map("{}: {}".format, names, counts))])


def _seen(images: ImageDataset, process: DiffusionProcess, i: int) -> Tensor:
    """Item i as x_0: of images [C, H, W] in [-1, 1], after the pipeline and, for symbols, at the nearest level."""
    return process.values_of(process.x0_of(images[i][None]))[0]


def _moments(x: Tensor) -> Tensor:
    return torch.stack([x.min(), x.max(), x.double().mean(), x.double().square().mean()])


def _class_names(images: ImageDataset) -> list[str]:
    return images.class_names or [str(i) for i in range(int(images.labels.max()) + 1)]


def draw_data(images: ImageDataset, process: DiffusionProcess) -> Image.Image:
    """A row of images of each class, or rows of any; below, the first of them at 11 times, noised by steps and at once."""
    names, rows = _rows(images)
    blank = torch.ones(*images.shape)
    shown = [blank if i is None else _seen(images, process, i) for row in rows for i in row]
    times = evenly(FRAMES, process.T + 1)
    x0 = process.x0_of(images[rows[0][0]][None])
    by_steps, at_once = noised_by_steps(process, x0, times), noised_at_once(process, x0, times)
    strips = grid(torch.cat([process.values_of(xt) for xt in by_steps + at_once]), len(times))
    numbers = (23, 23) if process.n_levels else (1, 2)
    titles = [f"({number}) {how}" for number, how in zip(numbers, ("by steps", "at once"), strict=True)]
    left = text_width([*names, *titles])
    data = labelled(grid(torch.stack(shown), FRAMES), names, left=left)
    return stacked([data, labelled(strips, titles, [f"t = {t}" for t in times], left)])


def _rows(images: ImageDataset) -> tuple[list[str], list[list[int | None]]]:
    """What to write before each row of the picture, and the images in it; None where a class has no more."""
    most = max(1, min(MOST_ROWS, MOST_PIXELS // (FRAMES * images.shape[1:].numel())))
    if images.labels is None:
        chosen = evenly(most * FRAMES, len(images))
        named = [("", chosen[first : first + FRAMES]) for first in range(0, len(chosen), FRAMES)]
    else:
        of_class = [(images.labels == c).nonzero()[:FRAMES, 0].tolist() for c in range(len(_class_names(images)))]
        named = [pair for pair in zip(_class_names(images), of_class, strict=True) if pair[1]]
    names, rows = zip(*named[:most], strict=True)
    return list(names), [row + [None] * (FRAMES - len(row)) for row in rows]


def noised_by_steps(process: DiffusionProcess, x0: Tensor, times: Sequence[int]) -> list[Tensor]:
    """x_t at ascending times, each reached from the one before by as many steps of equation 1; x_0 is x0 itself."""
    xt, states = x0, []
    for t in range(times[-1] + 1):
        if t > 0:
            xt = process.q_step(xt, t)
        if t in times:
            states.append(xt)
    return states


def noised_at_once(process: DiffusionProcess, x0: Tensor, times: Sequence[int]) -> list[Tensor]:
    """x_t at the times, each drawn from x_0 by equation 2, with noise of its own."""
    return [process.q_sample(x0, t) if t > 0 else x0 for t in times]
