"""Editing: samples that keep something of a given x_0, or of a measurement of it.

    edit              noise to a part of T, and back: Meng et al. 2022 (SDEdit, arXiv:2108.01073)
    interpolate       between two x_0, on the sphere of their encodings
    inpaint           the unknown part, given the known one: Lugmayr et al. 2022 (RePaint, arXiv:2201.09865)
    posterior_sample  x_0 given y = operator(x_0) + noise, for any linear operator: Rozet et al. 2024 (arXiv:2405.13712)

Each is a function of a GaussianDiffusion, and runs as a sampler of its own or through one of samplers.SAMPLERS. Symbols are
those of the README, section "The mathematics". `condition` is the network's; randomness comes from `generator`, on the
module's device, as for GaussianDiffusion.sample.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_process import Condition, check_floats, check_whole, choice, repeat_condition
from gaussian_diffusion import GaussianDiffusion
from samplers import NO_SIGNAL, SAMPLERS, Level, Normal, PredictX0, ddpm

Operator = Callable[[Tensor], Tensor]
Times = int | Sequence[int] | None
CURVATURE = 1e-6  # of the largest one: less is the rounding of float32


def _check(diffusion: GaussianDiffusion) -> None:
    if getattr(diffusion, "n_levels", None) is not None:
        raise ValueError(f"diffusion: a {type(diffusion).__name__}: editing is of numbers, and there is none of symbols")


def edit(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    strength: float,
    sampler: str = "ddpm",
    timesteps: Times = None,
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    condition: Condition = None,
) -> Tensor:
    """x_0 noised to the time strength * T and sampled from there: Meng et al. 2022, algorithm 2. Of x_0's shape.

    strength   0 gives x_0 back, 1 keeps of it only what x_T holds
    timesteps  as for GaussianDiffusion.sample, of the whole way; of these the times below strength * T are visited, too
    """
    _check(diffusion)
    check_floats("x0", x0)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength = {strength}: must lie between 0 and 1")
    start = round(strength * diffusion.T)
    steps = [start, *(t for t in diffusion.steps(timesteps, sampler) if t < start)]
    if start == 0:
        return x0
    noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    xt = diffusion.q_sample(x0, start, noise)
    return diffusion.sample(x0.shape, sampler, steps, 0.0, clip_x0, xt, generator, condition)


def interpolate(
    diffusion: GaussianDiffusion,
    x0_a: Tensor,
    x0_b: Tensor,
    count: int,
    timesteps: Times = None,
    clip_x0: bool = False,
    condition: Condition = None,
) -> Tensor:
    """`count` x_0 from x0_a to x0_b, both [B, ...]: [count, B, ...], by "ddim" from between their encodings, in one batch.

    The encodings are joined by an arc: a straight line would pass through x_T shorter than noise is.
    """
    _check(diffusion)
    if x0_a.shape != x0_b.shape:
        raise ValueError(f"x0_b of shape {list(x0_b.shape)}: must have the shape of x0_a, {list(x0_a.shape)}")
    check_whole("count", count, 2, "a whole number of at least {}, the two ends")
    a, b = (diffusion.encode(x0, timesteps, clip_x0, condition) for x0 in (x0_a, x0_b))
    x_T = torch.cat([slerp(a, b, share) for share in torch.linspace(0, 1, count).tolist()])
    condition = repeat_condition(condition, len(a), count)
    return diffusion.sample(x_T.shape, "ddim", timesteps, 0.0, clip_x0, x_T, None, condition).unflatten(0, (count, len(a)))


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point of the arc from a (share 0) to b (share 1), each sample of [B, ...] by itself (Shoemake 1985)."""
    unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in (a[..., None].flatten(1), b[..., None].flatten(1)))
    angle = (unit_a * unit_b).sum(1).clamp(-1, 1).acos().view(-1, *[1] * (a.ndim - 1))
    arc = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() > 1e-4, arc, torch.lerp(a, b, share))  # of parallel ones the arc is the line


# Inpainting


