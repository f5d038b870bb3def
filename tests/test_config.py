"""Configs: what is refused, in which words, and what a resolved config holds."""

import json
import math
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint
import config as config_module
from config import Range, build_dataset, build_diffusion, build_train_config, find, load_config, network_without_memory, resolve
from mistakes import Mistake

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
        ("train_cfg.compile=maybe", ["train_cfg.compile", "maybe", 'true or false or "auto"']),
        ("train_cfg.max_steps=0", ["train_cfg.max_steps", "at least 1 or null"]),
        ("train_cfg.ema_decay=1", ["train_cfg.ema_decay", "a number of at least 0 and below 1"]),
        ("train_cfg.num_workers=1025", ["train_cfg.num_workers", "at least 0 and at most 1024"]),
        ('train_cfg.model_save_dirpath=" "', ["train_cfg.model_save_dirpath", "must name a folder"]),
        ('train_cfg.model_save_dirpath="a\\ud800"', ["train_cfg.model_save_dirpath", "must name a folder"]),
        ("schedule.kwargs.s=20000000000000000000", ["schedule.kwargs"]),
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
        ("dataset.train.pipeline=null", ["dataset.train.pipeline", "list"]),
        ("train_cfg.power_ema=[1e-200]", ["train_cfg.power_ema", "1e-05"]),
        ('dataset.train.pipeline=["Resize"]', ["dataset.train.pipeline.0", "object"]),
        ('dataset.train.pipeline=[{"name":"Resize","size":"8"}]', ["dataset.train.pipeline.0.size", '"8"']),
        ('dataset.train.pipeline=[{"name":"Resize","sise":8}]', ["dataset.train.pipeline.0.sise", "did you mean 'size'"]),
        ('dataset.train.pipeline=[{"name":"Resize","size":8,"kwargs":{}}]', ["pipeline.0.size", "Allowed: name, kwargs"]),
        ('dataset.train.pipeline=[{"name":"Resize","size":99999}]', ["pipeline.0.size", "1..16384"]),
        ('dataset.train.pipeline=[{"name":"ToTensor","scale":1}]', ["dataset.train.pipeline.0.scale", "unknown"]),
        ('dataset.train.pipeline=[{"name":"Normalize","mean":[0.5]}]', ["dataset.train.pipeline.0.std", "missing"]),
        (
            'dataset.train.pipeline=[{"name":"Normalize","mean":[0.5],"std":[0.25]}]',
            ["dataset.train.pipeline.0.std", "[0.25]", "0.5 in every channel", "[-1, 1]"],
        ),
        (
            'dataset.train.pipeline=[{"name":"Normalize","kwargs":{"mean":[0.5,0.4,0.5],"std":[0.5]}}]',
            ["dataset.train.pipeline.0.kwargs.mean", "0.5 in every channel"],
        ),
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


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("RandomHorizontalFlip", {"p": 2}),
        ("Resize", {"size": 8, "interpolation": 17}),
        ("RandomRotation", {"degrees": 9, "interpolation": 17}),
    ],
)
def test_an_argument_that_a_transform_cannot_have_is_refused_by_its_path(name, kwargs):
    with pytest.raises(ValueError, match=r"dataset\.train.*pipeline\.0"):
        build_dataset(
            load_config(
                "configs/Digits_den.json", [f"dataset.train.pipeline={json.dumps([{'name': name, 'kwargs': kwargs}])}"]
            ),
            "train",
        )


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
        ('{\n  "schedule": {},\n  3}', "line 3, column 3"),
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


# Transforms


def pipeline(*transforms: dict) -> list[dict]:
    """What becomes of a pipeline."""
    config = digits()
    config["dataset"]["train"]["pipeline"] = list(transforms)
    return resolve(config)["dataset"]["train"]["pipeline"]


def test_a_transforms_arguments_may_stand_beside_its_name():
    assert pipeline({"name": "Resize", "size": [8, 9]}) == pipeline({"name": "Resize", "kwargs": {"size": [8, 9]}})


