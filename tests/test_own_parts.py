"""Parts of one's own in a run, from a config: optimizers, rates, data, losses; what is wrong with them is said first."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_state, metrics, tiny
from torch import nn

import checkpoint
import samplers
import test as sampling
import train
from training.optimizers import step_unless

QUIET, AT_ONCE = "train_cfg.sample_period=0", "train_cfg.warmup_steps=0"
OWN = """
from functools import partial

import numpy
import torch

import samplers
from dataset import Digits, ImageDataset
from gaussian_diffusion import GaussianDiffusion


class Momentum(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr, momentum=0.9)


class Counting(torch.optim.SGD):
    # keeps in its group how many steps there were, by which it divides its rate

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["k"] = 0

    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / group["k"])


class Decoupled(torch.optim.AdamW):
    def __init__(self, params, lr):
        super().__init__(params, lr, weight_decay=0.1, fused=True)


def halves(done):
    return numpy.exp2(-4 * done)


noisy = partial(samplers.ddim, eta=1.0)


def beyond(predict_x0, x, levels, normal):
    for level in levels[1:]:
        x = predict_x0(x, level.t)
        yield x


def too_few(predict_x0, x, levels, normal):
    yield predict_x0(x, levels[0].t)[:, :, 1:]


class Mean(GaussianDiffusion):
    def _loss(self, mode, x0, t, noise, condition):
        return super()._loss(mode, x0, t, noise, condition).mean()


class Pixels(GaussianDiffusion):
    def _loss(self, mode, x0, t, noise, condition):
        return self._residual(x0, t, noise, condition).abs()


class Huber(GaussianDiffusion):
    def _loss(self, mode, x0, t, noise, condition):
        residual = self._residual(x0, t, noise, condition)
        return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="none").flatten(1).mean(1)


class Larger(Digits):
    def __getitem__(self, i):
        return super().__getitem__(i), self.labels[i]

    def to_float(self, pixels):
        return 3 * super().to_float(pixels)


class Shorter(Digits):
    def to_float(self, pixels):
        return super().to_float(pixels)[:, :, 1:]


class Missing(Digits):
    def to_float(self, pixels):
        return super().to_float(pixels) * torch.nan


class Arrays(ImageDataset):
    def __len__(self):
        return 4

    def pixels(self, i):
        return numpy.zeros((1, 8, 8), numpy.uint8)


class Nothing(torch.nn.Module):
    def forward(self, xt, t):
        return xt


class Sets:
    uses_model = False

    def __init__(self, evaluation):
        pass

    def measure(self):
        return {"levels": {1, 2}}

    def describe(self, found):
        return ""
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of a file my_parts.py with what is in OWN, where the scripts are started."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_parts.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("my_parts", None)


def weights_of(folder, name="ema"):
    return checkpoint.load(folder / "last.pth")[name]


# Optimizers and learning rates


@pytest.mark.parametrize("name", ["Momentum", "Counting", "Decoupled"])
def test_a_run_with_an_optimizer_of_ones_own_goes_on_as_if_never_stopped(name, own):
    settings = (f"train_cfg.optimizer=my_parts.{name}", QUIET)
    assert train.main(tiny(own / "whole", *settings)) == 0
    assert train.main(tiny(own / "a", *settings, "train_cfg.max_steps=3")) == 0
    assert train.main(tiny(own / "a", *settings, flags=("--resume",))) == 0
    a, whole = (checkpoint.load(own / name / "last.pth") for name in ("a", "whole"))
    for part in ("model", "ema", "optimizer"):
        assert_same_state(a[part], whole[part], part)
    assert a["optimizer"]["state"] or a["optimizer"]["param_groups"][0]["k"] == 8


