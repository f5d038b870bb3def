"""Samples of a model in batches, each with a generator of its own: the same seed and batch size give the same samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dataset import NO_CONDITION, ImageDataset, evenly, evenly_with_repeats, rows_of
from gaussian_diffusion import GaussianDiffusion
from samplers import Sampler
from training.ranks import Ranks
from training.seeds import SAMPLING, mixed_seed

GIF_FRAMES = 50


class Drawn(NamedTuple):
    """Samples, and the states on the way to the first of them, on the CPU."""

    samples: Tensor  # [n, ...]
    strips: Tensor  # [pictures, frames, ...], from x_T to x_0
    animation: Tensor  # [pictures, GIF_FRAMES, ...]


def sample(diffusion: GaussianDiffusion, n: int, shape: Sequence[int], **options) -> Tensor:
    """n samples [n, *shape] on the CPU; the options are draw's."""
    return draw(diffusion, n, shape, **options).samples


def draw(
    diffusion: GaussianDiffusion,
    n: int,
    shape: Sequence[int],
    sampler: str | Sampler = "ddpm",
    timesteps: int | Sequence[int] | None = None,
    eta: float = 0.0,
    clip_x0: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    pictures: Sequence[int] = (),
    frames: int = 11,
    condition: Mapping[str, Tensor] = NO_CONDITION,
    ranks: Ranks | None = None,
    check: Callable[[], object] = lambda: None,
) -> Drawn:
    """n samples, and `frames` states of those numbered in pictures, ascending; all on rank 0 if ranks share the work out.

    sampler, timesteps, eta and clip_x0 are those of GaussianDiffusion.trajectory. A condition has n rows, one a sample.
    check is called after every step. Under another progress bar the one here leaves no trace.
    """
    device, ranks = next(diffusion.buffers()).device, ranks or Ranks("cpu", alone=True)
    steps = len(diffusion.steps(timesteps, sampler))
    strip_at, gif_at = evenly(frames, steps + 1), evenly(GIF_FRAMES, steps + 1)
    batches = range(0, n, batch_size)[ranks.rank :: ranks.world]
    drawn = []
    with tqdm(total=len(batches) * steps, desc="sampling", unit="step", leave=None, disable=ranks.rank > 0) as bar:
        for first in batches:
            generator = torch.Generator(device).manual_seed(mixed_seed(SAMPLING, seed, first))
            count = min(batch_size, n - first)
            how = {"generator": generator, "condition": rows_of(condition, slice(first, first + count), device)}
            states = diffusion.trajectory((count, *shape), sampler, timesteps, eta, clip_x0, **how)
            strip, animation, x = [], [], None
            rows = [i - first for i in pictures if first <= i < first + count]
            for i, (_, x) in enumerate(states):
                x = diffusion.values_of(x)
                strip += [x[rows].cpu()] if i in strip_at else []
                animation += [x[rows].cpu()] if i in gif_at else []
                bar.update(i > 0)
                check()
            drawn.append((first, Drawn(x.cpu(), torch.stack(strip, 1), torch.stack(animation, 1))))
    drawn = sorted(ranks.gather(drawn), key=lambda part: part[0])
    if not drawn:  # on a rank for which no batch was left
        return Drawn(*[torch.empty(0, *shape)] * 3)
    return Drawn(*(torch.cat(parts) for parts in zip(*(part for _, part in drawn), strict=True)))


def condition_of(images: ImageDataset, n_classes: int | None, n: int) -> dict[str, Tensor]:
    """The condition of n images spread evenly over a data set; where n is more than it has, each several times."""
    return rows_of(images.condition(n_classes), evenly_with_repeats(n, len(images)))


def condition_by_row(n_classes: int | None, n: int, max_rows: int = 16) -> tuple[dict[str, Tensor], int | None]:
    """Labels [n] of a picture with a row a class, of the first max_rows, and the picture's columns; none without classes.

    What is left over after whole rows are samples of different classes, so that no class has two more than another.
    """
    if n_classes is None:
        return {}, None
    rows = min(n_classes, max_rows)
    columns = max(1, n // rows)
    whole = torch.arange(min(n, rows * columns)) // columns
    rest = torch.arange(n - len(whole)) * rows // max(1, n - len(whole))  # too few for one more of each: of different classes
    return {"label": torch.cat([whole, rest])}, columns


def labels_in_shares(counts: Sequence[int], n: int, offset: float = 0.5) -> Tensor:
    """Labels [n], ascending, of classes as frequent as in counts: each n counts[c] / sum(counts) times, rounded up or down.

    With an offset drawn evenly from [0, 1), it is that many times on average (systematic sampling).
    """
    ends = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(ends, (torch.arange(n) + offset) * (ends[-1] / n), right=True).clamp(max=len(counts) - 1)
