"""Targets averaged over references (README, equation 15d): against Bayes' rule in float64, by hand and by enumeration."""

from itertools import product

import pytest
import torch
from closed_form import PREDICTIONS, Textbook
from runs import assert_same_state, losses, stop_at, tiny
from torch import nn

import checkpoint
import train
from beta_schedule import LinearSchedule
from gaussian_diffusion import GaussianDiffusion, References
from training.batches import references_for

SCHEDULE = LinearSchedule(12, 0.02, 0.7)
BOOK = Textbook(SCHEDULE.beta)
T = torch.tensor([1, 3, 5, 8, 10, 12])


class Says(nn.Module):
    """Says the same, whatever it is asked: its gradient is that of the loss in the output."""

    def __init__(self, *shape):
        super().__init__()
        self.out = nn.Parameter(torch.zeros(shape))

    def forward(self, xt, t):
        return self.out[: len(xt)]


class Scales(nn.Module):
    """Says x_t, each coordinate times a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, xt, t):
        return self.weight * xt


def gradient(x0, noise, references=None, **settings):
    """Of the loss of each row at T in the output of the network, which is 0; and the losses."""
    diffusion = GaussianDiffusion(SCHEDULE, Says(*x0.shape), **settings)
    loss = diffusion.loss(x0, T[: len(x0)], noise, references=references)
    loss.sum().backward()
    return diffusion.time_aware_net.out.grad, loss.detach()


def bayes_mean(x0, xt, t, others, fits):
    """E[x_0 | x_t] for x_0 that is as likely this one as each of the others that fit: row by row, in float64."""
    means = []
    for row in range(len(x0)):
        candidates = torch.cat([x0[row : row + 1], others[fits[row]]]).double()
        alpha_bar = BOOK.alpha_bar[t[row]]
        square = (xt[row].double() - alpha_bar.sqrt() * candidates).square().sum(1)
        weight = torch.softmax(-square / (2 * (1 - alpha_bar)), 0)
        means.append(weight @ candidates)
    return torch.stack(means)


def drawn():
    x0, noise, others = torch.randn(6, 3), torch.randn(6, 3), torch.randn(20, 3)
    return x0, noise, References(others, torch.rand(6, 20) < 0.6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_gradient_is_that_of_the_target_by_bayes_rule_and_the_value_that_of_the_images_own(prediction):
    x0, noise, references = drawn()
    xt = BOOK.xt(x0.double(), noise.double(), T)
    mean = bayes_mean(x0, xt, T, *references)
    alpha_bar = BOOK.alpha_bar[T, None]
    eps = (xt - alpha_bar.sqrt() * mean) / (1 - alpha_bar).sqrt()
    wanted = -2 / 3 * BOOK.target(prediction, mean, eps, T)  # of ||0 - target||^2 / 3
    found, loss = gradient(x0, noise, references, prediction=prediction)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)
    own, plain = gradient(x0, noise, prediction=prediction)
    assert torch.equal(loss, plain)
    assert (own - found)[T > 4].abs().amax(1).min() > 1e-3  # so that the above says something


def test_over_all_draws_of_the_data_the_target_is_its_posterior_mean():
    """Five images, of which x_0 and two references are drawn: all 125 draws, each with the chance that it leads to x_t."""
    data, t, xt = torch.randn(5, 2), 8, torch.tensor([0.3, -0.2])
    alpha_bar = BOOK.alpha_bar[t]
    weight = torch.softmax(-(xt - alpha_bar.sqrt() * data).double().square().sum(1) / (2 * (1 - alpha_bar)), 0)
    total, spread = torch.zeros(2, dtype=torch.float64), 0.0
    for first, *others in product(range(5), repeat=3):
        x0 = data[None, first]
        noise = ((xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()).float()
        diffusion = GaussianDiffusion(SCHEDULE, Says(1, 2), prediction="reconstruction")
        diffusion.loss(x0, t, noise, references=References(data[others])).sum().backward()
        target = -diffusion.time_aware_net.out.grad[0].double()
        total += weight[first] / 25 * target
        spread += weight[first] / 25 * (target - weight @ data.double()).square().sum()
    torch.testing.assert_close(total, weight @ data.double(), atol=1e-6, rtol=1e-6)
    alone = weight @ (data - weight @ data.double()).square().sum(1)
    assert spread < 0.5 * alone


@pytest.mark.parametrize("loss_mode", ["simple", "min_snr", "full"])
@pytest.mark.parametrize("reverse_variance", ["beta", "learnable"])
@pytest.mark.parametrize("bounded", [False, True])
def test_references_that_do_not_fit_change_nothing(loss_mode, reverse_variance, bounded):
    x0, _, references = drawn()
    x0 = x0.clamp(-1, 1)
    gradients = []
    for others in (None, References(references.x0, torch.zeros(6, 20, dtype=torch.bool))):
        net = Scales(torch.linspace(0.5, 1.5, 3))
        diffusion = GaussianDiffusion(SCHEDULE, net, reverse_variance, "reconstruction", loss_mode, bounded)
        torch.manual_seed(1)
        diffusion(x0, references=others).backward()
        gradients.append([p.grad for p in diffusion.parameters()])
    torch.testing.assert_close(*gradients)


def test_the_learned_variance_sees_the_images_own_error():
    x0, noise, references = drawn()
    found = []
    for others in (None, references):
        diffusion = GaussianDiffusion(SCHEDULE, Says(6, 3), "learnable")
        diffusion.loss(x0, T, noise, references=others).sum().backward()
        found.append(diffusion.log_sigma_square.grad)
    torch.testing.assert_close(*found)


def test_a_bounded_loss_counts_nothing_beyond_an_end_that_all_share():
    x0, noise = torch.tensor([[1.0, 0.4, -1.0]]), torch.zeros(1, 3)
    others = References(torch.tensor([[1.0, -0.6, 0.5]]))
    diffusion = GaussianDiffusion(SCHEDULE, Says(1, 3), prediction="reconstruction", bounded=True)
    diffusion.time_aware_net.out.data[:] = torch.tensor([[1.5, 1.5, -1.5]])
    diffusion.loss(x0, 12, noise, references=others).sum().backward()
    mean = bayes_mean(x0, BOOK.xt(x0.double(), noise.double(), T[-1:]), T[-1:], others.x0, torch.ones(1, 1, dtype=torch.bool))
    wanted = 2 / 3 * (diffusion.time_aware_net.out.detach() - mean)
    wanted[0, 0] = 0
    torch.testing.assert_close(diffusion.time_aware_net.out.grad.double(), wanted, atol=1e-5, rtol=1e-5)


def test_the_average_is_taken_in_float32_under_autocast():
    x0, noise, references = drawn()
    found = gradient(x0, noise, references)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(x0, noise, references)[0], found)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(gradient(x0, noise, references)[0], found)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_of_a_class_only_its_own_images_are_references_and_without_label_all_are():
    x0, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 2])
    found = references_for(torch.tensor([1, 3, 2]), 3, x0, labels)
    assert found.fits.tolist() == [[False, True, True, False], [True] * 4, [False, False, False, True]]
    assert references_for(None, None, x0, None).fits is None


CLASSES = ("time_aware_net.kwargs.n_classes=10", "train_cfg.references=64", "train_cfg.grad_accum=2")


def test_a_run_with_references_stopped_and_resumed_is_the_run_never_stopped(tmp_path, monkeypatch):
    whole, stopped, none = (tmp_path / name for name in ("whole", "stopped", "none"))
    assert train.main(tiny(whole, *CLASSES)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 6)
        assert train.main(tiny(stopped, *CLASSES)) == 143
    assert train.main(tiny(stopped, *CLASSES, flags=("--resume",))) == 0
    assert losses(stopped) == losses(whole)
    weights = {name: checkpoint.load(tmp_path / name / "last.pth")["model"] for name in ("whole", "stopped")}
    assert_same_state(weights["stopped"], weights["whole"])
    monkeypatch.setattr(train, "references_for", lambda labels, n, x0, _: References(x0, torch.zeros(len(labels), len(x0)) > 0))
    assert train.main(tiny(none, *CLASSES)) == 0  # with the same draws
    of_none = checkpoint.load(none / "last.pth")["model"]
    assert not torch.equal(of_none["time_aware_net.conv_in.weight"], weights["whole"]["time_aware_net.conv_in.weight"])


@pytest.mark.parametrize(
    ("config", "setting", "words"),
    [
        ("Digits_den.json", "train_cfg.cache_gb=0", "train_cfg.references = 8: needs the images in memory"),
        ("Digits_d3pm.json", "train_cfg.seed=0", "train_cfg.references = 8: targets are averages of images"),
    ],
)
def test_where_there_can_be_no_references_it_is_said_before_the_first_step(config, setting, words, tmp_path, capsys):
    argv = tiny(tmp_path / "run")
    argv = [argv[0].replace("Digits_den.json", config), *argv[1:3], "--set", "train_cfg.references=8", setting]
    assert train.main([*argv, f"train_cfg.model_save_dirpath={tmp_path / 'run'}"]) != 0
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
