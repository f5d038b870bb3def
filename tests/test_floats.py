"""Data that are no images: floats of any shape and range, all the way from a NumPy file to samples and their bound."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from runs import assert_same_state, metrics, stop_at
from torch.distributions import Normal

import checkpoint
import convert
import dataset
import test as sampling
import train
from beta_schedule import CosineSchedule
from config import load_config
from mistakes import Mistake

SCALE = 2.0  # standard deviation of the Gaussian rows
NETS = f"""
import torch
from torch import nn

from beta_schedule import CosineSchedule


class Best(nn.Module):
    # the best x_0_hat of N(0, {SCALE}^2 I), by a factor that stays 1

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.register_buffer("alpha_bar", CosineSchedule(100).alpha_bar.float(), persistent=False)

    def forward(self, xt, t):
        a = self.alpha_bar[t - 1].view(-1, *[1] * (xt.ndim - 1))
        return self.factor * a.sqrt() * {SCALE**2} / (a * {SCALE**2} + 1 - a) * xt


class Spread:
    # a metric: the standard deviation of the samples

    uses_model = False

    def __init__(self, evaluation):
        self.evaluation = evaluation

    def measure(self):
        return dict(spread=self.evaluation.samples.std().item())

    def describe(self, found):
        return str(found)


class Free(nn.Module):
    # takes floats of any shape, and what it is told

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, xt, t, told=None):
        return self.weight * xt + (0 if told is None else told.view(-1, *[1] * (xt.ndim - 1)))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The current folder, with the networks of NETS and two files: x.npy of a Gaussian, and signals.npy, of shape [2, 7]."""
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    np.save("x.npy", SCALE * draws.standard_normal((3000, 3)))
    np.save("signals.npy", draws.standard_normal((60, 2, 7)))
    yield tmp_path
    sys.modules.pop("my_nets", None)


def arguments(net: str, file: str, *more: str, **kwargs) -> list[str]:
    section = {"name": "NumpyArray", "train": {"file": file, "train": True}, "valid": {"file": file, "train": False}}
    config = {
        "schedule": {"name": "CosineSchedule", "kwargs": {"timesteps": 100}},
        "time_aware_net": {"name": net, "kwargs": kwargs} if kwargs else {"name": f"my_nets.{net}"},
        "diffusion": {"prediction": "reconstruction"},
        "dataset": section,
        "train_cfg": {"epochs": 1, "batch_size": 30, "lr": 1e-12, "max_steps": 2, "model_save_dirpath": "run"},
    }
    with open("config.json", "w") as out:
        json.dump(config, out)
    return ["config.json", "--device", "cpu", "--set", "train_cfg.precision=fp32", *more]


def test_rows_of_a_gaussian_have_its_spread_and_their_bound_is_their_density(own, capsys):
    """By the best network and its fitted variance the chain back is exact, so that the bound of each row is its -log p."""
    measured = ["train_cfg.metric_period=1", 'train_cfg.metrics=["my_nets.Spread"]', "train_cfg.metric_share=1"]
    assert train.main(arguments("Best", "x.npy", *measured)) == 0
    found = metrics(own / "run")[-1]["metrics"]["my_nets.Spread"]["spread"]  # of 500 samples of three
    assert found == pytest.approx(SCALE, abs=0.2)
    flags = ["-n", "4000", "--batch-size", "4000", "--pictures", "3", "--fit-variance", "300", "--metrics", "bpd"]
    assert sampling.main(["run", *flags, "--device", "cpu"]) == 0
    with np.load("run/last_gen/samples.npz") as arrays:
        samples = torch.tensor(arrays["samples"])
        assert arrays["states"].shape == (3, 11, 3)
    assert samples.shape == (4000, 3)
    errors = {"atol": 3 * SCALE / 8000**0.5, "rtol": 0}  # three standard ones
    torch.testing.assert_close(samples.std(0), torch.full((3,), SCALE), **errors)  # clipped, it would be 1 at most
    rows = torch.tensor(np.load("x.npy")[::10])
    nats = -Normal(0, SCALE).log_prob(rows).mean().item()
    found = json.loads((own / "run/last_gen/metrics.json").read_text())["bpd"]
    assert found["density"] is True
    assert found["total"] == pytest.approx(nats / np.log(2), abs=3 * found["standard_error"])
    assert found["standard_error"] < 0.1  # where the bound of 8-bit levels would be 7 more
    assert "300 valid rows, of their density" in capsys.readouterr().out


def test_a_unet_of_signals_learns_how_their_values_belong_together(own):
    """Of a smooth Gaussian process the least loss is known: that of Wiener's filter, in the eigenvectors of its covariance."""
    at = np.arange(16)
    covariance = np.exp(-0.5 * ((at[:, None] - at) / 3) ** 2)
    np.save("x.npy", np.random.default_rng(0).multivariate_normal(np.zeros(16), covariance, 4000)[:, None])
    unet = {"n_channels": 1, "base_channels": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "dims": 1}
    how = ("epochs=9", "max_steps=300", "batch_size=64", "lr=2e-3", "lr_schedule=linear", "warmup_steps=20", "ema_decay=0.98")
    assert train.main(arguments("TimeAwareUNet", "x.npy", *(f"train_cfg.{each}" for each in how), **unet)) == 0
    alpha_bar, variances = CosineSchedule(100).alpha_bar.numpy()[:, None], np.linalg.eigvalsh(covariance)
    best = (variances * (1 - alpha_bar) / (alpha_bar * variances + 1 - alpha_bar)).mean()
    assert metrics(own / "run")[-1]["valid_loss"] == pytest.approx(best, rel=0.06)
    assert best < 0.7 * (1 - alpha_bar).mean()  # the least loss of a network that knows nothing of the neighbours


