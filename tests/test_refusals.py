"""Refusals: checkpoints that lie, configs with a mistake and flags without sense end in one line, before anything is changed.

All of it runs with little memory to ask for, so that what is refused is refused by looking at it and not by running out.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import reduce
from pathlib import Path

import pytest
import torch
from children import RESUME, SCRIPTS, files, image_folder, run_argv
from PIL import Image
from runs import ROOT, losses

import checkpoint
import config
import train
from mistakes import LIBRARY, Mistake, _Console

SAMPLE = ["run/last.pth", "--device", "cpu", "-n", "1"]


@contextlib.contextmanager
def memory(size: int) -> Iterator[None]:
    """At most so many bytes more than now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def refuse(work, capsys) -> Callable[..., str]:
    """refuse(script, argv, words...): the script's one line with these words, after which all files are as before."""

    def refuse(script: str, argv: list[str], *words: str) -> str:
        before = files(work)
        capsys.readouterr()
        with memory(256 << 20):
            try:
                code = SCRIPTS[script].main(argv)
            except SystemExit as error:  # of argparse
                code = error.code
        message = capsys.readouterr().err.strip()
        assert code == 2, message
        assert "\n" not in message
        assert len(message) < 1200
        assert not re.search(r"alloc|\bmemory", message), message
        assert all(word in message for word in words), message
        assert files(work) == before
        return message

    return refuse


# Checkpoints that lie


def put(*path_and_value) -> Callable[[dict], None]:
    """A change of a state: the value at the end of a path."""
    *path, last, value = path_and_value

    def change(state: dict) -> None:
        reduce(lambda inner, key: inner[key], path, state)[last] = value

    return change


def without(key: str) -> Callable[[dict], None]:
    return lambda state: state.pop(key)


def nested_in_itself(state: dict) -> None:
    state["config"]["train_cfg"]["lr"] = state["config"]


def laughs() -> list:
    """A thousand million of them."""
    return reduce(lambda inner, _: [inner] * 10, range(9), ["ha"])


SIZES = {"timesteps": 2**62, "base_channels": 2**62, "t_channels": 10**9, "num_res_blocks": 10**9, "ch_mult": [1, 10**9]}
CONV = ("ema", "time_aware_net.conv_in.weight")
BOTH = {
    **{
        f"{key} huge": put("config", "schedule" if key == "timesteps" else "time_aware_net", "kwargs", key, value)
        for key, value in SIZES.items()
    },
    "base_channels other": put("config", "time_aware_net", "kwargs", "base_channels", 2048),
    "levels many": lambda s: s["config"]["time_aware_net"]["kwargs"].update(ch_mult=[1] * 9999, attention=[False] * 9999),
    "an unknown network": put("config", "time_aware_net", "name", "os.system"),
    "a config in itself": nested_in_itself,
    "a config of laughs": lambda s: s["config"]["train_cfg"].update(lr=laughs()),
    "laughs that any type may be": lambda s: s["config"]["dataset"]["train"]["pipeline"][0]["kwargs"].update(size=laughs()),
    "a key that is a number": put("config", "train_cfg", 5, 3),
    "config null": put("config", None),
    "config a tensor": put("config", torch.zeros(2)),
    "version a tensor": put("version", torch.ones(2)),
    "version to come": put("version", 99),
    "format a tensor": put("format", torch.ones(2)),
    "shape text": put("shape", [1, "a", 4]),
    "shape flat": put("shape", [1]),
    "shape negative": put("shape", [1, -4, 4]),
    "shape huge": put("shape", [1, 10**6, 10**6]),
    "a weight of another shape": put(*CONV, torch.zeros(3)),
    "a weight that is text": put(*CONV, "x"),
    "a weight of stride 0": put(*CONV, torch.zeros(1).expand(10**6, 10**6)),
    "ema a list": put("ema", []),
    **{f"no {key}": without(key) for key in ("format", "version", "config", "shape", "ema")},
}
MOMENT = ("optimizer", "state", 0)
SUMS = (None, [], ["a", "b"], 3)
TRAIN = {
    **{f"{key} {value!r}": put(key, value) for key in ("step", "closed", "records", "world") for value in (-1, 3.5, "x", None)},
    **{f"{key} {value!r}": put(key, value) for key in ("loss_sums", "bad_steps", "loss_by_t") for value in SUMS},
    **{f"quality {value!r}": put("quality", value) for value in (None, [], 3, {"best_fd": "x"}, {"best_fd": float("nan")})},
    "step a tensor": put("step", torch.zeros(2)),
    "step 2^70": put("step", 2**70),
    "best_loss text": put("best_loss", "x"),
    "optimizer empty": put("optimizer", {}),
    "optimizer without state": put("optimizer", "state", {}),
    "moments of another shape": put(*MOMENT, "exp_avg", torch.zeros(3)),
    "moments of stride 0": put(*MOMENT, "exp_avg", torch.zeros(1, dtype=torch.float64).expand(10**6, 10**6)),
    "moments of text": put(*MOMENT, "exp_avg", "x"),
    "moments missing": put(*MOMENT, {}),
    "steps of text": put(*MOMENT, "step", "x"),
    **{f"no {key}": without(key) for key in ("model", "optimizer", "scaler", "step", "records", "best_loss", "bad_steps")},
}
TEST = {"shape of other channels": put("shape", [3, 4, 4]), "shape odd": put("shape", [1, 5, 5])}
CASES = [(script, name, change) for name, change in BOTH.items() for script in ("train", "test")]
CASES += [("train", *case) for case in TRAIN.items()] + [("test", *case) for case in TEST.items()]


