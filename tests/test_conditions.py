"""What a data set says of an image besides its class, all the way: into the loss, the bound, the samples and their file."""

import json
import sys

import numpy as np
import pytest
import torch
from runs import assert_same_state, metrics, stop_at

import checkpoint
import dataset
import test as sampling
import train

OWN = """
import torch
from torch import nn

from dataset import ImageDataset


class Tones(ImageDataset):
    # flat images, whose grey follows from the angle a that each is told: 127.5 + 100 cos a, and 20 more in class 1

    def __init__(self, count: int = 96, name: str = "tone"):
        angle = torch.arange(count) * 2.4
        self.labels = torch.arange(count) // 3 % 2
        self.grey = (127.5 + 100 * angle.cos()).round() + 20 * self.labels
        self.conditions = {name: torch.stack([angle.cos(), angle.sin()], 1)}
        super().__init__()

    def __len__(self):
        return len(self.grey)

    def pixels(self, i):
        return torch.full((1, 8, 8), int(self.grey[i]), dtype=torch.uint8)


class Short(Tones):
    def __init__(self, count: int = 96):
        super().__init__(count)
        self.conditions = {"tone": self.conditions["tone"][1:]}


class Listed(Tones):
    def __init__(self, count: int = 96):
        super().__init__(count)
        self.conditions = {"tone": [0.0] * count}


class Learned(Tones):
    def __init__(self, count: int = 96):
        super().__init__(count)
        self.conditions["tone"].requires_grad_()


class Bare(Tones):
    def __init__(self, count: int = 96):
        super().__init__(count)
        self.conditions = self.conditions["tone"]


class Untold(nn.Module):
    # x_0 is the scalar product of what it is told with two weights; where that is hidden, it reads a row that it learns

    def __init__(self, null: object = (0.0, 0.0), name: str = "tone"):
        super().__init__()
        self.weight, self.null = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.tensor(null))
        self.null_condition = {name: self.null}

    def forward(self, xt, t, tone):
        return (tone @ self.weight)[:, None, None, None].expand(xt.shape)


class Bad(Untold):
    def __init__(self):
        super().__init__()
        self.null_condition = 0.5


class Net(nn.Module):
    # x_0 is the scalar product of what it is told with two weights, and the weight of the class

    def __init__(self, n_classes: int | None = None):
        super().__init__()
        self.n_classes = n_classes
        self.weight, self.of_class = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))

    def forward(self, xt, t, tone, label=None):
        x0 = tone @ self.weight + (0 if label is None else self.of_class[label])
        return x0[:, None, None, None].expand(xt.shape)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of a file my_tones.py with what is in OWN, where the scripts are started."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_tones.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(folder)
        yield folder


def arguments(folder, name: str, *settings: str, data: str = "Tones", n_classes: int | None = None) -> list[str]:
    config = {
        "schedule": {"name": "LinearSchedule", "kwargs": {"timesteps": 20, "start": 1e-3, "end": 0.3}},
        "time_aware_net": {"name": "my_tones.Net", "kwargs": {"n_classes": n_classes}},
        "diffusion": {"reverse_variance": "beta", "prediction": "reconstruction", "loss_mode": "simple"},
        "dataset": {"name": f"my_tones.{data}", "train": {}, "valid": {"count": 30}},
        "train_cfg": {
            "epochs": 40,
            "batch_size": 36,
            "lr": 0.05,
            "grad_accum": 2,
            "lr_schedule": "linear",
            "warmup_steps": 0,
            "label_dropout": 0,
            "ema_decay": 0.5,
            "sample_period": 20,
            "sample_timesteps": 3,
            "record_period": 10,
            "precision": "fp32",
            "model_save_dirpath": f"{folder}/{name}",
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    return [str(folder / f"{name}.json"), "--device", "cpu", *(["--set", *settings] if settings else [])]


@pytest.fixture(scope="module", params=[None, 2], ids=["no classes", "classes"])
def run(request, own):
    """A run's folder, and the classes of its network."""
    name, share = f"run{request.param}", ("train_cfg.metric_samples=20", "train_cfg.metric_share=1")
    settings = ['train_cfg.metrics=["bpd"]', "train_cfg.metric_period=40", *share]
    assert train.main(arguments(own, name, *settings, n_classes=request.param)) == 0
    return own / name, request.param


