"""The four configs of the first system, pytorch-gaussian-diffusion, and one more of the same make, run as they are.

Its repository has one file a config; here the facts in them are written once.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets

from config import build_dataset, build_diffusion, build_train_config, network_without_memory, resolve

FLIP_AND_SCALE = [{"name": "RandomHorizontalFlip"}, {"name": "ToTensor"}]
SPLITS = ("train", "valid", "test")


def first(data: str, prediction: str, ch_mult: list[int], splits: dict[str, dict], **train_cfg) -> dict:
    """A config of its make; splits holds what differs between the three."""
    return {
        "schedule": {"name": "LinearSchedule", "kwargs": {"timesteps": 1000, "start": 0.0001, "end": 0.02}},
        "time_aware_net": {
            "name": "TimeAwareUNet",
            "kwargs": {"n_channels": 3, "base_channels": 128, "t_channels": 64, "ch_mult": ch_mult},
        },
        "dataset": {"name": data} | {split: {**splits[split], "pipeline": FLIP_AND_SCALE} for split in SPLITS},
        "diffusion": {"reverse_variance": "beta", "prediction": prediction, "loss_mode": "simple"},
        "train_cfg": {"record_period": 50, "save_best": True, **train_cfg},
    }


def cifar10(prediction: str) -> dict:
    splits = {split: {"root": "Data/CIFAR10/", "train": split == "train"} for split in SPLITS}
    folder = f"model/CIFAR10_{prediction[:3]}"
    train_cfg = {"epochs": 1000, "batch_size": 128, "lr": 0.0002, "save_period": 100, "model_save_dirpath": folder}
    return first("CIFAR10", prediction, [1, 2, 2, 2], splits, **train_cfg)


def celeba(prediction: str) -> dict:
    splits = {split: {"root": f"Data/celeba_hq_256/{'train' if split == 'train' else 'valid'}"} for split in SPLITS}
    folder = f"model/CelebA_HQ_256_{prediction[:3]}"
    train_cfg = {"epochs": 150, "batch_size": 32, "lr": 0.00002, "save_period": 15, "model_save_dirpath": folder}
    return first("CelebA_HQ_256", prediction, [1, 1, 2, 2, 4, 4], splits, **train_cfg)


def resized(prediction: str) -> dict:
    """Not one of the four: arguments beside the name, Normalize, a slash at the end, three levels."""
    config = celeba(prediction)
    config["time_aware_net"]["kwargs"] |= {"ch_mult": [1, 2, 2], "base_channels": 64}
    normalize = {"name": "Normalize", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    for split in SPLITS:
        section = config["dataset"][split]
        section["root"] += "/"
        section["pipeline"] = [{"name": "Resize", "size": [64, 64]}, *FLIP_AND_SCALE, normalize]
    return config


MAKERS = {"CIFAR10": cifar10, "CelebA_HQ_256": celeba, "resized": resized}
ALL = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
PREDICTIONS = pytest.mark.parametrize("prediction", ["denoising", "reconstruction"])
# What follows works once the network's default of attention fits a ch_mult of any length.


def pictures(count: int, size: int, seed: int) -> np.ndarray:
    """Noise that no flip leaves as it is."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def write_cifar10(monkeypatch) -> dict[str, np.ndarray]:
    """CIFAR10's own files, with few images in them, where the config's root says; the images of each split."""
    folder = Path("Data/CIFAR10/cifar-10-batches-py")
    folder.mkdir(parents=True)
    parts = {"data_batch_1": pictures(6, 32, 0), "test_batch": pictures(4, 32, 1)}
    for name, images in parts.items():
        data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(len(images)))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for key, value in (("train_list", "data_batch_1"), ("test_list", "test_batch")):
        monkeypatch.setattr(torchvision_datasets.CIFAR10, key, [[value, None]])  # None: any check sum
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "meta", meta)
    return {"train": parts["data_batch_1"], "valid": parts["test_batch"], "test": parts["test_batch"]}


def write_celeba(monkeypatch) -> dict[str, np.ndarray]:
    """Twelve images to train and eleven to validate: more than ten, of which a tenth would be missed."""
    images = {"train": pictures(12, 256, 2), "valid": pictures(11, 256, 3)}
    for split, arrays in images.items():
        folder = Path("Data/celeba_hq_256") / split
        folder.mkdir(parents=True)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(folder / f"{i:05}.png")
    return {**images, "test": images["valid"]}


def assert_same_up_to_flips(data, images: np.ndarray) -> None:
    """Every image there in [-1, 1], as it was or turned left to right, and over ten looks some of each."""
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    assert len(data) == len(images)
    turned = []
    for i in range(len(data)):
        for _ in range(10):
            x = data[i].double()
            near = [(x - y).abs().max().item() < 1e-6 for y in (expected[i], expected[i].flip(-1))]
            assert sum(near) == 1
            turned.append(near[1])
    assert 0 < sum(turned) < len(turned)


@PREDICTIONS
@pytest.mark.parametrize(("make", "write"), [(cifar10, write_cifar10), (celeba, write_celeba)])
def test_the_data_of_each_split_are_what_they_were(make: Callable, write: Callable, prediction, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write(monkeypatch)
    config = resolve(make(prediction))
    for split in SPLITS:
        data = build_dataset(config, split)
        assert_same_up_to_flips(data, images[split])
        assert not data.is_random  # flips are done a batch at a time, the rest is kept decoded


def test_a_size_beside_its_name_and_normalize_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write_celeba(monkeypatch)
    data = build_dataset(resolve(resized("denoising")), "valid")
    smaller = [Image.fromarray(array).resize((64, 64), Image.Resampling.BILINEAR) for array in images["valid"]]
    assert_same_up_to_flips(data, np.stack([np.asarray(image) for image in smaller]))


@PREDICTIONS
@ALL
def test_it_resolves_and_resolving_again_changes_nothing(make, prediction):
    config = make(prediction)
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    train_cfg = build_train_config(resolved)
    assert {key: getattr(train_cfg, key) for key in config["train_cfg"]} == config["train_cfg"]


@PREDICTIONS
@ALL
def test_its_network_is_built(make, prediction):
    config = resolve(make(prediction))
    net = network_without_memory(config)
    side = 32 if make is cifar10 else 256
    x, t = torch.empty(2, 3, side, side, device="meta"), torch.ones(2, dtype=torch.long, device="meta")
    assert net(x, t).shape == x.shape
    config["time_aware_net"]["kwargs"] |= {"base_channels": 8}  # for the memory's sake
    diffusion = build_diffusion(config)
    assert diffusion.T == 1000
    assert diffusion.prediction == prediction