def test_a_unet_of_volumes_is_trained_and_sampled(own):
    np.save("x.npy", np.random.default_rng(0).standard_normal((60, 1, 4, 6, 2)))
    unet = {"n_channels": 1, "base_channels": 4, "ch_mult": [1, 1], "num_res_blocks": 1, "dims": 3}
    assert train.main(arguments("TimeAwareUNet", "x.npy", **unet)) == 0
    assert sampling.main(["run", "-n", "3", "--timesteps", "2", "--device", "cpu"]) == 0
    with np.load("run/last_gen/samples.npz") as arrays:
        assert arrays["samples"].shape == (3, 1, 4, 6, 2)
    np.save("x.npy", np.zeros((60, 1, 4, 5, 2)))
    assert train.main([*arguments("TimeAwareUNet", "x.npy", **unet), "--overwrite"]) == 2


def test_what_is_no_image_has_no_picture_and_goes_on_as_if_never_stopped(own, monkeypatch):
    argv = arguments("Free", "signals.npy", "train_cfg.lr=0.01", "train_cfg.max_steps=4", "train_cfg.epochs=2")
    assert train.main(argv) == 0
    whole = checkpoint.load("run")
    assert (whole["shape"], whole["is_float"]) == ([2, 7], True)
    assert whole["model"]["time_aware_net.weight"] != 0
    assert not [path for path in (own / "run").iterdir() if path.suffix == ".png"]
    argv = [*argv, "train_cfg.model_save_dirpath=stopped"]
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 3)
        assert train.main(argv) == 143
    (own / "signals.npy").rename(own / "moved.npy")
    moved = ["dataset.train.file=moved.npy", "dataset.valid.file=moved.npy"]
    assert train.main([*argv, *moved, "--resume"]) == 0
    for part in ("model", "ema", "optimizer"):
        assert_same_state(whole[part], checkpoint.load("stopped")[part])
    assert [line["valid_loss"] for line in metrics(own / "run")] == [line["valid_loss"] for line in metrics(own / "stopped")]
    assert sampling.main(["run", "-n", "5", "--timesteps", "3", "--device", "cpu"]) == 0
    assert [path.name for path in (own / "run/last_gen").iterdir()] == ["samples.npz"]


