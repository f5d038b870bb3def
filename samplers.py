"""Samplers: from x_T and a network's prediction of x_0 to x_0, one function each, in the dictionary SAMPLERS.

A sampler is a generator, sampler(predict_x0, x, levels, normal), that yields x after every step:

    predict_x0(x, t)  x_0_hat, a new tensor of x's shape, by one call of the network; t is an int in 1..T
    x                 the state at levels[0]; what the sampler writes into is a tensor of its own
    levels            the times to visit, descending, and what is known at each; the last is Level(0, 1.0, 0.0), x_0 itself
    normal()          standard noise of x's shape, in a buffer that the next call overwrites

It may have an argument eta besides. To add one, write it here, or pass your own function to GaussianDiffusion.sample.
Coefficients are Python floats, which are float64, so that a step is tensor operations alone and waits for no device. Symbols
and equation numbers are those of the README, section "The mathematics"; s is the time that a step from t leads to.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from math import expm1, inf, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """A time, and what a sampler may know of it."""

    t: int
    alpha_bar: float  # the signal's share of the variance of x_t
    x0_error: float  # e_t = E||x_0_hat - x_0||^2 / n, which the reverse variance assumes (equation 9)


Sampler = Callable[..., Iterator[Tensor]]
PredictX0 = Callable[[Tensor, int], Tensor]
Normal = Callable[[], Tensor]

SAMPLERS: dict[str, Sampler] = {}


# Spacings: where a sampler that is given a number of steps takes them, from alpha_bar [T] in float64

NOISE = -10.2  # the log snr below which x_t counts as noise; the schedule of Ho et al. 2020 ends at -10.1
NO_SIGNAL = 1e-36  # the alpha_bar below which x_t / sqrt(alpha_bar_t) may leave what float32 holds


def even_in_time(alpha_bar: Tensor, count: int) -> list[int]:
    """`count` times from T down to 1, in even steps of t."""
    return torch.linspace(len(alpha_bar), 1, count, dtype=torch.float64).round().int().tolist()


def even_in_log_snr(alpha_bar: Tensor, count: int, in_noise: float = 1.0) -> list[int]:
    """The times nearest to even steps in log snr from T down to 1, moved apart by as little as makes them distinct.

    Below NOISE, where x_t tells hardly anything of x_0, they are `in_noise` times as dense. Where x_T holds no signal, its
    log snr is -inf: T, and then the others as if T - 1 were the last.
    """
    log_snr = torch.logit(alpha_bar[alpha_bar > 0])
    times = [len(alpha_bar)] if len(log_snr) < len(alpha_bar) else []
    return times + _nearest(log_snr.clamp(min=NOISE) + in_noise * (log_snr - NOISE).clamp(max=0), count - len(times))


def _nearest(coordinate: Tensor, count: int) -> list[int]:
    """Distinct descending times whose coordinates [T], which fall, are nearest to even steps from that of T to that of 1."""
    if count == 0:
        return []
    targets = torch.linspace(coordinate[-1], coordinate[0], count, dtype=torch.float64)
    rising = coordinate.flip(0)  # of T, ..., 1
    after = torch.searchsorted(rising, targets).clamp(max=len(rising) - 1)
    before = (after - 1).clamp(min=0)
    nearest = len(rising) - torch.where(targets - rising[before] < rising[after] - targets, before, after)
    times = []
    for i, t in enumerate(nearest.tolist()):
        most = times[-1] - 1 if times else len(coordinate)
        times.append(max(min(t, most), count - i))  # leave a time for each that follows
    return times


def register(spacing: Callable[[Tensor, int], list[int]]) -> Callable[[Sampler], Sampler]:
    """Put a sampler into SAMPLERS under its own name, with the spacing that suits it."""

    def enter(sampler: Sampler) -> Sampler:
        there = SAMPLERS.get(sampler.__name__)
        if there and there.__module__ != sampler.__module__:
            raise ValueError(f"sampler {sampler.__name__!r}: is registered by {there.__module__}; give yours another name")
        sampler.spacing = spacing
        SAMPLERS[sampler.__name__] = sampler
        return sampler

    return enter


@register(even_in_time)
def ddpm(predict_x0: PredictX0, x: Tensor, levels: list[Level], normal: Normal) -> Iterator[Tensor]:
    """Ancestral sampling, Ho et al. 2020, algorithm 2, on any subset of the times (equation 16)."""
    for (t, alpha_bar_t, x0_error), (s, alpha_bar_s, _) in pairwise(levels):
        alpha = alpha_bar_t / alpha_bar_s
        mu_bar_from_xt = sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        mu_bar_from_x0 = sqrt(alpha_bar_s) * (1 - alpha) / (1 - alpha_bar_t)
        sigma_bar_square = (1 - alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        sigma_square = sigma_bar_square + mu_bar_from_x0 * mu_bar_from_x0 * x0_error
        x0 = predict_x0(x, t)
        x = (mu_bar_from_xt * x).add_(x0, alpha=mu_bar_from_x0)
        if s > 0:
            x.add_(normal(), alpha=sqrt(sigma_square))
        yield x


@register(even_in_time)
def ddim(predict_x0: PredictX0, x: Tensor, levels: list[Level], normal: Normal, eta: float = 0.0) -> Iterator[Tensor]:
    """Song et al. 2021 (arXiv:2010.02502), equation 12: deterministic for eta = 0, ancestral for eta = 1 (equation 17)."""
    for (t, alpha_bar_t, _), (_, alpha_bar_s, _) in pairwise(levels):
        alpha = alpha_bar_t / alpha_bar_s
        std = eta * sqrt((1 - alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t))  # eta sigma_bar, 0 in the last step
        from_xt = sqrt(max(1 - alpha_bar_s - std * std, 0.0) / (1 - alpha_bar_t))  # x_t holds the noise that is kept
        from_x0 = sqrt(alpha_bar_s) - from_xt * sqrt(alpha_bar_t)
        x0 = predict_x0(x, t)
        x = (from_xt * x).add_(x0, alpha=from_x0)
        if std > 0:
            x.add_(normal(), alpha=std)
        yield x


@register(partial(even_in_log_snr, in_noise=0.25))
def dpm(predict_x0: PredictX0, x: Tensor, levels: list[Level], normal: Normal) -> Iterator[Tensor]:
    """DPM-Solver++ 2M, Lu et al. 2022 (arXiv:2211.01095), algorithm 2; its first and last step of first order (equation 18).

    Its error is of second order in the steps of log snr, so these are even, but for noise, where x_0_hat hardly changes.
    """
    x0_before, h_before = None, inf
    for (t, alpha_bar_t, _), (s, alpha_bar_s, _) in pairwise(levels):
        h = _half_log_snr(alpha_bar_s) - _half_log_snr(alpha_bar_t)
        from_xt = sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t))
        from_x0 = -sqrt(alpha_bar_s) * expm1(-h)
        extrapolation = 0.5 * h / h_before if s > 0 and h_before < inf else 0.0  # 1 / (2 r) of the paper
        x0 = predict_x0(x, t)
        x = (from_xt * x).add_(x0, alpha=from_x0 * (1 + extrapolation))
        if extrapolation > 0:
            x.add_(x0_before, alpha=-from_x0 * extrapolation)
        x0_before, h_before = x0, h
        yield x


def _half_log_snr(alpha_bar: float) -> float:
    """lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), infinite at t = 0, and -inf where there is no signal."""
    if 0 < alpha_bar < 1:
        return 0.5 * log(alpha_bar / (1 - alpha_bar))
    return inf if alpha_bar else -inf


@register(even_in_log_snr)
def heun(predict_x0: PredictX0, x: Tensor, levels: list[Level], normal: Normal) -> Iterator[Tensor]:
    """Heun's second-order method, Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without churn (equation 19).

    Two calls of the network a step, but one in the last, Euler's alone, which ends at x_0_hat. The paper's sigma is nu here.
    """
    for (t, alpha_bar_t, _), (s, alpha_bar_s, _) in pairwise(levels):
        if s == 0:
            yield predict_x0(x, t)
            return
        if alpha_bar_t < NO_SIGNAL:  # nu is as good as infinite: Euler's step alone, which is that of ddim
            x = sqrt(1 - alpha_bar_s) * x + sqrt(alpha_bar_s) * predict_x0(x, t)
            yield x
            continue
        nu_t, nu_s = (sqrt((1 - alpha_bar) / alpha_bar) for alpha_bar in (alpha_bar_t, alpha_bar_s))
        y_t = x / sqrt(alpha_bar_t)
        slope_t = (y_t - predict_x0(x, t)).div_(nu_t)
        y_s = y_t.add(slope_t, alpha=nu_s - nu_t)  # Euler's step
        slope_s = (y_s - predict_x0(sqrt(alpha_bar_s) * y_s, s)).div_(nu_s)
        y_s = y_t.add_(slope_t.add_(slope_s), alpha=0.5 * (nu_s - nu_t))
        x = sqrt(alpha_bar_s) * y_s
        yield x


# The other way


def ddim_upwards(predict_x0: PredictX0, x: Tensor, levels: list[Level], normal: Normal) -> Iterator[Tensor]:
    """From x = x_0 to x_T, the inverse of ddim with eta = 0 on the same levels, but for an error of second order.

    ddim's step (equation 17) from t to s keeps eps_hat(x_t, t) and x_0_hat(x_t, t). Its inverse has x_t on both sides. Here the
    network is asked at a guess of x_t, made with what it said the step before, which is off by the square of the step; asked at
    x_s itself (Song et al. 2021, section 4.3), the error would be of first order.
    """
    x0, eps = x, torch.zeros_like(x)
    for (_, alpha_bar_s, _), (t, alpha_bar_t, _) in pairwise(reversed(levels)):
        guess = _step_upwards(x, x0, eps, alpha_bar_s, alpha_bar_t)
        x0 = predict_x0(guess, t)
        eps = (guess - sqrt(alpha_bar_t) * x0) / sqrt(1 - alpha_bar_t)
        x = _step_upwards(x, x0, eps, alpha_bar_s, alpha_bar_t)
        yield x


def _step_upwards(x: Tensor, x0: Tensor, eps: Tensor, alpha_bar_s: float, alpha_bar_t: float) -> Tensor:
    """x_t of x_s, by eps_hat or by x_0_hat: the same if both are of x_t itself, else by what differs less at a guess of it.

    With nu = sqrt((1 - alpha_bar) / alpha_bar), a wrong guess of y_t = x_t / sqrt(alpha_bar_t) is passed on by
    (nu_t - nu_s) deps/dy, or by (nu_t - nu_s) / nu_s dx0/dy. Of data of unit variance these are as nu_s nu_t to 1, so eps_hat
    serves where there is little noise, nu_s nu_t < 1 or alpha_bar_s + alpha_bar_t > 1, and x_0_hat where there is much.
    """
    if alpha_bar_s == 1 or alpha_bar_s + alpha_bar_t > 1:
        x0 = (x - sqrt(1 - alpha_bar_s) * eps) / sqrt(alpha_bar_s)
    else:
        eps = (x - sqrt(alpha_bar_s) * x0) / sqrt(1 - alpha_bar_s)
    return sqrt(alpha_bar_t) * x0 + sqrt(1 - alpha_bar_t) * eps
