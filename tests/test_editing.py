import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from closed_form import GAUSSIAN, MIXTURE, Correlated, CorrelatedNet, OptimalNet, Textbook, smooth_images
from torch import nn

from beta_schedule import CosineSchedule, LinearSchedule
from discrete_diffusion import DiscreteDiffusion
from editing import edit, inpaint, interpolate, posterior_sample, slerp
from gaussian_diffusion import GaussianDiffusion

SCHEDULE = LinearSchedule(1000)
IMAGES = smooth_images(2)
SHAPE = (3, 2, 2)
SIZE = 4000


def images_model(reverse_variance="beta", schedule=SCHEDULE):
    return GaussianDiffusion(schedule, CorrelatedNet(IMAGES, schedule.beta), reverse_variance, "reconstruction")


def optimal(data, schedule):
    return GaussianDiffusion(schedule, OptimalNet(data, schedule.beta, "reconstruction"), "beta", "reconstruction")


def assert_drawn_from(x, expected, bias=0.0):
    """Samples x [N, D] have that mean and covariance, within 5 standard errors, in every direction of the covariance.

    bias is what the chain's steps may take from a variance or add to it, as a share.
    """
    x = x.flatten(1).double()
    values, vectors = torch.linalg.eigh(expected.covariance)
    known = values < 1e-9 * values[-1]
    along = (x - expected.mean) @ vectors
    assert along[:, known].abs().max() < 1e-2 if known.any() else True
    along = along[:, ~known] / values[~known].sqrt()
    assert along.mean(0).abs().max() < 5 / math.sqrt(len(x))
    error = along.T.cov() - torch.eye(along.shape[1])
    assert error.diagonal().abs().max() < 5 * math.sqrt(2 / len(x)) + bias
    assert (error - error.diagonal().diag()).abs().max() < 5 / math.sqrt(len(x)) + bias


# SDEdit


@pytest.mark.parametrize("strength", [0.1, 0.3, 1.0])
def test_an_edit_has_the_moments_of_noise_and_back(strength):
    # x_t of x0 is Gaussian, and p(x0 | x_t) too, whose mean is linear in x_t
    x0 = torch.tensor([1.0, 0.2])
    data = GAUSSIAN.variances.item()
    alpha_bar = SCHEDULE.alpha_bar[round(1000 * strength) - 1].item()
    gain = math.sqrt(alpha_bar) * data / (alpha_bar * data + 1 - alpha_bar)
    mean = GAUSSIAN.means[0] + gain * math.sqrt(alpha_bar) * (x0 - GAUSSIAN.means[0])
    variance = gain**2 * (1 - alpha_bar) + data * (1 - alpha_bar) / (alpha_bar * data + 1 - alpha_bar)
    diffusion = optimal(GAUSSIAN, SCHEDULE)
    diffusion.fit_reverse_variance([GAUSSIAN.sample(200)])
    edited = edit(diffusion, x0.expand(SIZE, 2), strength)
    assert_drawn_from(edited, Correlated(mean, variance * torch.eye(2)), bias=0.01)


def test_an_edit_of_strength_0_is_the_image_itself():
    x0 = torch.randn(3, 2)
    assert torch.equal(edit(optimal(GAUSSIAN, SCHEDULE), x0, 0), x0)


def test_an_edit_visits_the_times_up_to_its_strength():
    seen = []

    class Watch(nn.Module):
        def forward(self, xt, t):
            seen.append(t[0].item())
            return 0 * xt

    edit(GaussianDiffusion(SCHEDULE, Watch()), torch.zeros(1, 2), 0.35, "ddim", [900, 351, 350, 200, 1])
    assert seen == [350, 200, 1]
    seen.clear()
    edit(GaussianDiffusion(SCHEDULE, Watch()), torch.zeros(1, 2), 0.5, "ddim", [1000, 400, 1])  # from 500, as it says
    assert seen == [500, 400, 1]


class Scaled(nn.Module):
    """Says k x_t, and notes the times."""

    def __init__(self, k):
        super().__init__()
        self.k, self.seen = k, []

    def forward(self, xt, t):
        self.seen.append(int(t[0]))
        return self.k * xt