def test_the_weights_move_as_the_optimizer_of_ones_own_says(own):
    """One step of SGD with momentum is lr times the gradient, whose norm is cut at grad_clip."""
    settings = (
        "train_cfg.max_steps=1",
        "train_cfg.lr=0.5",
        AT_ONCE,
        "train_cfg.grad_clip=0.01",
        QUIET,
    )
    (
        config,
        *_,
    ) = tiny(own / "a")
    start = train.Trainer(train.load_config(config, tiny(own / "a", *settings)[4:]), "cpu")
    start.folder.close()
    before = {name: p.clone() for name, p in start.model.named_parameters()}
    assert train.main(tiny(own / "a", "train_cfg.optimizer=my_parts.Momentum", *settings)) == 0
    moved = [weights_of(own / "a", "model")[name] - p for name, p in before.items()]
    assert torch.cat([each.flatten() for each in moved]).norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_the_learning_rate_falls_as_ones_own_function_says(own):
    settings = (
        "train_cfg.lr_schedule=my_parts.halves",
        "train_cfg.lr=1e-3",
        AT_ONCE,
        "train_cfg.record_period=1",
    )
    assert train.main(tiny(own / "a", QUIET, *settings)) == 0
    found = [line["lr"] for line in metrics(own / "a")]
    np.testing.assert_allclose(found, [1e-3 * 0.5 ** (4 * step / 8) for step in range(1, 9)], rtol=1e-6)


@pytest.mark.parametrize("how", [{"fused": True}, {"fused": False}, {"foreach": True}])
def test_a_step_whose_gradient_is_no_number_changes_nothing(how):
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1, **how)
    for bad, number in ((0.0, 1.0), (1.0, torch.nan)):
        before = p.detach().clone()
        p.grad = torch.full((3,), number)
        step_unless(torch.tensor(bad), optimizer)
        assert torch.equal(p, before) == bool(bad)
    assert all(value.isfinite().all() for value in optimizer.state[p].values())


# Weights to start with


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run that others start from."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert train.main(tiny(folder, QUIET)) == 0
    return folder


def trainer(folder, *settings):
    config, _, _, _, *defaults = tiny(folder, *settings)
    run = train.Trainer(train.load_config(config, defaults), "cpu")
    run.folder.close()
    return run


def test_a_run_starts_with_the_averaged_weights_of_another(first, tmp_path, caplog):
    train.log.propagate = True
    run = trainer(tmp_path / "a", f"train_cfg.init={first}", "diffusion.loss_mode=min_snr")  # of a folder, its last.pth
    averaged = {name: p for name, p in weights_of(first).items() if name.startswith("time_aware_net.")}
    for model in (run.model, run.ema):
        found = model.state_dict()
        assert_same_state({name: found[name] for name in averaged}, averaged)
    assert not caplog.records or "new are" not in caplog.text


def test_what_does_not_fit_is_new_and_named(first, tmp_path, caplog):
    """With classes, a network has rows for its labels besides."""
    train.log.propagate = True
    init = f"train_cfg.init={first / 'last.pth'}"
    run = trainer(tmp_path / "a", init, "time_aware_net.kwargs.n_classes=10", "diffusion.prediction=velocity")
    assert "; new are 1 of " in caplog.text
    assert "label.weight" in caplog.text
    assert "diffusion.prediction = 'denoising' there" in caplog.text
    averaged, found = weights_of(first), run.model.state_dict()
    assert (
        len([name for name in averaged if name.startswith("time_aware_net.") and torch.equal(found[name], averaged[name])]) > 20
    )
    net = 'time_aware_net={"name": "TimeAwareMLP", "kwargs": {"n_features": 3}}'
    with pytest.raises(ValueError, match=r"none of its weights has the name"):
        trainer(tmp_path / "b", init, net)


def test_a_run_of_numbers_may_start_from_one_of_symbols_and_is_warned(first, tmp_path, caplog):
    """Their networks differ in the first and the last layer only."""
    train.log.propagate = True
    symbols = (
        'diffusion={"name": "DiscreteDiffusion", "n_levels": 2, "transition": "binomial"}',
        "time_aware_net.kwargs.n_levels=2",
    )
    assert train.main(tiny(tmp_path / "symbols", *symbols, QUIET, "train_cfg.max_steps=1")) == 0
    trainer(tmp_path / "a", f"train_cfg.init={tmp_path / 'symbols'}")
    assert "its network predicts something else: diffusion.prediction = None there" in caplog.text