def inpaint(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    mask: Tensor,
    timesteps: Times = None,
    resamplings: int = 10,
    jump: int = 1,
    clip_x0: bool = False,
    x_T: Tensor | None = None,
    generator: torch.Generator | None = None,
    condition: Condition = None,
) -> Tensor:
    """x_0 with its unknown part drawn anew, given the known one: Lugmayr et al. 2022, algorithm 1. Of x_0's shape.

    After each ancestral step the known part is replaced by x_0 with the noise of that time. The unknown part has not seen
    it, so the two are noised again and the step repeated.

    mask         1 where x_0 is known, 0 where it is not; broadcast to x_0's shape
    resamplings  how often each step is done, 1: never again. The calls of the network are those of the steps times this
    jump         how many steps are done and repeated together, the paper's jump length

    The samples approach the conditional distribution as resamplings grows; with few they are biased (benchmarks/editing.py).
    """
    _check(diffusion)
    check_floats("x0", x0)
    check_whole("resamplings", resamplings, 1)
    check_whole("jump", jump, 1)
    known = _mask(mask, x0)
    rule = partial(_repaint, x0=x0, known=known, resamplings=resamplings, jump=jump)
    return diffusion.sample(x0.shape, rule, timesteps, 0.0, clip_x0, x_T, generator, condition)


def _mask(mask: Tensor, x0: Tensor) -> Tensor:
    """mask as booleans of x_0's shape."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask: a {type(mask).__name__}: must be a tensor, 1 where x0 is known and 0 where it is not")
    try:
        known = mask.to(x0.device).broadcast_to(x0.shape)
    except RuntimeError as error:
        raise ValueError(f"mask of shape {list(mask.shape)}: must broadcast to the shape of x0, {list(x0.shape)}") from error
    if not ((known == 0) | (known == 1)).all():
        raise ValueError(f"mask from {mask.min():g} to {mask.max():g}: must be 1 where x0 is known and 0 where it is not")
    return known.bool()


def _repaint(
    predict_x0: PredictX0,
    x: Tensor,
    levels: list[Level],
    normal: Normal,
    x0: Tensor,
    known: Tensor,
    resamplings: int,
    jump: int,
) -> Iterator[Tensor]:
    """A sampler that keeps x_0 where it is known: ddpm on `jump` levels at a time, repeated, each state yielded once."""
    for first in range(0, len(levels) - 1, jump):
        part = levels[first : first + jump + 1]
        for again in reversed(range(resamplings)):
            for level_t, level_s in pairwise(part):
                x = next(ddpm(predict_x0, x, [level_t, level_s], normal))
                x = torch.where(known, _noised(x0, level_s.alpha_bar, normal), x)
                if not again:
                    yield x
            if again:
                x = _noised(x, part[0].alpha_bar / part[-1].alpha_bar, normal)


def _noised(x: Tensor, alpha: float, normal: Normal) -> Tensor:
    """Equation 2, or 1, with that share of the signal."""
    return math.sqrt(alpha) * x + math.sqrt(1 - alpha) * normal() if alpha < 1 else x


# Linear measurements


def posterior_sample(
    diffusion: GaussianDiffusion,
    y: Tensor,
    operator: Operator,
    noise: float,
    shape: Sequence[int],
    sampler: str = "dpm",
    timesteps: Times = None,
    iterations: int = 5,
    clip_x0: bool = False,
    x_T: Tensor | None = None,
    generator: torch.Generator | None = None,
    condition: Condition = None,
) -> Tensor:
    """x_0 of the given shape, given y = operator(x_0) + noise z: moment matching, Rozet et al. 2024, algorithms 2 and 3.

    p(x_0 | x_t) is taken as a Gaussian. Its mean is x_0_hat, its covariance V = (1 - alpha_bar) / sqrt(alpha_bar) times the
    derivative of x_0_hat by x_t, which is exact. Given y as well, its mean is then x_0_hat + V A' zeta, where
    (A V A' + noise^2) zeta = y - A x_0_hat. Conjugate gradients solve for zeta, each product with V a derivative of the network
    backwards. Every sampler takes that mean in the place of x_0_hat. For Gaussian data all of it is exact.

    "ddpm" adds noise for the error e_t of x_0_hat without y, so that with few steps its samples spread otherwise than they
    should; the others assume no error.

    Where alpha_bar_T is 0, and x_T knows nothing of x_0, it begins at T - 1.

    y           [B, ...], whatever operator gives
    operator    A: a linear function of tensors of this shape, that autograd goes through
    noise       standard deviation of the noise in y, 0 or more. With 0, y must be what operator can give: else no x_0 fits it
    iterations  of conjugate gradients: one call of the network and iterations + 1 derivatives each time the sampler asks
    clip_x0     keep that mean in [-1, 1]
    """
    _check(diffusion)
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise = {noise}: must be a standard deviation, 0 or more")
    choice("sampler", sampler, SAMPLERS)
    check_whole("iterations", iterations, 1)
    if y.is_complex():
        raise ValueError("y: is complex: give it and the operator as torch.view_as_real")
    if not y.is_floating_point():
        raise ValueError(f"y: is {y.dtype}: must be of floats")
    if torch.is_inference_mode_enabled():
        raise ValueError("posterior_sample: needs derivatives, which inference_mode has none of; no_grad is right")
    adjoint = _adjoint(operator, y, shape)
    steps = diffusion.steps(timesteps, sampler)
    first = int((diffusion._alpha_bar >= NO_SIGNAL).sum())  # after it no signal is left, and no covariance is known
    if steps[0] > first:
        if first == 0:
            raise ValueError("timesteps: at t = 1 no signal is left, and there is no time before it to begin at")
        steps = [first, *(t for t in steps if t < first)]

    def rule(predict_x0: PredictX0, x: Tensor, levels: list[Level], normal: Normal) -> Iterator[Tensor]:
        alpha_bar = {level.t: level.alpha_bar for level in levels}

        def given_y(x: Tensor, t: int) -> Tensor:
            x0, covariance = _x0_and_covariance(predict_x0, x, t, alpha_bar[t])
            zeta = _conjugate_gradients(
                lambda v: operator(covariance(adjoint(v))) + noise * noise * v, y - operator(x0), iterations
            )
            x0 = x0 + covariance(adjoint(zeta))
            return x0.clamp_(-1, 1) if clip_x0 or diffusion.bounded else x0

        return SAMPLERS[sampler](given_y, x, levels, normal)

    return diffusion.sample(shape, rule, steps, 0.0, False, x_T, generator, condition)


def _adjoint(operator: Operator, y: Tensor, shape: Sequence[int]) -> Operator:
    """A': by autograd, which needs one x and its A x."""
    with torch.enable_grad():
        x = torch.zeros(*shape, device=y.device, dtype=y.dtype, requires_grad=True)
        Ax = operator(x)
    if not Ax.requires_grad:
        raise ValueError("operator: does not depend on x, or autograd does not go through it")
    if Ax.shape != y.shape:
        raise ValueError(f"y of shape {list(y.shape)}: operator gives {list(Ax.shape)} of {list(shape)}")
    probe = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype).to(y.device)
    once, twice = operator(probe), operator(-2 * probe)
    near = 1e-3 * once.norm().item() / max(1, once.numel()) ** 0.5
    if Ax.any() or not torch.allclose(twice, -2 * once, rtol=1e-3, atol=near):
        raise ValueError("operator: must be linear, but A(0) is not 0, or A(-2 x) not -2 A(x)")
    return lambda v: torch.autograd.grad(Ax, x, v, retain_graph=True)[0]


