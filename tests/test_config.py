"""Configs: what is refused, in which words, and what a resolved config holds."""

import json
from pathlib import Path

import pytest

from config import build_dataset, build_diffusion, build_train_config, load_config, resolve

CONFIGS = sorted(Path("configs").glob("*.json"))


def digits() -> dict:
    return json.loads(Path("configs/Digits_den.json").read_text())


@pytest.fixture
def write(tmp_path):
    """Write a config, or any text, and give its path."""

    def write(config: dict | str) -> Path:
        path = tmp_path / "config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_resolve_and_resolving_again_changes_nothing(path):
    resolved = load_config(path)
    assert resolve(json.loads(json.dumps(resolved))) == resolved
    assert resolved["train_cfg"]["model_save_dirpath"] == f"models/{path.stem}"


def test_cifar10_configs_follow_the_paper():
    config = load_config("configs/CIFAR10_den.json")
    diffusion = build_diffusion(config)
    assert sum(p.numel() for p in diffusion.time_aware_net.parameters()) == 35_746_307  # Ho et al. 2020, appendix B: 35.7 M
    assert (config["train_cfg"]["lr"], config["train_cfg"]["batch_size"], config["train_cfg"]["ema_decay"]) == (
        2e-4,
        128,
        0.9999,
    )
    assert config["time_aware_net"]["kwargs"]["dropout"] == 0.1


def test_a_config_is_not_changed_by_resolving():
    config = digits()
    before = json.dumps(config)
    resolve(config)
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("time_aware_net.kwargs.ch_mutl=[1,2]", ["time_aware_net.kwargs.ch_mutl", "unknown", "ch_mult"]),
        ("train_cfg.epoch=3", ["train_cfg.epoch", "unknown", "epochs"]),
        ("train_cfg.epochs=1.5", ["train_cfg.epochs", "1.5", "whole number"]),
        ("train_cfg.epochs=true", ["train_cfg.epochs", "whole number"]),
        ("train_cfg.epochs=0", ["train_cfg.epochs", "at least 1"]),
        ("train_cfg.lr=fast", ["train_cfg.lr", "fast", "number"]),
        ("train_cfg.lr=-1", ["train_cfg.lr", "above 0"]),
        ("train_cfg.lr=1e999", ["train_cfg.lr", "number"]),
        ("train_cfg.precision=half", ["train_cfg.precision", "half", "bf16"]),
        ("schedule.name=LinaerSchedule", ["schedule.name", "LinearSchedule"]),
        ("schedule.kwargs.timesteps=0", ["schedule.kwargs.timesteps", "1..1000000"]),
        ("schedule.kwargs.timesteps=1000000000000", ["schedule.kwargs.timesteps", "1..1000000"]),
        ("time_aware_net.kwargs.base_channels=100000000", ["time_aware_net.kwargs.base_channels", "65536"]),
        ("time_aware_net.kwargs.num_res_blocks=100000000", ["time_aware_net.kwargs.num_res_blocks", "256"]),
        ("time_aware_net.kwargs.base_channels=16000", ["time_aware_net.kwargs", "parameters"]),
        ("schedule.kwargs.s=-1", ["schedule.kwargs.s", "at least 0"]),
        ("time_aware_net.name=UNet", ["time_aware_net.name", "TimeAwareUNet"]),
        ("time_aware_net.kwargs.ch_mult=12", ["time_aware_net.kwargs.ch_mult", "a list, each a whole number"]),
        ("time_aware_net.kwargs.attention=[0,1]", ["time_aware_net.kwargs.attention", "true or false"]),
        ("time_aware_net.kwargs.attention=[true]", ["time_aware_net.kwargs.attention", "one entry a level"]),
        ("time_aware_net.kwargs.dropout=1", ["time_aware_net.kwargs.dropout", "below 1"]),
        ("diffusion.prediction=noise", ["diffusion.prediction", "denoising"]),
        ("diffusion.loss_mode=l2", ["diffusion.loss_mode", "simple", "full"]),
        ("diffusion.reverse_variance=null", ["diffusion.reverse_variance", "learnable"]),
        ("dataset.name=MNIST", ["dataset.name", "FashionMNIST"]),
        ("dataset.train.rooot=x", ["dataset.train.rooot", "unknown"]),
        ('dataset.train.pipeline=[{"name":"RandomHorizontalFilp"}]', ["dataset.train.pipeline.0.name", "RandomHorizontalFlip"]),
        ('dataset.train.pipeline=[{"name":"Resize"}]', ["dataset.train.pipeline.0.kwargs.size", "missing"]),
        ('dataset.train.pipeline=[{"name":"Resize","kwargs":{"size":"8"}}]', ["dataset.train.pipeline.0.kwargs.size", '"8"']),
        ('dataset.train.pipeline={"name":"Resize"}', ["dataset.train.pipeline", "list"]),
        ("train_cfg=3", ["train_cfg", "object"]),
        ("train_cfg", ["--set train_cfg", "lr=1e-4"]),
        ("train_cfg.lr.x=3", ["--set train_cfg.lr.x", "no such place"]),
    ],
)
def test_a_bad_key_is_refused_by_its_path_with_what_is_allowed(assignment, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011, PT012, the words are checked below
        config = load_config("configs/Digits_den.json", [assignment])
        build_diffusion(config), build_dataset(config, "train")
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_flip_of_impossible_probability_is_refused_by_its_path():
    flip = 'dataset.train.pipeline=[{"name":"RandomHorizontalFlip","kwargs":{"p":2}}]'
    with pytest.raises(ValueError, match=r"dataset\.train\.pipeline\.0\.kwargs"):
        build_dataset(load_config("configs/Digits_den.json", [flip]), "train")


@pytest.mark.parametrize("section", ["schedule", "time_aware_net", "diffusion", "dataset", "train_cfg"])
def test_a_missing_section_is_named(section, write):
    config = digits()
    del config[section]
    with pytest.raises(ValueError, match=f"^{section}: missing"):
        load_config(write(config))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schedule": }', "line 1, column 14"),
        ('{\n  "schedule": {},\n}', "line 3, column 1"),
        ('{"schedule": {}, "schedule": {}}', "schedule: stands twice"),
        ("[]", "must be an object"),
        ("", "line 1, column 1"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, words, write):
    with pytest.raises(ValueError, match=words):
        load_config(write(text))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.json: No such file"):
        load_config("nowhere.json")


def test_overrides_reach_every_level_and_keep_json_types():
    config = load_config(
        "configs/CIFAR10_den.json",
        [
            "train_cfg.lr=1e-4",
            "dataset.train.pipeline.0.kwargs.p=0.25",
            "train_cfg.model_save_dirpath=models/7",
            "train_cfg.chunk_size=null",
        ],
    )
    assert config["train_cfg"]["lr"] == 1e-4
    assert config["dataset"]["train"]["pipeline"][0]["kwargs"] == {"p": 0.25}
    assert build_train_config(config).model_save_dirpath == "models/7"
    assert build_train_config(config).chunk_size is None