def test_the_run_that_was_started_from_is_not_needed_to_go_on(first, tmp_path, capsys):
    kept = tmp_path / "kept.pth"
    kept.write_bytes((first / "last.pth").read_bytes())
    settings = (f"train_cfg.init={kept}", QUIET)
    assert train.main(tiny(tmp_path / "whole", *settings)) == 0
    assert train.main(tiny(tmp_path / "a", *settings, "train_cfg.max_steps=3")) == 0
    kept.unlink()
    assert train.main(tiny(tmp_path / "a", *settings, flags=("--resume",))) == 0
    assert_same_state(weights_of(tmp_path / "a"), weights_of(tmp_path / "whole"))
    assert train.main(tiny(tmp_path / "c", *settings)) == 2
    assert f"{kept}: no such checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


# What is wrong is said before anything is written


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('diffusion={"name": "my_parts.Mean"}', r"diffusion: loss: gives \[\] .*: must give one value a sample, \[2\]"),
        ('diffusion={"name": "my_parts.Pixels"}', r"diffusion: loss: gives \[2, 1, 4, 4\]"),
        (
            "dataset.name=my_parts.Shorter",
            r"dataset.train: to_float makes \[1, 3, 4\] of pixels \[1, 4, 4\]: must keep the shape",
        ),
        ('time_aware_net={"name": "my_parts.Nothing"}', "time_aware_net: has no weights to train"),
        ("train_cfg.sampler=my_parts.beyond", "train_cfg.sampler: sampler: asks for x_0 at t = 0: must ask at t in 1..20"),
        ("train_cfg.sampler=my_parts.too_few", r"train_cfg.sampler: sampler: gives a tensor of \[1, 1, 3, 4\]"),
        ("train_cfg.init=nowhere.pth", "train_cfg.init: nowhere.pth: no such checkpoint"),
        ("train_cfg.optimizer=sgd", 'train_cfg.optimizer = "sgd": unknown; .*adam, muon, or your own as "my_file.MyName"'),
        ("train_cfg.lr_schedule=step", 'train_cfg.lr_schedule = "step": unknown; .*constant, linear, cosine, or your own'),
        ("train_cfg.optimizer=my_parts.Sets", "train_cfg.optimizer = .*: must be a subclass of torch.optim.*Optimizer"),
    ],
)
def test_a_part_that_does_not_fit_is_named_before_anything_is_written(setting, words, own, capsys):
    assert train.main(tiny(own / "a", setting)) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    with pytest.raises(ValueError, match=words):
        trainer(own / "a", setting)
    assert not (own / "a").exists()


def test_pixels_that_are_no_tensor_are_named(own):
    data = 'dataset={"name": "my_parts.Arrays", "train": {}, "valid": {}}'
    with pytest.raises(ValueError, match=r"pixels\(0\) is a ndarray: must be a tensor of uint8"):
        trainer(own / "a", data)


def test_a_huber_loss_of_ones_own_is_the_one_of_its_definition(own):
    """Huber 1964: e^2 / 2 up to 1, and |e| - 1/2 beyond; here of a network that gives 0, whose error is the noise."""
    run = trainer(own / "a", 'diffusion={"name": "my_parts.Huber"}')
    run.model.time_aware_net.forward = lambda xt, t: torch.zeros_like(xt)
    noise = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = run.model.loss(torch.zeros(5, 1, 4, 4), 3, noise)
    e = noise.double().abs().numpy()
    np.testing.assert_allclose(found, np.where(e < 1, e**2 / 2, e - 0.5).mean((1, 2, 3)), rtol=1e-5)


def test_values_beyond_the_range_of_images_are_warned_of_and_have_no_bits(own, capsys):
    assert train.main(tiny(own / "a", "dataset.name=my_parts.Larger", QUIET)) == 0
    assert "dataset.valid: to_float gives -3 to 2.62353, and samples are clipped to [-1, 1]" in capsys.readouterr().err
    flags = ["-n", "2", "--timesteps", "2", "--device", "cpu", "--metrics", "bpd", "--bpd-timesteps", "2"]
    assert sampling.main([str(own / "a" / "last.pth"), *flags]) == 2
    assert "test.py: dataset.valid: x0 from -3 to 3: the discretized likelihood" in capsys.readouterr().err