def test_floats_in_the_shape_of_images_have_pictures(own):
    np.save("x.npy", np.random.default_rng(0).standard_normal((40, 5, 8, 6)))
    assert train.main(arguments("Free", "x.npy", "train_cfg.max_steps=1")) == 0
    assert sampling.main(["run", "-n", "4", "--timesteps", "3", "--device", "cpu"]) == 0
    assert (own / "run/epoch_1.png").exists()
    assert {path.name for path in (own / "run/last_gen").iterdir()} > {"grid.png", "3.png", "trajectory.gif"}


def test_floats_are_floats_in_diffusers_and_back(own):
    diffusers = pytest.importorskip("diffusers")
    np.save("x.npy", np.random.default_rng(0).standard_normal((40, 2, 8, 8)))
    unet = {"n_channels": 2, "base_channels": 8, "ch_mult": [1, 1], "num_res_blocks": 1}
    assert train.main(arguments("TimeAwareUNet", "x.npy", "train_cfg.sample_period=0", **unet)) == 0
    convert.to_diffusers("run/last.pth", "theirs")
    assert diffusers.DDPMPipeline.from_pretrained("theirs").scheduler.config.clip_sample is False
    convert.from_diffusers("theirs", "back.pth")
    assert checkpoint.load("back.pth")["is_float"] is True


def test_floats_within_bounds_are_not_for_diffusers(own, tmp_path):
    """Which would clip x_0_hat of images alone."""
    pytest.importorskip("diffusers")
    np.save("x.npy", np.random.default_rng(0).uniform(-1, 1, (40, 2, 8, 8)))
    unet = {"n_channels": 2, "base_channels": 8, "ch_mult": [1, 1], "num_res_blocks": 1}
    how = ("train_cfg.sample_period=0", "diffusion.bounded=true")
    assert train.main(arguments("TimeAwareUNet", "x.npy", *how, **unet)) == 0
    with pytest.raises(Mistake, match=r"^diffusion\.bounded = true: of floats"):
        convert.to_diffusers("run/last.pth", "theirs")


def test_images_as_an_array_are_images(own):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    np.save("x.npy", pixels)
    assert train.main(arguments("Free", "x.npy", "train_cfg.max_steps=1")) == 0
    state = checkpoint.load("run")
    assert (state["shape"], state["is_float"]) == ([1, 8, 8], False)
    images = dataset.NumpyArray("x.npy")
    assert torch.equal(images[7], torch.tensor(pixels[7]).float() / 127.5 - 1)
    assert sampling.main(["run", "-n", "5", "--timesteps", "3", "--device", "cpu", "--npz"]) == 0
    with np.load("run/last_gen/samples.npz") as arrays:
        assert np.abs(arrays["samples"]).max() <= 1


def test_an_array_gives_its_rows_labels_and_conditions(own):
    x, told = np.load("x.npy"), np.random.default_rng(1).standard_normal(3000)
    np.save("x.npy", x.astype(">f8"))  # of another machine
    np.save("y.npy", (np.arange(3000) % 4).astype(">u8"))
    np.save("told.npy", told)
    for train_split, rows in ((True, np.arange(3000) % 10 != 0), (False, np.arange(3000) % 10 == 0), (None, slice(None))):
        rows_of = dataset.NumpyArray("x.npy", "y.npy", {"told": "told.npy"}, train_split)
        assert torch.equal(torch.stack([rows_of[i] for i in range(len(rows_of))]), torch.tensor(x[rows], dtype=torch.float32))
        assert torch.equal(rows_of.labels, torch.arange(3000)[rows] % 4)
        assert rows_of.class_names == ["0", "1", "2", "3"]
        assert torch.equal(rows_of.conditions["told"], torch.tensor(told[rows], dtype=torch.float32))
    np.save("told.npy", np.arange(3000) % 2 == 0)
    assert dataset.NumpyArray("x.npy", conditions={"told": "told.npy"}).conditions["told"][:4].tolist() == [1, 0, 1, 0]
    pickled = pickle.dumps(dataset.NumpyArray("x.npy"))
    assert len(pickled) < x.nbytes  # the rows stay in the file
    assert torch.equal(pickle.loads(pickled)[5], torch.tensor(x[5], dtype=torch.float32))