@pytest.mark.parametrize(
    "stored",
    [
        {"name": "RandomHorizontalFlip"},
        {"name": "RandomHorizontalFlip", "kwargs": {}},
        {"name": "Pad", "kwargs": {"padding": 1}},
    ],
)
def test_a_transform_as_checkpoints_hold_it_stays_the_same(stored):
    assert pipeline(stored) == [stored]


def test_a_checkpoint_may_have_a_key_that_is_no_more_and_a_config_may_not():
    config = digits()
    config["train_cfg"]["references"] = 0
    assert resolve(config, stored=True) == resolve(digits())  # without a word, as it asked for nothing
    config["train_cfg"]["references"] = 2
    with pytest.warns(UserWarning, match="train_cfg.references = 2: this version has it no more"):
        assert resolve(config, stored=True) == resolve(digits())
    with pytest.raises(Mistake, match=r"train_cfg\.references: unknown key"):
        resolve(config)


def test_what_only_scales_to_the_range_that_images_have_anyway_drops_out():
    normalize = {"name": "Normalize", "mean": [0.5, 0.5, 0.5], "std": [0.5]}
    assert pipeline({"name": "RandomHorizontalFlip"}, {"name": "ToTensor"}, normalize) == [{"name": "RandomHorizontalFlip"}]
    config = digits()
    config["dataset"]["train"]["pipeline"] = [{"name": "RandomHorizontalFlip", "p": 0.25}, {"name": "ToTensor"}, normalize]
    data = build_dataset(resolve(config), "train")
    assert data.flips == [(-1, 0.25)]
    assert not data.is_random


def test_the_background_of_a_folder_is_set_from_the_command_line(tmp_path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "a.png")
    sections = [f'dataset.{split}={{"root": "{tmp_path}"}}' for split in ("train", "valid")]
    settings = ["dataset.name=ImageFolder", *sections, "dataset.train.background=black"]
    config = load_config("configs/Digits_den.json", settings)
    assert build_dataset(config, "train")[0].unique().tolist() == [-1]
    assert build_dataset(config, "valid")[0].unique().tolist() == [1]
    config["dataset"]["train"]["background"] = "blak"
    with pytest.raises(Mistake, match=r"^dataset\.train\.background = 'blak'"):
        build_dataset(config, "train")


# One's own classes

OWN = """
import math
from subprocess import Popen

import torch
from torch import nn
from torchvision.transforms import v2
from PIL import Image

from beta_schedule import LinearSchedule
from dataset import ImageDataset
from mistakes import Mistake


class Net(nn.Module):
    def __init__(
        self, width: int = 4, activation=nn.SiLU, fault: str = "", depth: int = None, sizes: tuple[int, str] = (3, "a"),
        limit: float = math.inf, **more
    ):
        super().__init__()
        if fault == "bug":
            raise ValueError("width = 4: mine")
        if fault == "mistake":
            raise Mistake("width = 4: must be odd")
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.table = torch.linspace(0, 1, width).tolist()  # which a tensor without memory does not have

    def forward(self, xt, t):
        return self.conv(xt)


class Remembering(Net):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        self.seen = state["seen"]


class Steps:
    def __init__(self, timesteps: int):
        self.alpha_bar = torch.linspace(0.9, 0.1, timesteps, dtype=torch.float64)


class Stripes(ImageDataset):
    def __init__(self, count: int, pipeline=None):
        self.count = count
        super().__init__(pipeline or ())

    def __len__(self):
        return self.count

    def image(self, i):
        return Image.new("L", (8, 8), i)


class Plain(Stripes):
    def __init__(self, count: int = 3):
        super().__init__(count)


class Listed(Plain):
    labels = [0, 1, 0]


class Invert:
    def __init__(self, by: int = 255):
        self.by = by

    def __call__(self, image):
        return image.point(lambda level: self.by - level)


def sampler():
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """The name of a module in the current folder that is not the script's; nothing of it is left afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "my_things.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "my_things"
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def good(own) -> dict:
    """A config of one's own network, schedule, data set and transform."""
    config = json.loads((Path(config_module.__file__).parent / "configs" / "Digits_den.json").read_text())
    config["time_aware_net"] = {"name": f"{own}.Net", "kwargs": {"width": 6}}
    config["schedule"] = {"name": f"{own}.Steps", "kwargs": {"timesteps": 7}}
    stripes = {"count": 5, "pipeline": [{"name": f"{own}.Invert", "by": 100}, {"name": "ToTensor"}]}
    config["dataset"] = {"name": f"{own}.Stripes", "train": stripes, "valid": {"count": 2}}
    return config