def test_a_condition_reaches_the_loss_of_its_image_and_samples_are_by_those_of_valid_images(run):
    """x_0 is a linear function of what the network is told, so that only a wrong row leaves a loss."""
    folder, n_classes = run
    unknown = 0 if n_classes else (20 / 127.5) ** 2 / 2  # what a class adds, in half of the images
    assert metrics(folder)[-1]["valid_loss"] == pytest.approx(unknown, abs=5e-4)
    flags = ["-n", "50", "--batch-size", "16", "--timesteps", "4", "--device", "cpu", "--npz"]
    assert sampling.main([str(folder), *flags]) == 0
    valid = sys.modules["my_tones"].Tones(30)
    asked = [i * 30 // 50 for i in range(50)]
    with np.load(folder / "last_gen" / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["condition_tone"], valid.conditions["tone"][asked])
        assert ("labels" in arrays) == (n_classes is not None)
        if n_classes:
            np.testing.assert_array_equal(arrays["labels"], valid.labels[asked])
        samples = arrays["samples"]
    expected = (valid.grey[asked] / 127.5 - 1).numpy()[:, None, None, None]
    np.testing.assert_allclose(samples, np.broadcast_to(expected, samples.shape), atol=0.03 if n_classes else 0.18)
    assert checkpoint.load(folder)["conditions"] == ["tone"]


def test_the_bound_is_given_the_condition_and_a_report_is_made(run, capsys):
    folder, n_classes = run
    flags = ["-n", "12", "--timesteps", "4", "--device", "cpu", "--bpd-images", "20", "--bpd-timesteps", "5"]
    assert sampling.main([str(folder), *flags, "--metrics", "bpd", "--report", "--fit-variance", "20"]) == 0
    given = "class, tone" if n_classes else "tone"
    assert f"on 20 valid images, given their {given} (" in capsys.readouterr().out
    found = json.loads((folder / "last_gen" / "metrics.json").read_text())["bpd"]
    assert found["given"] == given
    assert found["total"] < (2 if n_classes else 10)  # by another image's condition, above 16
    page = (folder / "last_gen" / "report.html").read_text()
    assert f", given their {given}" in page
    assert f"an image whose {given} is given costs at most" in page
    assert metrics(folder)[-1]["metrics"]["bpd"]["given"] == given


def test_what_such_a_network_is_not_for_is_one_line(run, capsys):
    folder, n_classes = run
    wrong = [(["--class", "0"], "this network is told tone"), (["--from", "a.png"], "this network is told tone")]
    if n_classes:
        wrong.append((["--metrics", "accuracy"], "this network is told more of an image than its class"))
    for flags, words in wrong:
        assert sampling.main([str(folder), "-n", "2", "--device", "cpu", *flags]) == 2
        assert words in capsys.readouterr().err


def test_a_run_with_conditions_stopped_and_resumed_is_the_run_never_stopped(run, own, monkeypatch):
    folder, n_classes = run
    argv = arguments(own, f"stopped{n_classes}", n_classes=n_classes)
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 50)
        assert train.main(argv) == 143
    assert train.main([*argv, "--resume"]) == 0
    first, second = (checkpoint.load(each) for each in (folder, own / f"stopped{n_classes}"))
    for part in ("model", "ema", "optimizer"):
        assert_same_state(first[part], second[part])


def test_a_model_belongs_to_what_it_was_told(run, own, capsys):
    folder, n_classes = run
    renamed = ["dataset.train.name=hue", "dataset.valid.name=hue"]
    flags = ["-n", "2", "--timesteps", "2", "--device", "cpu"]
    assert sampling.main([str(folder), *flags, "--set", *renamed]) == 2
    assert "dataset.valid: has the conditions ['hue'], and the network was told ['tone']" in capsys.readouterr().err
    state = checkpoint.load(folder)
    other = own / f"other{n_classes}"
    other.mkdir()
    checkpoint.save(other / "last.pth", {**state, "conditions": ["hue"]})
    assert sampling.main([str(folder), *flags, "--guidance", "2", "--guide", str(other / "last.pth")]) == 2
    assert "shape or kind of data, classes or conditions than what it is to guide" in capsys.readouterr().err
    assert train.main([*arguments(own, other.name, n_classes=n_classes), "--resume"]) == 2
    assert "the data are not the run's: conditions ['hue'] then, ['tone'] now" in capsys.readouterr().err


