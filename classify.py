"""The likelihood as a classifier: the class under which x_0 has the least bound (Li et al. 2023, arXiv:2303.16203).

label = diffusion.classify(x0, n_classes)      # this function is a method of GaussianDiffusion
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from diffusion_process import check_chunk_size, check_whole, choice, mean_from

Weighting = Literal["bound", "noisy"]
ROUNDS = TRIALS = 16  # of classify, by default
PATIENCE = 4.0  # standard errors by which a class must be worse than the best one to be given up


@torch.no_grad()
def classify(
    diffusion: nn.Module,
    x0: Tensor,
    n_classes: int,
    weighting: Weighting = "bound",
    rounds: int = ROUNDS,
    trials: int = TRIALS,
    chunk_size: int = 128,
    generator: torch.Generator | None = None,
    return_calls: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Long [B]: of x0 [B, ...], the class 0..n_classes - 1 of the least bound; Bayes' rule for classes equally likely.

    Only sum_t weight_t ||x_0_hat - x_0||^2 of the bound depends on the class (README, equations 6, 8 and 12). It is estimated
    at times drawn with probability in proportion to weight_t (1 - alpha_bar_t), one from each of `trials` equal parts of it in
    a round: 1 - alpha_bar_t is the error that data of unit variance would leave, so that each draw counts about the same. All
    classes get the same times and noise, so that what they share cancels. After each round a class is given up for a sample
    where it is worse than the best one by PATIENCE standard errors of their difference.

    weighting     "bound": Bayes' rule for a network that knows the data. "noisy": weight_t (1 - alpha_bar_t), the average bound
                  of x_0 with the noise of a random time (Kingma & Gao 2023, arXiv:2303.00848, theorem 1), for images: where
                  there is little noise the bound weighs an error most, and a network has errors there that are its own
    rounds        at most, until each sample has one class left
    trials        in a round, for each sample and each class that it has left
    chunk_size    rows of one network call, which has at least all the classes of one sample
    generator     of all draws, on x_0's device
    return_calls  also return how often the network saw each sample, long [B]
    """
    _check(diffusion, n_classes, weighting, rounds, trials, chunk_size)
    alive = torch.ones(len(x0), n_classes, dtype=torch.bool, device=x0.device)
    errors = torch.empty(len(x0), n_classes, 0, device=x0.device)  # of all trials so far, nan where a class was given up
    with diffusion._evaluating():
        for _ in range(rounds):
            undecided = alive.sum(1) > 1
            if not undecided.any():
                break
            more = errors.new_full((len(x0), n_classes, trials), math.nan)
            times = _times(diffusion, weighting, int(undecided.sum()), trials, generator)
            more[undecided] = _errors(diffusion, x0[undecided], alive[undecided], times, chunk_size, generator)
            errors = torch.cat([errors, more], 2)
            alive[undecided] &= ~_worse(errors[undecided], alive[undecided])
    label = _means(errors, alive).argmin(1)
    return (label, errors.isfinite().sum((1, 2))) if return_calls else label


def _check(diffusion: nn.Module, n_classes: int, weighting: str, rounds: int, trials: int, chunk_size: int) -> None:
    known = getattr(diffusion.time_aware_net, "n_classes", n_classes)  # a network of your own need not say
    if known is None:
        raise ValueError(f"n_classes = {n_classes}: this network has no classes")
    check_whole("n_classes", n_classes, 1)
    if n_classes > known:
        raise ValueError(f"n_classes = {n_classes}: must lie in 1..{known}, the classes of the network")
    choice("weighting", weighting, get_args(Weighting))
    if chunk_size is None:
        raise ValueError("chunk_size = None: must be a number of rows")
    check_chunk_size(chunk_size)
    check_whole("rounds", rounds, 1)
    check_whole("trials", trials, 2)


def _times(diffusion: nn.Module, weighting: str, size: int, trials: int, generator) -> Tensor:
    """Times [size, trials], one from each of as many parts of equal probability."""
    unit_error = diffusion.noise_scale**2  # 1 - alpha_bar
    probability = _weight(diffusion) * unit_error * (unit_error if weighting == "noisy" else 1)
    part = torch.arange(trials, device=unit_error.device).expand(size, trials)
    u = (part + torch.rand(part.shape, generator=generator, device=unit_error.device)) / trials
    below = probability.cumsum(0)
    return torch.searchsorted(below, u * below[-1]).clamp(max=diffusion.T - 1) + 1


def _errors(diffusion: nn.Module, x0: Tensor, alive: Tensor, times: Tensor, chunk_size: int, generator) -> Tensor:
    """||x_0_hat - x_0||^2 / (n (1 - alpha_bar_t)) [B, n_classes, trials] of the classes alive, nan for the others."""
    trials, unit_error = times.shape[1], diffusion.noise_scale**2
    samples = torch.arange(len(x0), device=x0.device).repeat_interleave(trials)
    errors = torch.full((len(samples), alive.shape[1]), math.nan, device=x0.device)
    pairs = max(1, chunk_size // int(alive.sum(1).max()))  # of a sample and a time, in one call with all their classes
    for i, t, error in zip(samples.split(pairs), times.flatten().split(pairs), errors.split(pairs), strict=True):
        noise = torch.randn(len(i), *x0.shape[1:], generator=generator, device=x0.device, dtype=x0.dtype)
        xt = diffusion.q_sample(x0[i], t, noise)
        row, label = alive[i].nonzero(as_tuple=True)
        wrong = diffusion.predict(xt[row], t[row], {"label": label}).x0 - x0[i][row]
        error[row, label] = (mean_from(1, wrong.square()) / unit_error[t - 1][row]).to(error)
    return errors.view(len(x0), trials, -1).transpose(1, 2)


def _weight(diffusion: nn.Module) -> Tensor:
    """Of ||x_0_hat - x_0||^2 / n in the bound per dimension, [T]: ||mu - mu_bar||^2 / (2 sigma^2), with mu's share of x_0."""
    return diffusion.mu_bar_from_x0**2 / (2 * diffusion.sigma_square)


def _means(errors: Tensor, alive: Tensor) -> Tensor:
    """[B, n_classes], infinite for a class that was given up. Those left have had all the trials of their sample."""
    return torch.where(alive, errors.nanmean(2), math.inf)


def _worse(errors: Tensor, alive: Tensor) -> Tensor:
    """[B, n_classes]: where a class is worse than the best one beyond doubt."""
    best = _means(errors, alive).argmin(1)
    excess = errors - errors.take_along_dim(best[:, None, None], 1)
    return excess.mean(2) > PATIENCE * excess.std(2) / math.sqrt(excess.shape[2])
