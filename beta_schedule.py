"""Variance schedules: beta_1..beta_T of the forward process and what follows from them.

A schedule is a sequence of T variances, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (README, equation 1).
Everything here is float64; index i of a tensor holds the value at t = i + 1.

    python beta_schedule.py                                       # a figure of every schedule, with its defaults
    python beta_schedule.py configs/Digits_den.json configs/CIFAR10_den.json       # of these configs'
"""

import math
import sys
import warnings

import torch
from torch import Tensor

MOST_TIMESTEPS = 10**6  # more is a mistake, and would run out of memory before it were seen


class BetaSchedule:
    """beta_1..beta_T, given as a float64 tensor [T] with every value in (0, 1).

    beta       variance of step t
    alpha      1 - beta_t
    alpha_bar  alpha_1 * ... * alpha_t: the signal's share of the variance of x_t (README, equation 2)
    snr        alpha_bar_t / (1 - alpha_bar_t): the signal-to-noise ratio

    cause stands before the error's words where a beta is out of range: the argument that it comes from.
    """

    def __init__(self, beta: Tensor, cause: str = ""):
        outside = ~((beta > 0) & (beta < 1))
        if outside.any():
            t = int(outside.nonzero()[0]) + 1
            raise ValueError(
                f"{cause}beta_{t} = {beta[t - 1].item():g}: every beta must lie between 0 and 1, both excluded; "
                "change the schedule's arguments"
            )
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = self.alpha.cumprod(0)
        self.snr = self.alpha_bar / (1 - self.alpha_bar)

    def __len__(self) -> int:
        return len(self.beta)


def alpha_bar_before(alpha_bar: Tensor) -> Tensor:
    """alpha_bar_{t-1} at t = 1..T, [T], of which alpha_bar_0 = 1."""
    return torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


def alpha_bar_of(schedule) -> Tensor:
    """The alpha_bar [T] of a schedule, float64 on the CPU; ValueError unless every step adds noise, and some signal is left.

    A step that adds none (beta_t = 0) has no density, and at no signal before T there is nothing for the steps after it.
    """
    if not hasattr(schedule, "alpha_bar") and "alpha_bar" not in dir(schedule):  # where it is and fails, its own error says how
        raise ValueError(f"schedule: a {type(schedule).__name__}: must have a float64 tensor alpha_bar [T]")
    alpha_bar = schedule.alpha_bar
    if not isinstance(alpha_bar, Tensor) or alpha_bar.ndim != 1 or not len(alpha_bar):
        raise ValueError("schedule: alpha_bar must be a float64 tensor [T]")
    if alpha_bar.dtype != torch.float64:
        few = "so that beta_t and 1 - alpha_bar_t have few right digits; compute it in float64"
        warnings.warn(f"schedule: alpha_bar is {alpha_bar.dtype}, {few}", stacklevel=4)
    alpha_bar = alpha_bar.detach().double().cpu()
    before = alpha_bar_before(alpha_bar)
    wrong = ~((before > 0) & (alpha_bar < before) & (alpha_bar >= 0))  # the last one may be 0
    if wrong.any():
        t = int(wrong.nonzero()[0]) + 1
        raise ValueError(
            f"schedule: alpha_bar_{t} = {alpha_bar[t - 1].item():g} after {before[t - 1].item():g}: alpha_bar must fall from "
            "below 1, at every step, and be positive before its last value"
        )
    return alpha_bar


def _time(timesteps: int) -> Tensor:
    """1..T as float64."""
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or not 1 <= timesteps <= MOST_TIMESTEPS:
        raise ValueError(f"timesteps = {timesteps!r}: must be a whole number in 1..{MOST_TIMESTEPS}")
    return torch.arange(1, timesteps + 1, dtype=torch.float64)


def _power(timesteps: int, start: float, end: float, power: float) -> Tensor:
    """From start at t = 1 to end at t = T, evenly spaced in beta^(1 / power)."""
    for name, value in (("start", start), ("end", end)):
        if not 0 < value < 1:
            raise ValueError(f"{name} = {value:g}: must lie between 0 and 1, both excluded")
    steps = len(_time(timesteps))
    return torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float64) ** power


class ConstantSchedule(BetaSchedule):
    """beta_t = constant."""

    def __init__(self, timesteps: int = 1000, constant: float = 0.01):
        super().__init__(torch.full_like(_time(timesteps), constant), f"constant = {constant:g}: ")


class LinearSchedule(BetaSchedule):
    """beta_t rises linearly in t from start to end (Ho et al. 2020, section 4)."""

    def __init__(self, timesteps: int = 1000, start: float = 1e-4, end: float = 0.02):
        super().__init__(_power(timesteps, start, end, 1))


class SqrtSchedule(BetaSchedule):
    """beta_t^2 rises linearly in t: fast at first, then slowly, from start to end."""

    def __init__(self, timesteps: int = 1000, start: float = 1e-4, end: float = 0.02):
        super().__init__(_power(timesteps, start, end, 0.5))


class QuadraticSchedule(BetaSchedule):
    """sqrt(beta_t) rises linearly in t: slowly at first, then fast, from start to end."""

    def __init__(self, timesteps: int = 1000, start: float = 1e-4, end: float = 0.02):
        super().__init__(_power(timesteps, start, end, 2))


class SineSchedule(BetaSchedule):
    """beta_t = scale * sin(pi / 2 * t / T): a quarter wave that ends at beta_T = scale."""

    def __init__(self, timesteps: int = 1000, scale: float = 0.02):
        super().__init__(scale * (math.pi / 2 * _time(timesteps) / timesteps).sin(), f"scale = {scale:g}: ")


class SigmoidSchedule(BetaSchedule):
    """beta_t = scale * sigmoid(u), u rising linearly in t from -6 to 6."""

    def __init__(self, timesteps: int = 1000, scale: float = 0.02):
        u = torch.linspace(-6, 6, len(_time(timesteps)), dtype=torch.float64)
        super().__init__(scale * u.sigmoid(), f"scale = {scale:g}: ")


class CosineSchedule(BetaSchedule):
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2(pi / 2 * (t / T + s) / (1 + s)), beta_t at most 0.999.

    Nichol & Dhariwal 2021, equation 17.
    """

    def __init__(self, timesteps: int = 1000, s: float = 0.008):
        if s < 0:
            raise ValueError(f"s = {s:g}: must be at least 0")
        t = torch.cat([torch.zeros(1, dtype=torch.float64), _time(timesteps)])
        f = (math.pi / 2 * (t / timesteps + s) / (1 + s)).cos() ** 2
        super().__init__((1 - f[1:] / f[:-1]).clamp(max=0.999))


def main(argv: list[str] | None = None) -> int:
    """Draw beta, alpha_bar and log snr of the schedules."""
    from evaluation.forward import draw_schedules
    from evaluation.pictures import png_path
    from mistakes import OneLineParser, run_script

    parser = OneLineParser(description="Draw beta, alpha_bar and log snr of every schedule, or of those of some configs.")
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="by default all schedules, each with its own defaults")
    parser.add_argument("--output", default="models/schedules.png", metavar="PNG", help="by default %(default)s")
    args = parser.parse_args(argv)

    def work() -> None:
        path = png_path(args.output)
        draw_schedules(args.configs, path)
        print(f"{path}: beta, alpha_bar and log snr of {', '.join(args.configs) or 'every schedule'}")

    return run_script("beta_schedule.py", work)


if __name__ == "__main__":
    sys.exit(main())
