"""Gaussian diffusion: the forward process, the reverse process, the losses, the variational bound, samples.

Nothing here knows of images: x is any float tensor [B, ...], the network any net(xt, t, **condition) -> tensor of xt's shape,
and condition whatever keyword arguments that network takes, labels for example, passed on unread; None is none. Equation
numbers are those of the README, section "The mathematics".

    python gaussian_diffusion.py                  # time and memory of every setting: on CUDA if there is one, else on the CPU
    python gaussian_diffusion.py --device cpu --timesteps 100 --batch-size 8 --image-size 16
"""

import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from beta_schedule import alpha_bar_before
from classify import classify
from diffusion_process import (
    Bound,
    Condition,
    DiffusionProcess,
    arguments_of,
    check_chunk_size,
    check_floats,
    check_losses,
    check_noise,
    choice,
    every_pair,
    is_whole,
    mean_from,
)
from samplers import SAMPLERS, Level, Sampler, ddim_upwards, even_in_time

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 3.4
IMPORTANCE_SHARE = 0.5  # of equation 15c; the rest is even, so that no weight is more than 2
TOLD = 1e-4  # the least share of sigma_t^2 that float32 keeps two digits of


def _process(alpha_bar: Tensor) -> SimpleNamespace:
    """The coefficients of q (equations 1 to 4), each [T]."""
    before = alpha_bar_before(alpha_bar)
    alpha = alpha_bar / before
    beta = 1 - alpha
    return SimpleNamespace(
        step_signal_scale=alpha.sqrt(),
        step_noise_scale=beta.sqrt(),
        signal_scale=alpha_bar.sqrt(),
        noise_scale=(1 - alpha_bar).sqrt(),
        signal_scale_before=before.sqrt(),
        mu_bar_from_x0=before.sqrt() * beta / (1 - alpha_bar),  # c_t
        mu_bar_from_xt=alpha.sqrt() * (1 - before) / (1 - alpha_bar),  # a_t
        sigma_bar_square=beta * (1 - before) / (1 - alpha_bar),  # 0 at t = 1
    )


# What the network's output is: u_t and w_t of its target u_t x_0 + w_t eps (equation 10), each [T]
PREDICTIONS = {
    "direct": lambda q: (q.signal_scale_before, q.mu_bar_from_xt * q.noise_scale),  # mu_bar
    "reconstruction": lambda q: (torch.ones_like(q.signal_scale), torch.zeros_like(q.signal_scale)),  # x_0
    "denoising": lambda q: (torch.zeros_like(q.signal_scale), torch.ones_like(q.signal_scale)),  # eps
    "velocity": lambda q: (-q.noise_scale, q.signal_scale),  # v of Salimans & Ho 2022
}

ReverseVariance = Literal["beta", "sigma_bar_square", "learnable"]
PredictionName = Literal[tuple(PREDICTIONS)]
LossMode = Literal["simple", "full", "min_snr"]
TimeSampling = Literal["uniform", "importance"]


class Prediction(NamedTuple):
    """Three readings of one network call, each of xt's shape."""

    mu: Tensor
    x0: Tensor
    eps: Tensor