def scaled(k=0.5, schedule=SCHEDULE):
    return GaussianDiffusion(schedule, Scaled(k), prediction="reconstruction")


def seeded():
    return torch.Generator().manual_seed(1)


def test_the_generator_decides_every_draw_of_an_edit():
    one, other = (edit(scaled(), torch.zeros(3, 2), 0.5, timesteps=4, generator=seeded()) for _ in range(2))
    assert torch.equal(one, other)


def test_an_edit_is_clipped():
    assert edit(scaled(9.0), torch.ones(30, 2), 0.5, "ddim", 4, clip_x0=True).abs().max() <= 1


def test_an_edit_starts_at_the_nearest_time_and_has_the_spacing_of_its_sampler():
    diffusion = scaled()
    edit(diffusion, torch.zeros(1, 2), 0.5004, "dpm", 8)
    assert diffusion.time_aware_net.seen == [500, *(t for t in diffusion.steps(8, "dpm") if t < 500)]


# Encodings


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_encode_then_ddim_comes_back_with_an_error_of_second_order(data):
    x0, errors = data.sample(100).double(), []
    for steps in (100, 200, 400):
        schedule = LinearSchedule(steps, 0.1 / steps, 12 / steps)  # also the first step shrinks
        diffusion = optimal(data, schedule)
        back = diffusion.sample(x0.shape, "ddim", x_T=diffusion.encode(x0))
        errors.append((back - x0).square().mean().sqrt().item())
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_encode_comes_back_from_where_next_to_no_signal_is_left(data):
    schedule, x0 = CosineSchedule(1000), data.sample(200)  # x_T holds 2e-9 of the variance: an error in eps grows by 2e4
    diffusion, errors = optimal(data, schedule), []
    for steps in (50, 200):
        back = diffusion.sample(x0.shape, "ddim", steps, x_T=diffusion.encode(x0, steps))
        errors.append((back - x0).square().mean().sqrt().item())
    assert errors[1] < 0.001
    assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(2, abs=0.3)


def test_the_encoding_of_gaussian_data_is_that_of_the_exact_flow():
    x0, errors = GAUSSIAN.sample(100).double(), []
    mean, variance = GAUSSIAN.means[0], GAUSSIAN.variances.item()
    for steps in (200, 400, 800):
        schedule = LinearSchedule(steps, 0.1 / steps, 12 / steps)
        alpha_bar = schedule.alpha_bar[-1].item()
        spread = math.sqrt((alpha_bar * variance + 1 - alpha_bar) / variance)
        exact = math.sqrt(alpha_bar) * mean + spread * (x0 - mean)
        errors.append((optimal(GAUSSIAN, schedule).encode(x0) - exact).square().mean().sqrt().item())
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.2)  # as ddim's own


def test_slerp_walks_the_arc():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for share in (0, 0.25, 0.5, 1):
        angle = share * math.pi / 2
        torch.testing.assert_close(slerp(a, b, share), 2 * torch.tensor([[math.cos(angle), math.sin(angle)]]))
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)


def test_an_interpolation_goes_from_the_one_to_the_other():
    a, b = MIXTURE.sample(5), MIXTURE.sample(5)
    diffusion = optimal(MIXTURE, LinearSchedule(800, 0.1 / 800, 12 / 800))
    way = interpolate(diffusion, a, b, 5)
    assert len(interpolate(diffusion, a, b, 2)) == 2
    assert way.shape == (5, 5, 2)
    torch.testing.assert_close(way[0], a, atol=0.02, rtol=0)
    torch.testing.assert_close(way[-1], b, atol=0.02, rtol=0)


def test_numbers_are_interpolated_as_vectors_of_one():
    a, b = torch.randn(5, 1), torch.randn(5, 1)
    diffusion = optimal(MIXTURE, LinearSchedule(800, 0.1 / 800, 12 / 800))
    diffusion.time_aware_net.forward = lambda xt, t: 0.5 * xt
    way = interpolate(diffusion, a[:, 0], b[:, 0], 3, timesteps=5)
    torch.testing.assert_close(way[..., None], interpolate(diffusion, a, b, 3, timesteps=5))


