import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import beta_schedule
from beta_schedule import (
    BetaSchedule,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    QuadraticSchedule,
    SigmoidSchedule,
    SineSchedule,
    SqrtSchedule,
    alpha_bar_of,
)
from discrete_diffusion import DiscreteDiffusion
from gaussian_diffusion import GaussianDiffusion

SCHEDULES = (ConstantSchedule, LinearSchedule, SqrtSchedule, SineSchedule, SigmoidSchedule, QuadraticSchedule, CosineSchedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 2, 7, 1000])
def test_every_schedule_is_T_float64_values_inside_0_1(schedule, timesteps):
    made = schedule(timesteps)
    assert len(made) == timesteps
    for table in (made.beta, made.alpha, made.alpha_bar, made.snr):
        assert table.shape == (timesteps,)
        assert table.dtype == torch.float64
    assert made.beta.min() > 0
    assert made.beta.max() < 1


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (ConstantSchedule, (0.01, 0.01)),
        (LinearSchedule, (1e-4, 0.02)),
        (SqrtSchedule, (1e-4, 0.02)),
        (QuadraticSchedule, (1e-4, 0.02)),
        (SineSchedule, (0.02 * math.sin(math.pi / 2000), 0.02)),
        (SigmoidSchedule, (0.02 / (1 + math.exp(6)), 0.02 / (1 + math.exp(-6)))),
        (CosineSchedule, (4.128e-5, 0.999)),  # of Nichol & Dhariwal 2021, equation 17, by hand
    ],
)
def test_without_arguments_a_schedule_has_1000_steps_and_these_ends(schedule, ends):
    assert len(schedule()) == 1000
    assert schedule().beta[[0, -1]].tolist() == pytest.approx(ends, rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_bar_and_snr_are_the_running_products(schedule):
    made, product = schedule(50), 1.0
    for i, beta in enumerate(made.beta.tolist()):
        product *= 1 - beta
        assert made.alpha[i].item() == pytest.approx(1 - beta, rel=1e-14)
        assert made.alpha_bar[i].item() == pytest.approx(product, rel=1e-12)
        assert made.snr[i].item() == pytest.approx(product / (1 - product), rel=1e-11)


@pytest.mark.parametrize(
    ("schedule", "beta"),
    [
        (ConstantSchedule(5, 0.3), lambda t: 0.3),
        (LinearSchedule(5, 0.1, 0.5), lambda t: 0.1 * t),
        (SqrtSchedule(5, 0.1, 0.5), lambda t: math.sqrt(0.01 + 0.24 * (t - 1) / 4)),
        (QuadraticSchedule(5, 0.01, 0.25), lambda t: (0.1 * t) ** 2),
        (SineSchedule(5, 0.4), lambda t: 0.4 * math.sin(math.pi * t / 10)),
        (SigmoidSchedule(5, 0.4), lambda t: 0.4 / (1 + math.exp(-(3 * t - 9)))),
    ],
    ids=lambda x: type(x).__name__,
)
def test_beta_follows_its_formula(schedule, beta):
    assert schedule.beta.tolist() == pytest.approx([beta(t) for t in range(1, 6)], rel=1e-12)


def test_the_rise_of_sqrt_is_early_and_of_quadratic_late():
    start, middle, end = 1e-4, 500, 0.02
    by_kind = [kind(1001, start, end).beta[middle].item() for kind in (QuadraticSchedule, LinearSchedule, SqrtSchedule)]
    assert by_kind == pytest.approx([((0.01 + math.sqrt(0.02)) / 2) ** 2, 0.01005, math.sqrt((1e-8 + 4e-4) / 2)], rel=1e-9)


def test_linear_defaults_are_those_of_ho_et_al():
    made = LinearSchedule()
    assert (len(made), made.beta[0].item(), made.beta[-1].item()) == (1000, 1e-4, 0.02)
    assert made.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    # section 4: L_T is about 1e-5 bits per dimension, here of data whose mean square is 1/4
    alpha_bar = made.alpha_bar[-1].item()
    bits = 0.5 * (alpha_bar / 4 - alpha_bar - math.log1p(-alpha_bar)) / math.log(2)
    assert 0.5e-5 < bits < 1.5e-5


def test_cosine_is_equation_17_of_nichol_and_dhariwal():
    made = CosineSchedule(1000)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 2, 10, 500, 900):
        assert made.alpha_bar[t - 1].item() == pytest.approx(f(t) / f(0), rel=1e-9)
    assert made.beta.max() == 0.999


