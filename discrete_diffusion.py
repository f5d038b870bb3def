"""Diffusion of symbols: the forward process, the reverse process, the losses, the exact bound, samples.

x is a long tensor [B, ...] with values 0..n_levels - 1, the network any net(xt, t, **condition) -> logits [B, ..., n_levels]
of x_0, and condition whatever keyword arguments that network takes, passed on unread. The methods are those of
GaussianDiffusion wherever the word means the same. From Austin et al. 2021 (arXiv:2107.03006, D3PM), and for two levels
Sohl-Dickstein et al. 2015. Equation numbers are those of the README, section "The mathematics".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from beta_schedule import alpha_bar_before
from diffusion_process import (
    Bound,
    Condition,
    DiffusionProcess,
    arguments_of,
    check_chunk_size,
    check_losses,
    check_noise,
    choice,
    every_pair,
    full_float32,
    mean_from,
)
from samplers import even_in_time

MAX_LEVELS = 2**16
MAX_GAUSSIAN_LEVELS = 2**10  # whose matrices have n_levels^2 entries
TABLE_BYTES = 2**25  # kept of the products of such matrices; what lies between them is multiplied when it is needed

TransitionName = Literal["uniform", "absorbing", "gaussian", "binomial"]
LossMode = Literal["bound", "hybrid"]

# Kernels: b stochastic matrices M, each acting on a row x[i] of x [b, ...]. S states: n_levels, one more where there is a mask.
#
#   log_from(x)    log M[x, .]     [b, ..., S]: where a state x goes
#   log_into(x)    log M[., x]     [b, ..., S]: how likely each state is to go to x
#   log_push(p)    log (exp(p) M)  [b, ..., S]: the distribution after M, of that before it, p [b, ..., n_levels] in logs;
#                  near, states of x's shape: about them it is exact where p is small, too
#   draw(x, u)     one draw of M[x, .], by u uniform on [0, 1) of x's shape


def _beside(table: Tensor, x: Tensor) -> Tensor:
    """table [b] shaped [b, 1, ..., 1], to be broadcast against x and its states [b, ..., S]."""
    return table.view(-1, *[1] * x.ndim)


class UniformKernel(NamedTuple):
    """keep I + move 1 1^T / n_levels: stay, or forget x for any level (equation 24)."""

    keep: Tensor  # [b]
    move: Tensor  # [b], 1 - keep
    n_levels: int

    @staticmethod
    def n_states(n_levels: int) -> int:
        return n_levels

    def log_from(self, x: Tensor) -> Tensor:
        keep, share = _beside(self.keep, x), _beside(self.move / self.n_levels, x)
        here = x[..., None] == torch.arange(self.n_levels, device=x.device)
        return torch.where(here, (keep + share).log(), share.log())

    log_into = log_from  # the matrix is symmetric

    def log_push(self, log_p: Tensor, near: Tensor | None = None) -> Tensor:
        keep, share = _beside(self.keep, log_p[..., 0]), _beside(self.move / self.n_levels, log_p[..., 0])
        return torch.logaddexp(keep.log() + log_p, share.log())

    def draw(self, x: Tensor, u: Tensor) -> Tensor:
        move = _beside(self.move, x)[..., 0].double()
        level = (u / move * self.n_levels).long().clamp(0, self.n_levels - 1)
        return torch.where(u < move, level, x)


class AbsorbingKernel(NamedTuple):
    """keep I + move 1 e_mask^T: stay, or be masked for good (equation 25). The mask is state n_levels."""

    keep: Tensor  # [b]
    move: Tensor  # [b], 1 - keep
    n_levels: int

    @staticmethod
    def n_states(n_levels: int) -> int:
        return n_levels + 1

    def _log(self, x: Tensor, into: bool) -> Tensor:
        """log_into(x), or else log_from(x): what goes to another state goes to the mask, and the mask stays."""
        state, masked = torch.arange(self.n_levels + 1, device=x.device), (x == self.n_levels)[..., None]
        keep, move = _beside(self.keep, x).log(), _beside(self.move, x).log()
        moved = torch.where(masked if into else state == self.n_levels, move, -math.inf)
        return torch.where(state == x[..., None], torch.where(masked, 0.0, keep), moved)

    def log_from(self, x: Tensor) -> Tensor:
        return self._log(x, into=False)

    def log_into(self, x: Tensor) -> Tensor:
        return self._log(x, into=True)

    def log_push(self, log_p: Tensor, near: Tensor | None = None) -> Tensor:
        keep, move = _beside(self.keep, log_p[..., 0]), _beside(self.move, log_p[..., 0])
        return torch.cat([keep.log() + log_p, move.log().expand(*log_p.shape[:-1], 1)], dim=-1)

    def draw(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.where(u < _beside(self.move, x)[..., 0].double(), self.n_levels, x)


class MatrixKernel(NamedTuple):
    """Any matrices, given by their logarithms [b, S, S]."""

    log_matrix: Tensor

    @staticmethod
    def _rows(matrix: Tensor, x: Tensor) -> Tensor:
        batch = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.ndim - 1))
        return matrix[batch, x]

    def log_from(self, x: Tensor) -> Tensor:
        return self._rows(self.log_matrix, x)

    def log_into(self, x: Tensor) -> Tensor:
        return self._rows(self.log_matrix.mT, x)

    def log_push(self, log_p: Tensor, near: Tensor | None = None) -> Tensor:
        total = self._log_sums(log_p)
        # float32 has none below e^-87: where p is less about `near`, they are taken again of a larger p, cut at its top
        shift = 0 if near is None else (log_p.detach().gather(-1, near[..., None]) + 60).clamp(-1e30, 0)
        if near is not None and (log_p.is_cuda or shift.any()):  # there, to know it would be to wait
            total = torch.maximum(total, self._log_sums((log_p - shift).clamp(max=80)) + shift)
        # one of the sum's own terms, in case that all of them are too small for float32
        stay = self.log_matrix.diagonal(dim1=1, dim2=2)
        stay = stay.view(len(log_p), *[1] * (log_p.ndim - 2), stay.shape[-1])
        return torch.maximum(total, log_p + stay).clamp(min=-1e4)  # no state is impossible, also where p is 0

    def _log_sums(self, log_p: Tensor) -> Tensor:
        """log (exp(log_p) M), -inf for what is too small."""
        p = _product(log_p.exp()[:, None].flatten(1, -2), self.log_matrix.exp()).view_as(log_p)
        tiny = torch.finfo(p.dtype).tiny
        return torch.where(p > tiny, p.clamp_min(tiny).log(), -math.inf)

    def draw(self, x: Tensor, u: Tensor) -> Tensor:
        return _categorical(self.log_from(x), u)


Kernel = UniformKernel | AbsorbingKernel | MatrixKernel


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in full float32, whatever autocast and TF32 are set to: probabilities need their digits."""
    with full_float32(), torch.autocast(a.device.type, enabled=False):
        return a @ b


