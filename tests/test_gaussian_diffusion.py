import math
import os
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closed_form import GAUSSIAN, MIXTURE, PREDICTIONS, VARIANCES, OptimalNet, Textbook
from torch import nn

from beta_schedule import ConstantSchedule, CosineSchedule, LinearSchedule
from gaussian_diffusion import GaussianDiffusion, main
from time_aware_module import TimeAwareMLP
from training.optimizers import build_optimizer

LOSSES = ("simple", "full", "min_snr")
SCHEDULE = LinearSchedule(12, 0.01, 0.4)
BOOK = Textbook(SCHEDULE.beta)
ALL_TIMES = torch.arange(1, 13)


class Shrink(nn.Module):
    def forward(self, xt, t):
        return 0.7 * xt


class Says(nn.Module):
    """A network that says the same whatever it is asked."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, xt, t):
        return self.out


def close(actual, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def arbitrary(reverse_variance, prediction, loss_mode="simple", net=None):
    """An untrained process; a learnable variance is moved to where no formula has it."""
    diffusion = GaussianDiffusion(SCHEDULE, net or TimeAwareMLP(3, 32), reverse_variance, prediction, loss_mode)
    if reverse_variance == "learnable":
        diffusion.log_sigma_square.data = torch.linspace(-3, 1, 12)
    return diffusion


def book_sigma_square(reverse_variance):
    """sigma_t^2 of `arbitrary`, t = 0..T."""
    if reverse_variance == "learnable":
        return torch.cat([torch.ones(1), torch.linspace(-3, 1, 12).exp()]).double()
    return BOOK.sigma_square(reverse_variance)


def full_weight(prediction, sigma_square):
    """The design's weights of the full loss, t = 0..T."""
    before_sigma = {
        "direct": torch.ones(13, dtype=torch.float64),
        "reconstruction": BOOK.previous * BOOK.beta**2 / (1 - BOOK.alpha_bar) ** 2,
        "denoising": BOOK.beta**2 / (BOOK.alpha * (1 - BOOK.alpha_bar)),
        "velocity": BOOK.previous * BOOK.beta**2 / (1 - BOOK.alpha_bar),  # x_0's, times 1 - alpha_bar
    }
    return before_sigma[prediction] / sigma_square


# Construction


CHOICES = {
    "reverse_variance": VARIANCES,
    "prediction": PREDICTIONS,
    "loss_mode": LOSSES,
    "time_sampling": ("uniform", "importance"),
}


@pytest.mark.parametrize("setting", CHOICES)
def test_an_unknown_setting_is_refused_with_the_choices(setting):
    with pytest.raises(ValueError, match=f"{setting} = 'gamma'.*{', '.join(CHOICES[setting])}"):
        GaussianDiffusion(SCHEDULE, TimeAwareMLP(2), **{setting: "gamma"})