def test_guidance_goes_on_past_what_a_network_can_do_without(own):
    """Told, x_0_hat is the best linear function g; where that is hidden, the mean m of all; guided, m + weight (g - m)."""
    net = 'time_aware_net={"name": "my_tones.Untold", "kwargs": {}}'
    assert train.main(arguments(own, "untold", net, "train_cfg.label_dropout=0.5", "train_cfg.epochs=80")) == 0
    train_data, valid = (sys.modules["my_tones"].Tones(count) for count in (96, 30))
    x0 = train_data.grey / 127.5 - 1
    mean, best = x0.mean(), torch.linalg.lstsq(train_data.conditions["tone"], x0[:, None]).solution
    told = (valid.conditions["tone"] @ best)[:, 0]
    flags = ["-n", "30", "--timesteps", "3", "--device", "cpu", "--npz", "--no-clip"]
    for weight in (0, 1, 2):
        assert sampling.main([str(own / "untold"), *flags, "--guidance", str(weight)]) == 0
        with np.load(own / "untold" / "last_gen" / "samples.npz") as arrays:
            samples = torch.tensor(arrays["samples"])
        expected = mean + weight * (told - mean)
        torch.testing.assert_close(samples, expected[:, None, None, None].expand(30, 1, 8, 8), rtol=0, atol=0.05 * (1 + weight))
    assert expected.abs().max() > 1.4


def test_what_a_network_reads_as_untold_must_fit_its_condition(own, capsys):
    net = ['time_aware_net={"name": "my_tones.Untold", "kwargs": {}}', "train_cfg.label_dropout=0.1"]
    for null, words in (
        ([0.0, 0.0, 0.0], "numbers, or tensors like a row: The size"),
        ([[0.0, 0.0]] * 2, "makes torch.float32 [2, 2] of torch.float32 [1, 2]"),
    ):
        argv = arguments(own, "wrong", *net, f"time_aware_net.kwargs.null={json.dumps(null)}")
        assert train.main(argv) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert train.main(arguments(own, "wrong", 'time_aware_net={"name": "my_tones.Bad", "kwargs": {}}')) == 2
    assert "its null_condition is a float: must be a dictionary by name" in capsys.readouterr().err
    assert train.main(arguments(own, "wrong", *net, "time_aware_net.kwargs.name=hue")) == 2
    assert "its null_condition names hue, and dataset.train gives no such condition" in capsys.readouterr().err


def test_data_say_what_their_images_are_told(own, capsys):
    assert dataset.main([arguments(own, "looked")[0], "--output", str(own / "looked.png")]) == 0
    assert "condition tone: [96, 2]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (
            "Tones",
            ["dataset.train.name=hue", "dataset.valid.name=hue"],
            "its forward takes no hue, a condition of",
        ),
        ("Tones", ["dataset.valid.name=hue"], "dataset.valid: has the conditions ['hue'], and dataset.train ['tone']"),
        ("Tones", ["dataset.train.name=label", "dataset.valid.name=label"], "conditions['label'] is [96, 2]: must be"),
        ("Short", [], "conditions['tone'] is [95, 2]: must be a tensor of 96 rows"),
        ("Listed", [], "conditions['tone'] is a list: must be a tensor of 96 rows"),
        ("Learned", [], "conditions['tone'] is [96, 2]: must be a tensor of 96 rows without gradient"),
        ("Bare", [], "dataset.train: conditions must be a dictionary of tensors by name"),
        ("Tones", ["dataset.train.name=t", "dataset.valid.name=t"], "its forward takes no t, a condition of dataset.train"),
    ],
)
def test_conditions_that_do_not_fit_are_named_before_anything_is_written(data, settings, words, own, capsys):
    assert train.main(arguments(own, "wrong", *settings, data=data)) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (own / "wrong").exists()
