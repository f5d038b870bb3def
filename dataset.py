"""Data sets by name. An item is one float32 image [C, H, W] in [-1, 1], or floats of any shape; labels are kept aside.

Every data set takes a `pipeline` of transforms, torchvision's or your own, applied to the PIL image in order. Flips that end
the pipeline are left to `to_float`, which does them for a whole batch at once, on any device. A new data set is a subclass of
`ImageDataset` and an entry of `DATASETS`, a new transform an entry of `FIXED_TRANSFORMS` or `RANDOM_TRANSFORMS`.

What a user can mend, a file or an argument, is a Mistake. An error inside a class of the user's own passes as it is.

    python dataset.py configs/Digits_den.json                            # the images as the network will see them, and noised
    python dataset.py configs/CelebA_HQ_256_den.json --split valid --set dataset.valid.root=my/images
"""

import copy
import functools
import gzip
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets
from torchvision.transforms import ToTensor, v2
from tqdm import tqdm

from image_files import OTHER_IMAGES, class_folder, colour_of, image_paths, is_readable, not_read, read_image
from mistakes import Mistake, one_line

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
CLUSTER_SIDE = 16  # pixels
MOST_CLASSES = 2**20  # that labels of a file may name
NO_CONDITION: Mapping[str, Tensor] = MappingProxyType({})  # of a network that is told nothing besides x_t and t
FLIPS = {v2.RandomHorizontalFlip: -1, v2.RandomVerticalFlip: -2}  # the dimension that is turned round
FIXED_TRANSFORMS = (v2.Resize, v2.CenterCrop, v2.Pad, v2.Grayscale)  # give the same image every time
RANDOM_TRANSFORMS = (*FLIPS, v2.RandomCrop, v2.RandomResizedCrop, v2.RandomRotation, v2.RandomAffine, v2.ColorJitter)
SCALINGS = (ToTensor, v2.Normalize)  # accepted, and left out: images are scaled to [-1, 1] anyway
TRANSFORMS = {cls.__name__: cls for cls in (*FIXED_TRANSFORMS, *RANDOM_TRANSFORMS, *SCALINGS)}


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] as they would be saved: clamped, and rounded to the nearest of 256 levels."""
    if not images.is_floating_point():
        raise ValueError(f"images of type {images.dtype}: must be floats in [-1, 1]")
    if not images.isfinite().all():
        raise ValueError(f"images: {int((~images.isfinite()).sum())} of {images.numel()} values are not finite")
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """The float images in [-1, 1] of 8-bit ones: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