@pytest.mark.parametrize("reverse_variance", VARIANCES[:2])
@pytest.mark.parametrize("schedule", [SCHEDULE, LinearSchedule(), CosineSchedule()], ids=["short", "linear", "cosine"])
def test_sigma_square_is_the_papers(schedule, reverse_variance):
    diffusion = GaussianDiffusion(schedule, TimeAwareMLP(2), reverse_variance)
    assert len(schedule) == diffusion.T
    close(diffusion.sigma_square, Textbook(schedule.beta).sigma_square(reverse_variance)[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_a_state_holds_the_network_and_the_variance_and_no_table(reverse_variance):
    net = TimeAwareMLP(2)
    of_variance = "log_sigma_square" if reverse_variance == "learnable" else "x0_error"
    expected = {of_variance, *(f"time_aware_net.{name}" for name in net.state_dict())}
    assert GaussianDiffusion(SCHEDULE, net, reverse_variance).state_dict().keys() == expected


def test_a_learnable_variance_is_the_exponential_of_its_parameter():
    close(arbitrary("learnable", "direct").sigma_square, torch.linspace(-3, 1, 12).exp())
    close(GaussianDiffusion(SCHEDULE, TimeAwareMLP(2), "learnable").sigma_square, SCHEDULE.beta)  # where it starts


def test_one_minus_alpha_bar_1_keeps_its_digits_in_float32():
    diffusion = GaussianDiffusion(ConstantSchedule(3, 1e-7), TimeAwareMLP(2))
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    close(diffusion.q_sample(zero, 1, one), one * math.sqrt(1e-7), rtol=1e-6, atol=0)
    assert {buffer.dtype for buffer in diffusion.buffers()} == {torch.float32}


# Forward process


@pytest.mark.parametrize("schedule", [SCHEDULE, CosineSchedule(200)], ids=["linear", "cosine"])
def test_steps_composed_give_the_moments_of_q_sample(schedule):
    diffusion = GaussianDiffusion(schedule, Shrink())
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    signal, variance = one, zero
    for t in range(1, len(schedule) + 1):
        signal = diffusion.q_step(signal, t, zero)
        variance = diffusion.q_step(variance.sqrt(), t, zero) ** 2 + diffusion.q_step(zero, t, one) ** 2
        product = math.prod(1 - beta for beta in schedule.beta[:t].tolist())
        close(signal, torch.full((1, 1), math.sqrt(product)), rtol=1e-4, atol=1e-9)
        close(variance, torch.full((1, 1), 1 - product), rtol=1e-4)
        close(diffusion.q_sample(one, t, zero), signal, rtol=1e-4, atol=1e-9)
        close(diffusion.q_sample(zero, t, one) ** 2, variance, rtol=1e-4)


@pytest.mark.parametrize("schedule", [SCHEDULE, LinearSchedule()], ids=["short", "1000"])
def test_q_posterior_is_bayes_rule(schedule):
    # q(x_{t-1} | x_t, x_0) of one dimension, as the product of the densities q(x_{t-1} | x_0) and q(x_t | x_{t-1})
    diffusion, T = GaussianDiffusion(schedule, Shrink()), len(schedule)
    x0, xt = torch.randn(T, 1, dtype=torch.float64), torch.randn(T, 1, dtype=torch.float64)
    mean, variance = diffusion.q_posterior(x0, xt, torch.arange(1, T + 1))
    product = 1.0
    for i, beta in enumerate(schedule.beta.tolist()):
        if i == 0:
            expected_mean, expected_variance = x0[0].item(), beta
        else:
            precision = 1 / (1 - product) + (1 - beta) / beta
            expected_variance = 1 / precision
            slope = math.sqrt(product) * x0[i].item() / (1 - product) + math.sqrt(1 - beta) * xt[i].item() / beta
            expected_mean = slope / precision
        assert mean[i].item() == pytest.approx(expected_mean, rel=1e-5, abs=1e-6)
        assert variance[i].item() == pytest.approx(expected_variance, rel=1e-5)
        product *= 1 - beta


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4, 5)])
def test_an_int_and_a_tensor_of_times_agree(shape):
    diffusion = GaussianDiffusion(SCHEDULE, Shrink())
    x0, xt, noise = torch.randn(3, *shape)
    t = torch.full((3,), 7)
    for a, b in zip(
        [diffusion.q_sample(x0, 7, noise), *diffusion.q_posterior(x0, xt, 7), *diffusion.predict(xt, 7)],
        [diffusion.q_sample(x0, t, noise), *diffusion.q_posterior(x0, xt, t), *diffusion.predict(xt, t)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_each_sample_of_a_batch_gets_its_own_time():
    diffusion = GaussianDiffusion(SCHEDULE, Shrink())
    t = torch.tensor([12, 1, 5])
    out = diffusion.q_sample(torch.ones(3, 1, 2, 2), t, torch.zeros(3, 1, 2, 2))
    close(out, BOOK.alpha_bar[t].sqrt().view(3, 1, 1, 1).expand(3, 1, 2, 2))


@pytest.mark.parametrize(
    "t",
    [
        0,
        13,
        -1,
        torch.tensor([1, 0, 1]),
        torch.tensor([1, 13, 1]),
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        torch.tensor([1, 2]),
        torch.tensor([[1], [2], [3]]),
        torch.tensor(1),
    ],
    ids=str,
)
def test_a_bad_time_is_refused(t):
    diffusion, x = GaussianDiffusion(SCHEDULE, Shrink()), torch.zeros(3, 2)
    calls = (
        diffusion.q_step,
        diffusion.q_sample,
        diffusion.predict,
        diffusion.p_mean_variance,
        diffusion.p_sample,
        diffusion.loss,
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^t"):
            call(x, t)
    with pytest.raises(ValueError, match=r"^t"):
        diffusion.q_posterior(x, x, t)


# Reverse process


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predict_reads_any_output_as_the_papers_do(prediction):
    xt, out = torch.randn(2, 12, 3).double()
    alpha_bar = BOOK.alpha_bar[1:, None]
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    mu_from_x0, mu_from_xt = BOOK.mu_from_x0[1:, None], BOOK.mu_from_xt[1:, None]
    x0 = {
        "direct": (out - mu_from_xt * xt) / mu_from_x0,
        "reconstruction": out,
        "denoising": (xt - noise * out) / signal,
        "velocity": signal * xt - noise * out,
    }[prediction]
    said = arbitrary("beta", prediction, net=Says(out)).predict(xt, ALL_TIMES)
    close(said.x0, x0)
    close(said.eps, (xt - signal * x0) / noise, rtol=1e-4, atol=1e-5)
    close(said.mu, mu_from_x0 * x0 + mu_from_xt * xt)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_p_mean_variance_and_p_sample_are_the_reverse_step(prediction, reverse_variance):
    xt, out, noise = torch.randn(3, 12, 3).double()
    diffusion = arbitrary(reverse_variance, prediction, net=Says(out))
    mean, variance = diffusion.p_mean_variance(xt, ALL_TIMES)
    close(mean, diffusion.predict(xt, ALL_TIMES).mu)
    close(variance[:, 0], book_sigma_square(reverse_variance)[1:])
    spread = book_sigma_square(reverse_variance)[1:, None].sqrt() * noise
    spread[0] = 0  # at t = 1 the mean itself
    close(diffusion.p_sample(xt, ALL_TIMES, noise), mean + spread)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clip_x0_clips_x0_before_the_mean_is_taken(prediction):
    x0, eps = 3 * torch.randn(12, 3).double(), torch.randn(12, 3).double()
    xt = BOOK.xt(x0, eps, ALL_TIMES)
    diffusion = arbitrary("beta", prediction, net=Says(BOOK.target(prediction, x0, eps, ALL_TIMES)))
    mean, _ = diffusion.p_mean_variance(xt, ALL_TIMES, clip_x0=True)
    clipped = BOOK.mu_from_x0[1:, None] * x0.clamp(-1, 1) + BOOK.mu_from_xt[1:, None] * xt
    close(mean, clipped, rtol=1e-4, atol=1e-4)
    close(diffusion.p_sample(xt, ALL_TIMES, torch.zeros(12, 3), clip_x0=True), clipped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_optimal_networks_mean_is_bayes_rule_of_the_mixture(prediction):
    # by Tweedie's formula, from the score of the noised density itself
    diffusion = GaussianDiffusion(SCHEDULE, OptimalNet(MIXTURE, SCHEDULE.beta, prediction), prediction=prediction)
    xt = (2 * torch.randn(12, 2).double()).requires_grad_()
    (score,) = torch.autograd.grad(MIXTURE.log_prob(xt, BOOK.alpha_bar[1:]).sum(), xt)
    said = diffusion.predict(xt.detach(), ALL_TIMES)
    close(said.eps, -(1 - BOOK.alpha_bar[1:, None]).sqrt() * score, rtol=1e-4, atol=1e-5)
    close(said.mu, (xt.detach() + BOOK.beta[1:, None] * score) / BOOK.alpha[1:, None].sqrt(), rtol=1e-4, atol=1e-5)


# Losses


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("loss_mode", LOSSES)
def test_every_loss_is_its_weight_times_the_mean_squared_error(loss_mode, reverse_variance, prediction):
    x0, eps, out = torch.randn(3, 12, 3).double()
    sigma_square = book_sigma_square(reverse_variance)
    error = (out - BOOK.target(prediction, x0, eps, ALL_TIMES)).square().mean(1)
    full = full_weight(prediction, sigma_square)[1:] * error
    if reverse_variance == "learnable":
        full += (sigma_square.log() + BOOK.posterior_variance / sigma_square)[1:]
    snr = (BOOK.alpha_bar / (1 - BOOK.alpha_bar))[1:]
    min_snr = {  # Hang et al. 2023, section 3.4, and x_0's weight over the square of what an error in mu makes of x_0
        "direct": snr.clamp(max=5) / BOOK.mu_from_x0[1:] ** 2,
        "reconstruction": snr.clamp(max=5),
        "denoising": snr.clamp(max=5) / snr,
        "velocity": snr.clamp(max=5) / (snr + 1),
    }[prediction]
    assert snr.min() < 5 < snr.max()
    expected = {"full": full, "simple": error, "min_snr": min_snr * error}[loss_mode]
    if reverse_variance == "learnable" and loss_mode != "full":
        expected = expected + full
    close(arbitrary(reverse_variance, prediction, loss_mode, Says(out)).loss(x0, ALL_TIMES, eps), expected, rtol=1e-4)


# x_0 within bounds


class Clamped(nn.Module):
    """A network that predicts an x_0 kept in [-1, 1] by itself."""

    def forward(self, xt, t):
        return (1.5 * xt).clamp(-1, 1)


def bounded(prediction, net, bounded=True):
    return GaussianDiffusion(SCHEDULE, net, prediction=prediction, loss_mode="min_snr", bounded=bounded)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [1, 4, 12])
def test_the_loss_of_a_bounded_x0_is_least_at_the_posterior_mean(t, prediction):
    values, prior = torch.tensor([-1.0, -0.2, 1.0]).double(), torch.tensor([0.5, 0.2, 0.3]).double()
    alpha_bar = BOOK.alpha_bar[t]
    grid = torch.linspace(-2, 2, 801).double()  # of what the network says of x_0
    for xt in (-1.5, -0.4, 0.3, 0.8):
        weight = prior * torch.exp(-((xt - alpha_bar.sqrt() * values) ** 2) / (2 * (1 - alpha_bar)))
        weight /= weight.sum()  # Bayes' rule
        x0, said = values.repeat_interleave(801)[:, None], grid.repeat(3)[:, None]
        times = torch.full((2403,), t)
        noise, noise_said = ((xt - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt() for x in (x0, said))
        net = Says(BOOK.target(prediction, said, noise_said, times))
        loss = bounded(prediction, net).loss(x0, times, noise).view(3, 801)
        assert grid[(weight[:, None] * loss).sum(0).argmin()].item() == pytest.approx((weight @ values).item(), abs=0.006)
        for row, beyond in ((loss[0], grid < -1.003), (loss[2], grid > 1.003)):
            assert row[beyond].max() == 0 < row[~beyond & (grid.abs() < 0.997)].min()
        plain = bounded(prediction, net, False).loss(x0, times, noise).view(3, 801)
        close(loss[1], plain[1])  # where x_0 is inside


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_bounded_x0_is_read_and_sampled_as_if_clipped(prediction):
    xt = 3 * torch.randn(12, 3)
    ours, plain = (bounded(prediction, TimeAwareMLP(3, 32), b) for b in (True, False))
    ours.x0_error.fill_(2)  # more than a guess in [-1, 1] errs by
    plain.load_state_dict(ours.state_dict())
    said, x0 = ours.predict(xt, ALL_TIMES), plain.predict(xt, ALL_TIMES).x0
    assert (x0.abs() > 1).any()
    assert (x0.abs() < 1).any()
    alpha_bar = BOOK.alpha_bar[1:, None]
    close(said.x0, x0.clamp(-1, 1), atol=1e-5)
    close(said.eps, (xt - alpha_bar.sqrt() * x0.clamp(-1, 1)) / (1 - alpha_bar).sqrt(), rtol=1e-4, atol=1e-4)
    close(ours.p_mean_variance(xt, ALL_TIMES)[0], plain.p_mean_variance(xt, ALL_TIMES, clip_x0=True)[0], atol=1e-5)
    for sampler in ("ddpm", "ddim", "dpm", "heun"):
        drawn = [
            model.sample(xt.shape, sampler, 6, clip_x0=clip, x_T=xt, generator=torch.Generator().manual_seed(0))
            for model, clip in ((ours, False), (plain, True))
        ]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("said", [0.0, 3e4, -3e4])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_no_rounding_takes_a_bounded_x0_out_of_its_bounds(prediction, said):
    schedule = CosineSchedule(1000)  # at whose end x_t says next to nothing of x_0
    book = Textbook(schedule.beta)
    for t in (1000, 999, 500, 1):
        xt, out = 3 * torch.randn(500, 2), torch.full((500, 2), said)
        found = GaussianDiffusion(schedule, Says(out), prediction=prediction, bounded=True).predict(xt, t).x0
        assert found.abs().max() <= 1
        signal, noise = book.alpha_bar[t].sqrt(), (1 - book.alpha_bar[t]).sqrt()
        x0 = {
            "direct": (out - book.mu_from_xt[t] * xt.double()) / book.mu_from_x0[t],
            "reconstruction": out.double(),
            "denoising": (xt.double() - noise * out) / signal,
            "velocity": signal * xt.double() - noise * out,
        }[prediction]
        close(found, x0.clamp(-1, 1), atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_of_a_bounded_x0_is_that_of_a_network_that_clips(prediction):
    x0 = torch.randint(0, 256, (6, 3)) / 127.5 - 1
    x0[:, 0] = torch.tensor([-1.0, 1.0]).repeat(3)

    class Unclamped(nn.Module):  # what says in this prediction that x_0 is 1.5 x_t
        def forward(self, xt, t):
            x0 = 1.5 * xt
            eps = (xt - BOOK.alpha_bar.sqrt()[t, None] * x0) / (1 - BOOK.alpha_bar).sqrt()[t, None]
            return BOOK.target(prediction, x0, eps, t).float()

    found = [
        diffusion.variational_bound(x0, discretized=True, generator=torch.Generator().manual_seed(0))
        for diffusion in (bounded(prediction, Unclamped()), bounded("reconstruction", Clamped(), False))
    ]
    for ours, expected in zip(*found, strict=True):
        close(ours, expected, rtol=1e-4)
    wide = bounded(prediction, Unclamped(), False).variational_bound(x0, True, generator=torch.Generator().manual_seed(0))
    assert (wide.total > found[0].total).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_simple_loss_of_the_optimum_is_the_exact_remaining_error(prediction):
    diffusion = arbitrary("beta", prediction, net=OptimalNet(GAUSSIAN, SCHEDULE.beta, prediction))
    x0_error = GAUSSIAN.x0_error(BOOK.alpha_bar)
    for t in (1, 2, 6, 12):
        loss = diffusion.loss(GAUSSIAN.sample(20_000), t)
        exact = (BOOK.error_from_x0[prediction] ** 2 * x0_error)[t].item()
        assert loss.mean().item() == pytest.approx(exact, abs=5 * loss.std().item() / math.sqrt(20_000))
        assert loss.std().item() / math.sqrt(20_000) < 0.01 * exact


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_the_full_loss_of_the_optimum_is_exact(reverse_variance, prediction):
    net = OptimalNet(GAUSSIAN, SCHEDULE.beta, prediction)
    loss = arbitrary(reverse_variance, prediction, "full", net).loss_full(GAUSSIAN.sample(4000)).detach()
    sigma_square = book_sigma_square(reverse_variance)
    exact = (BOOK.mu_from_x0**2 * GAUSSIAN.x0_error(BOOK.alpha_bar) / sigma_square)[1:].sum().item()
    if reverse_variance == "learnable":
        exact += (sigma_square.log() + BOOK.posterior_variance / sigma_square)[1:].sum().item()
    standard_error = loss.std().item() / math.sqrt(4000)
    assert loss.mean().item() == pytest.approx(exact, abs=5 * standard_error)
    assert standard_error < 0.02 * abs(exact)


@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("chunk_size", [1, 5, 12, None])
def test_loss_full_and_its_gradient_are_the_naive_sums(chunk_size, reverse_variance):
    diffusion, x0 = arbitrary(reverse_variance, "denoising", "full"), torch.randn(4, 3)
    torch.manual_seed(1)
    loss = diffusion.loss_full(x0, chunk_size)
    gradient = torch.autograd.grad(loss.mean(), list(diffusion.parameters()))

    torch.manual_seed(1)
    noise = torch.cat([torch.randn(len(t) * 4, 3) for t in ALL_TIMES.split(chunk_size or 12)]).view(12, 4, 3)
    naive = torch.zeros(4, dtype=torch.float64)
    for t in range(1, 13):
        times = torch.full((4,), t)
        out = diffusion.time_aware_net(BOOK.xt(x0, noise[t - 1], times).float(), times)
        sigma_square = (
            diffusion.sigma_square[t - 1] if reverse_variance == "learnable" else book_sigma_square(reverse_variance)[t]
        )
        weight = BOOK.beta[t] ** 2 / (sigma_square * BOOK.alpha[t] * (1 - BOOK.alpha_bar[t]))
        naive = naive + weight * (out - noise[t - 1]).double().square().mean(1)
        if reverse_variance == "learnable":
            naive = naive + sigma_square.log() + BOOK.posterior_variance[t] / sigma_square
    close(loss, naive, rtol=1e-4)
    naive_gradient = torch.autograd.grad(naive.mean(), list(diffusion.parameters()))
    for a, b in zip(gradient, naive_gradient, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_a_chunk_of_nothing_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size = {chunk_size}"):
        arbitrary("beta", "denoising", "full").loss_full(torch.zeros(2, 3), chunk_size)


def test_loss_full_evaluates_many_times_in_one_network_call():
    rows, net = [], TimeAwareMLP(3)
    net.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    with torch.no_grad():
        GaussianDiffusion(ConstantSchedule(100, 0.05), net, loss_mode="full")(torch.randn(4, 3), chunk_size=25)
    assert rows == [100, 100, 100, 100]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("loss_mode", LOSSES)
def test_every_setting_is_a_scalar_that_trains_every_parameter(loss_mode, reverse_variance, prediction):
    diffusion = arbitrary(reverse_variance, prediction, loss_mode)
    loss = diffusion(torch.randn(48, 3))
    assert loss.shape == ()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in diffusion.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.any() or not g.isfinite().all()] == []
    if reverse_variance == "learnable":
        assert gradients["log_sigma_square"].all()  # at every time: 48 samples are spread over 12


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss_mode", ["simple", "min_snr"])
def test_the_simple_loss_trains_the_network_and_the_bound_the_variance(loss_mode, prediction):
    learnable, fixed = arbitrary("learnable", prediction, loss_mode), arbitrary("beta", prediction, loss_mode)
    fixed.time_aware_net = learnable.time_aware_net
    x0, eps = torch.randn(2, 12, 3)
    parameters = list(learnable.time_aware_net.parameters())
    alone = torch.autograd.grad(fixed.loss(x0, ALL_TIMES, eps).sum(), parameters)
    *together, of_variance = torch.autograd.grad(
        learnable.loss(x0, ALL_TIMES, eps).sum(), [*parameters, learnable.log_sigma_square]
    )
    for a, b in zip(together, alone, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()

    with torch.no_grad():
        out = learnable.time_aware_net(BOOK.xt(x0, eps, ALL_TIMES).float(), ALL_TIMES)
    error = (out - BOOK.target(prediction, x0, eps, ALL_TIMES)).square().mean(1)
    sigma_square = book_sigma_square("learnable")
    # of w / sigma^2 + log sigma^2 + sigma_bar^2 / sigma^2 by log sigma^2
    analytic = 1 - full_weight(prediction, sigma_square)[1:] * error - (BOOK.posterior_variance / sigma_square)[1:]
    close(of_variance, analytic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss_mode", ["simple", "min_snr"])
def test_the_network_of_a_bounded_x0_learns_nothing_from_the_variances_part(loss_mode, prediction):
    net, x0, eps = TimeAwareMLP(3, 32), 2 * torch.rand(12, 3) - 1, torch.randn(12, 3)
    kinds = [(variance, prediction, loss_mode, True) for variance in ("learnable", "beta")]
    losses = [GaussianDiffusion(SCHEDULE, net, *kind).loss(x0, ALL_TIMES, eps).sum() for kind in kinds]
    for a, b in zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in losses), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_loss_simple_is_the_simple_loss_whatever_the_setting():
    # a network that is wrong by 2 everywhere costs 4 at any time
    net = OptimalNet(GAUSSIAN, SCHEDULE.beta, "reconstruction")
    net.forward = lambda xt, t: torch.full_like(xt, 2.0)
    for loss_mode in LOSSES:
        close(arbitrary("beta", "reconstruction", loss_mode, net).loss_simple(torch.zeros(6, 3)), torch.full((6,), 4.0))


@pytest.mark.parametrize("loss_mode", LOSSES)
def test_loss_simple_leaves_its_times_and_their_losses_unweighted(loss_mode):
    class SaysTime(nn.Module):  # which of x_0 = 0 is wrong by t
        def forward(self, xt, t):
            return t[:, None].expand_as(xt).float()

    drawn = {} if loss_mode == "full" else {"time_sampling": "importance"}
    diffusion = GaussianDiffusion(SCHEDULE, SaysTime(), "beta", "reconstruction", loss_mode, **drawn)
    loss = diffusion.loss_simple(torch.zeros(50, 3, requires_grad=True))
    t, terms = diffusion.last_terms
    assert loss.requires_grad
    assert not terms.requires_grad  # or it would keep the step's activations
    close(terms, t**2)
    assert len(t.unique()) > 6
    best = best_error_of_unit_variance("reconstruction", loss_mode)
    chance = 0.5 / 12 + 0.5 * best / best.sum() if drawn else torch.full((12,), 1 / 12).double()
    close(loss, t**2 / (12 * chance[t - 1]))


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_random_times_are_uniform_on_1_to_T(batch):
    seen = []

    class Watch(nn.Module):
        def forward(self, xt, t):
            seen.append(t)
            return xt

    diffusion, draws = GaussianDiffusion(ConstantSchedule(4, 0.3), Watch()), 3000
    for _ in range(draws):
        diffusion(torch.zeros(batch, 1))
    times = torch.stack(seen)
    for i in range(batch):  # each sample of the batch has its own uniform time
        share = times[:, i].bincount(minlength=5).double() / draws
        assert share[0] == 0
        assert len(share) == 5
        torch.testing.assert_close(share[1:], torch.full((4,), 0.25).double(), rtol=0, atol=5 * math.sqrt(0.1875 / draws))


def best_error_of_unit_variance(prediction, loss_mode):
    """[T]: what the best network for x_0 ~ N(0, 1) loses at each t: the target's variance given x_t, times a weight."""
    alpha_bar = BOOK.alpha_bar[1:]
    if loss_mode == "min_snr":  # whatever is predicted
        return (alpha_bar / (1 - alpha_bar)).clamp(max=5) * (1 - alpha_bar)
    one, zero = torch.ones(12, 1).double(), torch.zeros(12, 1).double()
    from_x0, from_eps = (BOOK.target(prediction, x0, eps, ALL_TIMES)[:, 0] for x0, eps in ((one, zero), (zero, one)))
    covariance = from_x0 * alpha_bar.sqrt() + from_eps * (1 - alpha_bar).sqrt()  # with x_t, of variance 1
    return from_x0**2 + from_eps**2 - covariance**2


@pytest.mark.parametrize("reverse_variance", ["beta", "learnable"])
@pytest.mark.parametrize("loss_mode", ["simple", "min_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_importance_draws_t_where_the_loss_is_large_and_keeps_its_expectation(prediction, loss_mode, reverse_variance):
    loss = best_error_of_unit_variance(prediction, loss_mode)
    chance = 0.5 / 12 + 0.5 * loss / loss.sum()
    diffusion = GaussianDiffusion(SCHEDULE, Shrink(), reverse_variance, prediction, loss_mode, time_sampling="importance")
    total = diffusion(torch.ones(20_000, 3))
    t, terms = diffusion.last_terms
    close(total, (terms.double() / (12 * chance[t - 1])).mean())
    share = t.bincount(minlength=13).double()[1:] / 20_000
    torch.testing.assert_close(share, chance, rtol=0, atol=1e-4)  # spread evenly over the batch, a time is off by one sample
    first = []
    for _ in range(1000):
        diffusion(torch.ones(2, 3))
        first.append(diffusion.last_terms[0][0])
    share = torch.stack(first).bincount(minlength=13).double()[1:] / 1000  # and each sample has that chance
    assert ((share - chance).abs() < 5 * (chance * (1 - chance) / 1000).sqrt()).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_importance_makes_the_loss_vary_less(prediction):
    """Of Gaussian data, with the network that is best for it."""
    torch.manual_seed(0)
    mean, spread = {}, {}
    for time_sampling in ("uniform", "importance"):
        net = OptimalNet(GAUSSIAN, SCHEDULE.beta, prediction)
        diffusion = GaussianDiffusion(SCHEDULE, net, "beta", prediction, "min_snr", time_sampling=time_sampling)
        losses = torch.stack([diffusion(GAUSSIAN.sample(1)) for _ in range(1000)])
        mean[time_sampling], spread[time_sampling] = losses.mean().item(), losses.var().item()
    assert spread["importance"] < 0.9 * spread["uniform"]
    assert abs(mean["importance"] - mean["uniform"]) < 4 * (sum(spread.values()) / 1000) ** 0.5


def test_importance_is_no_way_to_draw_the_times_of_the_full_loss():
    with pytest.raises(ValueError, match="time_sampling = 'importance': the full loss draws no t"):
        GaussianDiffusion(SCHEDULE, Shrink(), loss_mode="full", time_sampling="importance")


@pytest.mark.parametrize("loss_mode", LOSSES)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_under_autocast_only_the_network_runs_low(loss_mode, reverse_variance):
    class Lossy(nn.Module):  # what autocast makes of a network
        def forward(self, xt, t):
            return (0.7 * xt).bfloat16()

    x0, eps = torch.randn(2, 12, 3)
    diffusion = arbitrary(reverse_variance, "denoising", loss_mode, Lossy())
    expected = diffusion.loss(x0, ALL_TIMES, eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = diffusion.loss(x0, ALL_TIMES, eps)
        assert arbitrary(reverse_variance, "denoising", loss_mode)(x0).dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_a_network_of_another_precision_does_not_change_xs():
    diffusion = arbitrary("beta", "denoising", net=OptimalNet(GAUSSIAN, SCHEDULE.beta, "denoising"))  # says float64
    x = torch.zeros(12, 2)
    said = [*diffusion.predict(x, ALL_TIMES), diffusion.p_sample(x, ALL_TIMES), diffusion.loss(x, ALL_TIMES)]
    assert {y.dtype for y in [*said, diffusion.sample((12, 2))]} == {torch.float32}


def test_a_batch_of_images_is_averaged_over_pixels_and_samples():
    x0, noise = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    noise[1] = 3
    loss = arbitrary("beta", "denoising", net=Says(torch.zeros(2, 3, 4, 5))).loss(x0, 3, noise)
    assert loss.tolist() == [1.0, 9.0]


# Condition

CONDITIONED = {  # every public method that calls the network, on x0 [3, 2] and a condition
    "predict": lambda diffusion, x, condition: diffusion.predict(x, 1, condition=condition),
    "p_mean_variance": lambda diffusion, x, condition: diffusion.p_mean_variance(x, 1, condition=condition),
    "p_sample": lambda diffusion, x, condition: diffusion.p_sample(x, 1, condition=condition),
    "loss": lambda diffusion, x, condition: diffusion.loss(x, ALL_TIMES[[0, 4, 11]], condition=condition),
    "loss_simple": lambda diffusion, x, condition: diffusion.loss_simple(x, condition=condition),
    "loss_full": lambda diffusion, x, condition: diffusion.loss_full(x, 5, condition=condition),
    "forward": lambda diffusion, x, condition: diffusion(x, condition=condition),
    "variational_bound": lambda diffusion, x, condition: diffusion.variational_bound(x, chunk_size=5, condition=condition),
    "quick bound": lambda diffusion, x, condition: diffusion.variational_bound(x, timesteps=4, condition=condition),
    "sample": lambda diffusion, x, condition: diffusion.sample(x.shape, "heun", 2, x_T=x, condition=condition),
    "trajectory": lambda diffusion, x, condition: list(diffusion.trajectory(x.shape, x_T=x, condition=condition)),
    "fit": lambda diffusion, x, condition: diffusion.fit_reverse_variance([(x, condition) if condition else x]),
}
FAR_APART = torch.tensor([[-1e4, 1e4], [0.0, 0.0], [3e4, 3e4]])  # so that a state tells which sample it is of


@pytest.mark.parametrize("loss_mode", LOSSES)
@pytest.mark.parametrize("method", CONDITIONED)
def test_the_network_gets_the_condition_of_each_row_and_the_rest_unread(method, loss_mode):
    seen, unread, table = [], object(), torch.zeros(5, 7)

    class Watch(nn.Module):
        def forward(self, xt, t, **condition):
            seen.append((xt, t, condition))
            return 0 * xt

    condition = {"label": torch.tensor([7, 8, 9]), "mask": FAR_APART.clone(), "table": table, "unread": unread}
    before = dict(condition)
    diffusion = GaussianDiffusion(SCHEDULE, Watch(), "beta", "denoising", loss_mode)
    CONDITIONED[method](diffusion, FAR_APART, condition)
    assert len(seen) > 0
    for xt, t, got in seen:
        assert got.keys() == condition.keys()
        assert got["unread"] is unread
        assert got["table"] is table
        sample_of_row = (xt[:, 0] / 100).round().sign() + 1  # -, 0 or +, whatever the time
        assert torch.equal(got["label"], 7 + sample_of_row.long())
        assert torch.equal(got["mask"], FAR_APART[got["label"] - 7])
    assert condition == before


@pytest.mark.parametrize("method", CONDITIONED)
def test_without_a_condition_the_network_gets_no_more_than_x_and_t(method):
    class Two(nn.Module):
        def forward(self, *args, **kwargs):
            assert (len(args), kwargs) == (2, {})
            return args[0]

    CONDITIONED[method](GaussianDiffusion(SCHEDULE, Two()), torch.zeros(3, 2), None)
    CONDITIONED[method](GaussianDiffusion(SCHEDULE, Two()), torch.zeros(3, 2), {})


# Memory


def test_the_tensors_that_loss_full_holds_do_not_grow_with_T():
    peaks = []
    for T in (50, 1000):
        diffusion = GaussianDiffusion(ConstantSchedule(T, 0.01), TimeAwareMLP(8), loss_mode="full")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            diffusion(torch.zeros(4, 8)).backward()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        peaks.append(max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))))
    assert peaks[0] > 128 * 128 * 4 * 8  # bytes: eight activations of 128 rows were there at once, so something was measured
    assert peaks[1] < 1.2 * peaks[0]


PEAK = """
import sys, torch
from pathlib import Path
from beta_schedule import LinearSchedule
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareUNet

torch.set_num_threads(1)
net = TimeAwareUNet(1, 32, ch_mult=(1, 2), attention=(False, True))

def peak(T):
    GaussianDiffusion(LinearSchedule(T, 1e-4, 0.02), net, loss_mode="full")(torch.zeros(4, 1, 8, 8)).backward()
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak
    return int(status.split("VmHWM:")[1].split()[0])

warm = peak(1)
print(peak(int(sys.argv[1])) - warm)
"""


@pytest.mark.slow
def test_the_resident_memory_of_loss_full_does_not_grow_with_T():
    # what is freed goes back to the system at once, so that the peak is of what lives and not of how it lies in the heap
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    settings = {"stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": Path(__file__).parents[1]}
    runs = [subprocess.Popen([sys.executable, "-c", PEAK, T], **settings) for T in ("50", "1000")]
    at_50, at_1000 = (int(run.communicate()[0]) for run in runs)
    assert at_50 > 50_000  # KiB: something was measured
    assert at_1000 < 1.2 * at_50


@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (1, 3), (4, 3, 1)])
def test_a_network_that_changes_the_shape_is_refused_where_broadcasting_would_hide_it(shape):
    diffusion = GaussianDiffusion(LinearSchedule(10), Says(torch.zeros(shape)))
    with pytest.raises(ValueError, match=rf"time_aware_net: gives {re.escape(str(list(shape)))} for xt of shape \[4, 3\]"):
        diffusion(torch.zeros(4, 3))


def test_a_diffusion_of_float64_samples_in_float64():
    diffusion = GaussianDiffusion(LinearSchedule(20), TimeAwareMLP(2)).double()
    x0 = diffusion.sample((4, 2), "dpm", 5)
    assert x0.dtype == torch.float64
    assert x0.isfinite().all()


def test_what_a_network_gives_that_is_no_tensor_is_named():
    class Pair(nn.Module):
        def forward(self, xt, t):
            return xt, t

    with pytest.raises(ValueError, match=r"time_aware_net: gives a tuple for xt of shape \[4, 2\]"):
        GaussianDiffusion(LinearSchedule(20), Pair())(torch.zeros(4, 2))


# What is refused, and what is not


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("t", [0, -5, 11])
def test_an_int_outside_1_to_T_is_refused_on_any_device(t, device):
    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), nn.Identity()).to(device)
    with pytest.raises(ValueError, match=rf"t = {t}: every t must lie in 1\.\.10"):
        diffusion.q_sample(torch.zeros(2, 3, device=device), t)


def test_a_time_that_is_no_whole_number_is_refused():
    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), nn.Identity())
    with pytest.raises(ValueError, match="t: a float: must be an int or a long tensor"):
        diffusion.q_sample(torch.zeros(2, 3), 1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tables_are_not_rounded_to_three_digits(dtype):
    with pytest.raises(ValueError, match="the tables of a diffusion need float32"):
        GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), nn.Identity()).to(dtype)


