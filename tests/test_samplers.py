import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from closed_form import GAUSSIAN, MIXTURE, PREDICTIONS, OptimalNet, Textbook, even_in_log_snr
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from beta_schedule import CosineSchedule, LinearSchedule
from gaussian_diffusion import GaussianDiffusion
from samplers import SAMPLERS, Level, even_in_time, register
from time_aware_module import TimeAwareMLP

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def takes_eta(sampler):
    return "eta" in inspect.signature(SAMPLERS[sampler]).parameters


SETTINGS = [(sampler, eta) for sampler in SAMPLERS for eta in ((0.0, 0.5, 1.0) if takes_eta(sampler) else (0.0,))]
DETERMINISTIC = [sampler for sampler in SAMPLERS if sampler != "ddpm"]  # with eta = 0
SHORT = LinearSchedule(60, 1e-3, 0.2)
LONG = LinearSchedule(1000, 1e-4, 0.014)


class Wavy(nn.Module):
    """An arbitrary network, in float64 so that trajectories can be held against each other."""

    def forward(self, xt, t):
        return (2 * xt.double() + 0.1 * t[:, None]).sin() + 0.3 * xt.double()


class WavyMean(nn.Module):
    """The same network's x_0, said as mu."""

    def __init__(self, schedule):
        super().__init__()
        self.book = Textbook(schedule.beta)

    def forward(self, xt, t):
        return self.book.mu_from_x0[t, None] * Wavy()(xt, t) + self.book.mu_from_xt[t, None] * xt.double()


