"""What a process of numbers and one of symbols share: their times, their samples, the times of their bound.

`DiffusionProcess` is the base of `GaussianDiffusion` and `DiscreteDiffusion`. It knows T, the schedule's alpha_bar and the
network, and not what x is. Equation numbers are those of the README, section "The mathematics".
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beta_schedule import alpha_bar_of

CHUNK_ROWS = 128  # rows of one network call in the sums over t, unless the caller gives a chunk size

Condition = Mapping[str, Any] | None


class Bound(NamedTuple):
    """The parts of -ELBO and their sum, nats per dimension, each [B]."""

    prior: Tensor
    kl: Tensor
    reconstruction: Tensor
    total: Tensor


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 keep their digits, whatever TF32 is set to."""
    matmuls = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    switches = [(matmul, matmul.fp32_precision) for matmul in matmuls if hasattr(matmul, "fp32_precision")]  # torch 2.9
    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # from torch 2.9 on, where the switches say what this one cannot
        before = None
    for matmul, _ in switches:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for matmul, precision in switches:
            matmul.fp32_precision = "none"  # that of torch.backends.fp32_precision
            if matmul.fp32_precision != precision:
                matmul.fp32_precision = precision


def choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """ValueError unless value is one of those allowed."""
    if value not in list(allowed):  # which asks for no hash
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(allowed)}")


def mean_from(dim: int, x: Tensor) -> Tensor:
    """The mean over the dimension dim and all after it, of which there may be none."""
    return x[..., None].flatten(dim).mean(dim)


def arguments_of(condition: Condition) -> Mapping[str, Any]:
    """The network's keyword arguments in a condition; ValueError if it is no dictionary, such as a bare tensor of labels."""
    if condition is not None and not isinstance(condition, Mapping):
        found = f"a {type(condition).__name__}: must be a dictionary of the network's keyword arguments"
        raise ValueError(f'condition: {found}, such as {{"label": label}}')
    return condition or {}


def is_whole(value: object) -> bool:
    """Whether value is a whole number, which a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(name: str, value: object, least: int, allowed: str = "a whole number of at least {}") -> None:
    """ValueError unless value is a whole number of at least so much."""
    if not (is_whole(value) and value >= least):
        found = f" = {value}" if value is None or isinstance(value, int | float | str) else f": a {type(value).__name__}"
        raise ValueError(f"{name}{found}: must be {allowed.format(least)}")


def check_chunk_size(chunk_size: int | None) -> None:
    """ValueError unless it is None, or a whole number of at least 1."""
    if chunk_size is not None:
        check_whole("chunk_size", chunk_size, 1, "None or a whole number of at least {}; a condition is given by its name")


def check_floats(name: str, x: object) -> None:
    """ValueError unless x is a tensor of floats."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = f" of type {x.dtype}" if isinstance(x, Tensor) else f": a {type(x).__name__}"
        raise ValueError(f"{name}{found}: must be {'floats' if isinstance(x, Tensor) else 'a tensor of floats'}")


def check_noise(x: Tensor, noise: Tensor | None) -> None:
    """ValueError unless noise is None, or a tensor of x's shape."""
    if noise is not None and not (isinstance(noise, Tensor) and noise.shape == x.shape):
        found = f" of shape {list(noise.shape)}" if isinstance(noise, Tensor) else f": a {type(noise).__name__}"
        raise ValueError(f"noise{found}: must have the shape of x, {list(x.shape)}")


def check_losses(name: str, losses: object, t: Tensor) -> None:
    """ValueError unless losses, of a method of that name, are one a sample, as the times t [B] are."""
    if not isinstance(losses, Tensor) or losses.shape != t.shape:  # whose mean would be of something else
        found = list(losses.shape) if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(f"{name}: gives {found} for {len(t)} samples: must give one value a sample, [{len(t)}]")


def repeat_condition(condition: Condition, batch: int, times: int) -> Condition:
    """The condition of `batch` samples, so many times over: every tensor [batch, ...] in it is repeated, the rest stays."""

    def rows(value: object) -> object:
        each = isinstance(value, Tensor) and value.shape[:1] == (batch,)
        return value.repeat(times, *[1] * (value.ndim - 1)) if each else value

    return {name: rows(value) for name, value in arguments_of(condition).items()}


def every_pair(x0: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Condition]:
    """Rows [k * B, ...] and times [k * B]: all of x0 [B, ...] at the first of their times t [k, B], then at the second, ..."""
    rows = x0.repeat(len(t), *[1] * (x0.ndim - 1))
    return rows, t.flatten(), repeat_condition(condition, len(x0), len(t))


