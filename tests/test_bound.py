import math

import pytest
import torch
from closed_form import GAUSSIAN, MIXTURE, PREDICTIONS, VARIANCES, OptimalNet, Textbook, even_in_log_snr
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from beta_schedule import ConstantSchedule, LinearSchedule
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareMLP

T = 15
SCHEDULE = LinearSchedule(T, 0.01, 0.4)
BOOK = Textbook(SCHEDULE.beta)
X0_ERROR = GAUSSIAN.x0_error(BOOK.alpha_bar)
# E||mu - mu_bar||^2 / n of the optimal network on Gaussian data, t = 0..T
MU_ERROR = BOOK.mu_from_x0**2 * X0_ERROR
FITTED = (BOOK.posterior_variance + MU_ERROR)[1:]


class Constant(nn.Module):
    """A network that says one number."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, xt, t):
        return torch.full_like(xt, self.value)


def optimal(reverse_variance, prediction, data=GAUSSIAN, schedule=SCHEDULE):
    net = OptimalNet(data, schedule.beta, prediction)
    diffusion = GaussianDiffusion(schedule, net, reverse_variance, prediction)
    if reverse_variance == "learnable":
        diffusion.log_sigma_square.data = 0.7 * Textbook(schedule.beta).beta[1:].log().float()
    return diffusion


def sigma_square(reverse_variance):
    """sigma_t^2 of `optimal`, t = 0..T."""
    return BOOK.beta**0.7 if reverse_variance == "learnable" else BOOK.sigma_square(reverse_variance)


def assert_mean(values, expected):
    """The mean of independent draws is the expected one, within five standard errors."""
    values = values.double().detach()
    standard_error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(expected, abs=5 * standard_error + 1e-6)


# The bound


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_the_parts_of_the_bound_are_exact_on_gaussian_data(reverse_variance, prediction):
    x0 = GAUSSIAN.sample(8000)
    bound = optimal(reverse_variance, prediction).variational_bound(x0)

    end = BOOK.alpha_bar[-1]
    q = torch.distributions.Normal(end.sqrt() * x0.double(), (1 - end).sqrt())
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    prior = torch.distributions.kl_divergence(q, normal).mean(1)
    torch.testing.assert_close(bound.prior.double(), prior, rtol=1e-4, atol=1e-7)

    variance = sigma_square(reverse_variance)
    ratio = BOOK.posterior_variance / variance
    kl = 0.5 * (ratio - 1 - ratio.log() + MU_ERROR / variance)[2:].sum().item()
    assert_mean(bound.kl, kl)
    reconstruction = 0.5 * (math.log(2 * math.pi * variance[1]) + MU_ERROR[1] / variance[1]).item()
    assert_mean(bound.reconstruction, reconstruction)
    torch.testing.assert_close(bound.total, bound.prior + bound.kl + bound.reconstruction)
    assert bound.total.shape == (8000,)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_the_total_falls_to_the_entropy_as_T_grows(data, prediction):
    x0 = data.sample(256)
    entropy = -data.log_prob(x0) / data.n  # of the same draws, which cancels their noise
    gaps = []
    for steps in (20, 80, 320):
        diffusion = optimal("sigma_bar_square", prediction, data, even_in_log_snr(steps))
        gaps.append((diffusion.variational_bound(x0, chunk_size=20).total - entropy).mean().item())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0  # like 1 / T
    assert gaps[2] < 0.1


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_the_quick_total_of_a_fitted_process_is_the_entropy(data):
    diffusion = optimal("beta", "denoising", data, even_in_log_snr(300))
    diffusion.fit_reverse_variance([data.sample(500)])
    total = diffusion.variational_bound(data.sample(4000), timesteps=50).total.mean().item()
    assert total == pytest.approx(data.entropy(), abs=0.03)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_the_bound_and_the_fit_do_not_depend_on_the_chunk_size(chunk_size):
    x0 = torch.linspace(-1, 1, 6).view(3, 2)
    diffusion = GaussianDiffusion(SCHEDULE, Constant(0.3), prediction="reconstruction")  # an error without noise
    kl = diffusion.variational_bound(x0, chunk_size=chunk_size).kl
    mu_error = BOOK.mu_from_x0**2 * (x0.double() - 0.3).square().mean(1, keepdim=True)
    ratio = BOOK.posterior_variance / BOOK.beta
    expected = 0.5 * (ratio - 1 - ratio.log() + mu_error / BOOK.beta)[:, 2:].sum(1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=0)
    diffusion.fit_reverse_variance([x0[:1], x0[1:]], chunk_size)
    fitted = BOOK.posterior_variance + mu_error.mean(0)
    torch.testing.assert_close(diffusion.sigma_square.double(), fitted[1:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_takes_data_of_either_precision(dtype):
    diffusion = GaussianDiffusion(SCHEDULE, Constant(0.3), prediction="reconstruction")
    x0 = torch.linspace(-1, 1, 6).view(3, 2)
    torch.testing.assert_close(diffusion.variational_bound(x0.to(dtype)).kl.float(), diffusion.variational_bound(x0).kl)


def test_the_bound_keeps_its_digits_under_autocast():
    diffusion = GaussianDiffusion(SCHEDULE, Constant(0.3), prediction="reconstruction")
    x0 = torch.linspace(-1, 1, 6).view(3, 2)
    expected = diffusion.variational_bound(x0).kl
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(diffusion.variational_bound(x0).kl, expected, rtol=1e-6, atol=0)


def test_the_bound_keeps_no_graph_and_turns_dropout_off_and_on_again():
    seen = []

    class Dropping(nn.Dropout):
        def forward(self, xt, t):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(xt)

    diffusion = GaussianDiffusion(SCHEDULE, Dropping())
    diffusion.variational_bound(torch.zeros(2, 2))
    diffusion.fit_reverse_variance([torch.zeros(2, 2)])
    assert set(seen) == {(False, False)}
    assert diffusion.training
    assert diffusion.time_aware_net.training


# The discretized likelihood

LEVELS = torch.linspace(-1, 1, 256).view(256, 1)


def at_t_1(mean, sigma):
    """A process whose last step is N(mean, sigma^2) whatever x_1 is."""
    return GaussianDiffusion(ConstantSchedule(2, sigma**2), Constant(mean), "beta", "direct")


@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.1, 0.7])
@pytest.mark.parametrize("mean", [0.0, 0.1, -0.997, 1.0])
def test_the_probabilities_of_the_256_levels_sum_to_one(mean, sigma):
    nats = at_t_1(mean, sigma).variational_bound(LEVELS, discretized=True).reconstruction
    assert (-nats.double()).exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.1, 0.7])
@pytest.mark.parametrize("mean", [0.1, -0.997, 1.0, 1.3])
def test_the_probability_of_a_level_is_that_of_50_digits(mean, sigma):
    mpmath = pytest.importorskip("mpmath")
    nats = at_t_1(mean, sigma).variational_bound(LEVELS, discretized=True).reconstruction
    sigma = math.sqrt(torch.tensor(sigma**2).item())  # as float32 has it
    mean = torch.tensor(mean).item()
    with mpmath.workdps(50):
        for i in (0, 1, 50, 127, 128, 200, 254, 255):
            edges = [(2 * (i + half) / mpmath.mpf(255) - 1 - mean) / sigma for half in (-0.5, 0.5)]
            below = mpmath.ncdf(edges[0]) if i > 0 else 0
            # from the side where the difference of two small numbers is taken
            if edges[0] > 0:
                p = mpmath.ncdf(-edges[0]) - (mpmath.ncdf(-edges[1]) if i < 255 else 0)
            else:
                p = (mpmath.ncdf(edges[1]) if i < 255 else 1) - below
            assert nats[i].item() == pytest.approx(float(-mpmath.log(p)), rel=1e-3, abs=1e-6)


def test_the_likelihood_is_finite_far_in_the_tails():
    nats = at_t_1(-1.0, 0.001).variational_bound(torch.tensor([[1.0], [0.5], [-1.0]]), discretized=True).reconstruction
    assert nats.isfinite().all()
    assert nats[0].item() == pytest.approx(0.5 * ((2 - 1 / 255) / 0.001) ** 2, rel=1e-3)
    flipped = at_t_1(1.0, 0.001).variational_bound(torch.tensor([[-1.0], [-0.5], [1.0]]), discretized=True).reconstruction
    torch.testing.assert_close(flipped, nats, rtol=1e-5, atol=1e-6)


def test_a_fine_density_times_the_width_of_a_level_is_its_probability():
    diffusion = at_t_1(0.1, 0.5)
    inner = LEVELS[100:150]
    density = diffusion.variational_bound(inner).reconstruction
    probability = diffusion.variational_bound(inner, discretized=True).reconstruction
    torch.testing.assert_close(probability, density - math.log(2 / 255), rtol=1e-4, atol=1e-4)


def test_discretized_changes_only_the_reconstruction():
    diffusion = at_t_1(0.1, 0.5)
    plain, discretized = diffusion.variational_bound(LEVELS), diffusion.variational_bound(LEVELS, discretized=True)
    torch.testing.assert_close(discretized.prior, plain.prior)
    torch.testing.assert_close(discretized.total, plain.prior + discretized.kl + discretized.reconstruction)


@pytest.mark.parametrize("x0", [torch.tensor([[0.0, 1.01]]), torch.tensor([[-1.01, 0.0]])])
def test_discretized_refuses_data_outside_minus_one_to_one(x0):
    with pytest.raises(ValueError, match=r"1.01.*\[-1, 1\]"):
        at_t_1(0.0, 0.1).variational_bound(x0, discretized=True)


# The quick estimate


@pytest.mark.parametrize("timesteps", [1, 3, 4, 5])
def test_the_stratified_estimate_is_unbiased(timesteps):
    schedule = LinearSchedule(6, 0.05, 0.7)
    book = Textbook(schedule.beta)
    diffusion = GaussianDiffusion(schedule, Constant(0.3), "beta", "reconstruction")  # terms without noise
    x0 = torch.tensor([[1.0, -1.0]])
    mu_error = book.mu_from_x0**2 * 0.5 * (0.7**2 + 1.3**2)
    ratio = book.posterior_variance / book.beta
    terms = 0.5 * (ratio - 1 - ratio.log() + mu_error / book.beta)[2:]
    assert terms.max() > 3 * terms.min()
    draws = torch.cat([diffusion.variational_bound(x0, timesteps=timesteps).kl for _ in range(1500)])
    assert_mean(draws, terms.sum().item())
    assert draws.std().item() > 0 or timesteps == 5


def test_each_sample_of_a_quick_bound_has_a_time_of_its_own():
    diffusion = GaussianDiffusion(SCHEDULE, Constant(0.3), prediction="reconstruction")  # an error without noise
    ratio = BOOK.posterior_variance / BOOK.beta
    terms = 0.5 * (ratio - 1 - ratio.log() + BOOK.mu_from_x0**2 * 0.5**2 / BOOK.beta)[2:]
    kl = diffusion.variational_bound(torch.full((1400, 2), 0.8), timesteps=1).kl.double()
    t = (kl[:, None] / (T - 1) - terms).abs().argmin(1)  # of alike samples, which the time alone tells apart
    torch.testing.assert_close(kl, (T - 1) * terms[t], rtol=1e-4, atol=0)
    share = t.bincount(minlength=T - 1).double() / 1400
    chance = 1 / (T - 1)
    assert ((share - chance).abs() < 5 * math.sqrt(chance * (1 - chance) / 1400)).all()


@pytest.mark.parametrize("timesteps", [0, -1, T])
def test_an_impossible_number_of_terms_is_refused(timesteps):
    with pytest.raises(ValueError, match=rf"timesteps = {timesteps}.*1\.\.{T - 1}"):
        optimal("beta", "denoising").variational_bound(torch.zeros(2, 2), timesteps=timesteps)


def test_the_bound_and_the_fit_refuse_a_chunk_of_nothing():
    diffusion = optimal("beta", "denoising")
    with pytest.raises(ValueError, match="chunk_size = 0"):
        diffusion.variational_bound(torch.zeros(2, 2), chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size = 0"):
        diffusion.fit_reverse_variance([torch.zeros(2, 2)], chunk_size=0)


def test_the_generator_decides_every_draw():
    diffusion, x0 = optimal("beta", "denoising"), GAUSSIAN.sample(4)
    first, again, other = (
        diffusion.variational_bound(x0, timesteps=3, generator=torch.Generator().manual_seed(seed)).total for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# The fitted reverse variance


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_the_fitted_variance_is_exact_on_gaussian_data(reverse_variance, prediction):
    diffusion = optimal(reverse_variance, prediction)
    diffusion.fit_reverse_variance(GAUSSIAN.sample(6000).split(2500))  # the last batch is smaller
    # the mean of 12,000 squares has a relative standard error of sqrt(2 / 12,000) = 1.3 %
    torch.testing.assert_close(diffusion.sigma_square.detach().double(), FITTED, rtol=0.065, atol=0)
    mu_error = diffusion.sigma_square.detach().double() - BOOK.posterior_variance[1:]
    torch.testing.assert_close(mu_error, MU_ERROR[1:], rtol=0.065, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_the_fit_is_never_worse_than_a_fixed_variance_on_the_same_draws(reverse_variance, prediction):
    net, x0 = TimeAwareMLP(3, 32), torch.randn(16, 3) ** 3

    def bound(diffusion):
        return diffusion.variational_bound(x0, generator=torch.Generator().manual_seed(3))

    fixed = [bound(GaussianDiffusion(SCHEDULE, net, variance, prediction)) for variance in VARIANCES[:2]]
    diffusion = GaussianDiffusion(SCHEDULE, net, reverse_variance, prediction)
    diffusion.fit_reverse_variance([x0], generator=torch.Generator().manual_seed(3))
    fitted = bound(diffusion)
    for other in fixed:
        assert fitted.kl.mean() <= other.kl.mean()
        assert fitted.reconstruction.mean() <= other.reconstruction.mean()
    # and it is the optimum itself: a variance 2 % off at every t costs more, on either side
    best = diffusion.sigma_square.detach()
    for factor in (0.98, 1.02):
        near = GaussianDiffusion(SCHEDULE, net, "learnable", prediction)
        near.log_sigma_square.data = (factor * best).log()
        assert fitted.total.mean() < bound(near).total.mean()


@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_the_fit_is_saved_with_the_state_and_restored(reverse_variance):
    diffusion = optimal(reverse_variance, "denoising")
    before = diffusion.sigma_square.detach().clone()
    diffusion.fit_reverse_variance([GAUSSIAN.sample(500)])
    restored = optimal(reverse_variance, "denoising")
    restored.load_state_dict(diffusion.state_dict())
    assert torch.equal(restored.sigma_square, diffusion.sigma_square)
    assert not torch.allclose(restored.sigma_square, before, rtol=0.01)


@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_the_fit_to_a_network_that_is_never_wrong_leaves_a_variance(reverse_variance):
    diffusion, x0 = GaussianDiffusion(SCHEDULE, Constant(0.3), reverse_variance, "reconstruction"), torch.full((8, 2), 0.3)
    diffusion.fit_reverse_variance([x0])
    sigma_square = diffusion.sigma_square.detach().double()
    assert 0 < sigma_square[0] < 1e-10
    torch.testing.assert_close(sigma_square[1:], BOOK.posterior_variance[2:], rtol=1e-5, atol=0)
    assert diffusion.variational_bound(x0).total.isfinite().all()


def test_the_fitted_variance_is_the_one_that_p_sample_uses():
    diffusion = optimal("sigma_bar_square", "denoising")
    diffusion.fit_reverse_variance([GAUSSIAN.sample(6000)])
    _, variance = diffusion.p_mean_variance(torch.zeros(T, 2), torch.arange(1, T + 1))
    torch.testing.assert_close(variance[:, 0].double(), FITTED, rtol=0.065, atol=0)


@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_where_next_to_no_signal_is_left_the_fitted_variance_is_finite(reverse_variance):
    """alpha_bar_T is 1e-41: of the noise there, float32 does not hold the error that x_0_hat has."""
    diffusion = GaussianDiffusion(LinearSchedule(9500), Constant(0.5), reverse_variance)
    diffusion.fit_reverse_variance([torch.randn(1, 2)], chunk_size=9500)
    assert (diffusion.sigma_square > 0).all()
    for table in diffusion.state_dict().values():
        assert table.isfinite().all()
    assert diffusion.variational_bound(torch.zeros(1, 2), timesteps=20).total.isfinite().all()
    assert diffusion.sample((1, 2), timesteps=20).isfinite().all()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(6, 2))


def test_a_stream_whose_length_is_unknown_can_be_fitted_to():
    stream, whole = optimal("beta", "denoising"), optimal("beta", "denoising")
    stream.fit_reverse_variance(DataLoader(Stream(), batch_size=4), generator=torch.Generator().manual_seed(0))
    whole.fit_reverse_variance([torch.zeros(4, 2), torch.zeros(2, 2)], generator=torch.Generator().manual_seed(0))
    assert torch.equal(stream.sigma_square, whole.sigma_square)


@pytest.mark.parametrize("loss_mode", ["simple", "full"])
def test_a_learnable_variance_trained_by_gradient_comes_near_the_fitted(loss_mode):
    net = OptimalNet(GAUSSIAN, SCHEDULE.beta, "denoising")
    diffusion = GaussianDiffusion(SCHEDULE, net, "learnable", "denoising", loss_mode)
    diffusion.log_sigma_square.data += 1
    optimizer = torch.optim.Adam([diffusion.log_sigma_square], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, total_iters=150)
    for _ in range(150):
        optimizer.zero_grad()
        diffusion(GAUSSIAN.sample(128 if loss_mode == "full" else 128 * T), chunk_size=T).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(diffusion.sigma_square.detach().double(), FITTED, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("batches", "message"), [([], "there is none"), ([torch.full((2, 2), math.nan)], "not finite")], ids=["none", "nan"]
)
def test_a_fit_on_nothing_or_on_nan_is_refused_and_changes_nothing(batches, message):
    diffusion = optimal("beta", "denoising")
    with pytest.raises(ValueError, match=f"batches.*{message}"):
        diffusion.fit_reverse_variance(batches)
    torch.testing.assert_close(diffusion.sigma_square.double(), BOOK.beta[1:], rtol=1e-5, atol=0)