def test_ones_own_network_schedule_data_set_and_transform_are_used(good):
    resolved = resolve(good)
    assert resolve(json.loads(json.dumps(resolved))) == resolved
    defaults = {"fault": "", "depth": None, "sizes": [3, "a"], "limit": math.inf}  # not the one that JSON does not hold
    assert resolved["time_aware_net"]["kwargs"] == {"width": 6, **defaults}
    diffusion = build_diffusion(resolved)
    assert len(diffusion.time_aware_net.table) == 6
    assert diffusion.T == 7
    train, valid = (build_dataset(resolved, split) for split in ("train", "valid"))
    assert [round((x.mean().item() + 1) * 127.5) for x in train] == [100, 99, 98, 97, 96]
    assert len(valid) == 2
    assert diffusion(torch.stack(list(train))).isfinite()
    assert network_without_memory(resolved).conv.weight.is_meta


def test_ones_own_data_set_needs_no_pipeline(good, own):
    good["dataset"] = {"name": f"{own}.Plain", "train": {}, "valid": {"count": 2}}
    assert len(build_dataset(resolve(good), "train")) == 3


@pytest.mark.parametrize(
    ("section", "kwargs", "words"),
    [
        ("time_aware_net", {"width": 1.5}, "time_aware_net.kwargs.width = 1.5: must be a whole number"),
        ("time_aware_net", {"width": None}, "time_aware_net.kwargs.width = null: must be a whole number"),
        (
            "time_aware_net",
            {"sizes": [3, 4]},
            "time_aware_net.kwargs.sizes = [3, 4]: must be a list of a whole number, a string",
        ),
        ("time_aware_net", {"sizes": [3]}, "time_aware_net.kwargs.sizes = [3]: must be a list of a whole number, a string"),
        ("schedule", {"timestep": 5}, "schedule.kwargs.timestep: unknown key; did you mean 'timesteps'"),
        ("schedule", {}, "schedule.kwargs.timesteps: missing"),
    ],
)
def test_the_arguments_of_ones_own_are_checked_against_its_signature(section, kwargs, words, good):
    good[section]["kwargs"] = kwargs
    with pytest.raises(Mistake) as error:
        resolve(good)
    assert str(error.value).startswith(words)


def test_ones_own_network_with_an_extra_state_comes_back_from_its_checkpoint(good, own, tmp_path):
    good["time_aware_net"]["name"] = f"{own}.Remembering"
    diffusion = build_diffusion(resolve(good))
    checkpoint.save(tmp_path / "a.pth", {"config": resolve(good), "shape": [1, 8, 8], "ema": diffusion.state_dict()})
    assert checkpoint.load_diffusion(tmp_path / "a.pth")[0].time_aware_net.seen == 3


ODD = """
from enum import Enum

import numpy as np

import my_things


class Act(str, Enum):
    SILU = "silu"


class Net(my_things.Net):
    def __init__(self, odd=DEFAULT):
        super().__init__()
        self.odd = odd


class Steps(my_things.Steps):
    def __init__(self, timesteps: int, odd=DEFAULT):
        super().__init__(timesteps)


class Stripes(my_things.Stripes):
    def __init__(self, count: int, odd=DEFAULT, pipeline: list = ()):
        super().__init__(count, pipeline)
"""


@pytest.mark.parametrize("default", ["np.sqrt(2)", "Act.SILU", "(1.5, np.sqrt(2))"])
@pytest.mark.parametrize("section", ["time_aware_net", "schedule", "dataset"])
def test_a_default_that_is_no_plain_value_is_left_to_ones_own_class_and_its_checkpoint_loads(section, default, good, tmp_path):
    """A float64 of numpy's is a float, and a member of such an Enum a str; a checkpoint holds neither."""
    (tmp_path / "my_odd_things.py").write_text(ODD.replace("DEFAULT", default))
    good[section]["name"] = good[section]["name"].replace("my_things", "my_odd_things")
    good["time_aware_net"]["kwargs"] = {}
    resolved = resolve(good)
    state = {"config": resolved, "shape": [1, 8, 8], "ema": build_diffusion(resolved).state_dict()}
    checkpoint.save(tmp_path / "a.pth", state)
    diffusion, state = checkpoint.load_diffusion(tmp_path / "a.pth")
    assert len(build_dataset(state["config"], "valid")) == 2
    if section == "time_aware_net":
        odd = sys.modules["my_odd_things"]
        assert diffusion.time_aware_net.odd == eval(default, vars(odd))