@pytest.mark.parametrize("levels", [1, -5, 2.7, 0.5, math.inf, math.nan, None])
def test_a_number_of_levels_below_two_or_between_two_is_refused(levels):
    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), nn.Identity())
    with pytest.raises(ValueError, match=f"discretized = {levels}: must be"):
        diffusion.variational_bound(torch.zeros(2, 3), discretized=levels)


@pytest.mark.parametrize("mode", ["simple", "full"])
def test_pixels_that_are_not_floats_yet_are_refused(mode):
    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), nn.Identity(), loss_mode=mode)
    with pytest.raises(ValueError, match=r"x of type torch\.uint8: must be floats"):
        diffusion(torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, x: d.variational_bound(x.long()), "x0 of type torch.int64: must be floats"),
        (lambda d, x: d.fit_reverse_variance([x.long()]), "x0 of type torch.int64: must be floats"),
        (lambda d, x: d.fit_reverse_variance([([1.0], {})]), "x0: a list: must be a tensor of floats"),
        (lambda d, x: d.encode(x.long()), "x0 of type torch.int64: must be floats"),
        (lambda d, x: d.sample((2, 3), x_T=x.long()), "x_T of type torch.int64: must be floats"),
        (lambda d, x: d.sample((2, 3), x_T=[[0.0] * 3] * 2), "x_T: a list: must be a tensor of floats"),
        (lambda d, x: d.q_sample(x, True), "t: a bool: must be an int or a long tensor"),
        (lambda d, x: d.q_sample(x, 1, 0.0), r"noise: a float: must have the shape of x, \[2, 3\]"),
        (lambda d, x: d.p_sample(x, 1, torch.randn(3)), r"noise of shape \[3\]: must have the shape of x, \[2, 3\]"),
        (lambda d, x: d.variational_bound(x, timesteps=True), "timesteps = True: must be None or lie in"),
        (lambda d, x: d.trajectory((2, 3), condition=[1]), "condition: a list: must be a dictionary"),
        (lambda d, x: d.sample((2, 3), ["ddpm"]), r"sampler = \['ddpm'\]: must be one of ddpm"),
        (lambda d, x: GaussianDiffusion(10, nn.Identity()), "schedule: a int: must have a float64 tensor alpha_bar"),
        (
            lambda d, x: GaussianDiffusion(LinearSchedule(10), nn.Identity(), prediction=["denoising"]),
            r"prediction = \['denoising'\]: must be one of direct",
        ),
    ],
)
def test_an_argument_of_another_type_is_refused_before_the_network_works(call, message):
    def fails(xt, t):
        raise AssertionError

    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), nn.Identity())
    diffusion.time_aware_net.forward = fails
    with pytest.raises(ValueError, match=f"^{message}"):
        call(diffusion, torch.zeros(2, 3))