def _x0_and_covariance(predict_x0: PredictX0, x: Tensor, t: int, alpha_bar: float) -> tuple[Tensor, Operator]:
    """Mean of p(x_0 | x_t), and what multiplies by its covariance, which is symmetric: Rozet et al. 2024, equation 12."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = predict_x0(x, t)
    scale = (1 - alpha_bar) / math.sqrt(alpha_bar)
    return x0.detach(), lambda v: scale * torch.autograd.grad(x0, x, v, retain_graph=True)[0]


def _conjugate_gradients(matrix: Operator, b: Tensor, iterations: int) -> Tensor:
    """u with matrix(u) = b, each sample of [B, ...] by itself; a sample that is done, or meets no curvature, stays as it is.

    Curvature along a direction counts as none where it is less than CURVATURE of the largest one met: of a matrix of lower
    rank, that is rounding, and a step along it would be as long as rounding is small.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b)[..., None].flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))

    u, residual, direction = torch.zeros_like(b), b, b
    square = enough = dot(b, b)
    largest = torch.zeros_like(square)
    for _ in range(iterations):
        product = matrix(direction)
        curvature, length = dot(direction, product), dot(direction, direction)
        largest = torch.maximum(largest, torch.where(length > 0, curvature / length, 0))
        going = (curvature > CURVATURE * largest * length) & (square > 1e-12 * enough)
        step = torch.where(going, square / curvature, 0)
        u, residual = u + step * direction, residual - step * product
        before, square = square, dot(residual, residual)
        direction = residual + torch.where(going, square / before, 0) * direction
    return u