def test_an_interpolation_begins_at_ddim_of_the_encoding_with_the_same_arguments():
    diffusion, a, b = scaled(3.0), torch.randn(4, 2), torch.randn(4, 2)
    way = interpolate(diffusion, a, b, 3, 6, clip_x0=True)
    alone = diffusion.sample(a.shape, "ddim", 6, clip_x0=True, x_T=diffusion.encode(a, 6, clip_x0=True))
    torch.testing.assert_close(way[0], alone)


# Inpainting

MASK = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # the left half is known


def repaint_moments(steps, resamplings, jump, known_x0):
    """Mean and covariance of RePaint's samples on IMAGES: every step is linear, so both have a recursion, in float64."""
    book, n = Textbook(SCHEDULE.beta), IMAGES.n
    known = MASK.bool().expand(SHAPE).flatten()
    mean, covariance = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    levels = [*steps, 0]

    def down(t, s, mean, covariance):
        alpha_bar_t, alpha_bar_s = book.alpha_bar[t], book.alpha_bar[s]
        alpha = alpha_bar_t / alpha_bar_s
        from_xt = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        from_x0 = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t)
        noise = 0 if s == 0 else (1 - alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        gain = alpha_bar_t.sqrt() * IMAGES.covariance
        gain = gain @ torch.linalg.inv(alpha_bar_t * IMAGES.covariance + (1 - alpha_bar_t) * torch.eye(n))
        x0_hat = IMAGES.mean + gain @ (mean - alpha_bar_t.sqrt() * IMAGES.mean)
        matrix = from_xt * torch.eye(n) + from_x0 * gain
        mean = torch.where(known, alpha_bar_s.sqrt() * known_x0, from_xt * mean + from_x0 * x0_hat)
        covariance = matrix @ covariance @ matrix.T + noise * torch.eye(n)
        keep = (~known).double()
        return mean, keep[:, None] * covariance * keep + (1 - alpha_bar_s) * known.double().diag()

    for first in range(0, len(steps), jump):
        part = levels[first : first + jump + 1]
        for again in reversed(range(resamplings)):
            for t, s in pairwise(part):
                mean, covariance = down(t, s, mean, covariance)
            if again:
                alpha = book.alpha_bar[part[0]] / book.alpha_bar[part[-1]]
                mean, covariance = alpha.sqrt() * mean, alpha * covariance + (1 - alpha) * torch.eye(n)
    return Correlated(mean, covariance)


@pytest.mark.parametrize(("resamplings", "jump"), [(1, 1), (5, 1), (3, 4)])
def test_repaint_has_the_moments_of_its_recursion(resamplings, jump):
    x0 = IMAGES.sample(1).float().view(1, *SHAPE)
    diffusion = images_model("sigma_bar_square")
    steps = diffusion.steps(30)
    x = inpaint(diffusion, x0.expand(SIZE, *SHAPE), MASK, steps, resamplings, jump)
    assert_drawn_from(x, repaint_moments(steps, resamplings, jump, x0.flatten().double()))


def test_repaint_nears_the_posterior_as_it_resamples():
    x0 = IMAGES.sample(1)[0]
    matrix = torch.eye(12, dtype=torch.float64)[MASK.bool().expand(SHAPE).flatten()]
    exact = IMAGES.given(matrix, matrix @ x0, 0)
    errors = [
        (repaint_moments(range(1000, 0, -20), r, 1, x0).mean - exact.mean).norm() / exact.covariance.trace().sqrt()
        for r in (1, 4, 16, 64)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < errors[0] / 3


def test_the_known_part_is_kept_bitwise_and_the_rest_is_not():
    x0 = torch.randn(5, *SHAPE)
    x = inpaint(images_model(), x0, MASK, 10, 2, generator=torch.Generator().manual_seed(1))
    known = MASK.bool().expand_as(x0)
    assert torch.equal(x[known], x0[known])
    assert (x[~known] != x0[~known]).all()
    assert torch.equal(x, inpaint(images_model(), x0, MASK.bool(), 10, 2, generator=torch.Generator().manual_seed(1)))


def test_the_unknown_part_starts_from_the_x_T_given():
    diffusion, x0, known = scaled(), torch.zeros(1, 2), torch.tensor([1.0, 0.0])
    one, other = (inpaint(diffusion, x0, known, [1000, 900], 1, x_T=x0 + k, generator=seeded()) for k in (0, 1))
    assert one[0, 1] != other[0, 1]


# Linear measurements

OPERATORS = {
    "inpainting": lambda x: x[..., 0],
    "super-resolution": lambda x: F.avg_pool2d(x, 2),
    "colouring": lambda x: x.mean(1),
}


def measured(operator, noise):
    """y of one image, [1, ...], and the posterior."""
    matrix = operator(torch.eye(12, dtype=torch.float64).view(12, *SHAPE)).flatten(1).T
    y = matrix @ IMAGES.sample(1)[0] + noise * torch.randn(len(matrix), dtype=torch.float64)
    return y.float().view(1, *operator(torch.zeros(1, *SHAPE)).shape[1:]), IMAGES.given(matrix, y.float().double(), noise)


@pytest.mark.parametrize("t", [1, 200, 500, 900])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_mean_given_a_state_and_a_measurement_is_that_of_bayes(operator, noise, t):
    operator = OPERATORS[operator]
    y, exact = measured(operator, noise)
    xt, alpha_bar = torch.randn(1, *SHAPE), SCHEDULE.alpha_bar[t - 1]
    x0 = posterior_sample(images_model(), y, operator, noise, xt.shape, "ddim", [t], iterations=8, x_T=xt)  # one step is x0_hat
    exact = exact.given(alpha_bar.sqrt() * torch.eye(12, dtype=torch.float64), xt.flatten().double(), (1 - alpha_bar).sqrt())
    torch.testing.assert_close(x0.flatten().double(), exact.mean, atol=2e-3, rtol=0)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_samples_of_a_measured_gaussian_have_the_mean_and_covariance_of_the_posterior(operator, noise):
    operator = OPERATORS[operator]
    y, exact = measured(operator, noise)
    y = y.expand(SIZE, *y.shape[1:])
    x = posterior_sample(images_model(), y, operator, noise, (SIZE, *SHAPE), "dpm", 60, iterations=8)
    assert_drawn_from(x, exact, bias=0.02)


def test_a_few_steps_of_conjugate_gradients_come_near():
    y, _ = measured(OPERATORS["colouring"], 0.1)
    y, errors = y.expand(500, *y.shape[1:]), []
    x_T = torch.randn(500, *SHAPE)
    for iterations in (1, 2, 4, 8):
        x = posterior_sample(images_model(), y, OPERATORS["colouring"], 0.1, x_T.shape, "dpm", 20, iterations, x_T=x_T)
        errors.append(x)
    gaps = [(x - errors[-1]).norm() for x in errors[:-1]]
    assert gaps[0] > gaps[1] > gaps[2]


def test_the_measurement_is_met_where_it_has_no_noise():
    operator = OPERATORS["super-resolution"]
    y = operator(IMAGES.sample(50).float().view(50, *SHAPE))
    x = posterior_sample(images_model(), y, operator, 0.0, (50, *SHAPE), "dpm", 20)
    torch.testing.assert_close(operator(x), y, atol=1e-3, rtol=0)


def test_clip_x0_keeps_the_samples_in_range():
    y = torch.full((50, 3, 1, 1), 0.9)
    x = posterior_sample(images_model(), y, OPERATORS["super-resolution"], 0.1, (50, *SHAPE), "dpm", 10, clip_x0=True)
    assert x.abs().max() <= 1
    assert inpaint(images_model(), torch.ones(50, *SHAPE), MASK, 10, clip_x0=True).abs().max() <= 1


def test_clip_x0_changes_nothing_where_no_x0_leaves_the_range():
    class Within(nn.Module):
        def forward(self, xt, t):
            return 0.9 * xt.tanh()

    diffusion, y, x_T = (
        GaussianDiffusion(SCHEDULE, Within(), prediction="reconstruction"),
        torch.zeros(8, *SHAPE),
        torch.randn(8, *SHAPE),
    )
    clipped, free = (
        posterior_sample(diffusion, y, lambda x: x, 100.0, y.shape, "dpm", 10, clip_x0=clip, x_T=x_T) for clip in (True, False)
    )
    assert torch.equal(clipped, free)
    assert clipped.min() < 0 < clipped.max()


def test_gradients_stay_off_outside_and_the_network_gets_its_condition():
    class Watch(nn.Module):
        def forward(self, xt, t, label):
            assert label == "a"
            return 0.5 * xt

    diffusion, x0 = GaussianDiffusion(SCHEDULE, Watch()), torch.zeros(2, *SHAPE)
    options = {"timesteps": 4, "condition": {"label": "a"}}
    made = [
        edit(diffusion, x0, 0.5, **options),
        diffusion.encode(x0, **options),
        interpolate(diffusion, x0 + 1, x0 - 0.3, 3, **options),
        inpaint(diffusion, x0, MASK, **options),
        posterior_sample(diffusion, x0, lambda x: x, 0.1, x0.shape, **options),
    ]
    assert not any(x.requires_grad for x in made)


def test_a_posterior_sample_begins_where_signal_is_left():
    """From alpha_bar of 1e-102 on, float32 knows no covariance; the mean of many samples is the posterior's."""
    schedule = LinearSchedule(1000, 1e-4, 0.4)
    diffusion = GaussianDiffusion(schedule, OptimalNet(GAUSSIAN, schedule.beta, "velocity"), "beta", "velocity")
    y = torch.full((SIZE, 1), 0.4)
    x = posterior_sample(diffusion, y, lambda x: x[:, :1], 0.5, (SIZE, 2), "dpm", 200)
    mean, variance = GAUSSIAN.means[0], GAUSSIAN.variances.item()
    gain = variance / (variance + 0.25)
    expected = torch.stack([mean[0] + gain * (0.4 - mean[0]), mean[1]])
    covariance = torch.diag(torch.tensor([variance * (1 - gain), variance], dtype=torch.float64))
    assert_drawn_from(x, Correlated(expected, covariance), bias=0.05)


def test_a_posterior_sample_with_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    posterior_sample(images_model(), torch.zeros(2, *SHAPE), lambda x: x, 0.1, (2, *SHAPE), "ddpm", 4, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_clip_x0_clips_the_mean_given_y_and_not_the_one_before_it():
    """x_0_hat is 2.4; the measurement brings it to 0.2, as its covariance is large."""
    x_T, y = torch.full((2, 2), 0.8), torch.full((2, 2), 0.2)
    x = posterior_sample(scaled(3.0), y, lambda x: x, 0.01, (2, 2), "ddim", [500], clip_x0=True, x_T=x_T)
    torch.testing.assert_close(x, y, atol=0.01, rtol=0)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, x: edit(d, x, 1.1), "strength = 1.1"),
        (lambda d, x: edit(d, x, math.nan), "strength = nan"),
        (lambda d, x: interpolate(d, x, x[:1], 3), "x0_b of shape"),
        (lambda d, x: interpolate(d, x, x, 1), "count = 1"),
        (lambda d, x: inpaint(d, x, torch.ones(3, 3)), "mask of shape"),
        (lambda d, x: inpaint(d, x, torch.ones(2, 2, 3, 2, 2)), "mask of shape"),
        (lambda d, x: inpaint(d, x, 0.5 * MASK), "mask from 0 to 0.5"),
        (lambda d, x: inpaint(d, x, MASK, resamplings=0), "resamplings = 0"),
        (lambda d, x: posterior_sample(d, x, lambda x: x, -0.1, x.shape), "noise = -0.1"),
        (lambda d, x: posterior_sample(d, x, lambda x: x, math.nan, x.shape), "noise = nan"),
        (lambda d, x: posterior_sample(d, x[:1], lambda x: x, 0.1, x.shape), "y of shape"),
        (lambda d, x: posterior_sample(d, x, lambda x: x + 1, 0.1, x.shape), "operator: must be linear"),
        (lambda d, x: posterior_sample(d, x, lambda x: x.square(), 0.1, x.shape), "operator: must be linear"),
        (lambda d, x: posterior_sample(d, x, lambda x: x.clamp(min=0), 0.1, x.shape), "operator: must be linear"),
        (lambda d, x: posterior_sample(d, x, lambda x: x**3, 0.1, x.shape), "operator: must be linear"),
        (lambda d, x: posterior_sample(d, x.to(torch.complex64), torch.fft.fft, 0.1, x.shape), "y: is complex"),
        (lambda d, x: posterior_sample(d, x.long(), lambda x: x, 0.1, x.shape), "y: is torch.int64"),
        (lambda d, x: posterior_sample(d, x, torch.zeros_like, 0.1, x.shape), "operator: does not depend on x"),
        (lambda d, x: posterior_sample(d, x, lambda x: x, 0.1, x.shape, "euler"), "sampler = 'euler'"),
        (lambda d, x: posterior_sample(d, x, lambda x: x, 0.1, x.shape, iterations=0), "iterations = 0"),
        (lambda d, x: posterior_sample(d, x, lambda x: x, 0.1, x.shape, iterations=2.5), "iterations = 2.5: must be a whole"),
        (lambda d, x: posterior_sample(d, x, lambda x: x, math.inf, x.shape), "noise = inf"),
        (lambda d, x: posterior_sample(d, x, lambda x: x, 0.1, x.shape, ["dpm"]), r"sampler = \['dpm'\]: must be one of"),
        (lambda d, x: inpaint(d, x.long(), MASK), "x0 of type torch.int64: must be floats"),
        (lambda d, x: inpaint(d, x, MASK, jump=0), "jump = 0"),
        (lambda d, x: inpaint(d, x, MASK, jump=1.5), "jump = 1.5: must be a whole number"),
        (lambda d, x: inpaint(d, x, MASK, resamplings=2.5), "resamplings = 2.5: must be a whole number"),
        (lambda d, x: inpaint(d, x, [1, 0]), "mask: a list: must be a tensor"),
        (lambda d, x: interpolate(d, x, x, 2.5), "count = 2.5: must be a whole number of at least 2, the two ends"),
        (lambda d, x: edit(d, x.long(), 0.5), "x0 of type torch.int64: must be floats"),
        (lambda d, x: edit(d, x, 0, "euler"), "sampler = 'euler'"),
        (lambda d, x: edit(d, x, 0, timesteps=1001), "timesteps = 1001"),
    ],
)
def test_a_bad_argument_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(images_model(), torch.zeros(2, *SHAPE))