def test_clusters_need_a_network_with_as_many_classes_also_of_ones_own(good):
    good["dataset"]["clusters"] = 2
    with pytest.raises(Mistake, match=r"dataset\.clusters = 2: time_aware_net\.kwargs\.n_classes must be 2"):
        build_diffusion(resolve(good))


def test_labels_that_are_no_tensor_are_refused_where_the_data_are_built(good, own):
    good["dataset"] = {"name": f"{own}.Listed", "train": {}, "valid": {}}
    with pytest.raises(Mistake, match=r"dataset\.train: labels must be a long tensor \[3\]"):
        build_dataset(resolve(good), "train")


def test_an_annotation_that_cannot_be_read_is_named(good, own, tmp_path):
    (tmp_path / "my_types.py").write_text("class Net:\n    def __init__(self, x: 'Unknown' = 3): ...\n")
    good["time_aware_net"] = {"name": "my_types.Net"}
    with pytest.raises(Mistake, match="subclass of"):
        resolve(good)
    good["schedule"] = {"name": "my_types.Net"}
    good["time_aware_net"] = {"name": f"{own}.Net"}
    with pytest.raises(Mistake, match=r"schedule\.kwargs: an annotation cannot be read: name 'Unknown' is not defined"):
        resolve(good)


def test_a_bug_in_ones_own_network_keeps_its_traceback(good, own):
    good["time_aware_net"]["kwargs"] = {"fault": "bug"}
    with pytest.raises(ValueError, match=r"^width = 4: mine$") as bug:
        build_diffusion(resolve(good))
    assert not isinstance(bug.value, Mistake)
    last = traceback.extract_tb(bug.value.__traceback__)[-1]
    assert (Path(last.filename).name, last.line) == (f"{own}.py", 'raise ValueError("width = 4: mine")')


def test_a_mistake_that_ones_own_network_finds_gets_its_path(good):
    good["time_aware_net"]["kwargs"] = {"fault": "mistake"}
    with pytest.raises(Mistake, match=r"^time_aware_net\.kwargs\.width = 4: must be odd$"):
        build_diffusion(resolve(good))


def test_a_mistake_of_ours_is_chained_to_where_it_was_found():
    with pytest.raises(Mistake, match=r"^schedule\.kwargs\.s = -1") as error:
        build_diffusion(load_config("configs/Digits_den.json", ["schedule.kwargs.s=-1"]))
    assert traceback.extract_tb(error.value.__cause__.__traceback__)[-1].filename.endswith("beta_schedule.py")


def test_a_stored_config_can_be_resolved_where_the_data_sets_code_is_not(good):
    stored = resolve(good)
    stored["dataset"]["name"] = "their_data.Stripes"
    assert resolve(stored, stored=True)["dataset"] == stored["dataset"]
    with pytest.raises(Mistake, match=r"^dataset\.name = .*their_data\.py"):
        resolve(stored)
    with pytest.raises(Mistake, match=r"^dataset\.name = .*their_data\.py"):
        build_dataset(stored, "train")


def test_a_function_of_ones_own_is_found_where_functions_are_asked_for(own):
    assert find(f"{own}.sampler", {}, types.FunctionType)() is None
    assert find("ddpm", {"ddpm": print}, types.FunctionType) is print
    with pytest.raises(Mistake, match=r"name = .* must be a function"):
        find(f"{own}.Net", {}, types.FunctionType)