class ImageDataset(Dataset):
    """Base of the data sets: a subclass gives __len__ and image(i), the PIL image, or in its place pixels(i).

    labels      long tensor [N] of class numbers from 0, or None where there are none
    class_names the name of each class, in the order of its number, or None
    conditions  {name: tensor [N, ...]}: what a network is told of image i besides its label, by net(xt, t, name=tensor[i])
    centres     [clusters, n] where the classes are clusters (`give_clusters`), or None
    shape       [C, H, W] of every image, after the pipeline; of floats any
    is_float    gives pixels(i) float32 of any shape and range, x_0 as it stands, and no images, uint8 for [-1, 1]?
    flips       (dimension, probability) of each flip that to_float does
    is_random   may pixels(i) change from call to call? (not for the flips above; a transform of your own may, and draws from
                torch's generator)
    """

    labels: Tensor | None = None
    class_names: list[str] | None = None
    conditions: Mapping[str, Tensor] = NO_CONDITION
    centres: Tensor | None = None
    is_random = False
    is_float = False

    def __init__(self, pipeline: Sequence[Callable] = ()):
        pipeline = list(pipeline)
        self.flips: list[tuple[int, float]] = []
        while pipeline and type(pipeline[-1]) in FLIPS:
            flip = pipeline.pop()
            self.flips.append((FLIPS[type(flip)], flip.p))
        self.pipeline = pipeline
        self.is_random |= any(type(transform) not in FIXED_TRANSFORMS for transform in pipeline)
        self.shape: torch.Size | None = None
        if not len(self):
            raise Mistake(f"{type(self).__name__}: has no image")
        first = copy.copy(self).pixels(0)  # so that no file that it opens is open, and shared, in every worker
        if not isinstance(first, Tensor) or first.dtype not in (torch.uint8, torch.float32):
            found = first.dtype if isinstance(first, Tensor) else f"a {type(first).__name__}"
            allowed = "must be a tensor of uint8, an image of which to_float makes x_0, or of float32, x_0 itself"
            raise Mistake(f"{type(self).__name__}: pixels(0) is {found}: {allowed}")
        self.shape, self.is_float = first.shape, first.is_floating_point()

    @property
    def noun(self) -> str:
        """What to call its items."""
        return "rows" if self.is_float else "images"

    def condition(self, n_classes: int | None) -> dict[str, Tensor]:
        """What a network is told of the images, [N, ...] each: their labels, if it has classes, and their conditions."""
        condition = ({} if n_classes is None else {"label": self.labels}) | dict(self.conditions)
        for name, rows in condition.items():
            if len(rows) != len(self):
                raise Mistake(f"{type(self).__name__} has {len(rows)} rows of {name} for {len(self)} images")
        return condition

    def name_of(self, i: int) -> str:
        """What to call image i in a message."""
        return f"image {i} of {type(self).__name__}"

    def pixels(self, i: int) -> Tensor:
        """Image i after the pipeline, but for the flips: uint8 [C, H, W]. A subclass may give float32 of any shape instead."""
        image = self.image(i)
        if not isinstance(image, Image.Image):
            raise Mistake(f"{self.name_of(i)}: is a {type(image).__name__}, where image(i) must give a PIL image")
        for number, transform in enumerate(self.pipeline):
            image = self._transformed(image, f"pipeline.{number}", transform, i)
        pixels = v2.functional.pil_to_tensor(image)
        if pixels.dtype != torch.uint8 or image.mode in ("1", "P", "PA"):  # of the last two, numbers of a palette's colours
            raise Mistake(
                f"{self.name_of(i)}: has the mode {image.mode!r}: must have 8 bits a channel, as L and RGB; convert it"
            )
        if self.shape not in (None, pixels.shape):
            raise Mistake(
                f"{self.name_of(i)}: {list(pixels.shape)} where the first image has {list(self.shape)}: every image must have "
                "one size; add Resize (to [height, width]) or CenterCrop to the pipeline"
            )
        return pixels

    def fixed_pixels(self, i: int) -> Tensor:
        """pixels(i), in which what a pipeline draws by chance is the same every time."""
        if not self.is_random:
            return self.pixels(i)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(i)  # and no card's
            return self.pixels(i)

    def _transformed(self, image: Image.Image, where: str, transform: Callable, i: int) -> Image.Image:
        # What one of torchvision's finds wrong is its arguments or the image; an error in another is its author's to see.
        errors = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError)
        blamed = errors if type(transform) in TRANSFORMS.values() else ()
        try:
            image = transform(image)
        except blamed as error:
            raise Mistake(f"{where} cannot transform {self.name_of(i)} ({one_line(error)})") from error
        if not isinstance(image, Image.Image):
            raise Mistake(f"{where} gives a {type(image).__name__}, where a transform must give a PIL image")
        if 0 in image.size:
            raise Mistake(f"{where} leaves no pixel of {self.name_of(i)}")
        return image

    def to_float(self, pixels: Tensor) -> Tensor:
        """x_0, float32: of uint8 [B, C, H, W] in [-1, 1], each image flipped by its own coin; floats are x_0 themselves."""
        if pixels.is_floating_point():
            return pixels
        x = from_uint8(pixels)
        for dim, p in self.flips:
            coin = torch.rand(len(x), 1, 1, 1, device=x.device) < p
            x = torch.where(coin, x.flip(dim), x)
        return x

    def fixed_images(self, numbers: Iterable[int]) -> Tensor:
        """x_0 [k, ...] of these images, without the flips of training; what else the pipeline draws is the same every time."""
        still = copy.copy(self)
        still.flips = []
        return still.to_float(torch.stack([still.fixed_pixels(i) for i in numbers]))

    def __getitem__(self, i: int) -> Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"index {i}: {type(self).__name__} has {len(self)} images")
        return self.to_float(self.pixels(i)[None])[0]


