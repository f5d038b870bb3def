"""What images are compared in: the features of a classifier that is trained here, or of the Inception of the published FID.

An extractor is a module with `name`, what it is in words, `n_features`, and `features(images)`, from float images in [-1, 1]
[B, C, H, W] to [B, n_features].
"""

import hashlib
import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import from_uint8, to_uint8
from diffusion_process import full_float32
from files import whole_file

CLASSIFIER_FORMAT = "gaussian-diffusion classifier 1"
N_FEATURES = 128  # of the classifier
MIN_SIZE = 8  # pixels, height and width of the classifier's images
MAX_HELD_OUT = 5000  # images; a tenth of a smaller set


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 without TF32, and the same kernels each time, whatever speed the caller has chosen."""
    with full_float32(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


# Features of a classifier that is trained here


class SmallClassifier(nn.Module):
    """A convolutional classifier of images [B, C, H, W] in [-1, 1], H and W at least 8; the mean over space of its last
    convolution is its 128 features. `forward` gives logits [B, n_classes]. Build it with train_classifier.
    """

    n_features = N_FEATURES

    def __init__(self, channels: int, n_classes: int, name: str = f"untrained classifier, {N_FEATURES} features"):
        super().__init__()
        self.channels = channels
        self.n_classes = n_classes
        self.name = name
        self.blocks = nn.Sequential(
            _block(channels, 32, stride=2),
            _block(32, 64, stride=2),
            _block(64, N_FEATURES, stride=2),
            _block(N_FEATURES, N_FEATURES, stride=1),
        )
        self.head = nn.Linear(N_FEATURES, n_classes)

    def features(self, images: Tensor) -> Tensor:
        """[B, 128], of the layer before the logits."""
        if images.ndim != 4 or images.shape[1] != self.channels or min(images.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"images of shape {list(images.shape)}: must be [B, {self.channels}, H, W], H and W at least {MIN_SIZE}, "
                f"for the {self.name}"
            )
        return self.blocks(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def _block(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


def train_classifier(
    images: Tensor,
    labels: Tensor,
    epochs: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    lr: float = 3e-3,
    n_classes: int | None = None,
) -> SmallClassifier:
    """A SmallClassifier trained on all of images, uint8 [N, C, H, W], and labels, integers [N] in 0..K-1.

    AdamW under a one-cycle learning rate that rises to lr. The result is a function of the arguments, the same bits on the same
    device with the same number of threads, and leaves the global random state alone. It is in eval mode and needs no gradients.
    """
    labels = _check_labelled(images, labels)
    if epochs < 1 or batch_size < 2:
        raise ValueError(f"epochs = {epochs}, batch_size = {batch_size}: must be at least 1 and 2")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the weights are drawn on the CPU
        classifier = SmallClassifier(images.shape[1], n_classes or int(labels.max()) + 1).to(device)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(images))
    steps = len(images) // batch_size  # a last batch that is not full is left out: another one an epoch, drawn anew
    optimizer = torch.optim.AdamW(classifier.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    with full_precision(), tqdm(total=epochs * steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=generator).split(batch_size)[:steps]:
                logits = classifier(from_uint8(images[batch].to(device)))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[batch].to(device)).backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return classifier.eval().requires_grad_(False)


def cached_classifier(
    path: str | os.PathLike,
    images: Tensor,
    labels: Tensor,
    name: str,
    epochs: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SmallClassifier:
    """The classifier in the file path, or one trained on the data set `name` and saved there, if there is no such file.

    images and labels as in train_classifier. A fixed 5,000 images, or a tenth of a set under 50,000, are held out of
    training; the accuracy on them is printed and becomes a part of the classifier's name. A file that is not of these data,
    epochs and seed is an error: nothing is overwritten.
    """
    labels = _check_labelled(images, labels)
    contents = hashlib.sha256(images.cpu().contiguous().numpy())  # of the memory itself: a copy of it may be gigabytes
    contents.update(labels.cpu().contiguous().numpy())
    key = {
        "format": CLASSIFIER_FORMAT,
        "data set": name,
        "channels": images.shape[1],
        "classes": int(labels.max()) + 1,
        "image size": list(images.shape[2:]),
        "number of images": len(images),
        "epochs": epochs,
        "seed": seed,
        "contents": contents.hexdigest()[:16],
    }
    path = Path(path)
    saved = _load(path, key) if path.exists() else None
    if saved is None:
        if not path.parent.is_dir():
            raise ValueError(f"path = {path}: the folder {path.parent} does not exist")
        train, held_out = split(len(images))
        classifier = train_classifier(images[train], labels[train], epochs, seed, device, n_classes=key["classes"])
        accuracy = classifier_accuracy(classifier, images[held_out], labels[held_out])
        saved = {**key, "accuracy": accuracy, "state": {k: v.cpu() for k, v in classifier.state_dict().items()}}
        _save(saved, path)
        print(f"{path}: accuracy {100 * accuracy:.1f} % on {len(held_out)} held-out images of {name}, {len(train)} trained on")
    described = f"classifier of {name}, {N_FEATURES} features, {100 * saved['accuracy']:.1f} % held-out accuracy"
    classifier = SmallClassifier(key["channels"], key["classes"], described)
    classifier.load_state_dict(saved["state"])
    return classifier.to(device).eval().requires_grad_(False)


@torch.no_grad()
def classifier_accuracy(classifier: SmallClassifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """The share of images, uint8 [N, C, H, W], that get the highest logit at their label."""
    device = next(classifier.parameters()).device
    right = 0
    with full_precision():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += int((classifier(from_uint8(x.to(device))).argmax(1).cpu() == y.cpu()).sum())
    return right / len(images)


def _check_labelled(images: Tensor, labels: Tensor) -> Tensor:
    """labels as long, once both are known to be good."""
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 10 or min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"images: {images.dtype} of shape {list(images.shape)}; must be uint8 [N, C, H, W], N at least 10, H and W at "
            f"least {MIN_SIZE}"
        )
    if labels.is_floating_point() or labels.shape != images.shape[:1] or int(labels.min()) < 0:
        raise ValueError(f"labels: {labels.dtype} of shape {list(labels.shape)}; must be [{len(images)}] integers from 0 up")
    return labels.long()


def split(n_images: int) -> tuple[Tensor, Tensor]:
    """Indices of the images that a classifier is trained on, and of those held out of its training: always the same."""
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(0))
    held_out = min(MAX_HELD_OUT, n_images // 10)
    return order[held_out:], order[:held_out]


def _save(saved: dict, path: Path) -> None:
    """Whole or not at all, also when two processes save at once."""
    own = path.with_name(f".{path.name}.{os.getpid()}")
    with whole_file(own) as file:
        torch.save(saved, file)
    os.replace(own, path)


def _load(path: Path, key: dict) -> dict:
    """What _save wrote there, if it has this key."""
    cure = "delete it, or give another path"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises depends on the bytes
        raise ValueError(f"path = {path}: cannot be read as a classifier ({type(error).__name__}); {cure}") from error
    if not isinstance(saved, dict) or saved.get("format") != CLASSIFIER_FORMAT:
        raise ValueError(f"path = {path}: is not a classifier of this version; {cure}")
    wrong = [k for k in key if saved.get(k, key[k] if k == "contents" else None) != key[k]]  # older files do not say theirs
    if wrong:
        found, asked = (", ".join(f"{k} {which.get(k)}" for k in wrong) for which in (saved, key))
        raise ValueError(f"path = {path}: is a classifier of {found}, where {asked} was asked for; {cure}")
    return saved


# Features of the published FID


class InceptionFeatures(nn.Module):
    """The 2048 features of the Inception of the published FID; grey images [B, 1, H, W] are repeated to 3 channels."""

    n_features = 2048

    def __init__(self, inception: nn.Module):
        super().__init__()
        self.inception = inception
        self.name = "Inception of the published FID, 2048 features, by torch-fidelity"

    def features(self, images: Tensor) -> Tensor:
        """[B, 2048]."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images of shape {list(images.shape)}: must be [B, 1, H, W] or [B, 3, H, W]")
        return self.inception(to_uint8(images).expand(-1, 3, -1, -1))[0]


def inception_features(device: torch.device | str = "cpu") -> InceptionFeatures:
    """The Inception of Heusel et al. 2017, with the weights of their TensorFlow graph, from the package torch-fidelity.

    The weights are looked for in torch's cache, and downloaded there if they are not. A ValueError says what is wanting.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(f"the Inception of the published FID needs a package: pip install torch-fidelity ({error})") from None
    weights = Path(torch.hub.get_dir(), "checkpoints", Path(urllib.parse.urlparse(URL_INCEPTION_V3).path).name)
    try:
        if not weights.exists():
            weights.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(weights), weights.stem.rsplit("-", 1)[1])
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the Inception of the published FID needs its weights: put {URL_INCEPTION_V3} at {weights} ({error})"
        ) from None
    try:
        inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except Exception as error:  # what reading a damaged file raises depends on its bytes
        raise ValueError(f"{weights}: not the weights of the Inception, delete it ({type(error).__name__})") from error
    return InceptionFeatures(inception).to(device).eval()