def test_derivatives_are_asked_for_where_there_can_be_some():
    x = torch.zeros(2, *SHAPE)
    with torch.inference_mode(), pytest.raises(ValueError, match="needs derivatives, which inference_mode has none of"):
        posterior_sample(images_model(), x, lambda x: x, 0.1, x.shape)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm"])
def test_a_bounded_network_stays_in_range_given_y_too(sampler):
    class Bounded(nn.Module):
        def forward(self, xt, t):
            return 0.9 * torch.tanh(3 * xt)

    diffusion = GaussianDiffusion(SCHEDULE, Bounded(), prediction="reconstruction", bounded=True)
    y = torch.full((200, 3, 1, 1), 0.95)
    x = posterior_sample(diffusion, y, OPERATORS["super-resolution"], 0.0, (200, *SHAPE), sampler, 20)
    assert x.abs().max() <= 1


def test_where_no_signal_is_left_the_posterior_begins_below_it_and_is_exact():
    class ZeroTerminal:
        alpha_bar = torch.cat([SCHEDULE.alpha_bar[:-1], torch.zeros(1, dtype=torch.float64)])
        beta = torch.cat([SCHEDULE.beta[:-1], torch.ones(1, dtype=torch.float64)])

    diffusion = GaussianDiffusion(ZeroTerminal(), CorrelatedNet(IMAGES, ZeroTerminal.beta), prediction="reconstruction")
    operator = OPERATORS["colouring"]
    y, exact = measured(operator, 0.1)
    y, shape = y.expand(SIZE, *y.shape[1:]), (SIZE, *SHAPE)
    assert_drawn_from(posterior_sample(diffusion, y, operator, 0.1, shape, timesteps=60, iterations=8), exact, bias=0.02)
    assert posterior_sample(diffusion, y[:2], operator, 0.1, (2, *SHAPE), timesteps=[diffusion.T, 1]).isfinite().all()