@pytest.mark.parametrize(
    ("name", "base", "words"),
    [
        ("os.system", nn.Module, "no file os.py in the current folder"),
        ("torch.nn.Linear", nn.Module, "no file torch/nn.py"),
        ("..secret.Net", nn.Module, "no file"),
        ("secret" * 100 + ".Net", nn.Module, "no file"),
        ("my_things.sub/../x.Net", nn.Module, "no file"),
        ("my_things.Nat", nn.Module, "my_things has no Nat"),
        ("my_things.sampler", nn.Module, "must be a subclass of torch.nn.modules.module.Module"),
        ("my_things.sampler", Callable, "must be a class whose objects can be called"),
        ("my_things.sampler", object, "must be a class"),
        ("my_things.Steps", nn.Module, "must be a subclass of torch.nn.modules.module.Module"),
        ("my_things.Popen", object, "comes from subprocess"),
        ("my_things.LinearSchedule", object, "comes from beta_schedule"),
        ("random.Net", nn.Module, "Python knows another random"),
        ("json.decoder.Net", nn.Module, "Python knows another json"),
        ("Net", nn.Module, 'Allowed: TimeAwareUNet, TimeAwareMLP, or your own as "my_file.MyName"'),
    ],
)
def test_a_name_reaches_no_code_but_what_was_written_for_it(name, base, words, own):
    trap = "from pathlib import Path\nPath('ran').write_text('')\nfrom torch.nn import Module\nclass Net(Module): pass\n"
    for file in ("random.py", "json/decoder.py", "secret.py"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(trap)
    with pytest.raises(Mistake) as error:
        find(name, config_module.NETWORKS, base, "time_aware_net.name")
    assert str(error.value).startswith(f'time_aware_net.name = "{name[:60]}')
    assert words in str(error.value)
    assert not Path("ran").exists()


def test_a_name_finds_a_file_in_a_folder(own):
    Path("mine/deep").mkdir(parents=True)
    Path("mine/deep/nets.py").write_text(OWN)
    assert find("mine.deep.nets.Net", {}, nn.Module).__module__ == "mine.deep.nets"


def test_a_class_that_has_moved_is_found_where_it_was(own):
    """Its old place imports it from another file below the current folder."""
    Path("moved_nets").mkdir()
    Path("moved_nets/net.py").write_text("from torch import nn\n\n\nclass MovedNet(nn.Module):\n    pass\n")
    Path("old_net.py").write_text("from subprocess import Popen\n\nfrom moved_nets.net import MovedNet\n")
    assert find("old_net.MovedNet", {}, nn.Module) is find("moved_nets.net.MovedNet", {}, nn.Module)
    Path("subprocess.py").write_text("class Popen:\n    pass\n")  # which is not the one that was imported
    with pytest.raises(Mistake, match=r'^name = "old_net\.Popen": comes from subprocess.*Python knows another subprocess'):
        find("old_net.Popen", {}, object)


def test_a_class_without_alpha_bar_is_no_schedule(good, own):
    good["schedule"] = {"name": f"{own}.Invert"}
    with pytest.raises(Mistake, match=r"^schedule\.name = .*alpha_bar"):
        build_diffusion(resolve(good))


def test_our_own_schedules_and_networks_are_found_in_their_files():
    assert list(config_module.NETWORKS) == ["TimeAwareUNet", "TimeAwareMLP"]
    assert "LinearSchedule" in config_module.SCHEDULES
    assert not {"BetaSchedule", "Tensor"} & set(config_module.SCHEDULES)


@pytest.mark.parametrize(
    ("values", "inside", "outside", "words"),
    [
        (Range(ge=1), [1, 2**70], [0, -1], "of at least 1"),
        (Range(gt=0, le=1), [1e-9, 1], [0, 1.0001], "above 0 and at most 1"),
        (Range(ge=0, lt=1), [0, 0.999], [1, -1e-9], "of at least 0 and below 1"),
    ],
)
def test_a_range_holds_its_closed_ends_and_not_its_open_ones(values, inside, outside, words):
    assert all(value in values for value in inside)
    assert not any(value in values for value in outside)
    assert str(values) == words


def test_an_annotation_that_json_cannot_meet_is_named():
    def build(root: Path, names: str | None = None):
        pass

    with pytest.raises(Mistake, match=r'root = "a": must be a Path, which JSON does not have; annotate what it has'):
        config_module._arguments("dataset.train", build, {"root": "a"})