class DiffusionProcess(nn.Module):
    """A forward process of T steps, and a network net(xt, t, **condition) that undoes them."""

    def __init__(self, schedule, time_aware_net: nn.Module):
        super().__init__()
        self.time_aware_net = time_aware_net
        self._alpha_bar = alpha_bar_of(schedule)
        self.T = len(self._alpha_bar)
        self.last_terms: tuple[Tensor, Tensor] | None = None  # of forward

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """As any module; ValueError, and all left as it is, where the tables over t would have fewer digits than float32."""
        for table in self.buffers(recurse=False):
            dtype = fn(torch.empty(0, dtype=table.dtype, device=table.device)).dtype
            if dtype in (torch.bfloat16, torch.float16):
                raise ValueError(f"{dtype}: the tables of a diffusion need float32; run the network alone under autocast")
        return super()._apply(fn, recurse)

    def _net(self, xt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output: every call of the network is one of this."""
        return self.time_aware_net(xt, t, **arguments_of(condition))

    # Times

    def _times(self, t: int | Tensor, x: Tensor) -> Tensor:
        """t as a long tensor [B] on x's device; ValueError if it is not one, or leaves 1..T."""
        if is_whole(t):
            if not 1 <= t <= self.T:
                raise ValueError(f"t = {t}: every t must lie in 1..{self.T}")
            return torch.full((len(x),), int(t), device=x.device)
        if not isinstance(t, Tensor) or t.shape != x.shape[:1] or t.dtype != torch.long:
            found = f"{t.dtype} of shape {list(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise ValueError(f"t: {found}: must be an int or a long tensor [{len(x)}], one a sample")
        # on another device the look-up itself checks the range, without waiting for the result
        if t.device.type == "cpu" and len(t) and (t.min() < 1 or t.max() > self.T):
            raise ValueError(f"t = {t.tolist()}: every t must lie in 1..{self.T}")
        return t

    @staticmethod
    def _even_draws(x0: Tensor) -> Tensor:
        """[B] numbers, each uniform on [0, 1), spread evenly over the batch (Kingma et al. 2021, appendix I.1)."""
        return (torch.rand((), device=x0.device) + torch.arange(len(x0), device=x0.device) / len(x0)) % 1

    def _random_times(self, x0: Tensor) -> Tensor:
        """[B] times, each uniform on 1..T."""
        return (self._even_draws(x0) * self.T).long().clamp(max=self.T - 1) + 1

    def _chunks(self, x0: Tensor, times: Tensor, chunk_size: int | None) -> tuple[Tensor, ...]:
        """times [k, B] in pieces of chunk_size of the k, None for as many as make CHUNK_ROWS rows; none where k is 0."""
        check_chunk_size(chunk_size)
        return times.split(chunk_size or max(1, CHUNK_ROWS // max(1, len(x0)))) if len(times) else ()

    @staticmethod
    def _for_each(x0: Tensor, first: int, last: int) -> Tensor:
        """The times first..last of each sample, [k, B]."""
        return torch.arange(first, last + 1, device=x0.device)[:, None].expand(-1, len(x0))

    def _strata(self, timesteps: int | None, x0: Tensor, generator) -> tuple[Tensor, Tensor]:
        """The times of a bound's KL terms, of 2..T [k, B], and how many times each stands for [k].

        Each sample has draws of its own, so that the bounds of many are independent: their spread says how exact the mean is.
        """
        device = x0.device
        if timesteps is None:  # draws nothing, so that the noise is that of fit_reverse_variance
            return self._for_each(x0, 2, self.T), torch.ones(self.T - 1, device=device)
        if not is_whole(timesteps) or not 1 <= timesteps <= self.T - 1:
            raise ValueError(f"timesteps = {timesteps}: must be None or lie in 1..{self.T - 1}, the number of KL terms")
        edges = torch.linspace(2, self.T + 1, timesteps + 1, device=device).round().long()
        width = edges.diff()
        u = torch.rand(timesteps, len(x0), generator=generator, device=device)
        return edges[:-1, None] + (u * width[:, None]).long(), width.float()

    # The network's mode

    @contextmanager
    def _evaluating(self):
        """Dropout off inside; afterwards every module is in the mode it was in."""
        training = [module for module in self.modules() if module.training]
        if training:
            self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _each_evaluating(self, states: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """states, each computed with dropout off; what is done between them finds every module in the mode it was in."""
        while True:
            with self._evaluating(), torch.no_grad():
                state = next(states, None)
            if state is None:
                return
            yield state

    # Samples

    def trajectory(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Tensor]]:
        raise NotImplementedError

    def sample(
        self,
        shape: Sequence[int],
        sampler: str | Callable = "ddpm",
        timesteps: int | Sequence[int] | None = None,
        eta: float = 0.0,
        clip_x0: bool = False,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        condition: Condition = None,
    ) -> Tensor:
        """x_0 of the given shape: the last state of trajectory, which see for the arguments."""
        states = self.trajectory(shape, sampler, timesteps, eta, clip_x0, x_T, generator, condition)
        return deque(states, maxlen=1)[0][1]  # keeps one state at a time

    def _spacing(self, sampler: str | Callable) -> Callable[[Tensor, int], list[int]]:
        """How a sampler spreads a number of steps (samplers.py); ValueError if there is no such sampler."""
        raise NotImplementedError

    def steps(self, timesteps: int | Sequence[int] | None, sampler: str | Callable = "ddpm") -> list[int]:
        """The times that a sampler visits, descending; ValueError for times that are not in 1..T, or not descending.

        A number of them is spread from T to 1 with the sampler's own spacing (`samplers.register`), even in t if it has none.
        """
        spacing = self._spacing(sampler)
        if timesteps is None:
            return list(range(self.T, 0, -1))
        if is_whole(timesteps):
            if not 1 <= timesteps <= self.T:
                raise ValueError(f"timesteps = {timesteps}: must lie in 1..{self.T}")
            return spacing(self._alpha_bar, int(timesteps))
        steps = list(timesteps) if isinstance(timesteps, Iterable) and getattr(timesteps, "ndim", 1) else [timesteps]
        if not all(is_whole(t) for t in steps):
            raise ValueError(f"timesteps = {steps}: must be whole numbers")
        if not steps or steps[0] > self.T or steps[-1] < 1 or any(s >= t for t, s in pairwise(steps)):
            raise ValueError(f"timesteps = {steps}: must descend, without a repeat, within {self.T}..1")
        return steps