class ArrayDataset(ImageDataset):
    """Images held as one uint8 array [N, H, W] or [N, H, W, 3], with labels [N]."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], pipeline: Sequence[Callable] = ()):
        self.images = images
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        super().__init__(pipeline)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i])


class Digits(ArrayDataset):
    """scikit-learn's handwritten digits: grey, 8 x 8, 17 levels spread over 0..255; every tenth is for validation."""

    def __init__(self, train: bool = True, pipeline: Sequence[Callable] = ()):
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = (np.arange(len(digits.images)) % 10 != 0) == train
        images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.class_names = [str(name) for name in digits.target_names]
        super().__init__(images, digits.target[chosen], pipeline)


def _torchvision(cls: type, root: str, train: bool, download: bool):
    """A data set of torchvision's; Mistake where its files are neither there nor to be had."""
    try:
        return cls(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise Mistake(f"root = {root!r}: {cls.__name__} is not there and could not be fetched ({error})") from error


class FashionMNIST(ArrayDataset):
    """Zalando's clothes: grey, 28 x 28, 60,000 to train and 10,000 to validate.

    Read from Debian's package dataset-fashion-mnist where that is installed, else from root, where torchvision downloads it.
    """

    def __init__(self, root: str = "data", train: bool = True, download: bool = True, pipeline: Sequence[Callable] = ()):
        self.class_names = list(torchvision_datasets.FashionMNIST.classes)
        prefix = DEBIAN_FASHION_MNIST / ("train" if train else "t10k")
        images, labels = Path(f"{prefix}-images-idx3-ubyte.gz"), Path(f"{prefix}-labels-idx1-ubyte.gz")
        if images.exists() and labels.exists():  # each begins with a header; torch warns of labels that cannot be written to
            pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
            super().__init__(pixels, np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8).copy(), pipeline)
        else:
            files = _torchvision(torchvision_datasets.FashionMNIST, root, train, download)
            super().__init__(files.data.numpy(), files.targets, pipeline)


class CIFAR10(ArrayDataset):
    """32 x 32 colour photographs of ten classes, 50,000 to train and 10,000 to validate; torchvision downloads them to root."""

    def __init__(self, root: str = "data", train: bool = True, download: bool = True, pipeline: Sequence[Callable] = ()):
        files = _torchvision(torchvision_datasets.CIFAR10, root, train, download)
        self.class_names = list(files.classes)
        super().__init__(files.data, files.targets, pipeline)


class ImageFolder(ImageDataset):
    """The images of a folder and of all folders below it, sorted by path.

    root             the folder; links to folders are followed, each real folder once; names with a leading dot are skipped
    mode             "RGB" or "L" (grey): what every image is converted to, whatever its file holds. 16 bits become 8, an
                     animation gives its first frame, EXIF orientation is applied
    train            None: every image. False: every tenth, for validation. True: the others
    skip_unreadable  read every file once at the start, and leave out with a warning those that cannot be read
    background       what is seen through transparent pixels: a colour's name, "black", or its hexadecimal "#rrggbb"
    labels           "folders": an image's class is the first folder below root on its way. The classes are the folders in which
                     an image lies, of either part of a split, numbered by name. None: there are no classes
    """

    def __init__(
        self,
        root: str,
        mode: Literal["RGB", "L"] = "RGB",
        train: bool | None = None,
        skip_unreadable: bool = False,
        pipeline: Sequence[Callable] = (),
        background: str = "white",
        labels: Literal["folders"] | None = None,
    ):
        self.root = root = os.path.expanduser(root)
        self.mode = mode
        self.background = colour_of(background)
        if labels not in (None, "folders"):
            raise Mistake(f'labels = {labels!r}: must be "folders" or None')
        self.paths, others = image_paths(root)
        if left_out := {name: others[name] for name in OTHER_IMAGES if others[name]}:
            warnings.warn(f"root = {root!r}: left out {not_read(left_out)}", stacklevel=2)
        if labels == "folders":
            self.class_names = sorted({class_folder(path, root) for path in self.paths})
        if train is not None:
            self.paths = [path for i, path in enumerate(self.paths) if (i % 10 != 0) == train]
        if skip_unreadable:
            self.paths = [path for path in tqdm(self.paths, desc=f"reading {root}", unit="img") if is_readable(path)]
        if not self.paths:
            what = "image that can be read" if skip_unreadable else "image"
            split = "" if train is None else " for training" if train else " for validation"
            found = f"; there are {not_read(others)}" if others else ""
            raise Mistake(f"root = {root!r}: holds no {what}{split}{found}")
        if self.class_names is not None:
            number = {name: i for i, name in enumerate(self.class_names)}
            self.labels = torch.tensor([number[class_folder(path, root)] for path in self.paths])
        super().__init__(pipeline)

    def __len__(self) -> int:
        return len(self.paths)

    def name_of(self, i: int) -> str:
        return self.paths[i]

    def image(self, i: int) -> Image.Image:
        return read_image(self.paths[i], self.mode, self.background)