def _categorical(log_p: Tensor, u: Tensor) -> Tensor:
    """States of log_p [..., S], which need not be normalised, by inversion: u [...] uniform on [0, 1)."""
    cdf = torch.softmax(log_p, -1, dtype=torch.float64).cumsum(-1)  # in float32 an impossible state could be drawn
    state = torch.searchsorted(cdf, (u.double() * cdf[..., -1])[..., None], right=True)
    return state[..., 0].clamp_(max=log_p.shape[-1] - 1)


# Transitions: tables from which the kernels of any times are made. Index t of a table is time t; at t = 0 nothing has happened.
#
#   step(t)        Q_t of the times t, long [b]
#   jump(t)        Q_bar_t = Q_1 ... Q_t
#   between(s, t)  Q_{s+1} ... Q_t of two ints, with b = 1


class TwoNumbers(nn.Module):
    """A kernel of two numbers a step: stay with probability alpha_t, and after t steps with alpha_bar_t."""

    def __init__(self, kernel: type[UniformKernel | AbsorbingKernel], alpha_bar: Tensor, n_levels: int):
        super().__init__()
        self.kernel, self.n_levels = kernel, n_levels
        self.n_states = kernel.n_states(n_levels)
        self._alpha_bar = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar])  # of t = 0..T
        alpha = self._alpha_bar / alpha_bar_before(self._alpha_bar)
        for name, keep in (("step", alpha), ("jump", self._alpha_bar)):
            self.register_buffer(f"{name}_keep", keep.float(), persistent=False)
            self.register_buffer(f"{name}_move", (1 - keep).float(), persistent=False)

    def step(self, t: Tensor) -> Kernel:
        return self.kernel(self.step_keep.index_select(0, t), self.step_move.index_select(0, t), self.n_levels)

    def jump(self, t: Tensor) -> Kernel:
        return self.kernel(self.jump_keep.index_select(0, t), self.jump_move.index_select(0, t), self.n_levels)

    def between(self, s: int, t: int) -> Kernel:
        keep = (self._alpha_bar[t] / self._alpha_bar[s]).item()
        full = partial(torch.full_like, self.step_keep[:1])
        return self.kernel(full(keep), full(1 - keep), self.n_levels)


