"""The data sets of the race, and what samples of each are held against: features of its classifier, and its training images."""

import functools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from common import ROOT
from torch import Tensor, nn

from config import build_dataset, load_config
from dataset import from_uint8
from evaluation.features import N_FEATURES, cached_classifier, split
from evaluation.metrics import FeatureStatistics, frechet_distance, image_statistics
from mistakes import Mistake


class Files(NamedTuple):
    """What belongs to a data set: the config of our recipe, the plain one, the name of results and pictures, and its root."""

    config: str
    plain: str | None
    stem: str
    root: str | None = "{folder}"


ARENAS = {
    "FashionMNIST": Files("FashionMNIST_fast.json", "FashionMNIST_den.json", "race"),
    "emoji": Files("Emoji_class.json", None, "race_emoji", "{folder}/emoji/{split}"),  # benchmarks/emoji.py makes its folder
    "CIFAR10": Files("CIFAR10_fast.json", "CIFAR10_den.json", "race_cifar10"),
    "digits": Files("Digits_fast.json", "Digits_den.json", "race_digits", None),
}
OWN = ".json"  # of a path in the place of a name
MODELS = ROOT / "models"  # of the classifiers, not in git
FEW_IMAGES = 500  # whose distance to others of their kind is large: of the 180 valid digits to the others it is 4.7
CLASSIFIER_IMAGES, MAX_EPOCHS = 240_000, 40  # that a classifier sees in its training: four epochs of FashionMNIST