def test_one_step_from_no_signal_has_no_posterior_sample():
    class Destroyed:
        alpha_bar, beta = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    diffusion = GaussianDiffusion(Destroyed(), nn.Identity(), prediction="reconstruction")
    with pytest.raises(ValueError, match="at t = 1 no signal is left"):
        posterior_sample(diffusion, torch.zeros(2, *SHAPE), lambda x: x, 0.1, (2, *SHAPE))


def test_a_measurement_may_be_one_number_a_sample():
    diffusion = images_model()
    y = torch.full((2000,), 1.5)
    x0 = posterior_sample(diffusion, y, lambda x: x.flatten(1).sum(1), 0.05, (2000, *SHAPE), timesteps=20)
    assert (x0.flatten(1).sum(1) - 1.5).abs().mean() < 0.1


@pytest.mark.parametrize("strength", [0.29, 0.57, 0.58])
def test_an_edit_starts_at_that_part_of_T(strength):
    seen = []

    class Seen(nn.Module):
        def forward(self, xt, t):
            seen.append(int(t[0]))
            return xt

    edit(GaussianDiffusion(LinearSchedule(100), Seen()), torch.zeros(1, 2), strength)
    assert seen[0] == round(100 * strength)


@pytest.mark.parametrize("iterations", [5, 20])
def test_a_measurement_of_lower_rank_without_noise_is_met(iterations):
    torch.manual_seed(0)
    root = torch.randn(6, 6).double()
    data = Correlated(torch.randn(6), root @ root.T / 6 + 0.05 * torch.eye(6))
    schedule = CosineSchedule(1000)
    diffusion = GaussianDiffusion(schedule, CorrelatedNet(data, schedule.beta), "beta", "reconstruction")
    A = torch.randn(4, 2) @ torch.randn(2, 6)  # four numbers that say two things
    y = (data.sample(1)[0].float() @ A.T).expand(2000, -1)
    x = posterior_sample(diffusion, y, lambda x: x @ A.T, 0.0, (2000, 6), "dpm", 30, iterations)
    torch.testing.assert_close(x @ A.T, y, atol=1e-2, rtol=0)
    U = torch.linalg.svd(A.double())[0][:, :2]  # of what A can give
    exact = data.given(U.T @ A.double(), U.T @ y[0].double(), 0.0)
    assert (x.double().T.cov() - exact.covariance).norm() < 0.1 * data.covariance.norm()


@pytest.mark.parametrize(
    "call",
    [
        lambda d, x: edit(d, x, 0.5),
        lambda d, x: interpolate(d, x, x, 3),
        lambda d, x: inpaint(d, x, torch.ones(2)),
        lambda d, x: posterior_sample(d, x.float(), lambda x: x, 0.1, x.shape),
    ],
)
def test_symbols_are_not_edited(call):
    with pytest.raises(ValueError, match=r"^diffusion: a DiscreteDiffusion: editing is of numbers"):
        call(DiscreteDiffusion(LinearSchedule(8), nn.Identity(), 4), torch.zeros(1, 2, dtype=torch.long))


def test_where_T_has_no_signal_the_times_begin_one_before_it():
    class ZeroTerminal:
        alpha_bar = torch.cat([SCHEDULE.alpha_bar[:-1], torch.zeros(1, dtype=torch.float64)])

    diffusion = scaled(schedule=ZeroTerminal())
    posterior_sample(diffusion, torch.zeros(1, 2), lambda x: x, 0.1, (1, 2), timesteps=[1000, 1])
    assert diffusion.time_aware_net.seen == [999, 1]