class DiscretizedGaussian(nn.Module):
    """Q_t[i, j] proportional to exp(-4 (i - j)^2 / ((n_levels - 1)^2 beta_t)) off the diagonal (equation 26).

    The matrices of two times do not commute, so that there is no basis in which their products are numbers. What helps is that
    turning both axes round changes none of them: half the rows are enough. Of the products, computed in float64, so many times
    are kept as fit TABLE_BYTES; the others are a few steps further.
    """

    def __init__(self, alpha_bar: Tensor, n_levels: int):
        super().__init__()
        if n_levels > MAX_GAUSSIAN_LEVELS:
            raise ValueError(f"n_levels = {n_levels}: at most {MAX_GAUSSIAN_LEVELS} for transition = 'gaussian'")
        self.n_levels = self.n_states = n_levels
        alpha = alpha_bar / alpha_bar_before(alpha_bar)
        distance = torch.arange(n_levels, dtype=torch.float64)
        exponent = -4 * distance**2 / ((n_levels - 1) ** 2 * (1 - alpha)[:, None])  # [T, K], by |i - j|
        of_all_k = torch.cat([exponent, exponent[:, 1:]], dim=1)  # of k = -(K - 1)..K - 1, of which -k is as k
        log_w = exponent - of_all_k.logsumexp(1, keepdim=True)
        tails = log_w.exp().cumsum(1) - log_w.exp()[:, :1]  # of w_1 .. w_d
        stay = 1 - tails - tails.flip(1)  # of level i, with i neighbours on one side and K - 1 - i on the other
        still = torch.full_like(exponent[:1], -math.inf)  # at t = 0 nothing moves
        self.register_buffer("log_w", torch.cat([still, log_w]).float(), persistent=False)
        self.register_buffer("log_stay", torch.cat([0 * distance[None], stay.log()]).float(), persistent=False)
        self.register_buffer("products", self._products(log_w.exp(), stay), persistent=False)

    def _products(self, w: Tensor, stay: Tensor) -> Tensor:
        """The upper half of Q_bar_t at t = 0, every, 2 every, ...: float32 [., half, K]."""
        half, T = (self.n_levels + 1) // 2, len(w)
        self.every = min(T + 1, math.ceil((T + 1) * half * self.n_levels * 4 / TABLE_BYTES))
        product = torch.eye(self.n_levels, dtype=torch.float64)[:half]
        table = torch.empty(T // self.every + 1, half, self.n_levels)
        table[0] = product
        for t in range(1, T + 1):
            product = product @ self._matrix(w[t - 1], stay[t - 1])
            if t % self.every == 0:
                table[t // self.every] = product
        return table

    def _matrix(self, w: Tensor, stay: Tensor) -> Tensor:
        """[..., K, K] of w [..., K] by |i - j| and the diagonal stay [..., K]; both may be logarithms."""
        level = torch.arange(self.n_levels, device=w.device)
        distance = (level[:, None] - level).abs()
        matrix = w[..., distance]
        return torch.where(distance == 0, stay[..., None], matrix)

    def _steps(self, t: Tensor) -> Tensor:
        """The matrices Q_t [b, K, K]."""
        return self._matrix(self.log_w.index_select(0, t).exp(), self.log_stay.index_select(0, t).exp())

    def step(self, t: Tensor) -> Kernel:
        return MatrixKernel(self._matrix(self.log_w.index_select(0, t), self.log_stay.index_select(0, t)))

    def jump(self, t: Tensor) -> Kernel:
        start = t // self.every
        upper = self.products.index_select(0, start)
        for steps in range(1, self.every):
            further = start * self.every + steps
            product = _product(upper, self._steps(further.clamp(max=len(self.log_w) - 1)))
            upper = torch.where((further <= t)[:, None, None], product, upper)
        return self._whole(upper)

    def _whole(self, upper: Tensor) -> Kernel:
        """The kernel of the upper half of a product, [b, half, K]."""
        return MatrixKernel(torch.cat([upper, upper[:, : self.n_levels // 2].flip(1, 2)], dim=1).log())

    def between(self, s: int, t: int) -> Kernel:
        first, *others = torch.arange(s + 1, t + 1, device=self.log_w.device).split(1)
        if not others:
            return self.step(first)  # whose logarithms do not underflow
        upper = self._steps(first)[:, : (self.n_levels + 1) // 2]
        for time in others:
            upper = _product(upper, self._steps(time))
        return self._whole(upper)


TRANSITIONS = {
    "uniform": partial(TwoNumbers, UniformKernel),
    "absorbing": partial(TwoNumbers, AbsorbingKernel),
    "gaussian": DiscretizedGaussian,
    "binomial": partial(TwoNumbers, UniformKernel),  # of Sohl-Dickstein et al. 2015: the uniform one, at the same beta_t
}


def _check(n_levels: int, transition: str, loss_mode: str, cross_entropy_weight: float) -> None:
    choice("transition", transition, TRANSITIONS)
    choice("loss_mode", loss_mode, get_args(LossMode))
    if isinstance(n_levels, bool) or not isinstance(n_levels, int) or not 2 <= n_levels <= MAX_LEVELS:
        raise ValueError(f"n_levels = {n_levels!r}: must be a whole number in 2..{MAX_LEVELS}")
    if transition == "binomial" and n_levels != 2:
        raise ValueError(f"transition = 'binomial': is for n_levels = 2, not {n_levels}; for more it is called 'uniform'")
    if not 0 <= cross_entropy_weight < math.inf:
        raise ValueError(f"cross_entropy_weight = {cross_entropy_weight:g}: must be at least 0, and finite")


class DiscreteDiffusion(DiffusionProcess):
    """The diffusion process of a schedule and a network, on symbols.

    schedule              anything with a float64 tensor `alpha_bar` [T]; beta_t is 1 - alpha_bar_t / alpha_bar_{t-1}
    time_aware_net        net(xt, t, **condition) -> logits [B, ..., n_levels] of x_0, t long [B] in 1..T
    n_levels              K: x_0 is a long tensor with values in 0..K - 1. K lies in 2..65536, for "gaussian" in 2..1024
    transition            what a step does to a symbol: "uniform" (any level with probability beta_t), "absorbing" (masked with
                          probability beta_t: x_t is then n_levels, which x_0 never is), "gaussian" (moves to a near level),
                          "binomial" (K = 2)
    loss_mode             "bound", or "hybrid": the bound plus cross_entropy_weight times the cross-entropy of x_0
    cross_entropy_weight  kappa of "hybrid" (equation 31)

    A time t is a long tensor [B] in 1..T on x's device, or an int for the whole batch. Every symbol is diffused by itself, with
    the matrices Q_t (equation 23), which are derived in float64 and kept as float32 buffers outside the state dictionary.
    """

    def __init__(
        self,
        schedule,
        time_aware_net: nn.Module,
        n_levels: int,
        transition: TransitionName = "uniform",
        loss_mode: LossMode = "bound",
        cross_entropy_weight: float = 0.001,
    ):
        super().__init__(schedule, time_aware_net)
        _check(n_levels, transition, loss_mode, cross_entropy_weight)
        self.n_levels = n_levels
        self.transition = transition
        self.loss_mode = loss_mode
        self.cross_entropy_weight = cross_entropy_weight
        self.time_weight = None  # of each t in the loss: all have the same
        self.transitions = TRANSITIONS[transition](self._alpha_bar, n_levels)
        self.n_states = self.transitions.n_states
        uniform = torch.full((1, 1, n_levels), -math.log(n_levels))
        log_prior = self.transitions.jump(torch.tensor([self.T])).log_push(uniform)[0, 0]
        self.register_buffer("log_prior", log_prior, persistent=False)  # [S]: p(x_T) of one symbol (equation 29)

    # Between data in [-1, 1] and symbols

    def x0_of(self, values: Tensor) -> Tensor:
        """x_0 of data in [-1, 1]: the symbol of the nearest of n_levels evenly spaced values."""
        return to_symbols(values, self.n_levels)

    def values_of(self, x: Tensor) -> Tensor:
        """What x_0 or x_t looks like as data in [-1, 1]: those values, and 0 for the mask."""
        return to_values(x, self.n_levels)

    # Look-up of symbols

    @staticmethod
    def _symbols(name: str, x: Tensor, count: int) -> Tensor:
        """x, if it is a long tensor with values below count; on another device than the CPU the values are not looked at."""
        if x.dtype != torch.long:
            raise ValueError(f"{name}: {x.dtype}: must be a long tensor of symbols in 0..{count - 1}")
        if x.device.type == "cpu" and x.numel() and (x.min() < 0 or x.max() >= count):
            raise ValueError(f"{name} from {x.min()} to {x.max()}: every symbol must lie in 0..{count - 1}")
        return x

    def _x0(self, x0: Tensor) -> Tensor:
        return self._symbols("x0", x0, self.n_levels)

    # Forward process

    def q_step(self, x_prev: Tensor, t: int | Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t of q(x_t | x_{t-1}) = Q_t[x_{t-1}, x_t] (equation 23). noise: uniform on [0, 1), of x's shape."""
        x_prev = self._symbols("x_prev", x_prev, self.n_states)
        return self.transitions.step(self._times(t, x_prev)).draw(x_prev, _noise(x_prev, noise))

    def q_sample(self, x0: Tensor, t: int | Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t of q(x_t | x_0) = Q_bar_t[x_0, x_t] (equation 23). noise: uniform on [0, 1), of x's shape."""
        return self.transitions.jump(self._times(t, self._x0(x0))).draw(x0, _noise(x0, noise))

    def q_posterior(self, x0: Tensor, xt: Tensor, t: int | Tensor) -> Tensor:
        """Probabilities [B, ..., S] of q(x_{t-1} | x_0, x_t) (equation 27), nan where x_0 cannot become x_t.

        S is n_levels, and with the mask n_levels + 1.
        """
        if x0.shape != xt.shape:
            raise ValueError(f"x0 of shape {list(x0.shape)}: must have the shape of xt, {list(xt.shape)}")
        t = self._times(t, self._symbols("xt", xt, self.n_states))
        return (self.transitions.step(t).log_into(xt) + self.transitions.jump(t - 1).log_from(self._x0(x0))).softmax(-1)

    # Reverse process

    def predict(self, xt: Tensor, t: int | Tensor, condition: Condition = None) -> Tensor:
        """log p_hat(x_0 | x_t) [B, ..., n_levels], the network's logits normalised, by one call of it."""
        t = self._times(t, self._symbols("xt", xt, self.n_states))
        logits = self._net(xt, t, condition)
        found, wanted = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__, [*xt.shape, self.n_levels]
        if found != wanted:
            raise ValueError(f"time_aware_net: gives {found}, where n_levels = {self.n_levels} asks for logits of {wanted}")
        return logits.to(self.log_prior.dtype).log_softmax(-1)

    def _log_p(self, xt: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
        """log p(x_{t-1} | x_t) [B, ..., S], not normalised (equation 28)."""
        t, log_p = self._times(t, xt), self.predict(xt, t, condition)
        return self.transitions.step(t).log_into(xt) + self.transitions.jump(t - 1).log_push(log_p, xt)

    def p_probabilities(self, xt: Tensor, t: int | Tensor, condition: Condition = None) -> Tensor:
        """Probabilities [B, ..., S] of p(x_{t-1} | x_t) (equation 28)."""
        return self._log_p(xt, t, condition).softmax(-1)

    def p_sample(self, xt: Tensor, t: int | Tensor, noise: Tensor | None = None, condition: Condition = None) -> Tensor:
        """Draw x_{t-1} of p(x_{t-1} | x_t), at t = 1 too. noise: uniform on [0, 1), of x's shape."""
        check_noise(xt, noise)  # before the network's work
        return _categorical(self._log_p(xt, t, condition), _noise(xt, noise))

    # Losses

    def _kl(self, x0: Tensor, xt: Tensor, t: Tensor, log_p: Tensor) -> Tensor:
        """D(q(x_{t-1} | x_0, x_t) || p(x_{t-1} | x_t)) of every symbol, at t = 1: -log p(x_0 | x_1) (equation 29).

        t [b]; x_0, x_t [b, ...] and log_p [b, ..., n_levels]. Q_t[., x_t] is a factor of both distributions and cancels.
        """
        into, before = self.transitions.step(t).log_into(xt), self.transitions.jump(t - 1)
        log_from_x0, log_from_p = before.log_from(x0), before.log_push(log_p, xt)
        log_q, log_p = into + log_from_x0, into + log_from_p  # not normalised
        q = log_q.softmax(-1)
        ratio = torch.where(q > 0, log_from_x0 - log_from_p, 0.0)
        return (q * ratio).sum(-1) + log_p.logsumexp(-1) - log_q.logsumexp(-1)

    def loss(self, x0: Tensor, t: int | Tensor, noise: Tensor | None = None, condition: Condition = None) -> Tensor:
        """[B], nats per dimension: the term at t of the configured objective.

        "bound"   the bound's divergence at t, at t = 1 the reconstruction (equation 29)
        "hybrid"  the same plus cross_entropy_weight * -log p_hat(x_0 | x_t) (equation 31)

        noise: uniform on [0, 1), of x's shape.
        """
        t = self._times(t, x0)
        xt = self.q_sample(x0, t, noise)
        log_p = self.predict(xt, t, condition)
        loss = self._kl(x0, xt, t, log_p)
        if self.loss_mode == "hybrid":
            loss = loss - self.cross_entropy_weight * log_p.gather(-1, x0[..., None])[..., 0]
        return mean_from(1, loss)

    def forward(self, x0: Tensor, chunk_size: int | None = None, condition: Condition = None) -> Tensor:
        """Scalar: T times the loss at random times, batch mean, which estimates its sum over t = 1..T.

        That sum is the bound but for its prior term, which has no parameter. chunk_size is for the sums of other processes.
        The times that it drew and T times their losses, (t, loss) [B] each, are left in `last_terms`.
        """
        check_chunk_size(chunk_size)
        t = self._random_times(x0)
        loss = self.loss(x0, t, condition=condition)
        check_losses("loss", loss, t)
        self.last_terms = t, self.T * loss.detach()
        return self.T * loss.mean()

    # Variational bound

    def _prior(self, x0: Tensor) -> Tensor:
        """D(q(x_T | x_0) || p(x_T)) per dimension, [B]."""
        last = torch.full((1,), self.T, device=x0.device)
        log_q = self.transitions.jump(last).log_from(x0[None])[0]
        ratio = torch.where(log_q > -math.inf, log_q - self.log_prior, 0.0)
        return mean_from(1, (log_q.exp() * ratio).sum(-1))

    def variational_bound(
        self,
        x0: Tensor,
        timesteps: int | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        condition: Condition = None,
    ) -> Bound:
        """-ELBO of x_0 (equation 29) in its parts, nats per dimension, each [B]: of its probability, for x_0 is discrete.

        timesteps, chunk_size and generator are those of GaussianDiffusion.variational_bound.
        """
        return self.bound_by_time(x0, timesteps, chunk_size, generator, condition)[0]

    @torch.no_grad()
    def bound_by_time(
        self,
        x0: Tensor,
        timesteps: int | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        condition: Condition = None,
    ) -> tuple[Bound, Tensor, Tensor, Tensor]:
        """variational_bound, whose arguments it has, and what its kl is the sum of: see GaussianDiffusion.bound_by_time."""
        prior = self._prior(self._x0(x0))
        times, length = self._strata(timesteps, x0, generator)
        pieces = (self._for_each(x0, 1, 1), *self._chunks(x0, times, chunk_size))
        with self._evaluating():
            first, *others = (self._terms(x0, t, generator, condition) for t in pieces)
        reconstruction, terms = first[0], torch.cat([prior.new_zeros(0, len(x0)), *others])  # at T = 1 there are no others
        kl = (terms * length[:, None]).sum(0)
        return Bound(prior, kl, reconstruction, prior + kl + reconstruction), times, length, terms

    def _terms(self, x0: Tensor, t: Tensor, generator: torch.Generator | None, condition: Condition) -> Tensor:
        """[k, B]: the bound's terms of x_0 [B, ...] at the times t [k, B], per dimension, each with its own draw of x_t."""
        rows, times, conditions = every_pair(x0, t, condition)
        xt = self.q_sample(rows, times, _noise(rows, None, generator))
        return mean_from(1, self._kl(rows, xt, times, self.predict(xt, times, conditions))).view(t.shape)

    # Samples

    def trajectory(
        self,
        shape: Sequence[int],
        sampler: Literal["ddpm"] = "ddpm",
        timesteps: int | Sequence[int] | None = None,
        eta: float = 0.0,
        clip_x0: bool = False,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        condition: Condition = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Generate (t, x_t) from (T, x_T) down to (0, x_0), without gradients.

        sampler    only "ddpm", ancestral sampling; the others need numbers to go on from
        timesteps  the steps. None: all. An int: that many, T and 1 included, even in t. Or the times, descending
        eta        0: it belongs to a sampler that there is not
        clip_x0    changes nothing, for x_0 is always a level
        x_T        the state to start from, of the given shape; drawn of p(x_T) if None
        generator  of all draws, on the module's device
        """
        steps = self.steps(timesteps, sampler)
        if eta:
            raise ValueError(f"eta = {eta:g}: the sampler 'ddpm' has none")
        arguments_of(condition)
        if x_T is None:
            u = torch.rand(*shape, generator=generator, device=self.log_prior.device, dtype=torch.float64)
            x_T = _categorical(self.log_prior.expand(*shape, -1), u)
        elif x_T.shape != torch.Size(shape):
            raise ValueError(f"x_T of shape {list(x_T.shape)}: must have the shape asked for, {list(shape)}")
        x_T = self._symbols("x_T", x_T, self.n_states)
        return self._each_evaluating(self._states(x_T, [*steps, 0], generator, condition))

    def _states(self, x: Tensor, steps: list[int], generator, condition: Condition) -> Iterator[tuple[int, Tensor]]:
        yield steps[0], x
        for t, s in pairwise(steps):
            log_p = self.predict(x, t, condition)[None]
            into = self.transitions.between(s, t).log_into(x[None])
            before = self.transitions.jump(torch.full((1,), s, device=x.device))
            x = _categorical(into + before.log_push(log_p), _noise(x[None], None, generator))[0]
            yield s, x

    def _spacing(self, sampler: str) -> Callable[[Tensor, int], list[int]]:
        if sampler != "ddpm":
            raise ValueError(f"sampler = {sampler!r}: of symbols there is only 'ddpm'")
        return even_in_time

    def network_calls(self, timesteps: int | Sequence[int] | None, sampler: str = "ddpm") -> int:
        """How often a sample calls the network."""
        return len(self.steps(timesteps, sampler))


def _noise(x: Tensor, noise: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
    """The noise given, or drawn: uniform on [0, 1), in float64, whose steps are finer than any probability in question."""
    check_noise(x, noise)
    if noise is None:
        return torch.rand(x.shape, dtype=torch.float64, device=x.device, generator=generator)
    return noise.double()


def to_symbols(x: Tensor, n_levels: int) -> Tensor:
    """The nearest of n_levels evenly spaced values in [-1, 1], as symbols 0..n_levels - 1; of 2 levels, a threshold at 0."""
    return ((x + 1) * (0.5 * (n_levels - 1))).round().long().clamp_(0, n_levels - 1)


def to_values(x: Tensor, n_levels: int) -> Tensor:
    """What to_symbols makes symbols of, in [-1, 1]; 0 where x is the mask."""
    return torch.where(x < n_levels, x * (2 / (n_levels - 1)) - 1, 0.0)