@dataclass(frozen=True)
class Arena:
    """A data set of the race, by its name in ARENAS or by the path of our config for it.

    folder is where those of ARENAS lie, below which is a set's own folder where it is not torchvision's. With classes, the
    networks learn the labels; with a number of clusters, those of clusters of the training images.
    """

    name: str
    folder: str
    classes: bool = False
    clusters: int | None = None

    @property
    def files(self) -> Files:
        own = Files(os.path.abspath(self.name), None, f"race_{Path(self.name).stem}", None)
        return own if self.name.endswith(OWN) else ARENAS[self.name]

    @property
    def config(self) -> Path:
        """Of our recipe for it."""
        return ROOT / "configs" / self.files.config

    @property
    def plain(self) -> Path:
        """Of the plain recipe for it: the noise is predicted, and the loss is the simple one."""
        return ROOT / "configs" / self.files.plain

    def data_of(self, config: str | Path) -> tuple:
        """The data set of a config, and the folders of its parts."""
        dataset = load_config(config, self.roots)["dataset"]
        return dataset["name"], *(dataset[split].get("root") for split in ("train", "valid"))

    @property
    def stem(self) -> str:
        return self.files.stem + ("_classes" if self.classes else "")

    @property
    def settings(self) -> list[str]:
        """That lead from its config to a network with or without classes, and the data in the folder."""
        return [*self.roots, *self._labelled(self.clusters, self.n_classes if self.classes or self.clusters else None)]

    @staticmethod
    def _labelled(clusters: int | None, n_classes: int | None) -> list[str]:
        return [f"dataset.clusters={clusters or 'null'}", f"time_aware_net.kwargs.n_classes={n_classes or 'null'}"]

    @property
    def roots(self) -> list[str]:
        root = self.files.root
        return [f"dataset.{split}.root={root.format(folder=self.folder, split=split)}" for split in ("train", "valid") if root]

    @property
    def n_classes(self) -> int:
        return self.clusters or int(self.images("train")[1].max()) + 1

    def images(self, split: str) -> tuple[Tensor, Tensor]:
        """All images of "train" or "valid", uint8 [N, C, H, W], and their labels [N]."""
        return _images(self, split)[:2]

    @property
    def seconds(self) -> float:
        """Of computing that the clusters took."""
        return _images(self, "train")[2]

    def classifier(self, device: torch.device) -> nn.Module:
        """Trained on its training images, once, and kept in models/."""
        images, labels = replace(self, clusters=None).images("train")
        if labels is None:
            raise Mistake(f"--data {self.name}: its training images have no labels, from which the classifier learns")
        name = Path(self.name).stem
        path = MODELS / f"classifier_{name}.pth"
        path.parent.mkdir(exist_ok=True)
        epochs = min(MAX_EPOCHS, CLASSIFIER_IMAGES // len(images))
        return cached_classifier(path, images, labels, name, epochs, device=device)


@functools.cache
def _images(arena: Arena, split: str) -> tuple[Tensor, Tensor, float]:
    """Images, labels, and the seconds that the clusters took, reading for them included, of time.process_time."""
    data = build_dataset(load_config(arena.config, [*arena.roots, *Arena._labelled(None, None)]), split)
    images, labels, seconds = torch.stack([data.pixels(i) for i in range(len(data))]), data.labels, 0.0
    if arena.clusters:
        begin = time.process_time()
        data = build_dataset(load_config(arena.config, [*arena.roots, *Arena._labelled(arena.clusters, arena.clusters)]), split)
        labels, seconds = data.labels, time.process_time() - begin
    return images, labels, seconds


class Measure:
    """What the samples of an arena are held against: its valid images, with the training images where those are few."""

    def __init__(self, arena: Arena, device: torch.device):
        self.arena, self.extractor = arena, arena.classifier(device)
        valid = arena.images("valid")[0]
        real = torch.cat([valid, arena.images("train")[0]]) if len(valid) < FEW_IMAGES else valid
        if len(real) <= N_FEATURES:
            raise Mistake(f"{arena.name}: has {len(real)} images, where the distance needs at least {N_FEATURES + 1}")
        self.real = self._statistics(real)

    def _statistics(self, images: Tensor) -> FeatureStatistics:
        return image_statistics(map(from_uint8, images.split(500)), self.extractor)

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """The Fréchet distance of samples, uint8 [n, C, H, W], to the real images, and how near training images are."""
        return {"distance": frechet_distance(self._statistics(samples), self.real), "nearest": self.nearest(samples)}

    def to_unseen(self, samples: Tensor) -> float:
        """The Fréchet distance of samples to the training images that the features were not trained on."""
        return frechet_distance(self._statistics(samples), self._unseen_statistics)

    @functools.cached_property
    def _unseen(self) -> Tensor:
        """Training images that the features were not trained on, in an order by chance; where such are few, all of them."""
        images = self.arena.images("train")[0]
        held_out = split(len(images))[1]
        if len(held_out) < FEW_IMAGES:
            held_out = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[held_out]

    @functools.cached_property
    def _unseen_statistics(self) -> FeatureStatistics:
        return self._statistics(self._unseen)

    def nearest(self, samples: Tensor) -> float:
        """The mean over samples of the distance to the nearest training image: root mean square over pixels, in [0, 2].

        Copies have 0; images that are new have what the valid images have.
        """
        train = from_uint8(self.arena.images("train")[0]).flatten(1)
        parts = [torch.cdist(from_uint8(part).flatten(1), train).amin(1) for part in samples.split(100)]
        return (torch.cat(parts) / train.shape[1] ** 0.5).mean().item()

    def of_data(self, n: int) -> dict[str, float]:
        """Distances of data: both ends of the scale, and how near valid images are.

        The ends are noise, and n training images, or as many as there are, that the features were not trained on, as they were
        not on samples: 572 such emoji have 0.80, 572 of the others 1.9 to 2.4.
        """
        chosen = self._unseen[:n]
        noise = torch.randint(0, 256, (n, *chosen.shape[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        ends = {f"{len(chosen)} training images": chosen, "uniform noise": noise}
        found = {name: frechet_distance(self._statistics(x), self.real) for name, x in ends.items()}
        return found | {"valid images to the nearest training image": self.nearest(self.arena.images("valid")[0][:n])}