def test_conditions_and_labels_of_files_reach_the_samples(own):
    np.save("told.npy", np.arange(60.0))
    more = [f'dataset.{split}.conditions={{"told": "told.npy"}}' for split in ("train", "valid")]
    assert train.main(arguments("Free", "signals.npy", *more)) == 0
    assert sampling.main(["run", "-n", "6", "--timesteps", "1", "--device", "cpu"]) == 0
    with np.load("run/last_gen/samples.npz") as arrays:
        assert arrays["condition_told"].tolist() == [0, 10, 20, 30, 40, 50]
        means = arrays["samples"].mean((1, 2))  # which one step makes of what it is told
        assert means.round().tolist() == [0, 10, 20, 30, 40, 50]


def test_labels_and_conditions_may_move_while_a_run_is_stopped_but_not_change(own, capsys):
    np.save("told.npy", np.arange(60.0))
    np.save("y.npy", np.arange(60) % 3)
    more = [f'dataset.{split}.conditions={{"told": "told.npy"}}' for split in ("train", "valid")]
    more += [f"dataset.{split}.labels=y.npy" for split in ("train", "valid")]
    assert train.main(arguments("Free", "signals.npy", *more)) == 0
    (own / "there").mkdir()
    for name in ("told.npy", "y.npy", "signals.npy"):
        (own / name).rename(own / "there" / name)
    moved = [each.replace("y.npy", "there/y.npy").replace("told.npy", "there/told.npy") for each in more]
    longer = ["train_cfg.max_steps=3", "train_cfg.epochs=2"]
    assert train.main([*arguments("Free", "there/signals.npy", *moved, *longer), "--resume"]) == 0
    renamed = [each.replace('"told"', '"hue"') for each in moved]
    assert train.main([*arguments("Free", "there/signals.npy", *renamed, *longer), "--resume"]) == 2
    assert "its forward takes no hue" in capsys.readouterr().err