def test_a_loss_that_is_no_number_says_that_the_images_are_none(own, capsys):
    assert train.main(tiny(own / "a", "dataset.name=my_parts.Missing", "train_cfg.max_bad_steps=2")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "largest loss nan at t = " in last
    assert ", of images that are not finite themselves; the last good checkpoint" in last


def test_a_key_of_train_cfg_that_lacks_its_section_is_recognised(tmp_path, capsys):
    assert train.main(tiny(tmp_path / "a", "epochs=2")) == 2
    assert "epochs: unknown key; did you mean 'train_cfg.epochs'?\n" in capsys.readouterr().err


# test.py


def test_the_numbers_of_the_samples_and_of_the_way_to_them_are_those_of_the_pictures(first, capsys):
    flags = ["-n", "5", "--pictures", "3", "--frames", "4", "--timesteps", "6", "--sampler", "ddim", "--device", "cpu", "--npz"]
    assert sampling.main([str(first), *flags]) == 0  # a run's folder is its last.pth
    folder = first / "last_gen"
    with np.load(folder / "samples.npz") as arrays:
        samples, states, times, pictured = (arrays[name] for name in ("samples", "states", "times", "pictured"))
        assert "labels" not in arrays
    assert (samples.shape, states.shape, samples.dtype) == ((5, 1, 4, 4), (3, 4, 1, 4, 4), np.float32)
    diffusion = checkpoint.load_diffusion(first / "last.pth")[0]
    steps = [*diffusion.steps(6, "ddim"), 0]
    assert times.tolist() == [steps[i] for i in (0, 2, 4, 6)]
    assert pictured.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(states[:, -1], samples[pictured])
    strip = np.asarray(Image.open(folder / "0.png"))  # pixels may be enlarged, and have edges between them
    assert {round((value + 1) * 127.5) for value in samples[0].clip(-1, 1).flat} <= set(strip.flat)
    assert "samples.npz: samples [5, 1, 4, 4], states [3, 4, 1, 4, 4], pictured [3], times [4]" in capsys.readouterr().out


def test_a_sampler_may_be_a_function_with_its_parameter_and_a_wrong_one_is_a_line(own, first, capsys):
    flags = ["-n", "3", "--timesteps", "5", "--device", "cpu", "--npz"]
    drawn = []
    for more in (["--sampler", "my_parts.noisy"], ["--sampler", "ddim", "--eta", "1"]):
        assert sampling.main([str(first / "last.pth"), *flags, *more]) == 0
        with np.load(first / "last_gen" / "samples.npz") as arrays:
            drawn.append(arrays["samples"])
    np.testing.assert_array_equal(*drawn)
    diffusion = checkpoint.load_diffusion(first)[0]
    assert diffusion.steps(5, partial(samplers.dpm)) == diffusion.steps(5, "dpm")
    capsys.readouterr()
    assert sampling.main([str(first / "last.pth"), *flags, "--sampler", "my_parts.too_few"]) == 2
    assert "test.py: sampler: gives a tensor of [3, 1, 3, 4]" in capsys.readouterr().err


def test_a_metric_that_gives_no_numbers_is_named(own, first, capsys):
    flags = ["-n", "2", "--timesteps", "2", "--device", "cpu", "--metrics", "my_parts.Sets"]
    assert sampling.main([str(first / "last.pth"), *flags]) == 2
    assert "Sets.measure: gives what is neither number nor text" in capsys.readouterr().err


def test_a_checkpoint_may_hold_its_shape_as_it_comes_and_wants_a_state_not_a_module(first, tmp_path):
    diffusion, state = checkpoint.load_diffusion(first / "last.pth")
    kept = {"config": state["config"], "shape": torch.zeros(2, 1, 4, 4).shape[1:], "ema": diffusion.state_dict()}
    checkpoint.save(tmp_path / "own.pth", kept)
    assert checkpoint.load_diffusion(tmp_path / "own.pth")[1]["shape"] == [1, 4, 4]
    with pytest.raises(ValueError, match=r"state\.ema: .*GaussianDiffusion.*give its state_dict\(\)"):
        checkpoint.save(tmp_path / "own.pth", kept | {"ema": diffusion})
