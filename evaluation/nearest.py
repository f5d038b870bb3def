"""The nearest training image of each image, in pixels and in features: samples beside images that training never saw.

A model that copies its data draws images that lie nearer to a training image than new images of the same kind do.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import ImageDataset, evenly, from_uint8, to_uint8
from evaluation.charts import Series, line_chart
from evaluation.features import full_precision
from evaluation.page import columns_of_two, figure, p, picture, shrunk

MOST_SIDE = 64  # pixels: a larger image is compared, and shown, by the averages of its squares
SHOWN = 16  # samples with a picture
SPACES = {"pixels": "root mean square difference, 8-bit levels", "features": "Euclidean distance of the features"}


class Found(NamedTuple):
    """Of each image, the nearest training image: its Euclidean distance, its number, and which of its views it is."""

    distance: Tensor  # [q]
    number: Tensor  # [q]
    view: Tensor  # [q], which of `views`: 0 as it is, others mirrored


class Nearest:
    """The least distance of each query, float64 [q, d], to all the vectors that it was shown."""

    def __init__(self, queries: Tensor):
        self.queries = queries
        count = len(queries)
        self.found = Found(torch.full((count,), torch.inf).double(), torch.zeros(count).long(), torch.zeros(count).long())

    def show(self, vectors: Tensor, first: int, view: int) -> None:
        """Compare with vectors [b, d], which are the images first, first + 1, ..."""
        distance, number = torch.cdist(self.queries, vectors).min(1)
        nearer = distance < self.found.distance
        news = (distance, number + first, torch.full_like(number, view))
        self.found = Found(*(torch.where(nearer, new, old) for new, old in zip(news, self.found, strict=True)))


def pixel_vectors(images: Tensor) -> Tensor:
    """Float64 [B, d] of images in [-1, 1], whose distance is the root of the mean squared difference of 8-bit levels."""
    levels = shrunk(to_uint8(images), MOST_SIDE).double().flatten(1)
    return levels / levels.shape[1] ** 0.5


def feature_vectors(images: Tensor, extractor: nn.Module) -> Tensor:
    device = next(extractor.parameters()).device
    with full_precision():
        return extractor.features(from_uint8(to_uint8(images)).to(device)).cpu().double()


def views(images: Tensor, flips: list[tuple[int, float]]) -> list[Tensor]:
    """The images, and what the flips of training make of them."""
    found = [images]
    for dim, _ in flips:
        found += [x.flip(dim) for x in found]
    return found


@torch.no_grad()
def nearest_training_images(
    images: Tensor, train: ImageDataset, extractor: nn.Module | None, batch_size: int = 64
) -> dict[str, Found]:
    """Found of each of images [q, C, H, W] in [-1, 1], in "pixels" and, with an extractor, in "features"."""
    spaces = {"pixels": pixel_vectors} | ({"features": lambda x: feature_vectors(x, extractor)} if extractor else {})

    queries = images.split(batch_size)
    searches = {name: Nearest(torch.cat([vectors(x) for x in queries])) for name, vectors in spaces.items()}
    for first in tqdm(range(0, len(train), batch_size), desc="nearest training images", unit="batch"):
        numbers = range(first, min(first + batch_size, len(train)))
        batch = train.fixed_images(numbers)
        for view, x in enumerate(views(batch, train.flips)):
            for name, search in searches.items():
                search.show(spaces[name](x), first, view)
    return {name: search.found._replace(distance=_exact(search, spaces[name], train)) for name, search in searches.items()}


def _exact(search: Nearest, vectors: Callable[[Tensor], Tensor], train: ImageDataset) -> Tensor:
    """The distances found, from differences: cdist takes them from products, and gives copies 1e-5 of a level in place of 0."""
    pairs = zip(search.found.number.tolist(), search.found.view.tolist(), strict=True)
    nearest = [vectors(training_image(train, number, view)[None]) for number, view in pairs]
    return (search.queries - torch.cat(nearest)).norm(dim=1)


def training_image(train: ImageDataset, number: int, view: int) -> Tensor:
    """[C, H, W] in [-1, 1]: image `number` as it looks in that view."""
    return views(train.fixed_images([number]), train.flips)[view][0]


def nearer_than(distance: Tensor, held_out: Tensor) -> Tensor:
    """For each of the distances, the share of the held-out ones that are larger."""
    return (held_out[None] > distance[:, None]).double().mean(1)


class Copies:
    """What the nearest training images say of the samples.

    samples  [n, C, H, W] in [-1, 1]
    found    by the name of a space, of the samples and then of held-out images
    numbers  what to call them, where they are some of more
    suspects places among them of those that are nearer in pixels than every held-out image
    """

    def __init__(self, samples: Tensor, found: dict[str, Found], train: ImageDataset, numbers: Sequence[int] | None = None):
        self.samples, self.found, self.train = samples, found, train
        self.numbers = range(len(samples)) if numbers is None else numbers
        self.made = {name: one.distance[: len(samples)] for name, one in found.items()}
        self.held_out = {name: one.distance[len(samples) :] for name, one in found.items()}
        self.share = {name: nearer_than(self.made[name], self.held_out[name]) for name in found}
        made, held_out = self.made["pixels"], self.held_out["pixels"]
        held_out = held_out[held_out > 0]  # a validation image that is a training image, too, was not unseen
        self.suspects = ((made < held_out.min()) if len(held_out) else made == 0).nonzero().flatten().tolist()

    def parts(self) -> list[str]:
        """Of the page: a verdict, the distances of all, and the nearest images of SHOWN samples."""
        return [self._verdict(), self._charts(), self._cards()]

    def _verdict(self) -> str:
        middle = " and ".join(f"{100 * share.median():.0f} % in {name}" for name, share in self.share.items())
        text = f"The median sample is nearer to a training image than {middle} of the validation images are: about 50 % is"
        text += " what new images of the same kind give, 100 % what copies give."
        if shared := int((self.held_out["pixels"] == 0).sum()):
            text += f" ({shared} of the validation images equal a training image; below they do not count.)"
        if not self.suspects:
            return p(text, "No sample is nearer in pixels than every validation image.")
        numbers = ", ".join(str(self.numbers[i]) for i in self.suspects[:20]) + (" and more" if len(self.suspects) > 20 else "")
        return p(
            text, f"{len(self.suspects)} samples are nearer in pixels than every validation image: {numbers}.", kind="alarm"
        )

    def _charts(self) -> str:
        charts = []
        for name in self.found:
            lines = []
            for words, values, colour in (("validation images", self.held_out, "c1"), ("samples", self.made, "c0")):
                distances = values[name].sort().values.tolist()
                share = [100 * (i + 1) / len(distances) for i in range(len(distances))]
                lines.append(Series(words, distances, share, colour))
            what = f"In {name}: the share of images whose nearest training image is at most so far away."
            charts.append(line_chart(what, lines, SPACES[name], "% of the images"))
        return columns_of_two(*charts)

    def _cards(self) -> str:
        rest = [i for i in evenly(SHOWN, len(self.samples)) if i not in self.suspects]
        cards = "".join(self._card(i) for i in (self.suspects + rest)[:SHOWN])
        order = "Each picture: a sample, then its nearest training image in " + ", then in ".join(self.found) + "."
        below = "Below it the distance, and how many of the validation images lie farther from their nearest training image."
        return f'{p(order, below)}<div class="cards">{cards}</div>'

    def _card(self, i: int) -> str:
        images, lines = [self.samples[i]], [f"Sample {self.numbers[i]}"]
        for name, one in self.found.items():
            images.append(training_image(self.train, int(one.number[i]), int(one.view[i])))
            unit = " levels" if name == "pixels" else ""
            lines.append(f"{name.capitalize()}: {one.distance[i]:.3g}{unit}, nearer than {100 * self.share[name][i]:.0f} %")
        alt = f"Sample {self.numbers[i]} and its nearest training images in {' and '.join(self.found)}"
        return figure(picture(torch.stack(images), len(images), MOST_SIDE), alt, *lines)