class Unfinished:
    @property
    def alpha_bar(self):
        return self.missing


def test_a_schedule_of_ones_own_that_fails_says_how_itself():
    with pytest.raises(AttributeError, match="missing"):
        GaussianDiffusion(Unfinished(), nn.Identity())


@pytest.mark.parametrize("loss_mode", LOSSES)
@pytest.mark.parametrize("shape", [(), (4, 3)], ids=["of the batch", "a pixel"])
def test_a_loss_of_ones_own_that_is_not_one_a_sample_is_named(shape, loss_mode):
    class Own(GaussianDiffusion):
        def _loss(self, mode, x0, t, noise, condition):
            return torch.zeros(shape)

    diffusion = Own(LinearSchedule(10), nn.Identity(), loss_mode=loss_mode)
    with pytest.raises(ValueError, match=rf"^_loss: gives {re.escape(str(list(shape)))} for .* must give one value a sample"):
        diffusion(torch.zeros(4, 3), chunk_size=1)


class Elementwise(nn.Module):
    def forward(self, xt, t):
        return xt / 2


@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("loss_mode", ["simple", "min_snr", "full"])
def test_a_sample_may_be_a_single_number(loss_mode, reverse_variance):
    """x of shape [B] has the losses and the bound of the same numbers as [B, 1]."""
    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), Elementwise(), reverse_variance, loss_mode=loss_mode)
    x0 = torch.rand(5) * 2 - 1
    for method in (diffusion.loss_simple, diffusion.loss_full, diffusion, diffusion.variational_bound):
        results = []
        for x in (x0, x0[:, None]):
            torch.manual_seed(0)
            results.append(method(x))
        torch.testing.assert_close(*results)