class CelebA_HQ_256(ImageFolder):
    """CelebA-HQ at 256 x 256: the images of the folder root, resized, of which train chooses as in ImageFolder."""

    def __init__(self, root: str = "data/celeba_hq_256", train: bool | None = None, pipeline: Sequence[Callable] = ()):
        super().__init__(root, "RGB", train, pipeline=[v2.Resize((256, 256)), *pipeline])


class NumpyArray(ImageDataset):
    """The rows of a NumPy file: floats [N, ...] of any shape, each row an x_0 as it stands, or uint8 images [N, C, H, W].

    file        x.npy, as numpy.save writes it; rows are read as they are needed, and all may be more than memory holds
    labels      y.npy: whole numbers [N], the class of each row, from 0 to the largest that is there; None without
    conditions  {"name": "z.npy"}: numbers [N, ...], what a network is told of each row by that name
    train       None: every row. False: every tenth, for validation. True: the others
    """

    def __init__(
        self, file: str, labels: str | None = None, conditions: dict[str, str] | None = None, train: bool | None = None
    ):
        self.file = os.path.expanduser(file)
        self.array = _open_array("file", file)
        if self.array.ndim < 2 or 0 in self.array.shape or not (self.array.dtype == np.uint8 or self.array.dtype.kind == "f"):
            found = f"{self.array.dtype} {list(self.array.shape)}"
            raise Mistake(f"file = {file!r}: holds {found}: must hold floats [N, ...], or images, uint8 [N, C, H, W]")
        rows = np.arange(len(self.array))
        self.rows = rows if train is None else rows[(rows % 10 != 0) == train]
        if labels is not None:
            of_all = self._labels(labels)
            self.labels, self.class_names = of_all[self.rows], [str(label) for label in range(int(of_all.max()) + 1)]
        told = conditions or {}
        self.conditions = {name: self._numbers(f"conditions.{name}", path)[self.rows] for name, path in told.items()}
        super().__init__()

    def _labels(self, path: str) -> Tensor:
        """The class of every row of the file."""
        labels = self._numbers("labels", path)
        if labels.ndim != 1 or labels.is_floating_point() or labels.min() < 0 or labels.max() >= MOST_CLASSES:
            found = f"{list(labels.shape)} from {labels.min():g} to {labels.max():g}"
            raise Mistake(f"labels = {path!r}: holds {found}: must hold whole numbers [N] from 0 to {MOST_CLASSES - 1}")
        return labels

    def _numbers(self, key: str, path: str) -> Tensor:
        """What another file says of every row of this one: floats as float32, whole numbers, and false and true, as long."""
        array = _open_array(key, path)
        if len(array) != len(self.array) or array.dtype.kind not in "fiub":
            found = f"{array.dtype} {list(array.shape)}"
            allowed = f"must hold numbers [{len(self.array)}, ...], one for each row of file"
            raise Mistake(f"{key} = {path!r}: holds {found}: {allowed}")
        return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict:
        return vars(self) | {"array": None}  # of which a pickle, for a worker that is spawned, would hold every row

    def name_of(self, i: int) -> str:
        return f"row {self.rows[i]} of {self.file}"

    def pixels(self, i: int) -> Tensor:
        if self.array is None:
            self.array = _open_array("file", self.file)
        kind = np.uint8 if self.array.dtype == np.uint8 else np.float32
        with np.errstate(over="ignore"):  # to infinity, which is no x_0
            return torch.from_numpy(np.array(self.array[self.rows[i]], kind))


