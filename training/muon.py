"""Muon: an optimizer that steps equally far in every direction of a hidden layer's weight matrix (Jordan et al. 2024,
kellerjordan.github.io/posts/muon), beside Adam for the rest."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from diffusion_process import full_float32

MOMENTUM = 0.95  # of a group that names no other
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al.: five times s -> a s + b s^3 + c s^5 takes 0.01 to 1 into 0.68 to 1.14
STEPS = 5


def orthogonalized(batches: Sequence[Tensor]) -> list[Tensor]:
    """About U V^T of each x = U S V^T, each batch [B, m, n]: the same singular vectors, with every singular value near 1.

    Five Newton-Schulz steps X <- (a + b X X^T + c (X X^T)^2) X on X = x / ||x||. All factors are polynomials of one m x m
    matrix, so that they commute and x itself is multiplied only twice; m is the smaller side, and the factors of all matrices
    with the same m are found at once. Needs the full precision of float32: an error in a product of the small matrices grows
    12-fold a step.
    """
    wide = [x if x.shape[-2] <= x.shape[-1] else x.mT for x in batches]
    wide = [x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7) for x in wide]
    sides = _by_key(range(len(wide)), lambda i: wide[i].shape[-2])
    for indices in sides.values():
        factors = _newton_schulz(torch.cat([wide[i] @ wide[i].mT for i in indices]))
        for i, factor in zip(indices, factors.split([len(wide[i]) for i in indices]), strict=True):
            wide[i] = factor @ wide[i]
    return [x if x.shape == given.shape else x.mT for x, given in zip(wide, batches, strict=True)]


def _newton_schulz(gram: Tensor) -> Tensor:
    """The product of the factors a + b G + c G^2 of five steps, [B, m, m], with G = X X^T [B, m, m] of the X so far."""
    (a, b, c), one = QUINTIC, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = polynomial = a * one + b * gram + c * (gram @ gram)
    for _ in range(STEPS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = a * one + b * gram + c * (gram @ gram)
        factor = polynomial @ factor
    return factor


def _by_key(items: Iterable, key: Callable) -> dict:
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


class Muon(torch.optim.Adam):
    """Adam; in groups with "orthogonal": True, p <- p - lr 0.2 sqrt(max(m, n)) U V^T instead.

    U S V^T is the average gradient (Nesterov's, with the group's "momentum", 0.95 by default) of a weight [m, ...] as a matrix
    [m, n]. The factor makes the step as large as one of Adam's is on average, so that both do with one lr (Liu et al. 2025,
    arXiv:2502.16982, equation 4). As in torch's fused Adam, where `found_inf` is set the step changes nothing.
    """

    @torch.no_grad()
    def step(self) -> None:
        with full_float32():
            for group in self.param_groups:
                if group.get("orthogonal"):
                    self._step_orthogonal(group)
        super().step()  # passes over weights without a gradient

    def _step_orthogonal(self, group: dict) -> None:
        """Inside, k weights of one shape and layout are one tensor [k, ...]: it is the number of calls that takes time."""
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        found = getattr(self, "found_inf", None)
        good = torch.ones((), device=weights[0].device) if found is None else 1 - found.squeeze()
        for p in weights:
            if not self.state[p]:
                self.state[p] |= {"step": torch.zeros((), device=p.device), "momentum": torch.zeros_like(p)}
        torch._foreach_add_([self.state[p]["step"] for p in weights], [good] * len(weights))
        batches = list(_by_key(weights, lambda p: (p.shape, p.stride())).values())
        is_good = good > 0
        momentum = group.get("momentum", MOMENTUM)
        directions = orthogonalized([self._averages(batch, momentum, is_good).flatten(2) for batch in batches])
        for batch, direction in zip(batches, directions, strict=True):
            rate = -0.2 * group["lr"] * max(direction.shape[1:]) ** 0.5
            torch._foreach_add_(batch, _unstacked(direction * (good * rate), batch[0]))
            for p in batch:
                p.grad = None

    def _averages(self, weights: list[Tensor], momentum: float, is_good: Tensor) -> Tensor:
        """The running averages of the gradients of k weights, one step ahead: [k, ...]."""
        kept = [self.state[p]["momentum"] for p in weights]
        average = torch.stack(kept)
        gradient = torch.where(is_good, torch.stack([p.grad for p in weights]), average)  # which leaves the average as it is
        average.lerp_(gradient, 1 - momentum)
        torch._foreach_copy_(kept, _unstacked(average, weights[0]))
        return gradient.lerp_(average, momentum)


def _unstacked(stacked: Tensor, like: Tensor) -> Sequence[Tensor]:
    """[k, ...] as k tensors of the shape and the layout of `like`: with another layout torch._foreach would go one by one."""
    sizes, strides = (len(stacked), *like.shape), (like.numel(), *like.stride())
    out = torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)
    return out.copy_(stacked.view(sizes)).unbind()
