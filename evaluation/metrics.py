"""What is measured of a model: the Fréchet distance of its samples to real images, and its bits per dimension.

A distance means something only beside the name of its extractor and the number of images of both sets.

    samples = sample(diffusion, 1000, shape)                                       # evaluation/sampling.py
    frechet(samples.split(100), valid_batches, extractor)                          # evaluation/features.py has extractors
    bits_per_dimension(diffusion, valid_batches)

METRICS is what `test.py --metrics` offers; a metric of your own is a class like those at the end.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from classify import ROUNDS, TRIALS, Weighting
from config import build_dataset, check_shape, find
from dataset import ImageDataset, are_among, evenly, from_uint8, rows_of, to_uint8
from diffusion_process import Bound
from evaluation.features import (
    InceptionFeatures,
    SmallClassifier,
    cached_classifier,
    full_precision,
    inception_features,
)
from gaussian_diffusion import GaussianDiffusion
from guidance import Guidance
from mistakes import Mistake, as_mistake
from training import speed
from training.ranks import Ranks
from training.seeds import VALIDATION, mixed_seed

# What a setting is called where it is set: here the flags of test.py
FLAGS = {"metrics": "--metrics", "features": "--features", "n": "-n", "images": "--bpd-images", "terms": "--bpd-timesteps"}
OF_GUIDED = "the bound of guided samples says nothing of the network; measure it without guidance"
MAX_CLASSIFIER_BYTES = 4 * 10**9  # of training images that a classifier is made of; of more, evenly spread ones

# The Fréchet distance


class FeatureStatistics:
    """Mean and covariance of features [N, D] that arrive in batches, in float64, in memory D x D whatever N.

    A batch b is added by the means m and the scatters S = sum_i (x_i - m)(x_i - m)^T (Chan, Golub & LeVeque 1979), not by sums
    of squares, so that an offset of the features costs no digits:

        m = m_a + (m_b - m_a) n_b / n        S = S_a + S_b + (m_b - m_a)(m_b - m_a)^T n_a n_b / n        n = n_a + n_b

    Features may be on any device and of any float type; the statistics are kept on the CPU, the same everywhere.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def n_features(self) -> int:
        """D, 0 before the first batch."""
        return len(self._mean)

    @property
    def mean(self) -> Tensor:
        """[D]."""
        self._need(1)
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """[D, D], unbiased: S / (N - 1)."""
        self._need(2)
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add a batch [B, D]; B may be 0, and differ from batch to batch."""
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"features: {features.dtype} of shape {list(features.shape)}; must be floats of shape [B, D]")
        if self.count and features.shape[1] != self.n_features:
            raise ValueError(f"features: {features.shape[1]} dimensions, where the samples before had {self.n_features}")
        if not len(features):
            return
        features = features.detach().cpu().double()
        if not features.isfinite().all():
            raise ValueError(f"features: {int((~features.isfinite()).sum())} of {features.numel()} values are not finite")
        mean = features.mean(0)
        centred = features - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self._mean, self._scatter = len(features), mean, scatter
            return
        total = self.count + len(features)
        delta = mean - self._mean
        self._mean = self._mean + delta * (len(features) / total)
        self._scatter = (self._scatter + scatter).addr_(delta, delta, alpha=self.count * len(features) / total)
        self.count = total

    def _need(self, count: int) -> None:
        if self.count < count:
            raise ValueError(f"count = {self.count}: this statistic needs at least {count} samples")


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians with these means m and covariances C.

        ||m_a - m_b||^2 + Tr(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2})

    Dowson & Landau 1982, equation 16; Heusel et al. 2017, equation 6. The last trace is the sum of the singular values of
    C_a^{1/2} C_b^{1/2}: taken so, it needs no root of a rounding error, and a singular covariance keeps its digits (a root of
    the product's eigenvalues leaves 1e-8 to 1e-6 of the trace). Everything real, symmetric and float64; never negative.

    Each set needs more samples than there are dimensions, or its covariance is singular whatever the distribution.
    """
    if a.n_features != b.n_features:
        raise ValueError(f"a has {a.n_features} feature dimensions and b has {b.n_features}: must be the same extractor's")
    for name, statistics in (("a", a), ("b", b)):
        if statistics.count <= statistics.n_features or statistics.count < 2:
            raise ValueError(
                f"{name} has {statistics.count} samples of {statistics.n_features} feature dimensions: the Fréchet distance "
                f"needs at least {max(statistics.n_features + 1, 2)} samples, one more than dimensions"
            )
    covariance_a, covariance_b = a.covariance, b.covariance
    fidelity = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    distance = (a.mean - b.mean).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * fidelity
    return max(distance.item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """C^{1/2} by symmetric eigenvalues, those that rounding made negative taken as 0."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


@torch.no_grad()
def image_statistics(batches: Iterable[Tensor], extractor: nn.Module) -> FeatureStatistics:
    """Statistics of the features of image batches [B, C, H, W], floats in [-1, 1], on the extractor's device.

    Every image is first quantised to 8 bits: a saved image and the tensor it was saved from have the same features.
    """
    device, was_training = next(extractor.parameters()).device, extractor.training
    statistics = FeatureStatistics()
    extractor.eval()
    try:
        for images in batches:
            with full_precision():  # not around the images, which may come of a network
                statistics.update(extractor.features(from_uint8(to_uint8(images.to(device)))))
    finally:
        extractor.train(was_training)
    return statistics


def frechet(samples: Iterable[Tensor], real: Iterable[Tensor] | FeatureStatistics, extractor: nn.Module) -> dict[str, Any]:
    """The Fréchet distance of two sets of images, each in batches [B, C, H, W] in [-1, 1], and what it is the distance of.

    real may also be the statistics of those images, by the same extractor.
    """
    made = image_statistics(samples, extractor)
    there = real if isinstance(real, FeatureStatistics) else image_statistics(real, extractor)
    distance = frechet_distance(made, there)
    return {"distance": distance, "samples": made.count, "real": there.count, "features": extractor.name}


# The bound


class Part(NamedTuple):
    """Times first..last, and the bound's mean KL term of them, in bits per dimension for each time."""

    first: int
    last: int
    bits: float


def bits_per_dimension(
    diffusion: GaussianDiffusion,
    batches: Iterable[Tensor | tuple[Tensor, dict]],
    timesteps: int | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
    discretized: bool = True,
) -> dict[str, float]:
    """The bound of 8-bit images [B, ...] in [-1, 1] (equation 6), in bits a dimension: its parts, and the total's error.

    batches      of images, or of (images, condition)
    timesteps    how many of the T terms are drawn for each image, None for all
    ranks        those that share the images out between them; batches are then this one's
    discretized  False for x_0 of any floats: the bound is then of their density, and may be below 0
    """
    return bits_by_time(diffusion, batches, timesteps, seed, ranks, discretized)[0]


def bits_by_time(
    diffusion: GaussianDiffusion,
    batches: Iterable[Tensor | tuple[Tensor, dict]],
    timesteps: int | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
    discretized: bool = True,
) -> tuple[dict[str, float], list[Part]]:
    """bits_per_dimension, whose arguments it has, and the parts of 2..T that its kl is the sum of, one for each term drawn."""
    bounds, terms, ranks = [], [], ranks or Ranks("cpu", alone=True)
    for i, batch in enumerate(batches):
        x0, condition = (batch, None) if isinstance(batch, Tensor) else batch
        generator = torch.Generator(x0.device).manual_seed(mixed_seed(VALIDATION, seed, 0, i * ranks.world + ranks.rank))
        kind = {} if diffusion.n_levels else {"discretized": discretized}  # symbols are discrete as they are
        how = {"timesteps": timesteps, "generator": generator, "condition": condition}
        bound, _, length, kl = diffusion.bound_by_time(diffusion.x0_of(x0), **kind, **how)
        bounds.append(torch.stack(bound).cpu() / math.log(2))
        terms.append(torch.stack([length.cpu().double(), kl.cpu().double().sum(1) / math.log(2)]))  # mps has no float64
    bounds = torch.cat(ranks.gather_everywhere(bounds), dim=1)  # [4, images]
    length, kl = torch.stack(ranks.gather_everywhere(terms)).unbind(1)  # [batches, k]
    means = dict(zip(Bound._fields, bounds.mean(1).tolist(), strict=True))
    found = means | {"standard_error": bounds[-1].std().item() / bounds.shape[1] ** 0.5, "images": bounds.shape[1]}
    last = 1 + length[0].cumsum(0)
    table = torch.stack([last - length[0] + 1, last, kl.sum(0) / bounds.shape[1]], dim=1)
    return found, [Part(int(first), int(last), bits) for first, last, bits in table.tolist()]


# What test.py measures


@dataclass
class Evaluation:
    """A model to measure, and what with."""

    diffusion: GaussianDiffusion
    config: dict  # of its checkpoint
    ranks: Ranks
    n: int  # samples that are drawn
    batch_size: int = 64
    seed: int = 0
    bpd_images: int = 1000  # of the valid split
    bpd_timesteps: int | None = None
    weighting: Weighting = "bound"  # by which classes are told apart
    features: str = "classifier"  # or "inception"
    classifier: str | None = None  # its file; None for one in models/, of this data set
    shape: Sequence[int] | None = None  # of a sample; None for that of the valid images
    samples: Tensor | None = None  # [n, *shape], once they are drawn
    condition: Mapping[str, Tensor] = field(default_factory=dict)  # that the samples were drawn by, n rows each
    check: Callable[[], object] = lambda: None  # called before each batch of images
    class_names: list[str] | None = None  # of the checkpoint, if it says them
    conditions: list[str] | None = None  # that the network was told
    is_float: bool | None = None  # is x_0 of any floats, and no image?
    centres: Tensor | None = None  # of the clusters that are its classes
    datasets: dict[str, ImageDataset] = field(default_factory=dict)  # that were built, by split
    names: Mapping[str, str] = field(default_factory=lambda: FLAGS)  # of settings, in messages

    @property
    def guided(self) -> bool:
        return isinstance(self.diffusion.time_aware_net, Guidance)

    @property
    def n_classes(self) -> int | None:
        return getattr(self.diffusion.time_aware_net, "n_classes", None)

    @property
    def labels(self) -> Tensor | None:
        """[n], the class that each sample was asked to be; None without."""
        return self.condition.get("label")

    def dataset(self, split: str) -> ImageDataset:
        """The data set of a split; Mistake if its classes or conditions are not those that the network has learned."""
        if split in self.datasets:
            return self.datasets[split]
        images = build_dataset(self.config, split, self.centres)
        if self.n_classes is not None and images.labels is None:
            raise Mistake(f"dataset.{split}: has no labels, and the network learned {self.n_classes} classes")
        if self.n_classes is not None and self.class_names and not are_among(images.class_names, self.class_names):
            raise Mistake(f"dataset.{split}: has the classes {images.class_names}, and the network learned {self.class_names}")
        if self.conditions not in (None, told := list(images.conditions)):
            raise Mistake(f"dataset.{split}: has the conditions {told}, and the network was told {self.conditions}")
        if self.is_float not in (None, images.is_float):
            raise Mistake(f"dataset.{split}: holds {images.noun}, which are other data than those of the network")
        with as_mistake(f"dataset.{split}: "):
            check_shape(self.config, images.shape)
        return self.datasets.setdefault(split, images)

    def images(self, split: str, count: int | None = None, ranks: Ranks | None = None) -> Iterable[tuple[Tensor, dict]]:
        """Batches (images, condition) of `count` images spread evenly over a split, None for all.

        Those of this rank, or of the ranks given. Only images to train on are flipped by chance: what is measured on others is
        the same every time.
        """
        images, ranks = copy.copy(self.dataset(split)), ranks or self.ranks
        images.flips = images.flips if split == "train" else []
        numbers = torch.tensor(evenly(len(images) if count is None else count, len(images)))
        batches = numbers.split(self.batch_size)[ranks.rank :: ranks.world]
        for batch in tqdm(batches, desc=f"{split} {images.noun}", unit="batch", leave=None, disable=ranks.rank > 0):
            self.check()
            x0 = images.to_float(torch.stack([images.fixed_pixels(i) for i in batch.tolist()])).to(ranks.device)
            yield x0, rows_of(images.condition(self.n_classes), batch, ranks.device)


def build_extractor(e: Evaluation) -> nn.Module:
    """The one asked for; the classifier is trained on the training images, once, and kept beside the data."""
    if e.features == "inception":
        return inception_features(e.ranks.device)
    dataset = e.config["dataset"] | {"clusters": None}  # the features are of the data's own classes
    train, name = build_dataset({"dataset": dataset}, "train"), dataset["name"]
    if train.labels is None:
        key = e.names["features"]
        raise Mistake(f"{key} classifier: {name} has no labels to train one on; {key} inception needs none")
    mark = hashlib.sha256(json.dumps(dataset["train"], sort_keys=True).encode()).hexdigest()[:8]  # not of another ImageFolder
    path = Path(e.classifier or f"models/classifier_{name}_{mark}.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = evenly(min(len(train), MAX_CLASSIFIER_BYTES // math.prod(train.shape)), len(train))
    images = torch.stack([train.fixed_pixels(i) for i in tqdm(numbers, desc="reading for the classifier", leave=None, delay=1)])
    return cached_classifier(path, images, train.labels[numbers], name, device=e.ranks.device)


class BitsPerDimension:
    """The bound on images of the valid split."""

    uses_model, uses_samples = True, False  # so all ranks measure it together, and none are drawn for it alone
    figure = "total"  # of what it measures, less is better

    def __init__(self, evaluation: Evaluation):
        """Refuse what cannot be measured, before the first network call."""
        self.evaluation, names, last = evaluation, evaluation.names, evaluation.diffusion.T - 1
        if evaluation.guided:
            raise Mistake(f"{names['metrics']} bpd: {OF_GUIDED}")
        if evaluation.bpd_timesteps is not None and not 1 <= evaluation.bpd_timesteps <= last:
            raise Mistake(f"{names['terms']} = {evaluation.bpd_timesteps}: must lie in 1..{last}, the number of KL terms")
        images = min(evaluation.bpd_images, len(evaluation.dataset("valid")))
        if images < 2:
            of = f"of {names['images']} and of dataset.valid"
            raise Mistake(f"{names['metrics']} bpd: needs at least 2 images for a standard error, {of}")

    def measure(self) -> dict[str, Any]:
        e, valid = self.evaluation, self.evaluation.dataset("valid")
        batches = e.images("valid", e.bpd_images)
        with as_mistake("dataset.valid: "):  # of a to_float of one's own that leaves [-1, 1]
            how = {"discretized": not valid.is_float}
            found, self.by_time = bits_by_time(e.diffusion, batches, e.bpd_timesteps, e.seed, e.ranks, **how)
        given = ["class"] * (e.n_classes is not None) + list(valid.conditions)
        return found | ({"given": ", ".join(given)} if given else {}) | ({"density": True} if valid.is_float else {})

    @staticmethod
    def describe(found: dict[str, Any]) -> str:
        parts = " + ".join(f"{name} {found[name]:.4f}" for name in Bound._fields[:-1])
        error, images = found["standard_error"], found["images"]
        given = f", given their {found['given']}" if "given" in found else ""
        what = "rows, of their density, which may be below 0" if "density" in found else "images"
        return f"bits per dimension  {found['total']:.4f} +- {error:.4f} on {images} valid {what}{given} ({parts})"


class FrechetDistance:
    """The Fréchet distance of the samples to all images of the valid split."""

    uses_model = False  # rank 0 has all samples
    figure = "distance"

    def __init__(self, evaluation: Evaluation):
        """Refuse what cannot be measured, before the first network call; train the classifier, if there is none yet."""
        self.evaluation, self.real = evaluation, None
        if evaluation.ranks.rank:
            return
        shape, names = evaluation.dataset("valid").shape, evaluation.names
        where = f"{names['metrics']} fd: "
        if evaluation.dataset("valid").is_float:
            raise Mistake(f"{where}its features are of images, and these data are floats: name a metric of your own")
        if evaluation.shape is not None and list(evaluation.shape) != list(shape):
            sizes = [f"{height} x {width}" for _, height, width in (shape, evaluation.shape)]
            raise Mistake(f"{where}compares with images of {sizes[0]}, dataset.valid's, where samples have {sizes[1]}")
        needed = 1 + {"classifier": SmallClassifier, "inception": InceptionFeatures}[evaluation.features].n_features
        counts = {names["n"]: evaluation.n, "dataset.valid": len(evaluation.dataset("valid"))}
        for name, count in counts.items():
            if count < needed:
                raise Mistake(f"{name} = {count}: the Fréchet distance needs at least {needed}, one more than features")
        with as_mistake(where):
            self.extractor = build_extractor(evaluation)
            self.extractor.features(torch.zeros(1, *shape, device=evaluation.ranks.device))  # does it take them?

    def measure(self) -> dict[str, Any]:
        e = self.evaluation
        if self.real is None:  # once a run
            images = e.images("valid", ranks=Ranks(str(e.ranks.device), alone=True))
            self.real = image_statistics((x0 for x0, _ in images), self.extractor)
        return frechet(e.samples.split(e.batch_size), self.real, self.extractor)

    @staticmethod
    def describe(found: dict[str, Any]) -> str:
        what = f"of {found['samples']} samples to {found['real']} valid images"
        return f"Fréchet distance    {found['distance']:.4f} {what}, in the features of the {found['features']}"


class Accuracy:
    """How many images of the valid split the bound classes rightly (classify.py)."""

    uses_model, uses_samples = True, False

    def __init__(self, evaluation: Evaluation):
        """Refuse what cannot be measured, before the first network call."""
        self.evaluation, where = evaluation, f"{evaluation.names['metrics']} accuracy"
        if evaluation.guided:
            raise Mistake(f"{where}: {OF_GUIDED}")
        if evaluation.diffusion.n_levels:
            raise Mistake(f"{where}: this checkpoint is of symbols, and classes are told apart by numbers only")
        if evaluation.n_classes is None:
            raise Mistake(f"{where}: this network has no classes")
        if evaluation.dataset("valid").conditions:
            raise Mistake(f"{where}: this network is told more of an image than its class")
        self.calls = ROUNDS * TRIALS * evaluation.n_classes  # of the network, for an image, at most

    def measure(self) -> dict[str, Any]:
        e, found = self.evaluation, []
        for i, (x0, condition) in enumerate(e.images("valid", e.bpd_images)):
            batch = i * e.ranks.world + e.ranks.rank  # so that each gets the same noise, whatever the number of ranks
            generator = torch.Generator(x0.device).manual_seed(mixed_seed(VALIDATION, e.seed, 0, batch))
            how = {"weighting": e.weighting, "generator": generator, "return_calls": True}
            label, calls = e.diffusion.classify(x0, e.n_classes, **how)
            found.append(torch.stack([label == condition["label"], calls]).cpu().double())
        right, calls = torch.cat(e.ranks.gather_everywhere(found), dim=1)
        accuracy, images = right.mean().item(), len(right)
        error = (accuracy * (1 - accuracy) / images) ** 0.5
        how = {"images": images, "weighting": e.weighting, "calls": calls.mean().item()}
        return {"accuracy": accuracy, "standard_error": error, **how}

    @staticmethod
    def describe(found: dict[str, Any]) -> str:
        shares = f"{100 * found['accuracy']:.1f} % +- {100 * found['standard_error']:.1f} % of {found['images']} valid images"
        return f"classified rightly  {shares}, with {found['calls']:.0f} network calls each (weighting {found['weighting']!r})"


def measure_each(metrics: Mapping[str, Any], ranks: Ranks, precision: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure one after the other: name and finding of each; of one that does not use the model only on rank 0.

    The network runs in the precision. In a finding, tensors and numpy's numbers are the plain ones that JSON holds.
    """
    for name, metric in metrics.items():
        if ranks.rank and not metric.uses_model:
            continue
        with speed.autocast(ranks.device, precision if metric.uses_model else "fp32"):
            found = metric.measure()
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise Mistake(f"{type(metric).__name__}.measure: gives a {kind}, where a metric must give a dictionary")
        try:
            text = json.dumps(found, default=lambda number: number.tolist())
        except AttributeError as error:
            raise Mistake(f"{type(metric).__name__}.measure: gives what is neither number nor text ({error})") from error
        yield name, json.loads(text)


OF_A_METRIC = ("uses_model", "measure", "describe")


def build_metric(name: str, evaluation: Evaluation, where: str) -> Any:
    """The metric of a name, or of a class of the user's own; Mistake, its message after where, if that lacks something."""
    metric = find(name, METRICS, object, where)(evaluation)
    if lacking := [part for part in OF_A_METRIC if not hasattr(metric, part)]:
        raise Mistake(f"{where} = {name}: has no {', '.join(lacking)}; evaluation/metrics.py has examples at its end")
    return metric


METRICS = {"bpd": BitsPerDimension, "fd": FrechetDistance, "accuracy": Accuracy}