def _open_array(key: str, path: str) -> np.ndarray:
    """The array of a file x.npy, of which nothing is read yet; Mistake if it cannot be opened."""
    try:
        array = np.load(os.path.expanduser(path), mmap_mode="r")
    except OSError as error:
        raise Mistake(f"{key} = {path!r}: {error.strerror or 'cannot be read'}") from error
    except (TypeError, ValueError, EOFError):  # whose words are of Python objects, and of how to load them
        array = None
    if not isinstance(array, np.ndarray) or not array.ndim:
        raise Mistake(f"{key} = {path!r}: must be a file of one array of numbers [N, ...], as numpy.save writes it")
    return array


def small_images(images: ImageDataset) -> np.ndarray:
    """Every image averaged over squares to at most 16 x 16 pixels, in [0, 1], as k-means sees it: float32 [N, C * h * w]."""
    size = [min(CLUSTER_SIDE, side) for side in images.shape[1:]]
    parts = []
    with torch.random.fork_rng(devices=[]):  # of random transforms, always the same
        torch.default_generator.manual_seed(0)
        for first in tqdm(range(0, len(images), 256), desc="reading for clusters", unit="batch", leave=None):
            pixels = torch.stack([images.pixels(i) for i in range(first, min(first + 256, len(images)))])
            parts.append(torch.nn.functional.adaptive_avg_pool2d(pixels / 255, size).flatten(1))
    return torch.cat(parts).numpy()


def rows_of(condition: Mapping[str, Tensor], rows: Tensor | slice, device: str | torch.device | None = None) -> dict:
    """These rows of each tensor of a condition, on the device."""
    return {name: values[rows].to(device) for name, values in condition.items()}


def evenly_with_repeats(count: int, among: int) -> Tensor:
    """`count` ascending indices [count] spread evenly over 0..among - 1, several times the same where there are fewer."""
    return torch.arange(count) * among // count


def evenly(count: int, among: int) -> list[int]:
    """At most `count` indices spread evenly over 0..among - 1, both ends included."""
    return torch.linspace(0, among - 1, min(count, among), dtype=torch.float64).round().int().tolist()


def are_among(names: Sequence[str] | None, of: Sequence[str] | None) -> bool:
    """Are the class names of a split those of another, in their order, but for the last ones, of which it may have no image?"""
    return names == of if names is None or of is None else list(names) == list(of)[: len(names)]


def find_clusters(images: ImageDataset, count: int) -> None:
    """Make `count` clusters of alike images their classes, by scikit-learn's MiniBatchKMeans.

    To learn from the cluster of each image makes up for labels that are not there (Bao et al. 2022, arXiv:2212.00362).
    """
    from sklearn.cluster import MiniBatchKMeans

    if images.is_float:
        raise Mistake(f"dataset.clusters = {count}: clusters are of images, and these data are floats: give them labels")
    if count > len(images):
        raise Mistake(f"dataset.clusters = {count}: there are only {len(images)} images to train on")
    x = small_images(images)
    give_clusters(images, torch.from_numpy(MiniBatchKMeans(count, random_state=0, n_init=3).fit(x).cluster_centers_), x)


def give_clusters(images: ImageDataset, centres: Tensor, x: np.ndarray | None = None) -> None:
    """Make the number of the nearest of centres [clusters, n] the class of each image; x is small_images(images), if known."""
    from sklearn.metrics import pairwise_distances_argmin

    x = small_images(images) if x is None else x
    if getattr(centres, "shape", ())[1:] != x.shape[1:] or not centres.isfinite().all():
        raise Mistake(f"the centres of the run's clusters are not of images {list(images.shape)}: the data are not the run's")
    images.labels = torch.from_numpy(pairwise_distances_argmin(x, centres.numpy())).long()
    images.class_names, images.centres = [str(i) for i in range(len(centres))], centres