@pytest.mark.parametrize(
    ("schedule", "peer"),
    [
        (LinearSchedule, {"beta_schedule": "linear"}),
        (QuadraticSchedule, {"beta_schedule": "scaled_linear"}),
        (CosineSchedule, {"beta_schedule": "squaredcos_cap_v2"}),
        (SigmoidSchedule, {"beta_schedule": "sigmoid", "beta_start": 0.0}),
    ],
)
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_beta_is_that_of_diffusers(schedule, peer, timesteps):
    diffusers = pytest.importorskip("diffusers")
    betas = diffusers.DDPMScheduler(num_train_timesteps=timesteps, **peer).betas  # of float32
    torch.testing.assert_close(schedule(timesteps).beta.float(), betas, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("timesteps", [0, -1, 2.5, "10", None, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bad_timesteps_are_refused(schedule, timesteps):
    with pytest.raises(ValueError, match=f"timesteps = {timesteps!r}.*1..1000000"):
        schedule(timesteps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantSchedule(5, 0.0), "beta_1 = 0"),
        (lambda: ConstantSchedule(5, 1.0), "beta_1 = 1"),
        (lambda: ConstantSchedule(5, math.nan), "beta_1 = nan"),
        (lambda: SineSchedule(5, 1.0), "beta_5 = 1"),
        (lambda: SineSchedule(5, -0.1), "beta_1 = -0"),
        (lambda: SigmoidSchedule(5, 1.1), "beta_4 = 1.04"),
        (lambda: LinearSchedule(5, 0.1, 1.0), "end = 1:"),
        (lambda: SqrtSchedule(5, 0.0, 0.5), "start = 0: must lie"),
        (lambda: QuadraticSchedule(5, -0.1, 0.5), "start = -0.1: must lie"),
        (lambda: CosineSchedule(5, -0.1), "s = -0.1: must be at least 0"),
        (lambda: BetaSchedule(torch.tensor([0.1, 0.2, 1.5], dtype=torch.float64)), "beta_3 = 1.5: .* between 0 and 1"),
    ],
)
def test_a_beta_outside_0_1_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_seven_schedules_are_all_there():
    assert {name for name in vars(beta_schedule) if name.endswith("Schedule")} - {"BetaSchedule"} == {
        schedule.__name__ for schedule in SCHEDULES
    }


@pytest.mark.parametrize(
    ("alpha_bar", "words"),
    [
        ([0.9, 0.5, 0.5], "alpha_bar_3 = 0.5 after 0.5"),  # clipped from below, as is often done
        ([1.0, 0.5], "alpha_bar_1 = 1 after 1"),
        ([0.5, 0.9], "alpha_bar_2 = 0.9 after 0.5"),
        ([0.5, 0.0, 0.0], "alpha_bar_3 = 0 after 0"),
        ([0.5, -0.1], "alpha_bar_2 = -0.1 after 0.5"),
        ([0.5, math.nan], "alpha_bar_2 = nan after 0.5"),
        ([[0.5], [0.4]], r"must be a float64 tensor \[T\]"),
        ([], r"must be a float64 tensor \[T\]"),
    ],
)
def test_an_alpha_bar_without_a_step_or_a_signal_is_refused(alpha_bar, words):
    schedule = SimpleNamespace(alpha_bar=torch.tensor(alpha_bar, dtype=torch.float64))
    for process in (lambda: GaussianDiffusion(schedule, nn.Identity()), lambda: DiscreteDiffusion(schedule, nn.Identity(), 4)):
        with pytest.raises(ValueError, match=f"^schedule: .*{words}"):
            process()


def test_an_alpha_bar_that_is_no_tensor_or_wants_gradients():
    with pytest.raises(ValueError, match="must be a float64 tensor"):
        alpha_bar_of(SimpleNamespace(alpha_bar=[0.5, 0.4]))
    with pytest.warns(UserWarning, match=r"alpha_bar is torch.float32, so that beta_t"):  # of older checkpoints
        taken = alpha_bar_of(SimpleNamespace(alpha_bar=torch.tensor([0.5, 0.25])))
    assert taken.tolist() == [0.5, 0.25]
    assert taken.dtype == torch.float64
    alpha_bar = torch.tensor([0.5, 0.0], dtype=torch.float64, requires_grad=True)  # no signal at T is fine
    assert alpha_bar_of(SimpleNamespace(alpha_bar=alpha_bar)).tolist() == [0.5, 0.0]
    assert not alpha_bar_of(SimpleNamespace(alpha_bar=alpha_bar)).requires_grad