def test_a_file_to_validate_on_may_lack_the_last_class(own, capsys):
    rows, label = np.load("x.npy"), np.arange(3000) % 3
    for name, of in (("train", slice(0, 2000)), ("valid", label < 2)):
        np.save(f"{name}.npy", rows[of])
        np.save(f"{name}_labels.npy", label[of])
    where = [f"dataset.{split}.{key}" for split in ("train", "valid") for key in ("file", "labels", "train")]
    given = ["train.npy", "train_labels.npy", "null", "valid.npy", "valid_labels.npy", "null"]
    net = {"n_features": 3, "hidden": 8, "n_classes": 3}
    more = [f"{key}={value}" for key, value in zip(where, given, strict=True)]
    assert train.main(arguments("TimeAwareMLP", "x.npy", *more, **net)) == 0
    flags = ["run", "-n", "3", "--timesteps", "2", "--device", "cpu", "--metrics", "bpd", "--bpd-images", "20"]
    assert sampling.main([*flags, "--bpd-timesteps", "4"]) == 0
    capsys.readouterr()
    assert sampling.main([*flags, "--set", "dataset.valid.labels=null"]) == 2
    assert "dataset.valid: has no labels, and the network learned 3 classes" in capsys.readouterr().err
    np.save("train_labels.npy", np.minimum(label[:2000], 1))
    assert train.main([*arguments("TimeAwareMLP", "x.npy", *more, **net), "--overwrite"]) == 2
    assert "n_classes = 3: dataset.train has 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('dataset.train.conditions={"told": "gap.npy"}', "dataset.train: conditions['told'] is not finite in row 8"),
        ("dataset.train.conditions=3", "dataset.train.conditions = 3: must be an object, each value a string or null"),
        ("diffusion.bounded=true", "diffusion.bounded = true: x_0 must lie in [-1, 1], and dataset.train holds -"),
        ('diffusion={"name": "DiscreteDiffusion", "n_levels": 4}', "is of floats, and symbols are made of images"),
        ("dataset.train.file=none.npy", "dataset.train.file = 'none.npy': No such file or directory"),
        ("dataset.train.file=config.json", "dataset.train.file = 'config.json': must be a file of one array of numbers"),
        ("dataset.train.file=two.npz", "dataset.train.file = 'two.npz': must be a file of one array of numbers [N, ...]"),
        ("dataset.train.file=whole.npy", "holds int64 [60, 2]: must hold floats [N, ...], or images, uint8 [N, C, H, W]"),
        ("dataset.train.file=flat.npy", "holds float64 [60]: must hold floats [N, ...]"),
        ("dataset.train.file=bytes.npy", "its items have the shape [8, 8]: must be images, [C, H, W], or floats"),
        ("dataset.train.file=nan.npy", "dataset.train: not all of its floats are finite"),
        ("dataset.train.file=one_nan.npy", "row 2778 of one_nan.npy: is not finite"),
        ("dataset.train.file=none_each.npy", "holds float64 [60, 0]: must hold floats"),
        ("dataset.valid.file=bytes4.npy", "dataset.valid: holds images, and dataset.train rows"),
        ("dataset.train.labels=texts.npy", "labels = 'texts.npy': holds <U1 [60]: must hold numbers [60, ...], one for each"),
        ("dataset.train.labels=below.npy", "'below.npy': holds [60] from -1 to 58: must hold whole numbers [N] from 0"),
        ("dataset.train.labels=far.npy", "holds [60] from 0 to 5.9e+12: must hold whole numbers [N] from 0 to 1048575"),
        ("dataset.train.conditions.told=3", "dataset.train.conditions.told = 3: must be a file of one array"),
        ("dataset.train.labels=flat.npy", "labels = 'flat.npy': holds [60] from -2"),
        ('dataset.train.conditions={"told": "x.npy"}', "told = 'x.npy': holds float64 [3000, 3]: must hold numbers [60, ...]"),
        ("dataset.train.pipeline=[]", "dataset.train.pipeline: unknown key"),
        ("train_cfg.metric_period=1", "train_cfg.metrics fd: its features are of images, and these data are floats"),
    ],
)
def test_what_floats_cannot_be_is_one_line_before_anything_is_written(setting, words, own, capsys):
    draws = np.random.default_rng(0)
    np.save("flat.npy", draws.standard_normal(60))
    np.save("whole.npy", np.zeros((60, 2), int))
    np.save("gap.npy", np.where(np.arange(60) == 9, np.nan, 1.0))
    np.save("bytes.npy", np.zeros((60, 8, 8), np.uint8))
    np.save("nan.npy", np.full((60, 2, 7), np.nan))
    np.savez("two.npz", a=np.zeros(2), b=np.zeros(2))
    one_nan = draws.standard_normal((3000, 2, 7))
    one_nan[2778, 1, 3] = np.nan
    np.save("one_nan.npy", one_nan)
    np.save("none_each.npy", np.zeros((60, 0)))
    np.save("bytes4.npy", np.zeros((60, 1, 2, 7), np.uint8))
    np.save("texts.npy", np.array(["a"] * 60))
    np.save("below.npy", np.arange(60) - 1)
    np.save("far.npy", np.arange(60) * 10**11)
    assert train.main(arguments("Free", "signals.npy", setting)) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (own / "run").exists()