class GaussianDiffusion(DiffusionProcess):
    """The diffusion process of a schedule and a network.

    schedule          beta_1..beta_T: anything with a float64 tensor `alpha_bar` [T]
    time_aware_net    net(xt, t, **condition) -> tensor of xt's shape, t long [B] in 1..T
    reverse_variance  sigma_t^2 of p(x_{t-1} | x_t): "beta", "sigma_bar_square" (the posterior's) or "learnable"
    prediction        what the network's output is: "direct" (mu), "reconstruction" (x0), "denoising" (eps) or "velocity"
    loss_mode         "simple", "full" or "min_snr" (README, equations 13 to 15)
    bounded           x_0 lies in [-1, 1], often at an end of it: the predicted x_0 is kept there, and in the losses any x_0_hat
                      beyond an end is as good as the end, where x_0 is (README, equation 15b)
    time_sampling     how the simple and the min-SNR loss draw t: "uniform", or "importance", more often where it is large as a
                      rule, and weighted for the same expectation (README, equation 15c)

    A time t is a long tensor [B] in 1..T on x's device, or an int for the whole batch. Coefficients are derived in float64 and
    kept as float32 buffers. T is the number of steps.
    """

    n_levels = None  # x is of numbers; a process of symbols has a number of levels here

    def __init__(
        self,
        schedule,
        time_aware_net: nn.Module,
        reverse_variance: ReverseVariance = "beta",
        prediction: PredictionName = "denoising",
        loss_mode: LossMode = "simple",
        bounded: bool = False,
        time_sampling: TimeSampling = "uniform",
    ):
        choice("reverse_variance", reverse_variance, get_args(ReverseVariance))
        choice("prediction", prediction, PREDICTIONS)
        choice("loss_mode", loss_mode, get_args(LossMode))
        choice("time_sampling", time_sampling, get_args(TimeSampling))
        if not isinstance(bounded, bool):
            raise ValueError(f"bounded = {bounded!r}: must be True or False")
        if loss_mode == "full" and time_sampling != "uniform":
            raise ValueError(f"time_sampling = {time_sampling!r}: the full loss draws no t, it sums over all")
        super().__init__(schedule, time_aware_net)
        self.reverse_variance = reverse_variance
        self.prediction = prediction
        self.loss_mode = loss_mode
        self.bounded = bounded
        self.time_sampling = time_sampling
        for name, table in self._tables().items():
            if not table.float().isfinite().all():
                raise ValueError(
                    f"alpha_bar_T = {self._alpha_bar[-1].item():g}: too small for prediction = {prediction!r} in float32; "
                    "use a schedule that ends with more signal"
                )
            self.register_buffer(name, table.float(), persistent=False)
        density = self._time_density()
        if density.shape != (self.T,) or not (density >= 0).all() or abs(density.sum().item() - 1) > 1e-4:
            raise ValueError(f"_time_density: must be [T = {self.T}], at least 0, and add up to 1")
        self._times_are_even = bool((density == density[0]).all())
        time_cdf = density.cumsum(0).float()
        time_cdf[density.nonzero()[-1] :] = math.inf  # beyond the last t that has a chance, no draw goes
        self.register_buffer("time_cdf", time_cdf, persistent=False)
        self.register_buffer("time_weight", (1 / (self.T * density)).float(), persistent=False)
        self._register_variance()

    def _tables(self) -> dict[str, Tensor]:
        """The coefficients of q and of what an output implies, float64 [T]."""
        q = _process(self._alpha_bar)
        u, w = PREDICTIONS[self.prediction](q)
        # equation 11: x_t and the target, solved for x_0 and eps
        d = u * q.noise_scale - w * q.signal_scale
        x0_from_xt, x0_from_out = -w / d, q.noise_scale / d
        return vars(q) | {
            "target_from_x0": u,
            "target_from_eps": w,
            "mu_from_xt": q.mu_bar_from_xt + q.mu_bar_from_x0 * x0_from_xt,
            "mu_from_out": q.mu_bar_from_x0 * x0_from_out,
            "x0_from_xt": x0_from_xt,
            "x0_from_out": x0_from_out,
            "eps_from_xt": u / d,
            "eps_from_out": -q.signal_scale / d,
            "min_snr_weight": (self._alpha_bar / (1 - self._alpha_bar)).clamp(max=MIN_SNR_GAMMA) * x0_from_out**2,
        }

    def _time_density(self) -> Tensor:
        """[T] in float64: the chance of each t in a loss's draw (equation 15c)."""
        uniform = torch.full_like(self._alpha_bar, 1 / self.T)
        if self.time_sampling == "uniform":
            return uniform
        tables = self._tables()
        expected = (1 - self._alpha_bar) / tables["x0_from_out"] ** 2  # the output's error, of data of unit variance
        if self.loss_mode == "min_snr":
            expected *= tables["min_snr_weight"]
        return torch.lerp(uniform, expected / expected.sum(), IMPORTANCE_SHARE)

    def _register_variance(self) -> None:
        """Keep sigma_t^2 as what it assumes of the network, E||x0_hat - x_0||^2 / n, or as a parameter.

        beta_t claims that the network knows nothing but x_t (of unit variance), sigma_bar_t^2 that it is never wrong.
        sigma_bar_1^2 is taken as beta_1, so that the last step has a density.
        """
        x0_error = 1 - self._alpha_bar
        if self.reverse_variance == "sigma_bar_square":
            x0_error[1:] = 0
        if self.reverse_variance == "learnable":
            self.log_sigma_square = nn.Parameter(self._variance(x0_error).log().float())
        else:
            self.register_buffer("x0_error", x0_error.float())

    def _variance(self, x0_error: Tensor) -> Tensor:
        """Equation 9: sigma_t^2 = sigma_bar_t^2 + mu_bar_from_x0_t^2 x0_error_t, [T]."""
        return self.sigma_bar_square + self.mu_bar_from_x0**2 * x0_error

    @property
    def sigma_square(self) -> Tensor:
        """Variance of p(x_{t-1} | x_t), t = 1..T: float32 [T], positive; a function of a parameter when learnable."""
        if self.reverse_variance == "learnable":
            return self.log_sigma_square.exp()
        return self._variance(self.x0_error)

    # Between data in [-1, 1] and x, which are the same here, and not in DiscreteDiffusion

    def x0_of(self, values: Tensor) -> Tensor:
        """x_0 of data in [-1, 1]."""
        return values

    def values_of(self, x: Tensor) -> Tensor:
        """What x_0 or x_t looks like as data in [-1, 1]."""
        return x

    # Look-up of times

    @staticmethod
    def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """table [T] at the times t [B], shaped [B, 1, ..., 1] to multiply `like`."""
        return table.index_select(0, t - 1).view(-1, *[1] * (like.ndim - 1))

    def _mix(self, a: Tensor, x: Tensor, b: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """a_t x + b_t y, with a and b tables [T]."""
        return self._at(a, t, x) * x + self._at(b, t, y) * y

    # Forward process

    def q_step(self, x_prev: Tensor, t: int | Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t of q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I) (equation 1)."""
        noise = _noise(x_prev, noise)
        return self._mix(self.step_signal_scale, x_prev, self.step_noise_scale, noise, self._times(t, x_prev))

    def q_sample(self, x0: Tensor, t: int | Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (equation 2)."""
        noise = _noise(x0, noise)
        return self._mix(self.signal_scale, x0, self.noise_scale, noise, self._times(t, x0))

    def q_posterior(self, x0: Tensor, xt: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """mu_bar_t (x's shape) and sigma_bar_t^2 [B, 1, ..., 1] of q(x_{t-1} | x_0, x_t) (equations 3 and 4).

        At t = 1 the mean is x_0 itself, and sigma_bar_1^2, 0 by the formula, is taken as beta_1.
        """
        if x0.shape != xt.shape:
            raise ValueError(f"x0 of shape {list(x0.shape)}: must have the shape of xt, {list(xt.shape)}")
        t = self._times(t, xt)
        variance = self._at(self.sigma_bar_square, t, xt)
        first = self._at(self.step_noise_scale**2, t, xt)
        mean = self._mix(self.mu_bar_from_x0, x0, self.mu_bar_from_xt, xt, t)
        return mean, torch.where(t.view(variance.shape) == 1, first, variance)

    # Reverse process

    def _net(self, xt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output in x's precision, whatever precision autocast let it run in."""
        out = super()._net(xt, t, condition)
        found = list(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        if found != list(xt.shape):  # which would broadcast, and train on something else
            raise ValueError(f"time_aware_net: gives {found} for xt of shape {list(xt.shape)}: must be xt's shape")
        return out.to(xt.dtype)

    def predict(self, xt: Tensor, t: int | Tensor, condition: Condition = None) -> Prediction:
        """mu, x_0 and eps as one call of the network at (x_t, t) implies them (equation 11)."""
        t = self._times(t, xt)
        out = self._net(xt, t, condition)
        x0 = self._mix(self.x0_from_xt, xt, self.x0_from_out, out, t)
        if self.bounded:
            x0 = x0.clamp(-1, 1)
            mu = self._mix(self.mu_bar_from_x0, x0, self.mu_bar_from_xt, xt, t)
            eps = self._mix(1 / self.noise_scale, xt, -self.signal_scale / self.noise_scale, x0, t)
            return Prediction(mu, x0, eps)
        mu = self._mix(self.mu_from_xt, xt, self.mu_from_out, out, t)
        return Prediction(mu, x0, self._mix(self.eps_from_xt, xt, self.eps_from_out, out, t))

    def p_mean_variance(
        self, xt: Tensor, t: int | Tensor, clip_x0: bool = False, condition: Condition = None
    ) -> tuple[Tensor, Tensor]:
        """Mean (x's shape) and variance [B, 1, ..., 1] of p(x_{t-1} | x_t); clip_x0 keeps the predicted x_0 in [-1, 1]."""
        t = self._times(t, xt)
        mean, x0, _ = self.predict(xt, t, condition)
        if clip_x0:
            mean = self._mix(self.mu_bar_from_x0, x0.clamp(-1, 1), self.mu_bar_from_xt, xt, t)
        return mean, self._at(self.sigma_square, t, xt)

    def p_sample(
        self, xt: Tensor, t: int | Tensor, noise: Tensor | None = None, clip_x0: bool = False, condition: Condition = None
    ) -> Tensor:
        """Draw x_{t-1} of p(x_{t-1} | x_t); at t = 1 the mean itself, so that no noise is left in x_0."""
        t = self._times(t, xt)
        check_noise(xt, noise)  # before the network's work
        mean, variance = self.p_mean_variance(xt, t, clip_x0, condition)
        noise = _noise(xt, noise)
        return mean + variance.sqrt() * noise * (t > 1).view(variance.shape)

    # Losses

    def _residual(self, x0: Tensor, t: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """The network's output at x_t = q_sample(x_0, t, noise), less what it should be (equation 10)."""
        out = self._net(self.q_sample(x0, t, noise), t, condition)
        return out - self._mix(self.target_from_x0, x0, self.target_from_eps, noise, t)

    def _of_nearest_x0(self, residual: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The residual; of a bounded x_0, that of the x_0_hat in [-1, 1] that is nearest."""
        if not self.bounded:
            return residual
        from_out = self._at(self.x0_from_out, t, x0)
        x0_hat = x0 + from_out * residual
        return torch.where(x0_hat.abs() > 1, (x0_hat.clamp(-1, 1) - x0) / from_out, residual)

    def _bound_term(self, t: Tensor, error: Tensor) -> Tensor:
        """[B]: the term of L_2 / n or L_1 / n (equations 13 and 8) at t, of the network's mean squared error [B]."""
        sigma_square = self._at(self.sigma_square, t, error)
        term = self._at(self.mu_from_out**2, t, error) * error / sigma_square  # equation 12
        if self.reverse_variance == "learnable":
            term = term + sigma_square.log() + self._at(self.sigma_bar_square, t, error) / sigma_square
        return term

    def _loss(self, mode: LossMode, x0: Tensor, t: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """[B]: the loss of each sample at the times t [B], before any weight of t. A loss of your own overrides this one."""
        residual = self._residual(x0, t, noise, condition)
        counted, learnable = residual, self.reverse_variance == "learnable"
        if self.bounded:  # nothing counts beyond the end of [-1, 1] where x_0 is (equation 15b)
            x0_off = self._at(self.x0_from_out, t, x0) * residual.detach()  # x_0_hat - x_0
            counted = residual.masked_fill((x0.abs() >= 1) & (x0 * x0_off > 0), 0)
        error = mean_from(1, counted.square())
        fixed_error = error.detach()  # which a learnable variance learns from: the bound's
        if self.bounded and learnable:
            fixed_error = mean_from(1, self._of_nearest_x0(residual.detach(), x0, t).square())
        if mode == "full":  # with the value of fixed_error and the gradient of error
            return self._bound_term(t, error + (fixed_error - error.detach()))
        loss = self._at(self.min_snr_weight, t, error) * error if mode == "min_snr" else error
        if learnable:  # the bound trains the variance, and only that
            loss = loss + self._bound_term(t, fixed_error)
        return loss

    def loss(self, x0: Tensor, t: int | Tensor, noise: Tensor | None = None, condition: Condition = None) -> Tensor:
        """[B], per dimension: the term at t of the configured objective.

        "simple"   ||out - target||^2 / n (equation 14)
        "min_snr"  the same times min(snr_t, 5) in units of x_0's error (equation 15)
        "full"     the term of L_2 / n, or L_1 / n for a learnable variance (equations 13 and 8); loss_full is the sum over t

        With a learnable variance, "simple" and "min_snr" add the full term with the network's gradient stopped (Nichol &
        Dhariwal 2021, section 3.1): the network learns from the one, the variance from the other.
        """
        noise = _noise(x0, noise)
        return self._loss(self.loss_mode, x0, self._times(t, x0), noise, condition)

    def _random_times(self, x0: Tensor) -> Tensor:
        """[B] times of _time_density on 1..T, spread evenly over the batch."""
        if self._times_are_even:
            return super()._random_times(x0)
        return torch.searchsorted(self.time_cdf, self._even_draws(x0), right=True) + 1

    def _drawn_loss(self, mode: LossMode, x0: Tensor, condition: Condition) -> Tensor:
        """[B]: the loss at random times, weighted to be that of uniform ones in expectation (equation 15c)."""
        t = self._random_times(x0)
        loss = self._loss(mode, x0, t, _noise(x0, None), condition)
        check_losses("_loss", loss, t)
        self.last_terms = t, loss.detach()
        return self._at(self.time_weight, t, loss) * loss

    def loss_simple(self, x0: Tensor, condition: Condition = None) -> Tensor:
        """[B]: the simple loss (equation 14) at random times."""
        return self._drawn_loss("simple", x0, condition)

    def loss_full(self, x0: Tensor, chunk_size: int | None = None, condition: Condition = None) -> Tensor:
        """[B]: the full loss (equation 13), summed over every t = 1..T, each with its own noise.

        chunk_size timesteps go through the network in one call (None: as many as make 128 rows). What a call keeps for the
        backward pass is computed again there, so memory grows with chunk_size and not with T.
        """

        def chunk(x0: Tensor, t: Tensor) -> Tensor:
            rows, times, conditions = every_pair(x0, t, condition)
            loss = self._loss("full", rows, times, _noise(rows, None), conditions)
            check_losses("_loss", loss, times)
            return loss.view(len(t), -1).sum(0)

        chunks = self._chunks(x0, self._for_each(x0, 1, self.T), chunk_size)
        return sum(checkpoint(chunk, x0, t, use_reentrant=False) for t in chunks)

    def forward(self, x0: Tensor, chunk_size: int | None = None, condition: Condition = None) -> Tensor:
        """Scalar: the configured loss, batch mean. chunk_size is loss_full's.

        The times that it drew and their losses, (t, loss) [B] each, are left in `last_terms`, unweighted; not by the full loss,
        of all t.
        """
        check_chunk_size(chunk_size)
        if self.loss_mode == "full":
            return self.loss_full(x0, chunk_size, condition).mean()
        return self._drawn_loss(self.loss_mode, x0, condition).mean()

    # Variational bound

    def _residuals(
        self, x0: Tensor, times: Tensor, chunk_size: int | None, generator, condition: Condition
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of times [k, B] and the network's residuals there [k, B, ...]: first t = 1 alone, then the rest in chunks."""
        for t in (self._for_each(x0, 1, 1), *self._chunks(x0, times, chunk_size)):
            rows, row_times, conditions = every_pair(x0, t, condition)
            noise = torch.randn(rows.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            residual = self._of_nearest_x0(self._residual(rows, row_times, noise, conditions), rows, row_times)
            yield t, residual.unflatten(0, t.shape)

    def variational_bound(
        self,
        x0: Tensor,
        discretized: bool | int = False,
        timesteps: int | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        condition: Condition = None,
    ) -> Bound:
        """-ELBO of x_0 (equation 6) in its parts, nats per dimension, each [B], with every constant kept.

        discretized  False: for the density of x_0. True: for the probability of 8-bit data, whose 256 levels lie 2/255 apart in
                     [-1, 1], the outer two reaching to infinity (Ho et al. 2020, equation 13); total / ln 2 is then bits per
                     dimension. A number: the same of so many levels. ValueError where x_0 leaves [-1, 1]
        timesteps    None: every KL term. An int: that many, for each sample one drawn from each of as many equal parts of 2..T
                     and weighted by the part's length; unbiased, and as much faster
        chunk_size   timesteps in one network call, None for as many as make 128 rows
        generator    of all draws, on x_0's device; the same one draws the same noise in fit_reverse_variance
        """
        return self.bound_by_time(x0, discretized, timesteps, chunk_size, generator, condition)[0]

    @torch.no_grad()
    def bound_by_time(
        self,
        x0: Tensor,
        discretized: bool | int = False,
        timesteps: int | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        condition: Condition = None,
    ) -> tuple[Bound, Tensor, Tensor, Tensor]:
        """variational_bound, whose arguments it has, and what its kl is the sum of.

        Besides the bound: the times t of 2..T [k, B], ascending; how many times each stands for, [k], which add up to T - 1;
        and the KL terms there [k, B], nats per dimension. With `timesteps`, a term is an unbiased estimate of the mean over
        its part of 2..T.
        """
        check_floats("x0", x0)
        n_levels = 256 * discretized if isinstance(discretized, bool) else discretized
        if not is_whole(n_levels) or n_levels < 0 or n_levels == 1:
            raise ValueError(f"discretized = {discretized}: must be False, True, or a number of levels, at least 2")
        if n_levels and not (x0.abs() <= 1).all():  # nor is nan
            raise ValueError(f"x0 from {x0.min():g} to {x0.max():g}: the discretized likelihood is of data in [-1, 1]")
        times, length = self._strata(timesteps, x0, generator)
        alpha_bar_T = self._alpha_bar[-1].item()
        prior = 0.5 * (alpha_bar_T * mean_from(1, x0.square()) - alpha_bar_T - math.log1p(-alpha_bar_T))
        sigma_square, terms = self.sigma_square, [prior.new_zeros(0, len(x0))]  # T = 1 has no others
        with self._evaluating():
            residuals = self._residuals(x0, times, chunk_size, generator, condition)
            mu = x0 + self.mu_from_out[0] * next(residuals)[1][0]  # mu_bar_1 is x_0
            reconstruction = _gaussian_nll(x0, mu, sigma_square[0], n_levels)
            for t, residual in residuals:
                mu_error = self.mu_from_out[t - 1] ** 2 * mean_from(2, residual.square())  # [k, B], equation 12
                ratio = (self.sigma_bar_square / sigma_square)[t - 1]
                terms.append(0.5 * (ratio - 1 - ratio.log() + mu_error / sigma_square[t - 1]))
        terms = torch.cat(terms)
        kl = (length[:, None] * terms).sum(0)
        return Bound(prior, kl, reconstruction, prior + kl + reconstruction), times, length, terms

    @torch.no_grad()
    def fit_reverse_variance(
        self, batches: Iterable, chunk_size: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Set sigma_t^2, t = 1..T, to the values that minimise the bound for this network, in place (equation 9).

        batches is iterated once; each x_0 [B, ...], or pair (x_0, condition), is evaluated at all T times. A progress bar
        counts them. Works for every reverse_variance, and is saved with the module's state. chunk_size and generator as in
        variational_bound.
        """
        if self.reverse_variance == "learnable" and not isinstance(self.log_sigma_square, nn.Parameter):
            raise ValueError("log_sigma_square: is computed from other parameters, and cannot be set")
        errors, count = [], 0
        try:
            total = len(batches) * self.T
        except TypeError:  # an iterator, or the loader of a stream
            total = None
        with self._evaluating(), tqdm(total=total, desc="fitting the reverse variance", unit="t") as bar:
            for batch in batches:
                x0, condition = (batch, None) if isinstance(batch, Tensor) else _pair(batch)
                check_floats("x0", x0)
                pieces = []
                for t, residual in self._residuals(x0, self._for_each(x0, 2, self.T), chunk_size, generator, condition):
                    pieces.append(mean_from(2, residual.square()).sum(1))
                    bar.update(len(t))
                errors.append(torch.cat(pieces))  # [T]; stays on the device, so that nothing waits for it
                count += len(x0)
        error = torch.stack(errors).cpu().double().sum(0) if count else torch.full((self.T,), math.nan)
        if not error.isfinite().all():
            raise ValueError("batches: " + ("the network's error on them is not finite" if count else "there is none"))
        x0_error = self.x0_from_out.cpu().double() ** 2 * error / count  # equation 12
        # a network that is never wrong must still leave sigma_1^2 positive, and one that knows no x_0 near T all finite
        x0_error = x0_error.clamp(1e-12, torch.finfo(self.signal_scale.dtype).max).to(self.signal_scale)
        if self.reverse_variance == "learnable":
            self.log_sigma_square.copy_(self._variance(x0_error).log())
        else:
            self.x0_error.copy_(x0_error)

    # Samples

    def trajectory(
        self,
        shape: Sequence[int],
        sampler: str | Sampler = "ddpm",
        timesteps: int | Sequence[int] | None = None,
        eta: float = 0.0,
        clip_x0: bool = False,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        condition: Condition = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Generate (t, x_t) from (T, x_T) down to (0, x_0), without gradients.

        sampler    a name in samplers.SAMPLERS ("ddpm", "ddim", "dpm", "heun": equations 16 to 19), or a function like those
        timesteps  the steps. None: all. An int: that many, T and 1 included, spread as `steps` says. Or the times, descending
        eta        of "ddim" only, 0 to 1; with 0 a function of your own keeps its default
        clip_x0    keep every predicted x_0 in [-1, 1], and the error that a variance assumes of it at most 1. Without it, a
                   learned variance needs all steps of "ddpm": an error in it grows where they are few
        x_T        the state to start from, of the given shape; drawn if None
        generator  of all draws, on the module's device
        """
        rule = _sampler(sampler)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta:g}: must lie between 0 and 1")
        if eta and not _takes_eta(rule):
            those = " or ".join(repr(name) for name in SAMPLERS if _takes_eta(SAMPLERS[name]))
            name = getattr(_written(rule), "__name__", rule)
            raise ValueError(f"eta = {eta:g}: only the sampler {those} has it, not {name!r}")
        rule = partial(rule, eta=eta) if eta else rule
        arguments_of(condition)
        levels = self._levels(self.steps(timesteps, sampler), clip_x0)
        if x_T is None:
            x_T = torch.randn(*shape, generator=generator, device=self.signal_scale.device, dtype=self.signal_scale.dtype)
        check_floats("x_T", x_T)
        if x_T.shape != torch.Size(shape):
            raise ValueError(f"x_T of shape {list(x_T.shape)}: must have the shape asked for, {list(shape)}")
        return self._each_evaluating(self._states(x_T, levels, rule, clip_x0, generator, condition))

    def _states(
        self, x: Tensor, levels: list[Level], rule: Sampler, clip_x0: bool, generator, condition: Condition
    ) -> Iterator[tuple[int, Tensor]]:
        """The states of trajectory: the sampler's, each with its time, and a ValueError where it yields what it must not."""
        times = torch.empty(len(x), dtype=torch.long, device=x.device)
        noise = torch.empty_like(x)

        def predict_x0(x: Tensor, t: int) -> Tensor:
            if isinstance(t, int) and not 1 <= t <= self.T:  # a tensor's value is not waited for
                raise ValueError(f"sampler: asks for x_0 at t = {t}: must ask at t in 1..{self.T}")
            out = self._net(x, times.fill_(t), condition)
            x0 = (self.x0_from_xt[t - 1] * x).addcmul_(self.x0_from_out[t - 1], out)  # equation 11, with one t for all rows
            return x0.clamp_(-1, 1) if clip_x0 or self.bounded else x0

        yield levels[0].t, x
        states = iter(rule(predict_x0, x, levels, lambda: noise.normal_(generator=generator)))
        for level in levels[1:]:
            state = next(states, None)
            if not isinstance(state, Tensor) or state.shape != x.shape:
                found = f"a tensor of {list(state.shape)}" if isinstance(state, Tensor) else f"a {type(state).__name__}"
                raise ValueError(f"sampler: gives {found} at t = {level.t}: must yield x there, of shape {list(x.shape)}")
            x = state
            yield level.t, x
        if next(states, None) is not None:
            raise ValueError("sampler: gives a state after x_0, its last: must yield x once for each level but the first")

    def encode(
        self, x0: Tensor, timesteps: int | Sequence[int] | None = None, clip_x0: bool = False, condition: Condition = None
    ) -> Tensor:
        """x_T, of x_0's shape, from which "ddim" with the same arguments leads back to x_0: samplers.ddim_upwards.

        One call of the network a step. The error falls with the square of the number of steps.
        """
        check_floats("x0", x0)
        return self.sample(x0.shape, ddim_upwards, timesteps, 0.0, clip_x0, x0, None, condition)

    def _spacing(self, sampler: str | Sampler) -> Callable[[Tensor, int], list[int]]:
        return getattr(_written(_sampler(sampler)), "spacing", even_in_time)

    def network_calls(self, timesteps: int | Sequence[int] | None, sampler: str | Sampler = "ddpm") -> int:
        """How often a sample calls the network, counted while the sampler runs on an image of a single number."""
        calls = []

        def predict_x0(x: Tensor, t: int) -> Tensor:
            calls.append(t)
            return torch.zeros_like(x)

        levels = self._levels(self.steps(timesteps, sampler), clip_x0=False)
        x = torch.zeros(1, 1, 1, 1)
        for _ in _sampler(sampler)(predict_x0, x, levels, lambda: torch.zeros_like(x)):
            pass
        return len(calls)

    def _levels(self, steps: list[int], clip_x0: bool) -> list[Level]:
        """What a sampler may know of the times it visits, and of t = 0 after them, as Python floats."""
        x0_error = self._assumed_x0_error()
        # Near T a learned sigma_t^2 says next to nothing of e_t, and a longer step magnifies what it says wrongly
        learned = self.reverse_variance == "learnable" and len(steps) < self.T
        if learned:  # where float32 loses c_t^2 e_t beside sigma_bar_t^2, it is that of the last t before
            q = _process(self._alpha_bar)
            last = (q.mu_bar_from_x0**2 * (1 - self._alpha_bar) > TOLD * q.sigma_bar_square).nonzero()[-1].item()
            x0_error[last:] = x0_error[last].clone()
        if clip_x0 or self.bounded:  # of data in [-1, 1] no good guess errs by more (Bao et al. 2022, theorem 2)
            x0_error = x0_error.clamp(max=1)
            if learned:  # at most what beta claims, as in Nichol & Dhariwal 2021, equation 15
                x0_error = torch.minimum(x0_error, 1 - self._alpha_bar)
        table = list(zip(self._alpha_bar.tolist(), x0_error.tolist(), strict=True))
        return [*(Level(t, *table[t - 1]) for t in steps), Level(0, 1.0, 0.0)]

    def _assumed_x0_error(self) -> Tensor:
        """Equation 9 solved for x0_error, [T] in float64: what sigma_t^2 assumes of the network, in any chain."""
        if self.reverse_variance != "learnable":
            return self.x0_error.cpu().double()
        excess = self.log_sigma_square.detach().cpu().double().exp() - self.sigma_bar_square.cpu().double()
        factor = self.mu_bar_from_x0.cpu().double() ** 2
        error = torch.where(factor > 0, excess / factor, 1 - self._alpha_bar)  # where it has none, as beta claims
        return error.clamp(min=0)  # a learnt one may be a little too small

    classify = classify  # the class of the least bound


def _pair(batch: object) -> tuple[Tensor, Condition]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError("batches: each must be x_0, a tensor, or a pair (x_0, condition)")
    return tuple(batch)


def _sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of that name, or the one given."""
    if callable(sampler):
        return sampler
    choice("sampler", sampler, SAMPLERS)
    return SAMPLERS[sampler]


def _written(sampler: Sampler) -> Callable:
    """The function itself, of one that functools.partial has given its parameters."""
    return _written(sampler.func) if isinstance(sampler, partial) else sampler


def _takes_eta(sampler: Sampler) -> bool:
    return "eta" in inspect.signature(sampler).parameters


def _noise(x: Tensor, noise: Tensor | None) -> Tensor:
    """The noise given, or drawn."""
    check_floats("x", x)
    check_noise(x, noise)
    return torch.randn_like(x) if noise is None else noise


def _gaussian_nll(x: Tensor, mean: Tensor, variance: Tensor, n_levels: int) -> Tensor:
    """-log N(x; mean, variance) per dimension in nats, [B]; of n_levels > 0: of the interval of x's level instead."""
    z = (x - mean) / variance.sqrt()
    if not n_levels:
        return 0.5 * ((2 * math.pi * variance).log() + mean_from(1, z.square()))
    reach = 1 / (n_levels - 1)  # half the distance of two levels
    half = reach / variance.sqrt()
    lower = torch.where(x < -1 + reach, -math.inf, z - half)
    upper = torch.where(x > 1 - reach, math.inf, z + half)
    right = lower > 0  # there the two probabilities are close to 1: take their complements
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_lower, log_upper = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return -mean_from(1, log_upper + torch.log(-torch.expm1(log_lower - log_upper)))


TABLE = {"timesteps": (1000, 20), "batch_size": (16, 4), "image_size": (32, 16), "base_channels": (128, 32)}  # CUDA, others


def _measure(diffusion: GaussianDiffusion, x0: Tensor, chunk_size: int | None, iterations: int) -> tuple[float, float, float]:
    """Loss, median seconds of a forward and backward pass, and peak memory in MiB (nan where it cannot be known)."""
    cuda = x0.device.type == "cuda"
    seconds = []
    for i in range(iterations + 1):  # the first one warms up
        diffusion.zero_grad()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = diffusion(x0, chunk_size)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        if i:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else math.nan
    return loss.item(), statistics.median(seconds), peak


def main(argv: list[str] | None = None) -> int:
    """Print the time and memory table; the exit code."""
    from mistakes import Mistake, OneLineParser, as_mistake, run_script
    from training.ranks import Ranks

    parser = OneLineParser(description="Time and memory of a forward and backward pass in every setting.")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ...; by default CUDA where there is one")
    for name, (on_cuda, elsewhere) in TABLE.items():
        default = f"by default {on_cuda} on CUDA, {elsewhere} elsewhere"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=default)
    parser.add_argument("--chunk-size", type=int, help="timesteps in one network call of the full loss")
    parser.add_argument("--activation-checkpointing", action="store_true", help="in the U-Net")
    parser.add_argument("--iterations", type=int, default=3, help="timed ones, after one to warm up; the median is shown")
    args = parser.parse_args(argv)

    def work() -> None:
        device = Ranks(args.device, alone=True).device
        for name, (on_cuda, elsewhere) in TABLE.items():
            if getattr(args, name) is None:
                setattr(args, name, on_cuda if device.type == "cuda" else elsewhere)
        if min(args.batch_size, args.image_size, args.iterations) < 1:
            raise Mistake("--batch-size, --image-size and --iterations must be at least 1")
        with as_mistake():
            _table(**vars(args) | {"device": device})

    return run_script("gaussian_diffusion.py", work)


def _table(
    device: torch.device,
    timesteps: int,
    batch_size: int,
    image_size: int,
    base_channels: int,
    chunk_size: int | None,
    activation_checkpointing: bool,
    iterations: int,
) -> None:
    from beta_schedule import LinearSchedule
    from time_aware_module import TimeAwareUNet

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    batch = f"batch {batch_size} of 3 x {image_size} x {image_size}"
    small = "" if device.type == "cuda" else " (small, for want of CUDA)"
    print(f"{where}, torch {torch.__version__}: T = {timesteps}, {batch}, base_channels = {base_channels}{small}")
    print(f"{'variance':>16}  {'prediction':>14}  {'loss':>7}  {'loss value':>12}  {'ms / iteration':>14}  {'peak MiB':>8}")
    for variance, prediction, loss_mode in product(*map(get_args, (ReverseVariance, PredictionName, LossMode))):
        torch.manual_seed(0)
        net = TimeAwareUNet(3, base_channels, attention=(False, True, False, False))
        net.activation_checkpointing = activation_checkpointing
        diffusion = GaussianDiffusion(LinearSchedule(timesteps), net, variance, prediction, loss_mode).to(device)
        x0 = torch.rand(batch_size, 3, image_size, image_size, device=device) * 2 - 1
        print(f"{variance:>16}  {prediction:>14}  {loss_mode:>7}", end="  ", flush=True)
        try:
            loss, seconds, peak = _measure(diffusion, x0, chunk_size, iterations)
        except RuntimeError as error:  # CUDA's own class is one of these
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            print("out of memory")
            continue
        print(f"{loss:12.5g}  {1000 * seconds:14.1f}  {'n/a' if math.isnan(peak) else f'{peak:.0f}':>8}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