def test_no_sample_at_all_has_no_loss():
    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), Elementwise())
    assert diffusion.loss_full(torch.zeros(0, 3)).shape == (0,)
    assert diffusion.variational_bound(torch.zeros(0, 3)).total.shape == (0,)


class Constant(nn.Module):
    """The same x_0_hat everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, xt, t):
        return self.value.expand_as(xt)


@pytest.mark.parametrize("loss_mode", ["simple", "min_snr", "full"])
def test_a_learnt_variance_of_bounded_data_is_that_of_the_bound(loss_mode):
    """x_0 is 0.5 and the network says 1.5, which counts as 1: the best variance assumes the error 0.25, and not 1."""
    schedule = LinearSchedule(10, 0.1, 0.2)
    kind = {"prediction": "reconstruction", "loss_mode": loss_mode, "bounded": True}
    diffusion = GaussianDiffusion(schedule, Constant(1.5), "learnable", **kind)
    x0 = torch.full((200, 2), 0.5)
    book = Textbook(schedule.beta)
    best = (book.posterior_variance + book.mu_from_x0.square() * 0.25)[1:]
    with torch.no_grad():
        diffusion.log_sigma_square.copy_(best.log())
    sum(diffusion.loss(x0, t).mean() for t in range(1, 11)).backward()
    gradient = diffusion.log_sigma_square.grad
    assert gradient.abs().max() < 1e-5
    assert diffusion.time_aware_net.value.grad > 0  # it learns that 1.5 is too much


def test_tables_that_may_not_be_rounded_are_left_as_they_are():
    diffusion = GaussianDiffusion(LinearSchedule(1000), Elementwise())
    before = {name: table.clone() for name, table in diffusion.named_buffers()}
    for convert in (diffusion.half, diffusion.bfloat16, lambda: diffusion.to(torch.float16)):
        with pytest.raises(ValueError, match="the tables of a diffusion need float32"):
            convert()
    assert all(torch.equal(table, before[name]) for name, table in diffusion.named_buffers())


@pytest.mark.parametrize("loss_mode", ["simple", "full"])
def test_a_condition_that_is_none_is_refused(loss_mode):
    """And not taken for a chunk_size, or for no label where it is class 0."""
    diffusion = GaussianDiffusion(LinearSchedule(10), Elementwise(), loss_mode=loss_mode)
    x0, label = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    for condition in ({"label": label}, label, 0, 2.5):
        with pytest.raises(ValueError, match=r"chunk_size.*a condition is given by its name"):
            diffusion(x0, condition)
    first = torch.zeros(1, dtype=torch.long)
    for call in (
        lambda: diffusion(x0, condition=label),
        lambda: diffusion.predict(x0[:1], 5, first),
        lambda: diffusion.sample((1, 3), condition=first),
        lambda: diffusion.variational_bound(x0, condition=label),
    ):
        with pytest.raises(ValueError, match=r'condition: a Tensor: must be a dictionary .* such as {"label": label}'):
            call()
    for batch in ([x0], (x0, label, label), "x0"):
        with pytest.raises(ValueError, match="batches: each must be x_0"):
            diffusion.fit_reverse_variance([batch])


def test_noise_of_another_shape_is_refused():
    diffusion, x0, noise = GaussianDiffusion(LinearSchedule(10), Elementwise()), torch.randn(3, 2), torch.randn(3, 1)
    for call in (diffusion.q_sample, diffusion.loss):
        with pytest.raises(ValueError, match=r"noise of shape \[3, 1\]: must have the shape of x, \[3, 2\]"):
            call(x0, 2, noise)


def test_the_posterior_of_two_shapes_is_refused():
    with pytest.raises(ValueError, match=r"x0 of shape \[3\]: must have the shape of xt, \[3, 1\]"):
        GaussianDiffusion(LinearSchedule(10), Elementwise()).q_posterior(torch.randn(3), torch.randn(3, 1), 2)


def test_the_tables_and_the_network_may_be_float64():
    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), Elementwise()).double()
    assert diffusion.sample((3, 2)).dtype == torch.float64


# As a script


def test_on_a_cpu_the_table_is_small_also_beside_a_card(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("gaussian_diffusion._measure", lambda *args: (0.0, 0.0, 0.0))
    assert main(["--device", "cpu", "--batch-size", "3"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("T = 20, batch 3 of 3 x 16 x 16, base_channels = 32 (small, for want of CUDA)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--timesteps", "0"], "timesteps = 0"),
        (["--timesteps", "many"], "argument --timesteps: invalid int value: 'many'"),
        (["--base-channels", "33"], "base_channels = 33"),
        (["--iterations", "0"], "--iterations must be at least 1"),
        (["--batch-size", "-1"], "--batch-size, --image-size and --iterations must be at least 1"),
        (["--chunk-size", "0"], "chunk_size = 0"),
        (["--device", "nonsense"], "--device nonsense: no such kind of device"),
    ],
    ids=str,
)
def test_a_mistake_ends_the_table_in_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gaussian_diffusion.py"])
    quick = ["--device", "cpu", "--timesteps", "2", "--batch-size", "1", "--image-size", "8", "--base-channels", "8"]
    try:
        code = main([*quick, *flags])
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert said.startswith("gaussian_diffusion.py: ")
    assert said.count("\n") == 1
    assert message in said


class Late(GaussianDiffusion):
    """Draws t in proportion to itself."""

    def _time_density(self):
        t = torch.arange(1, self.T + 1, dtype=torch.float64)
        return t / t.sum()


@pytest.mark.parametrize("time_sampling", ["uniform", "importance"])
def test_times_are_drawn_by_the_density_of_ones_own(time_sampling):
    diffusion = Late(CosineSchedule(10), TimeAwareMLP(1, 4, 1, 4), time_sampling=time_sampling)
    diffusion(torch.zeros(10000, 1))
    share = torch.bincount(diffusion.last_terms[0], minlength=11)[1:] / 10000
    assert torch.allclose(share.double(), torch.arange(1, 11).double() / 55, atol=2e-3)
    assert torch.allclose(share * diffusion.time_weight, torch.full((10,), 0.1), atol=2e-3)


def test_a_time_without_a_chance_is_never_drawn():
    """Nor where the chances add up to a little less than 1: its weight would be infinite."""

    class Early(GaussianDiffusion):
        def _time_density(self):
            return torch.tensor([0.5, 0.49995, 0, 0], dtype=torch.float64)

    diffusion = Early(CosineSchedule(4), TimeAwareMLP(1, 4, 1, 4))
    for _ in range(20):
        assert diffusion(torch.zeros(9000, 1)).isfinite()
        assert diffusion.last_terms[0].unique().tolist() == [1, 2]


def test_a_word_is_not_taken_for_true():
    with pytest.raises(ValueError, match=r"^bounded = 'False': must be True or False$"):
        GaussianDiffusion(CosineSchedule(10), nn.Identity(), bounded="False")


@pytest.mark.parametrize("density", [[1.0] * 10, [0.2] * 5, [0.2] * 6 + [-0.1, 0.1, -0.1, -0.1], [torch.nan] * 10])
def test_a_density_of_the_times_that_is_none_is_refused(density, monkeypatch):
    """Drawn from its sums, all times would be the first ones."""
    monkeypatch.setattr(Late, "_time_density", lambda self: torch.tensor(density, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^_time_density: must be \[T = 10\], at least 0, and add up to 1$"):
        Late(CosineSchedule(10), nn.Identity())


class Computed(GaussianDiffusion):
    """Learns the variance by way of another parameter."""

    def _register_variance(self):
        self.v = nn.Parameter(torch.zeros(self.T))

    @property
    def log_sigma_square(self):
        return self.v - 1


def test_a_variance_that_is_computed_is_trained_and_not_fitted_to_nothing():
    diffusion, batches = Computed(CosineSchedule(10), TimeAwareMLP(1, 4, 1, 4), "learnable"), iter([torch.zeros(4, 1)])
    with pytest.raises(ValueError, match="log_sigma_square: is computed"):
        diffusion.fit_reverse_variance(batches)
    assert len(list(batches)) == 1  # it was refused before the work
    cfg = SimpleNamespace(optimizer="adam", lr=1e-3)
    diffusion(torch.zeros(40, 1)).backward()
    build_optimizer(cfg, diffusion, torch.device("cpu")).step()
    assert diffusion.v.abs().min() > 0