def test_a_network_of_vectors_takes_no_others_and_no_clusters(own, capsys):
    of_four = {"n_features": 4, "n_classes": 5}
    assert train.main(arguments("TimeAwareMLP", "x.npy", "dataset.clusters=5", **of_four)) == 2
    assert "dataset.clusters = 5: clusters are of images, and these data are floats" in capsys.readouterr().err
    np.save("y.npy", np.arange(3000) % 5)
    labels = [f"dataset.{split}.labels=y.npy" for split in ("train", "valid")]
    assert train.main(arguments("TimeAwareMLP", "x.npy", *labels, **of_four)) == 2
    assert "vectors of shape [1, 3]: this network takes [B, 4]" in capsys.readouterr().err
    assert not (own / "run").exists()


def test_floats_far_from_unit_scale_are_told(own, caplog):
    np.save("x.npy", 50 * np.load("x.npy"))
    assert train.main(arguments("Free", "x.npy", "train_cfg.max_steps=1")) == 0
    said = [line for line in caplog.messages if line.startswith("dataset.train: its floats, ")]
    assert len(said) == 1
    assert "have a root mean square of" in said[0]


def test_rows_to_validate_on_that_training_sees_are_told(own, caplog):
    assert train.main(arguments("Free", "x.npy", "train_cfg.max_steps=1", "dataset.train.train=null")) == 0
    assert "dataset.valid: 300 of its 300 images are in dataset.train, so that training sees them" in caplog.messages


def test_a_model_of_floats_and_one_of_images_are_kept_apart(own, capsys):
    draws, flags = np.random.default_rng(0), ["-n", "2", "--timesteps", "2", "--device", "cpu"]
    np.save("floats.npy", draws.standard_normal((40, 1, 8, 8)))
    np.save("bytes.npy", draws.integers(0, 256, (40, 1, 8, 8), np.uint8))
    for name in ("floats", "bytes"):
        assert train.main(arguments("Free", f"{name}.npy", f"train_cfg.model_save_dirpath={name}")) == 0
    assert sampling.main(["floats", *flags, "--metrics", "bpd", "--set", "dataset.valid.file=bytes.npy"]) == 2
    assert "dataset.valid: holds images, which are other data than those of the network" in capsys.readouterr().err
    assert sampling.main(["floats", *flags, "--guidance", "2", "--guide", "bytes/last.pth"]) == 2
    assert "is of another prediction, schedule, shape or kind of data" in capsys.readouterr().err


def test_what_a_model_of_floats_is_not_for_is_one_line(own, capsys):
    assert train.main(arguments("Free", "signals.npy")) == 0
    for flags, words in {
        ("--report",): "--report: this checkpoint is of floats, and this is only for images",
        ("--from", "a.png"): "--from: this checkpoint is of floats, and this is only for images",
        ("8", "8"): "H W = 8 8: the samples, [2, 7], are no images",
        ("--metrics", "fd"): "--metrics fd: its features are of images, and these data are floats",
    }.items():
        assert sampling.main(["run", *flags, "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err
    np.save("signals.npy", np.zeros((60, 2, 7), np.float32))
    assert dataset.main(["config.json"]) == 0
    assert "54 rows [2, 7]" in capsys.readouterr().out
    assert not (own / "models").exists()


def test_a_run_of_floats_does_not_go_on_with_images(own, capsys):
    np.save("x.npy", np.random.default_rng(0).standard_normal((40, 1, 8, 8)))
    assert train.main(arguments("Free", "x.npy")) == 0
    np.save("x.npy", np.zeros((40, 1, 8, 8), np.uint8))
    assert train.main([*arguments("Free", "x.npy"), "--resume"]) == 2
    assert "the data are not the run's: is_float True then, False now" in capsys.readouterr().err
    assert load_config("config.json")["dataset"]["train"]["conditions"] is None