class WavySaid(nn.Module):
    """The same network's x_0, said as eps or as velocity."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.book, self.prediction = Textbook(schedule.beta), prediction

    def forward(self, xt, t):
        alpha_bar, xt = self.book.alpha_bar[t, None], xt.double()
        x0 = Wavy()(xt, t)
        return self.book.target(self.prediction, x0, (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt(), t)


def optimal(prediction, data=GAUSSIAN, schedule=SHORT, reverse_variance="beta"):
    return GaussianDiffusion(schedule, OptimalNet(data, schedule.beta, prediction), reverse_variance, prediction)


def noised_data(data, schedule, size):
    """x_T of the data, drawn from its exact density."""
    alpha_bar = schedule.alpha_bar[-1]
    return (alpha_bar.sqrt() * data.sample(size).double() + (1 - alpha_bar).sqrt() * torch.randn(size, data.n).double()).float()


def flow(xt, alpha_bar_t, alpha_bar_s):
    """The exact solution of the probability-flow ODE on Gaussian data, from x_t to x_s (Song et al. 2021)."""
    mean, variance = GAUSSIAN.means[0], GAUSSIAN.variances.item()

    def spread(alpha_bar):
        return math.sqrt(alpha_bar * variance + 1 - alpha_bar)

    centred = xt.double() - math.sqrt(alpha_bar_t) * mean
    return math.sqrt(alpha_bar_s) * mean + spread(alpha_bar_s) / spread(alpha_bar_t) * centred


# Against diffusers, step by step

PEERS = {
    "ddpm small": ("DDPMScheduler", {"variance_type": "fixed_small"}, "sigma_bar_square", "ddpm", 0.0),
    "ddpm large": ("DDPMScheduler", {"variance_type": "fixed_large"}, "beta", "ddpm", 0.0),
    "ddim 0": ("DDIMScheduler", {"timestep_spacing": "trailing"}, "beta", "ddim", 0.0),
    "ddim 0.4": ("DDIMScheduler", {"timestep_spacing": "trailing"}, "beta", "ddim", 0.4),
    "ddim 1": ("DDIMScheduler", {"timestep_spacing": "trailing"}, "sigma_bar_square", "ddim", 1.0),
    "dpm": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"},
        "beta",
        "dpm",
        0.0,
    ),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", ["all", "some"])
@pytest.mark.parametrize("peer", PEERS)
def test_every_state_is_that_of_diffusers(peer, steps, prediction):
    diffusers = pytest.importorskip("diffusers")
    name, kwargs, reverse_variance, sampler, eta = PEERS[peer]
    if name == "DDIMScheduler":  # takes only even steps
        steps = list(range(60, 0, -1 if steps == "all" else -6))
    else:  # and DDPMScheduler adds no noise after its time 0 only, our t = 1
        steps = list(range(60, 0, -1)) if steps == "all" else [60, 51, 50, 32, 20, 11, 9, 4, 1]

    if name != "DPMSolverMultistepScheduler":
        kwargs = kwargs | {"clip_sample": False}
    said = {"direct": "sample", "reconstruction": "sample", "denoising": "epsilon", "velocity": "v_prediction"}[prediction]
    scheduler = getattr(diffusers, name)(num_train_timesteps=60, prediction_type=said, **kwargs)
    scheduler.alphas_cumprod = SHORT.alpha_bar  # without its rounding to float32
    if name == "DDIMScheduler":
        scheduler.set_timesteps(len(steps))
    else:
        scheduler.set_timesteps(timesteps=[t - 1 for t in steps])
    assert scheduler.timesteps.tolist() == [t - 1 for t in steps]

    net = WavyMean(SHORT) if prediction == "direct" else Wavy()
    diffusion = GaussianDiffusion(SHORT, net, reverse_variance, prediction)
    x = torch.randn(16, 2, dtype=torch.float64)
    states = diffusion.trajectory((16, 2), sampler, steps, eta, x_T=x, generator=torch.Generator().manual_seed(1))
    t, state = next(states)
    assert t == 60
    assert torch.equal(state, x)

    generator = torch.Generator().manual_seed(1)
    noise = {"DDPMScheduler": {"generator": generator}, "DDIMScheduler": {"generator": generator, "eta": eta}}.get(name, {})
    for t, following in zip(steps, [*steps[1:], 0], strict=True):
        x = scheduler.step(Wavy()(x, torch.full((16,), t)), t - 1, x, **noise).prev_sample
        said_t, state = next(states)
        assert said_t == following
        torch.testing.assert_close(state, x, rtol=1e-4, atol=5e-4 * x.abs().max().item())
    assert next(states, None) is None


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_every_state_of_heun_is_that_of_diffusers(clip, prediction):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(num_train_timesteps=60, prediction_type="sample", clip_sample=clip)
    scheduler.alphas_cumprod = SHORT.alpha_bar
    steps = [60, 51, 50, 32, 20, 11, 9, 4, 1]
    scheduler.set_timesteps(timesteps=[t - 1 for t in steps])

    def signal_scale(t):
        return SHORT.alpha_bar[t - 1].sqrt() if t else 1.0

    net = {"direct": WavyMean(SHORT), "reconstruction": Wavy()}.get(prediction) or WavySaid(SHORT, prediction)
    diffusion = GaussianDiffusion(SHORT, net, "beta", prediction)
    x_T = torch.randn(16, 2, dtype=torch.float64)
    states = diffusion.trajectory((16, 2), "heun", steps, clip_x0=clip, x_T=x_T)
    assert torch.equal(next(states)[1], x_T)
    y, calls = x_T / signal_scale(60), iter(scheduler.timesteps)  # diffusers' states are x / sqrt(alpha_bar)
    for t, following in zip(steps, [*steps[1:], 0], strict=True):
        for at in (t, following) if following else (t,):
            time = next(calls)
            assert time == at - 1
            y = scheduler.step(Wavy()(signal_scale(at) * y, torch.full((16,), at)), time, y).prev_sample
        said_t, x = next(states)
        assert said_t == following
        torch.testing.assert_close(x, signal_scale(following) * y, rtol=1e-4, atol=5e-4 * x.abs().max().item())
    assert next(calls, None) is next(states, None) is None


@pytest.mark.parametrize("peer", ["ddpm small", "ddim 0", "dpm"])
def test_clip_x0_is_that_of_diffusers(peer):
    diffusers = pytest.importorskip("diffusers")
    name, kwargs, reverse_variance, sampler, _ = PEERS[peer]
    clip = {"clip_sample": True} if sampler != "dpm" else {"thresholding": True, "sample_max_value": 1.0}
    scheduler = getattr(diffusers, name)(num_train_timesteps=60, **kwargs, **clip)
    scheduler.alphas_cumprod = SHORT.alpha_bar
    if sampler == "dpm":
        scheduler.set_timesteps(timesteps=list(range(59, -1, -1)))
    else:
        scheduler.set_timesteps(60)
    x = torch.randn(16, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    ours = GaussianDiffusion(SHORT, Wavy(), reverse_variance).sample((16, 2), sampler, clip_x0=True, x_T=x, generator=generator)
    generator = torch.Generator().manual_seed(1)
    step = {"ddpm": {"generator": generator}, "ddim": {"use_clipped_model_output": True}, "dpm": {}}[sampler]
    for t in range(60, 0, -1):
        out = Wavy()(x, torch.full((16,), t))
        x = scheduler.step(out[..., None], t - 1, x[..., None], **step).prev_sample[..., 0]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert ours.abs().max() <= 1


# Moments


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "eta"), SETTINGS)
def test_the_samples_have_the_moments_of_the_gaussian(sampler, eta, prediction):
    schedule = even_in_log_snr(200)
    x_T = noised_data(GAUSSIAN, schedule, 10_000)
    x0 = optimal(prediction, GAUSSIAN, schedule).sample(x_T.shape, sampler, eta=eta, x_T=x_T).double()
    torch.testing.assert_close(x0.mean(0), GAUSSIAN.means[0], rtol=0, atol=0.02)
    torch.testing.assert_close(x0.T.cov(), GAUSSIAN.variances * torch.eye(2).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "eta"), SETTINGS)
def test_the_samples_have_the_weights_means_and_variances_of_the_mixture(sampler, eta, prediction):
    schedule = even_in_log_snr(200)
    x_T = noised_data(MIXTURE, schedule, 5000)
    x0 = optimal(prediction, MIXTURE, schedule).sample(x_T.shape, sampler, eta=eta, x_T=x_T).double()
    nearest = torch.cdist(x0, MIXTURE.means).argmin(1)
    for k in range(2):
        mine = x0[nearest == k]
        assert len(mine) / 5000 == pytest.approx(MIXTURE.weights[k].item(), abs=0.025)
        torch.testing.assert_close(mine.mean(0), MIXTURE.means[k], rtol=0, atol=0.03)
        torch.testing.assert_close(mine.T.cov(), MIXTURE.variances[k] * torch.eye(2).double(), rtol=0, atol=0.01)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "eta", "reverse_variance"),
    [("ddpm", 0, "beta"), ("ddpm", 0, "sigma_bar_square"), ("ddim", 0, "beta"), ("ddim", 0.5, "beta"), ("ddim", 1, "beta")],
)
def test_a_chain_of_few_steps_has_the_moments_of_its_recursion(sampler, eta, reverse_variance, prediction):
    # with E[x_0 | x_t] linear in x_t every state is Gaussian, and its mean and variance follow by hand
    schedule = LinearSchedule(6, 0.1, 0.9)
    book, mean, variance = Textbook(schedule.beta), torch.zeros(2).double(), 1.0
    for t in range(6, 0, -1):
        alpha_bar, previous = book.alpha_bar[t], book.previous[t]
        gain = alpha_bar.sqrt() * 0.3 / (alpha_bar * 0.3 + 1 - alpha_bar)  # of E[x_0 | x_t]
        if sampler == "ddpm":
            noise = book.sigma_square(reverse_variance)[t] if t > 1 else 0
            from_xt, from_x0 = book.mu_from_xt[t], book.mu_from_x0[t]
        else:  # Song et al. 2021, equation 12
            noise = eta**2 * book.posterior_variance[t]
            from_xt = ((1 - previous - noise) / (1 - alpha_bar)).sqrt()
            from_x0 = previous.sqrt() - from_xt * alpha_bar.sqrt()
        slope = from_xt + from_x0 * gain
        mean = slope * mean + from_x0 * (1 - gain * alpha_bar.sqrt()) * GAUSSIAN.means[0]
        variance = slope**2 * variance + noise
    x0 = optimal(prediction, GAUSSIAN, schedule, reverse_variance).sample((20_000, 2), sampler, eta=eta).double()
    torch.testing.assert_close(x0.mean(0), mean, rtol=0, atol=0.02)
    assert x0.var(0).mean().item() == pytest.approx(variance.item(), rel=0.035)


@pytest.mark.parametrize("reverse_variance", ["beta", "sigma_bar_square", "learnable"])
def test_a_fitted_variance_on_a_shortened_chain_is_exact_on_gaussian_data(reverse_variance):
    # q(x_s | x_t) of Gaussian data is itself Gaussian, so that the fitted chain is exact however few its steps
    diffusion = optimal("denoising", reverse_variance=reverse_variance)
    diffusion.fit_reverse_variance([GAUSSIAN.sample(8000)])
    steps, x_T = [60, 25, 8, 1], noised_data(GAUSSIAN, SHORT, 40_000)
    for t, xt in diffusion.trajectory(x_T.shape, timesteps=steps, x_T=x_T):
        alpha_bar = 1.0 if t == 0 else SHORT.alpha_bar[t - 1].item()
        expected = alpha_bar * 0.3 + 1 - alpha_bar
        if t == 0:  # the mean of the last step, without its noise
            expected -= GAUSSIAN.x0_error(SHORT.alpha_bar[0]).item()
        assert xt.double().var(0).mean().item() == pytest.approx(expected, rel=0.03)
        torch.testing.assert_close(xt.double().mean(0), math.sqrt(alpha_bar) * GAUSSIAN.means[0], rtol=0, atol=0.03)


def test_one_step_of_a_shortened_chain_has_the_exact_posterior():
    diffusion = optimal("denoising")
    diffusion.fit_reverse_variance([GAUSSIAN.sample(8000)])
    states = dict(diffusion.trajectory((40_000, 2), timesteps=[60, 30], x_T=torch.full((40_000, 2), 0.5)))
    bar_s, bar_t = SHORT.alpha_bar[29], SHORT.alpha_bar[59]
    # x_s ~ N(sqrt(bar_s) m, prior), x_t = sqrt(alpha) x_s + N(0, 1 - alpha)
    alpha, prior = bar_t / bar_s, bar_s * 0.3 + 1 - bar_s
    gain = alpha.sqrt() * prior / (alpha * prior + 1 - alpha)
    mean = bar_s.sqrt() * GAUSSIAN.means[0] + gain * (0.5 - bar_t.sqrt() * GAUSSIAN.means[0])
    torch.testing.assert_close(states[30].double().mean(0), mean, rtol=0, atol=0.02)
    assert states[30].double().var(0).mean().item() == pytest.approx((prior * (1 - gain * alpha.sqrt())).item(), rel=0.025)


@pytest.mark.parametrize("timesteps", [[60, 40, 13, 2], [60, 1], [45, 44, 3]])
def test_a_learnt_variance_a_little_below_the_least_makes_the_steps_of_the_least(timesteps):
    """An assumed error of x_0 cannot be negative; carried to a step of many times, this one would outweigh the variance."""
    learnt, least = (optimal("denoising", MIXTURE, SHORT, variance) for variance in ("learnable", "sigma_bar_square"))
    variance = Textbook(SHORT.beta).sigma_square("sigma_bar_square")[1:]
    learnt.log_sigma_square.data = (0.998 * variance).log().float()
    drawn = [
        [x for _, x in model.trajectory((200, 2), "ddpm", timesteps, generator=torch.Generator().manual_seed(2))]
        for model in (learnt, least)
    ]
    for ours, expected in zip(*drawn, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timesteps", [[60, 40, 13, 2], [60, 1], [45, 44, 3]])
def test_a_learnt_variance_a_little_above_betas_makes_the_steps_of_beta(timesteps):
    """At T, sigma_t^2 hardly depends on the error of x_0 that it assumes, and a long step does."""
    learnt, most = (optimal("denoising", MIXTURE, SHORT, variance) for variance in ("learnable", "beta"))
    learnt.log_sigma_square.data = (1.002 * SHORT.beta).log().float()
    how = {"timesteps": timesteps, "clip_x0": True}
    drawn = [model.sample((200, 2), **how, generator=torch.Generator().manual_seed(2)) for model in (learnt, most)]
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=1e-5)
    assert learnt._levels(learnt.steps(None), True)[-2].x0_error > most._levels(most.steps(None), True)[-2].x0_error


@pytest.mark.parametrize("timesteps", [2, 3, [1995, 1], [1990, 900, 1]])
@pytest.mark.parametrize("end", [0.02, 0.003])
def test_a_learnt_variance_makes_few_steps_exact_though_float32_cannot_hold_it_near_T(timesteps, end):
    """Near T of 2000 steps, c_t^2 e_t is some 1e-10 of sigma_bar_t^2, and what float32 leaves of e_t is 0 or thousands."""
    schedule = LinearSchedule(2000, 1e-4, end)
    book, diffusion = Textbook(schedule.beta), optimal("denoising", GAUSSIAN, schedule, "learnable")
    variance = book.posterior_variance + book.mu_from_x0**2 * GAUSSIAN.x0_error(book.alpha_bar)  # equation 9
    diffusion.log_sigma_square.data = variance[1:].log().float()
    times = diffusion.steps(timesteps)
    x_T = diffusion.q_sample(GAUSSIAN.sample(40_000).float(), times[0])
    x0 = diffusion.sample(x_T.shape, timesteps=times, x_T=x_T).double()
    expected = 0.3 - GAUSSIAN.x0_error(schedule.alpha_bar[0]).item()  # the mean of the last step, without its noise
    assert x0.var(0).mean().item() == pytest.approx(expected, rel=0.05)


def test_a_fitted_variance_of_wide_data_is_exact_in_few_steps():
    """Of x_0 ~ N(0, 16 I), whose best x_0_hat is 16 sqrt(alpha_bar_t) x_t / (16 alpha_bar_t + 1 - alpha_bar_t)."""

    class Best(nn.Module):
        def forward(self, xt, t):
            alpha_bar = SHORT.alpha_bar[t - 1].float()[:, None]
            return 16 * alpha_bar.sqrt() * xt / (16 * alpha_bar + 1 - alpha_bar)

    diffusion = GaussianDiffusion(SHORT, Best(), "learnable", "reconstruction")
    diffusion.fit_reverse_variance([4 * torch.randn(20_000, 2)])
    assert diffusion.sample((20_000, 2), timesteps=6).std().item() == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timesteps", [None, [60, 40, 13, 2]])
def test_ddim_of_eta_1_is_the_ancestral_sampler_of_sigma_bar_square(timesteps, prediction):
    diffusion = optimal(prediction, MIXTURE, reverse_variance="sigma_bar_square")
    ddpm, ddim = (
        diffusion.sample((64, 2), sampler, timesteps, eta, generator=torch.Generator().manual_seed(4))
        for sampler, eta in (("ddpm", 0.0), ("ddim", 1.0))
    )
    torch.testing.assert_close(ddpm, ddim, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "eta"), SETTINGS)
def test_the_last_step_is_what_the_network_says_x0_is(sampler, eta, prediction):
    x1 = torch.randn(8, 2)
    x0 = optimal(prediction, MIXTURE).sample((8, 2), sampler, [1], eta, x_T=x1)
    expected = OptimalNet(MIXTURE, SHORT.beta, "reconstruction")(x1, torch.ones(8, dtype=torch.long))
    torch.testing.assert_close(x0.double(), expected, rtol=1e-4, atol=1e-4)


# The probability-flow ODE


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_20_steps_of_dpm_even_in_log_snr_come_within_2_percent_of_the_exact_solution(prediction):
    log_snr = LONG.alpha_bar.logit()
    wanted = torch.linspace(log_snr[-1].item(), log_snr[0].item(), 20, dtype=torch.float64)
    steps = [int((log_snr - value).abs().argmin()) + 1 for value in wanted]
    x_T = noised_data(GAUSSIAN, LONG, 500)
    exact = flow(x_T, LONG.alpha_bar[-1].item(), 1.0)
    dpm, ddim = (
        (optimal(prediction, GAUSSIAN, LONG).sample(x_T.shape, sampler, steps, x_T=x_T) - exact).square().mean().sqrt().item()
        for sampler in ("dpm", "ddim")
    )
    assert dpm < 0.02 * math.sqrt(0.3)  # of the data's standard deviation
    assert ddim > 5 * dpm


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm", 2), ("heun", 2)])
def test_the_order_of_convergence(sampler, order):
    # To a fixed time above 0, as the final step to 0 is of first order and spans an infinite log snr, and by steps that are
    # even in t, whose log snr changes smoothly. The last of the times is the one before that final step.
    schedule = LinearSchedule(4800, 0.1 / 4800, 12 / 4800)
    diffusion = GaussianDiffusion(schedule, OptimalNet(GAUSSIAN, schedule.beta, "reconstruction"), "beta", "reconstruction")
    x_T = noised_data(GAUSSIAN, schedule, 100).double()
    exact = flow(x_T, schedule.alpha_bar[-1].item(), schedule.alpha_bar[479].item())
    errors = []
    for n in (20, 40, 80, 160, 320):
        steps = torch.linspace(4800, 480, n + 1).int().tolist()
        states = dict(diffusion.trajectory(x_T.shape, sampler, steps, x_T=x_T))
        errors.append((states[480] - exact).square().mean().sqrt().item())
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.15)
    assert math.log2(errors[0] / errors[-1]) / 4 > 0.8 * order


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_deterministic_sampler_is_a_function_of_x_T(sampler):
    diffusion, x_T = optimal("denoising", MIXTURE), torch.randn(8, 2)
    assert torch.equal(*(diffusion.sample((8, 2), sampler, 12, x_T=x_T) for _ in range(2)))


# Randomness, modes and times


@pytest.mark.parametrize(("sampler", "eta"), SETTINGS)
def test_the_same_seed_gives_the_same_samples(sampler, eta):
    first, again, other = (
        optimal("denoising").sample((8, 2), sampler, 10, eta, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_gradients_are_off_while_sampling_and_restored_after(training):
    seen = []

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, xt, t):
            seen.append((self.training, torch.is_grad_enabled()))
            return self.linear(xt)

    diffusion = GaussianDiffusion(SHORT, Dropping()).train(training)
    assert not diffusion.sample((4, 2), timesteps=5).requires_grad
    assert seen == [(False, False)] * 5
    assert diffusion.training is training
    assert diffusion.time_aware_net.training is training
    assert torch.is_grad_enabled()


def test_a_trajectory_left_early_restores_the_mode():
    diffusion = optimal("denoising")
    states = diffusion.trajectory((4, 2))
    next(states), next(states)
    states.close()
    assert diffusion.training


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    ("timesteps", "visited"),
    [
        (None, list(range(60, -1, -1))),
        (60, list(range(60, -1, -1))),
        (2, [60, 1, 0]),
        (3, [60, 30, 1, 0]),
        (5, [60, 45, 30, 16, 1, 0]),
        (1, [60, 0]),
        ((50, 7), [50, 7, 0]),
        (range(60, 0, -20), [60, 40, 20, 0]),
    ],
    ids=str,
)
def test_the_times_visited(timesteps, visited, sampler):
    asked = []

    class Watch(nn.Module):
        def forward(self, xt, t):
            asked.append(t.tolist())
            return xt

    times = [t for t, _ in GaussianDiffusion(SHORT, Watch()).trajectory((2, 3), sampler, timesteps)]
    assert times == visited
    assert asked == [[t, t] for t in visited[:-1]]  # one network call a step


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("timesteps", [None, 1, 2, 7, 60, (50, 7)])
def test_the_network_calls_are_counted(timesteps, sampler):
    asked = []

    class Watch(nn.Module):
        def forward(self, xt, t):
            asked.append(t)
            return xt

    diffusion = GaussianDiffusion(SHORT, Watch())
    diffusion.sample((2, 3), sampler, timesteps)
    steps = 60 if timesteps is None else len(timesteps) if isinstance(timesteps, tuple) else timesteps
    expected = 2 * steps - 1 if sampler == "heun" else steps  # its last step is Euler's
    assert len(asked) == expected
    assert diffusion.network_calls(timesteps, sampler) == expected


@pytest.mark.parametrize("sampler", ["dpm", "heun"])
@pytest.mark.parametrize("count", [1, 2, 5, 20, 59, 60])
def test_a_number_of_second_order_steps_is_spread_evenly_in_log_snr(count, sampler):
    diffusion = optimal("denoising")
    steps = diffusion.steps(count, sampler)
    assert len(steps) == len(set(steps)) == count
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == 60
    if count == 1:
        return
    assert steps[-1] == 1
    log_snr = (SHORT.alpha_bar / (1 - SHORT.alpha_bar)).log()
    gaps = log_snr[torch.tensor(steps) - 1].diff()
    if count == 5:  # few enough to find times near the even ones
        assert gaps.max() < 1.3 * gaps.min()


@pytest.mark.parametrize(("sampler", "in_noise"), [("dpm", 0.25), ("heun", 1)])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_the_times_of_a_spacing_are_the_nearest_to_even_steps(count, sampler, in_noise):
    log_snr = Textbook(CosineSchedule(1000).beta).alpha_bar[1:].logit()
    coordinate = torch.where(log_snr > -10.2, log_snr, -10.2 + in_noise * (log_snr + 10.2))  # whose even steps are wanted
    wanted = torch.linspace(coordinate[-1].item(), coordinate[0].item(), count, dtype=torch.float64)
    times = [int((coordinate - value).abs().argmin()) + 1 for value in wanted]
    assert SAMPLERS[sampler].spacing(CosineSchedule(1000).alpha_bar, count) == times


@pytest.mark.parametrize("sampler", ["dpm", "heun"])
def test_times_that_would_coincide_are_moved_apart_by_one(sampler):
    alpha_bar = torch.tensor([10, 9.9, 9.8, 9.7, 0], dtype=torch.float64).sigmoid()  # 3.3 is nearest to 0, as 0 itself is
    assert SAMPLERS[sampler].spacing(alpha_bar, 4) == [5, 4, 3, 1]


@pytest.mark.parametrize("sampler", ["dpm", "heun"])
@pytest.mark.parametrize(
    ("alpha_bar", "count", "times"),
    [([0.0], 1, [1]), ([0.5, 0.0], 1, [2]), ([0.5, 0.0], 2, [2, 1]), ([0.9, 0.5, 0.0], 2, [3, 2])],
)
def test_x_T_without_signal_is_visited_first(alpha_bar, count, times, sampler):
    assert SAMPLERS[sampler].spacing(torch.tensor(alpha_bar, dtype=torch.float64), count) == times


@pytest.mark.parametrize(("count", "most"), [(8, 0.07), (12, 0.04), (25, 0.014)])
def test_few_steps_of_dpm_keep_the_spread_of_data_by_a_schedule_with_much_noise(count, most):
    """The exact flow takes a coordinate of x_T, of variance 1, to that of the data, as strong components of images have it."""
    schedule = CosineSchedule(1000)
    std = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0, 30.0], dtype=torch.float64)
    alpha_bar = Textbook(schedule.beta).alpha_bar

    class Optimal(nn.Module):
        def forward(self, xt, t):
            signal = alpha_bar[t, None]
            return signal.sqrt() * std**2 / (signal * std**2 + 1 - signal) * xt.double()

    diffusion = GaussianDiffusion(schedule, Optimal(), prediction="reconstruction")
    error, error_of_even = (
        (diffusion.sample((1, 6), "dpm", times, x_T=torch.ones(1, 6)) / std - 1).abs().max()
        for times in (count, SAMPLERS["heun"].spacing(schedule.alpha_bar, count))
    )
    assert error < most
    assert error_of_even > 1.8 * error


def test_every_state_of_a_trajectory_can_be_kept():
    diffusion = optimal("denoising")
    x_T = torch.randn(4, 2)
    before = x_T.clone()
    kept = [x for _, x in diffusion.trajectory((4, 2), timesteps=10, x_T=x_T)]
    assert torch.equal(x_T, before)
    assert len({tuple(x.flatten().tolist()) for x in kept}) == 11


def test_images_are_sampled_in_their_shape():
    class Shrink(nn.Module):
        def forward(self, xt, t):
            return 0.3 * xt

    assert GaussianDiffusion(SHORT, Shrink()).sample((2, 3, 4, 5), timesteps=4).shape == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sampler": "euler"}, f"sampler = 'euler'.*{', '.join(SAMPLERS)}"),
        ({"sampler": "heun", "eta": 0.5}, "eta = 0.5: only the sampler 'ddim' has it, not 'heun'"),
        ({"timesteps": 0}, r"timesteps = 0.*1\.\.60"),
        ({"timesteps": -3}, r"timesteps = -3.*1\.\.60"),
        ({"timesteps": 61}, r"timesteps = 61.*1\.\.60"),
        ({"timesteps": []}, r"timesteps = \[\].*descend"),
        ({"timesteps": 2.5}, r"timesteps = \[2.5\]: must be whole numbers"),
        ({"timesteps": True}, r"timesteps = \[True\]: must be whole numbers"),
        ({"timesteps": [True]}, r"timesteps = \[True\]: must be whole numbers"),
        ({"timesteps": torch.tensor(3)}, r"timesteps = \[tensor\(3\)\]: must be whole numbers"),
        ({"timesteps": [61, 3]}, r"timesteps = \[61, 3\].*60\.\.1"),
        ({"timesteps": [60, 0]}, r"timesteps = \[60, 0\].*60\.\.1"),
        ({"timesteps": [60, 5, 5, 1]}, "timesteps = .*without a repeat"),
        ({"timesteps": [1, 30, 60]}, "timesteps = .*must descend"),
        ({"sampler": "ddim", "eta": -0.1}, "eta = -0.1.*between 0 and 1"),
        ({"sampler": "ddim", "eta": 1.1}, "eta = 1.1.*between 0 and 1"),
        ({"sampler": "ddim", "eta": math.nan}, "eta = nan.*between 0 and 1"),
        ({"x_T": torch.zeros(2, 3)}, r"x_T of shape \[2, 3\].*\[4, 2\]"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_at_the_call(bad, message):
    diffusion = optimal("denoising")
    for call in (diffusion.trajectory, diffusion.sample):  # trajectory: before its first item is asked for
        with pytest.raises(ValueError, match=message):
            call((4, 2), **bad)


def test_times_may_be_numpys():
    diffusion = optimal("denoising")
    assert diffusion.steps(np.int64(5)) == diffusion.steps(5)
    assert diffusion.steps(np.array([50, 7, 1])) == [50, 7, 1]
    assert diffusion.sample((4, 2), "dpm", np.array([50, 7, 1])).isfinite().all()


# A sampler of one's own


def own(predict_x0, x, levels, normal, eta=0.3):
    """Goes to what the network says x_0 is, and says what it was given."""
    own.given = (levels, eta)
    for level in levels[:-1]:
        x = predict_x0(x, level.t)
        yield x


def test_the_eta_that_a_sampler_of_ones_own_has_stays_unless_another_is_asked_for():
    diffusion = GaussianDiffusion(SHORT, OptimalNet(GAUSSIAN, SHORT.beta, "denoising"))

    def draw(sampler, **more):
        return diffusion.sample((4, 2), sampler, 5, **more, generator=torch.Generator().manual_seed(0))

    ancestral = partial(SAMPLERS["ddim"], eta=1.0)
    assert torch.equal(draw(ancestral), draw("ddim", eta=1.0))
    assert torch.equal(draw(ancestral, eta=0.5), draw("ddim", eta=0.5))
    with pytest.raises(ValueError, match=r"eta = 0.5: only the sampler 'ddim' has it, not 'dpm'"):
        draw(partial(SAMPLERS["dpm"]), eta=0.5)


def test_a_function_is_a_sampler_too():
    diffusion = GaussianDiffusion(SHORT, OptimalNet(GAUSSIAN, SHORT.beta, "denoising"), "sigma_bar_square")
    states = list(diffusion.trajectory((4, 2), own, 3, eta=0.7))
    assert [t for t, _ in states] == [60, 30, 1, 0]  # even in t, as it names no spacing
    levels, eta = own.given
    assert eta == 0.7
    assert levels[-1] == Level(0, 1.0, 0.0)
    for level in levels[:-1]:
        assert level.alpha_bar == SHORT.alpha_bar[level.t - 1].item()
        assert level.x0_error == pytest.approx(1 - level.alpha_bar if level.t == 1 else 0)  # what sigma_bar_square assumes
    assert diffusion.network_calls(3, own) == 3


class Own:
    """A sampler that is an object."""

    def __call__(self, *args, **kwargs):
        return own(*args, **kwargs)


@pytest.mark.parametrize("sampler", [partial(own, eta=0.5), Own()], ids=["partial", "object"])
def test_whatever_can_be_called_is_a_sampler(sampler):
    diffusion = optimal("denoising")
    assert diffusion.steps(3, sampler) == [60, 30, 1]
    assert diffusion.network_calls(3, sampler) == 3
    x_T = torch.randn(4, 2)
    states = [list(diffusion.trajectory((4, 2), each, 3, x_T=x_T)) for each in (sampler, own)]
    assert all(t == s and torch.equal(x, y) for (t, x), (s, y) in zip(*states, strict=True))
    with pytest.raises(ValueError, match=r"eta = 0.5: only the sampler 'ddim' has it, not <"):
        diffusion.trajectory((4, 2), Own(), eta=0.5)


@pytest.mark.parametrize("t", [0, -1, 61])
def test_a_sampler_of_ones_own_that_asks_at_another_time_is_told_so(t):
    def beyond(predict_x0, x, levels, normal):
        yield from (predict_x0(x, t) for _ in levels[1:])

    with pytest.raises(ValueError, match=rf"^sampler: asks for x_0 at t = {t}: must ask at t in 1\.\.60$"):
        optimal("denoising").sample((4, 2), beyond, 3)


def test_a_sampler_of_ones_own_may_ask_at_a_time_that_is_a_tensor():
    def by_tensors(predict_x0, x, levels, normal):
        yield from (predict_x0(x, torch.tensor(level.t)) for level in levels[:-1])

    def by_ints(predict_x0, x, levels, normal):
        yield from (predict_x0(x, level.t) for level in levels[:-1])

    x_T = torch.randn(4, 2)
    assert torch.equal(*(optimal("denoising").sample((4, 2), rule, 3, x_T=x_T) for rule in (by_tensors, by_ints)))


def test_the_network_calls_of_a_sampler_that_looks_at_whole_images_are_counted():
    def clipped(predict_x0, x, levels, normal):
        for level in levels[:-1]:
            x = predict_x0(x, level.t)
            x = x / x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)
            yield x

    assert GaussianDiffusion(SHORT, nn.Identity()).network_calls(5, clipped) == 5


def test_a_registered_sampler_is_known_by_its_name_and_spreads_its_steps_itself(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "jump", None)  # taken out after the test

    @register(lambda alpha_bar, count: [len(alpha_bar), *range(count - 1, 0, -1)])
    def jump(predict_x0, x, levels, normal):
        for level in levels[:-1]:
            x = predict_x0(x, level.t)
            yield x

    times = [t for t, _ in optimal("denoising").trajectory((4, 2), "jump", 4)]
    assert times == [60, 3, 2, 1, 0]


def function_named(name, module):
    def sampler(predict_x0, x, levels, normal):
        yield from (x for _ in levels[:-1])

    sampler.__name__, sampler.__module__ = name, module
    return sampler


def test_a_name_that_another_module_registered_is_refused_and_ones_own_may_be_registered_again(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "jump", None)  # taken out after the test
    before = dict(SAMPLERS)
    ddim = function_named("ddim", __name__)
    with pytest.raises(ValueError, match=r"^sampler 'ddim': is registered by samplers; give yours another name$"):
        register(even_in_time)(ddim)
    assert before == SAMPLERS
    assert not hasattr(ddim, "spacing")
    for _ in range(2):  # as when a cell of a notebook is run again
        jump = function_named("jump", __name__)
        assert register(even_in_time)(jump) is jump is SAMPLERS["jump"]
    with pytest.raises(ValueError, match=f"'jump': is registered by {__name__}"):
        register(even_in_time)(function_named("jump", "another"))
    assert SAMPLERS["jump"] is jump


def too_few(predict_x0, x, levels, normal):
    yield from (x for _ in levels[:-2])


def a_single_state(predict_x0, x, levels, normal):
    return x


def another_shape(predict_x0, x, levels, normal):
    yield x
    yield x[:, :1]  # which would broadcast


def no_state(predict_x0, x, levels, normal):
    yield x, levels


@pytest.mark.parametrize(
    ("sampler", "found", "t", "given"),
    [
        (too_few, "a NoneType", 0, [60, 31, 7]),
        (a_single_state, r"a tensor of \[2\]", 31, [60]),
        (another_shape, r"a tensor of \[4, 1\]", 7, [60, 31]),
        (no_state, "a tuple", 31, [60]),
    ],
)
def test_a_sampler_of_ones_own_that_gives_no_state_is_told_so_with_the_time(sampler, found, t, given):
    states = optimal("denoising").trajectory((4, 2), sampler, [60, 31, 7])
    assert [next(states)[0] for _ in given] == given
    with pytest.raises(ValueError, match=rf"^sampler: gives {found} at t = {t}: must yield x there, of shape \[4, 2\]$"):
        next(states)


def test_a_sampler_of_ones_own_that_gives_more_states_than_times_is_told_so():
    with pytest.raises(ValueError, match=r"^sampler: gives a state after x_0"):
        optimal("denoising").sample((4, 2), lambda predict_x0, x, levels, normal: [x] * len(levels), [60, 31, 7])


def test_the_states_of_a_sampler_of_ones_own_are_those_it_gives_in_any_sequence():
    x_T = torch.randn(4, 2)
    halves = [x_T / 2, x_T / 4, x_T / 8]
    states = list(optimal("denoising").trajectory((4, 2), lambda *_: halves, [60, 31, 7], x_T=x_T))
    assert [t for t, _ in states] == [60, 31, 7, 0]
    assert all(x is expected for (_, x), expected in zip(states, [x_T, *halves], strict=True))


def test_a_bug_in_a_sampler_of_ones_own_shows_its_line():
    def broken(predict_x0, x, levels, normal):
        yield x + None

    with pytest.raises(TypeError) as caught:
        optimal("denoising").sample((4, 2), broken)
    assert caught.traceback[-1].name == "broken"


# On a device that works ahead of the host, here one that only knows the shapes of its tensors


class Scale(nn.Module):
    def forward(self, xt, t):
        return xt * t.view(-1, 1)


@pytest.mark.parametrize(("sampler", "eta"), SETTINGS)
@pytest.mark.parametrize("clip_x0", [False, True])
def test_no_step_waits_for_the_device(sampler, eta, clip_x0, monkeypatch, fake_cuda):
    diffusion = GaussianDiffusion(SHORT, Scale())
    levels = diffusion._levels([60, 31, 7, 1], clip_x0)  # read before the first step
    monkeypatch.setattr(diffusion, "_levels", lambda steps, clip_x0: levels)
    with FakeTensorMode():
        diffusion._apply(lambda table: torch.empty(table.shape, device="cuda"))
        x0 = diffusion.sample((2, 3), sampler, [60, 31, 7, 1], eta, clip_x0)
        assert (x0.device.type, x0.shape) == ("cuda", (2, 3))


@pytest.mark.usefixtures("fake_cuda")
def test_the_bound_waits_for_no_device_and_the_fit_only_at_its_end():
    diffusion, fitted = GaussianDiffusion(SHORT, Scale()), []
    diffusion._alpha_bar = SHORT.alpha_bar.numpy()  # stays a table of the host
    with FakeTensorMode():
        diffusion._apply(lambda table: torch.empty(table.shape, device="cuda"))
        for timesteps in (None, 7):
            assert diffusion.variational_bound(torch.zeros(2, 3, device="cuda"), timesteps=timesteps).total.shape == (2,)

        def batches():
            for i in range(3):
                yield torch.zeros(2, 3, device="cuda")
                fitted.append(i)

        with pytest.raises(DataDependentOutputException):  # is the error finite?
            diffusion.fit_reverse_variance(batches())
    assert fitted == [0, 1, 2]


# No signal at T (Lin et al. 2023, arXiv:2305.08891)


class ZeroTerminal:
    """A cosine schedule of 200 steps, rescaled so that sqrt(alpha_bar) ends at 0 exactly."""

    def __init__(self):
        scale = CosineSchedule(200).alpha_bar.sqrt()
        self.alpha_bar = ((scale - scale[-1]) * scale[0] / (scale[0] - scale[-1])).square()
        self.beta = 1 - self.alpha_bar / torch.cat([torch.ones(1).double(), self.alpha_bar[:-1]])


@pytest.mark.parametrize("timesteps", [None, 40])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_signal_at_T_samples_have_the_moments_of_the_data(sampler, timesteps):
    schedule = ZeroTerminal()
    assert schedule.alpha_bar[-1] == 0
    diffusion = optimal("velocity", schedule=schedule)
    diffusion.fit_reverse_variance([GAUSSIAN.sample(500)])
    steps = diffusion.steps(timesteps, sampler)
    assert steps[0] == 200
    assert steps[-1] == 1
    assert len(set(steps)) == (timesteps or 200)
    x0 = diffusion.sample((20_000, 2), sampler, timesteps).double()
    deviation = GAUSSIAN.variances.sqrt().item()
    assert (x0.mean(0) - GAUSSIAN.means[0]).abs().max() < 5 * deviation / math.sqrt(len(x0)) + 2e-3
    assert (x0.std(0) / deviation - 1).abs().max() < 0.04


def test_with_next_to_no_signal_from_some_time_on_samples_have_the_moments_of_the_data():
    """alpha_bar falls to 1e-102, far below what float32 holds, through all that it nearly holds."""
    schedule = LinearSchedule(1000, 1e-4, 0.4)
    x0 = optimal("velocity", schedule=schedule).sample((5_000, 2), "heun").double()  # whose nu is 1 / sqrt(alpha_bar)
    deviation = GAUSSIAN.variances.sqrt().item()
    assert (x0.mean(0) - GAUSSIAN.means[0]).abs().max() < 5 * deviation / math.sqrt(len(x0)) + 2e-3
    assert (x0.std(0) / deviation - 1).abs().max() < 0.05


def test_a_learnt_variance_is_defined_also_where_no_signal_is_left():
    diffusion = GaussianDiffusion(LinearSchedule(1000, 1e-4, 0.4), TimeAwareMLP(2), "learnable", "velocity")
    assert diffusion._assumed_x0_error().isfinite().all()
    assert diffusion.sample((4, 2), x_T=torch.zeros(4, 2)).isfinite().all()


def test_without_signal_at_T_eps_does_not_tell_x0_and_is_refused():
    with pytest.raises(ValueError, match="alpha_bar_T = 0: too small for prediction = 'denoising'"):
        optimal("denoising", schedule=ZeroTerminal())


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_without_signal_at_T_the_first_step_is_from_the_mean_of_the_data(sampler):
    diffusion, x_T = optimal("velocity", schedule=ZeroTerminal()), torch.randn(5, 2)
    (_, first), (t, x), *_ = diffusion.trajectory((5, 2), sampler, [200, 60, 1], x_T=x_T)
    assert torch.equal(first, x_T)
    alpha_bar = ZeroTerminal().alpha_bar[t - 1].item()
    expected = math.sqrt(1 - alpha_bar) * x_T + math.sqrt(alpha_bar) * GAUSSIAN.means[0].float()
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


def test_without_signal_at_T_an_encoding_leads_back():
    diffusion = optimal("velocity", schedule=ZeroTerminal())
    x0 = GAUSSIAN.sample(500)
    x_T = diffusion.encode(x0)
    torch.testing.assert_close(diffusion.sample(x0.shape, "ddim", x_T=x_T), x0, rtol=0, atol=2e-2)
    # of a Gaussian the flow keeps (x - mean) / deviation
    expected = (x0.double() - GAUSSIAN.means[0]) / GAUSSIAN.variances.sqrt()
    assert (x_T - expected).abs().mean() < 0.05
    assert diffusion.encode(x0, timesteps=1).isfinite().all()  # in one step from all signal to none


# States that are looked at one at a time


class Dropping(nn.Module):
    """A network that says whether dropout is on."""

    def __init__(self):
        super().__init__()
        self.dropout, self.modes = nn.Dropout(), []

    def forward(self, xt, t):
        self.modes.append(self.dropout.training)
        return xt


def test_between_two_states_every_module_is_in_the_mode_it_was_in():
    net = Dropping()
    diffusion = GaussianDiffusion(SHORT, net).train()
    first, second = (diffusion.trajectory((2, 2), timesteps=count) for count in (3, 6))
    for _ in range(4):
        next(first, None), next(second)
        assert diffusion.training
        assert net.dropout.training
    next(second)  # where the first one has ended
    assert not any(net.modes)
    assert len(net.modes) == 3 + 4
    torch.testing.assert_close(torch.is_grad_enabled(), True)