@pytest.mark.parametrize(("script", "change"), [case[::2] for case in CASES], ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_checkpoint_that_lies_is_refused_by_name_before_memory_is_asked_for(script, change, refuse, state):
    os.mkdir("run")
    lying = deepcopy(state)
    change(lying)
    torch.save(lying, "run/last.pth")
    refuse(script, RESUME if script == "train" else SAMPLE, "run/last.pth")


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function: Callable, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def save_packed(path: str, state: dict) -> None:
    """A bomb: a small file of much data."""
    torch.save({**state, "more": torch.zeros(50_000_000, dtype=torch.uint8)}, "../big.pth")
    with zipfile.ZipFile("../big.pth") as big, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name in big.namelist():
            small.writestr(name, big.read(name))


CRAFTED = {
    "a command": Call(os.system, "touch hostile"),
    "an evaluation": Call(eval, "open('hostile', 'w')"),
    "an array of bytes": Call(bytearray, 10**11),
    "a tensor": Call(torch.Tensor, 10**6, 10**5),
    "an attribute": Call(getattr, "text", "upper"),
    "lists in lists": pickle.loads(b"(" * 300 + b"l" * 300 + b"."),
}


@pytest.mark.parametrize("script", ["train", "test"])
@pytest.mark.parametrize("kind", [*CRAFTED, "bare", "packed"])
def test_a_crafted_pickle_is_refused_and_does_nothing(kind, script, refuse, state):
    os.mkdir("run")
    if kind == "bare":
        Path("run/last.pth").write_bytes(pickle.dumps(CRAFTED["a command"]))
    elif kind == "packed":
        save_packed("run/last.pth", state)
    else:
        torch.save({**state, "config": CRAFTED[kind]}, "run/last.pth")
    refuse(script, RESUME if script == "train" else SAMPLE, "run/last.pth")


def save_behind(path: str, state: dict) -> None:
    """A file of torch's older format, which is read from its start, before an archive, which is found from its end."""
    torch.save({**state, "config": CRAFTED["an array of bytes"]}, path, _use_new_zipfile_serialization=False)
    torch.save(state, "good.pth")
    with open(path, "ab") as file:
        file.write(Path("good.pth").read_bytes())


def save_beside(path: str, state: dict) -> None:
    """An archive with a harmless pickle in the folder of the one that torch reads."""
    torch.save({**state, "config": CRAFTED["an array of bytes"]}, "bad.pth")
    with zipfile.ZipFile("bad.pth") as bad, zipfile.ZipFile(path, "w") as both:
        both.writestr("bad/more/data.pkl", pickle.dumps({}))
        for name in bad.namelist():
            both.writestr(name, bad.read(name))


@pytest.mark.parametrize("save", [save_behind, save_beside])
def test_what_torch_would_read_is_what_was_looked_at(save, state, work):
    save("last.pth", state)
    with pytest.raises(Mistake, match="torch would read another part"):
        checkpoint.load("last.pth")


# Configs


def good_configs() -> dict[str, dict]:
    """Configs that are as good as they are different."""
    configs = {name: json.loads((ROOT / "configs" / f"{name}.json").read_text()) for name in ("Digits_den", "CIFAR10_den")}
    folder = json.loads((ROOT / "configs" / "CelebA_HQ_256_den.json").read_text())
    folder["dataset"] |= {"name": "ImageFolder"}
    for split in ("train", "valid"):
        configs["CIFAR10_den"]["dataset"][split]["download"] = False
        folder["dataset"][split] |= {"root": "images", "mode": "L", "skip_unreadable": False, "background": "#000000"}
        folder["dataset"][split] |= {"train": split == "train"}
        folder["dataset"][split]["pipeline"].insert(0, {"name": "Resize", "kwargs": {"size": [64, 64]}})
    folder["time_aware_net"]["kwargs"] |= {
        "n_channels": 1,
        "base_channels": 32,
        "dropout": 0.1,
        "num_heads": 2,
        "t_channels": 64,
    }
    folder["schedule"] = {"name": "ConstantSchedule", "kwargs": {"timesteps": 10, "constant": 0.5}}
    written_out = config.load_config(ROOT / "configs" / "Digits_rec.json")  # every default of train_cfg, too
    return configs | {"ImageFolder": folder, "written out": written_out}


RANGES = {  # values of the right type that no key of the name takes
    "timesteps": [0, -5, 10**12],
    "constant": [0, 1, -0.1],
    "start": [0, 1.5],
    "end": [0, 2],
    "s": [-0.1],
    "n_channels": [0, -1, 10**12],
    "base_channels": [0, 7, -8, 10**9],
    "t_channels": [0, -2, 10**12],
    "num_res_blocks": [0, -1, 10**9],
    "num_heads": [0, -1, 3],
    "num_groups": [0, 7],
    "ch_mult": [[], [0, 1], [1, -1], [1, 10**9]],
    "attention": [[], [True] * 7],
    "dropout": [1, -0.5, 7],
    "reverse_variance": ["beta2", ""],
    "prediction": ["noise"],
    "loss_mode": ["l2"],
    "name": ["Nothing", "", "__init__"],
    "size": [-3, 0, [0, 4], 10**12, [64, 20000]],
    "epochs": [0, -1],
    "batch_size": [0, -32],
    "lr": [0, -1e-3, 1.5, 1e299],
    "record_period": [0, -1],
    "save_period": [-1],
    "save_minutes": [-0.5],
    "sample_period": [-1],
    "sample_timesteps": [0],
    "max_steps": [0],
    "valid_images": [-1],
    "seed": [-1],
    "warmup_steps": [-1],
    "lr_schedule": ["step"],
    "variance_lr": [0, -1, 1.01],
    "grad_clip": [-1],
    "grad_accum": [0],
    "ema_decay": [1, -0.1, 2],
    "precision": ["fp8"],
    "chunk_size": [0, -1],
    "cache_gb": [-1],
    "num_workers": [-1, 10**9],
    "max_bad_steps": [0],
    "model_save_dirpath": ["", " ", "a\0b", "a" * 300, "file", "file/run"],
    "mode": ["CMYK", "l"],
    "background": ["", "nocolour", "#12"],
}
OTHER_TYPES = ["many", 1.5, True, None, [], {}, [[1]], {"a": 1}, 3]
MAY_BE_NULL = {"train", "attention", "t_channels", "num_groups", "chunk_size", "max_steps", "valid_images"}
FLOATS = {"lr", "variance_lr", "grad_clip", "ema_decay", "cache_gb", "save_minutes", "dropout", "start", "end", "s", "constant"}
REQUIRED = {"schedule", "time_aware_net", "diffusion", "dataset", "train_cfg", "name", "n_channels", "valid", "size"}
REQUIRED |= {"epochs", "batch_size", "lr", "model_save_dirpath"}


def places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key of a config, those in lists of objects too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(node, dict):
            yield (*path, key)
        yield from places(value, (*path, key))


def of_another_type(value: object, key: str) -> list:
    """Values that the key does not take because of their type."""
    if value is None:
        return [{}, "many", 1.5, [[1]]]
    allowed = {type(value)} | ({type(None)} if key in MAY_BE_NULL else set()) | ({int, float} if key in FLOATS else set())
    allowed |= {int, list} if key == "size" else set()
    allowed |= {bool} if key == "compile" else set()
    return [other for other in OTHER_TYPES if type(other) not in allowed]


def mutations(good: dict) -> Iterator[tuple[str, str, tuple, Callable[[dict], None]]]:
    """(what is done, to which value, the key's path, how) for every way to spoil one key."""
    for path in places(good):
        *parents, key = path
        value = reduce(lambda inner, step: inner[step], path, good)

        def at(change, parents=parents):
            return lambda config: change(reduce(lambda inner, step: inner[step], parents, config))

        if key in REQUIRED or path == ("dataset", "train") or (key == "root" and "ImageFolder" in str(good)):
            yield "removed", "", path, at(lambda inner, key=key: inner.pop(key))
        for new in (key + "x", key.upper()):
            yield "renamed", "", (*parents, new), at(lambda inner, key=key, new=new: inner.update({new: inner.pop(key)}))
        for other in of_another_type(value, key):
            yield "retyped", repr(other), path, at(lambda inner, key=key, other=other: inner.update({key: other}))
        for other in RANGES.get(key, []) if not isinstance(value, dict) else []:
            yield "out of range", repr(other)[:20], path, at(lambda inner, key=key, other=other: inner.update({key: other}))


def draw(name: str) -> bytes:
    """A random number that depends on the case's name alone, so that a case more leaves the order of the others as it is."""
    return hashlib.sha256(name.encode()).digest()


def bad_configs(goods: dict[str, dict]) -> dict[str, tuple[tuple, dict]]:
    """200 of them (path, config) by name, the same every time; up to 25 of each base are a value out of range."""
    groups: dict[tuple, dict] = {}
    for base, good in goods.items():
        for what, value, path, change in mutations(good):
            bad = deepcopy(good)
            change(bad)
            group = groups.setdefault((base, what) if what == "out of range" else ("others",), {})
            group[f"{base}: {'.'.join(map(str, path))} {what} {value}".strip()] = (path, bad)
    others = sorted(groups.pop(("others",)).items(), key=lambda case: draw(case[0]))
    ranged = [case for group in groups.values() for case in sorted(group.items(), key=lambda case: draw(case[0]))[:25]]
    return dict((ranged + others)[:200])


BAD_CONFIGS = bad_configs(good_configs())


@pytest.mark.parametrize(("path", "bad"), BAD_CONFIGS.values(), ids=list(BAD_CONFIGS))
def test_a_config_with_one_bad_key_is_refused_by_the_keys_path(path, bad, refuse):
    os.mkdir("images")
    for i in range(2):
        Image.new("L", (64, 64)).save(f"images/{i}.png")
    Path("file").write_text("mine")
    Path("config.json").write_text(json.dumps(bad))
    message = refuse("train", ["config.json", "--device", "cpu"], ".".join(map(str, path)))
    assert message.startswith("train.py: ")


def test_a_key_more_leaves_nearly_all_bad_configs_as_they_are():
    goods = good_configs()
    goods["written out"]["train_cfg"] = {"a_first_key": 1, **goods["written out"]["train_cfg"], "a_last_key": "many"}
    assert len(BAD_CONFIGS.keys() - bad_configs(goods).keys()) <= 10


def test_each_config_that_is_spoilt_was_good():
    for good in good_configs().values():
        assert config.resolve(good)
    assert len(BAD_CONFIGS) == 200 == len({json.dumps(bad) for _, bad in BAD_CONFIGS.values()})


DEEP = "[" * 100_000
CONFIG_FILES = {
    "a folder": lambda path: path.mkdir(),
    "binary": lambda path: path.write_bytes(random.Random(0).randbytes(500)),
    "deep": lambda path: path.write_text(DEEP),
    "a long number": lambda path: path.write_text("9" * 5000),
    "a loop of links": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("make", CONFIG_FILES.values(), ids=list(CONFIG_FILES))
def test_a_config_file_that_is_none_is_named(make, refuse):
    make(Path("c.json"))
    assert refuse("train", ["c.json"]).startswith("train.py: c.json: ")


# What else a user may get wrong

SETTINGS = {
    "train_cfg.lr=" + DEEP: "train_cfg.lr",
    "train_cfg.lr=" + "9" * 5000: "train_cfg.lr",
    "train_cfg.a\nb=3": "train_cfg.a",
    "5=3": "5: unknown key",
}


@pytest.mark.parametrize("setting", SETTINGS, ids=range(len(SETTINGS)))
def test_a_setting_that_no_json_holds_is_one_line(setting, refuse):
    refuse("train", run_argv(setting), SETTINGS[setting])


def test_settings_given_twice_add_up(refuse):
    refuse("train", [*run_argv("train_cfg.epochs=0"), "--set", "train_cfg.seed=1"], "train_cfg.epochs = 0")


def test_an_option_is_its_whole_name(refuse, whole):
    shutil.copytree(whole.folder, "run")
    refuse("train", run_argv(flags=("--o",)), "unrecognized arguments: --o")


SAMPLING = {
    "-s -1": "--seed",
    "-n 0": "-n",
    "--timesteps 1000000000000": "timesteps",
    "--timesteps 0": "timesteps",
    "1000000 1000000": "1000000",
    "1000000000000 1000000000000": "1000000000000",
    "-n 1000000000 --batch-size 1000000000": "1000000000",
}


@pytest.mark.parametrize(("flags", "word"), SAMPLING.items(), ids=list(SAMPLING))
def test_bad_flags_of_the_sampler_are_one_line_and_nothing_written(flags, word, refuse, whole):
    shutil.copy(whole.folder / "last.pth", ".")
    refuse("test", ["last.pth", *flags.split(), "--device", "cpu"], word)


def test_ctrl_c_while_sampling_is_no_traceback(start, work, whole):
    shutil.copy(whole.folder / "last.pth", ".")
    child = start("test", ["last.pth", "--device", "cpu", "-n", "1000000", "--batch-size", "64"])
    child.wait_for_output("sampling")
    child.send(signal.SIGINT)
    child.end().assert_ended(130, "test.py: stopped by SIGINT")
    assert list(work.iterdir()) == [work / "last.pth"]


def test_resume_of_a_checkpoint_elsewhere_spares_the_run_in_the_folder(refuse, whole):
    for name in ("run", "other"):
        shutil.copytree(whole.folder, name)
    refuse("train", run_argv(flags=("--resume", "other/last.pth")), "other/last.pth", "run")


def test_resume_of_a_checkpoint_elsewhere_in_a_new_folder_takes_the_records_along(work, whole):
    shutil.copytree(whole.folder, "other")
    assert train.main(run_argv(flags=("--resume", "other/last.pth"))) == 0
    assert losses(Path("run")) == losses(whole.folder)
    assert checkpoint.load("run/last.pth")["step"] == 8


# Images and numbers


@pytest.mark.parametrize("locked", ["images", "images/inner", "images/0001.png"])
def test_images_without_permission_are_named(locked, start, tmp_path, work):
    settings = image_folder(tmp_path / "images", 3)
    (tmp_path / "images" / "inner").mkdir()
    (tmp_path / locked).chmod(0)
    outcome = start("train", run_argv(*settings), unprivileged=True).end()
    (tmp_path / locked).chmod(0o755)
    outcome.assert_ended(2, "train.py: ", str(tmp_path / locked), "ermission denied")
    assert not (work / "run").exists()


def test_weights_that_are_not_finite_never_reach_a_checkpoint(work, monkeypatch, capsys):
    step = train.Trainer.train_step

    def overflowing(self, pixels, labels):
        step(self, pixels, labels)
        if self.step == 3:
            self.parameters[0].data.view(-1)[0] = torch.inf

    monkeypatch.setattr(train.Trainer, "train_step", overflowing)
    assert train.main(run_argv()) == 2
    assert "weights at step 3 are not finite" in capsys.readouterr().err.splitlines()[-1]
    for path in Path("run").glob("*.pth"):
        saved = checkpoint.load(path)
        assert saved["step"] < 3
        assert all(weights.isfinite().all() for part in ("model", "ema") for weights in saved[part].values()), path


READING = """
from pathlib import Path

from time_aware_module import TimeAwareUNet


class Net(TimeAwareUNet):
    def __init__(self, **more):
        super().__init__(**more)
        Path("nowhere.txt").read_text()
"""


def test_an_error_of_the_systems_in_ones_own_file_keeps_its_traceback(work, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_reading_net.py").write_text(READING)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt") as error:
        train.main(run_argv("time_aware_net.name=my_reading_net.Net"))
    own = [frame for frame in traceback.extract_tb(error.value.__traceback__) if frame.filename.startswith(str(work))]
    assert [frame.line for frame in own] == ['Path("nowhere.txt").read_text()']
    assert not Path("run").exists()


def test_an_error_of_the_systems_that_the_library_meets_is_one_line(work, capsys, monkeypatch):
    """Though the network is of the user's own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_quiet_net.py").write_text(READING.replace('Path("nowhere.txt").read_text()', "self.path = Path()"))
    nowhere = "train_cfg.model_save_dirpath=/proc/nowhere/run"  # where no one can make a folder
    assert train.main(run_argv("time_aware_net.name=my_quiet_net.Net", nowhere)) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.fullmatch(r"train\.py: \[Errno \d+\] .*'/proc/nowhere.*'", said.splitlines()[-1])


def test_a_name_that_is_no_utf_8_can_be_printed():
    written = io.BytesIO()
    console = _Console(io.TextIOWrapper(written, encoding="utf-8", write_through=True))
    console.write("\udcffä")
    assert written.getvalue().decode() == "\\udcffä"


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", "\\xb1 \\udcff"), ("latin-1", "± \\udcff")])
def test_what_a_stream_has_no_letter_for_can_be_printed(encoding, expected):
    written = io.BytesIO()
    console = _Console(io.TextIOWrapper(written, encoding=encoding, write_through=True))
    console.write("± \udcff")
    assert written.getvalue().decode(encoding) == expected


def test_the_errors_of_every_file_but_the_scripts_are_said_in_one_line():
    named = set(re.findall(r"`(\w+)\.py`", (ROOT / "CONTRIBUTING.md").read_text()))  # others are the user's own
    files = named & {path.stem for path in ROOT.glob("*.py")} - {"train", "test", "convert", "files"}
    assert files | {"evaluation", "training"} == LIBRARY