def shared_images(train: ImageDataset, valid: ImageDataset) -> int:
    """How many images of valid are known to be in train, too: the same files of a folder, or the same array."""
    if isinstance(train, ImageFolder) and isinstance(valid, ImageFolder):
        real = functools.cache(os.path.realpath)  # of the few folders, not of each image
        seen, known = ({(real(os.path.dirname(path)), os.path.basename(path)) for path in x.paths} for x in (train, valid))
        return len(seen & known)
    if isinstance(train, NumpyArray) and isinstance(valid, NumpyArray):
        return len(np.intersect1d(train.rows, valid.rows)) if os.path.samefile(train.file, valid.file) else 0
    arrays = isinstance(train, ArrayDataset) and isinstance(valid, ArrayDataset)
    return len(valid) if arrays and np.array_equal(train.images, valid.images) else 0


def check_dataset(images: ImageDataset, where: str) -> None:
    """Mistake unless it was set up by ImageDataset, with labels that are None or a long tensor [N]."""
    if getattr(images, "shape", None) is None:
        raise Mistake(f"{where}: {type(images).__name__}.__init__ must end with super().__init__(pipeline)")
    if len(images.shape) != 3 and not (images.is_float and len(images.shape)):
        of_floats = "have a dimension" if images.is_float else "be images, [C, H, W], or floats"
        raise Mistake(f"{where}: its items have the shape {list(images.shape)}: must {of_floats}")
    labels, count = images.labels, len(images)
    if labels is not None and (getattr(labels, "dtype", None) != torch.long or labels.shape != (count,)):
        raise Mistake(f"{where}: labels must be a long tensor [{count}], the number of each image's class, or None")
    if not isinstance(images.conditions, Mapping) or any(type(name) is not str for name in images.conditions):
        raise Mistake(f"{where}: conditions must be a dictionary of tensors by name")
    for name, rows in images.conditions.items():
        if name == "label" or not isinstance(rows, Tensor) or rows.shape[:1] != (count,) or rows.requires_grad:
            found = list(rows.shape) if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            allowed = f"must be a tensor of {count} rows without gradient, and no label"
            raise Mistake(f"{where}: conditions[{name!r}] is {found}: {allowed}")
        if len(bad := (~rows.isfinite()).nonzero()):
            raise Mistake(f"{where}: conditions[{name!r}] is not finite in row {bad[0, 0]}")
    names = images.class_names
    if names is not None and (type(names) not in (list, tuple) or any(type(name) is not str for name in names)):  # nor numpy's
        raise Mistake(f"{where}: class_names must be a list of plain str, or None")


DATASETS = {cls.__name__: cls for cls in (Digits, FashionMNIST, CIFAR10, CelebA_HQ_256, ImageFolder, NumpyArray)}


def main(argv: list[str] | None = None) -> int:
    """Show the images of a config as its network will see them, and one of them as it is noised."""
    from config import build_dataset, build_diffusion, load_config
    from evaluation.forward import describe, draw_data
    from evaluation.pictures import png_path, save_png
    from mistakes import OneLineParser, run_script

    parser = OneLineParser(description="Show the images of a config as its network will see them, and one as it is noised.")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--split", default="train", choices=["train", "valid", "test"], help="by default %(default)s")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override config keys")
    parser.add_argument("--output", metavar="PNG", help="by default models/CONFIG_data.png")
    args = parser.parse_args(argv)

    def work() -> None:
        path = png_path(f"models/{Path(args.config).stem}_data.png" if args.output is None else args.output)
        config = load_config(args.config, args.set)
        if args.split not in config["dataset"]:
            raise Mistake(f"--split {args.split}: {args.config} has no dataset.{args.split}")
        process = build_diffusion(config, torch.nn.Identity())  # only its forward process is asked
        images = build_dataset(config, args.split)
        torch.manual_seed(0)
        print(f"{config['dataset']['name']}, {args.split}: {describe(images, process)}")
        if len(images.shape) != 3:
            return  # no images, and so no picture
        picture = draw_data(images, process)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, picture)
        print(f"{path}: what the network will see, and one image noised, by steps and at once (README, equations 1 and 2)")

    return run_script("dataset.py", work)


if __name__ == "__main__":
    sys.exit(main())
