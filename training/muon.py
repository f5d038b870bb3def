"""Muon: an optimizer that steps equally far in every direction of a hidden layer's weight matrix (Jordan et al. 2024,
kellerjordan.github.io/posts/muon), beside Adam for the rest."""

import torch
from torch import Tensor

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al.: five times s -> a s + b s^3 + c s^5 takes 0.01 to 1 into 0.68 to 1.14
STEPS = 5


def orthogonalized(x: Tensor) -> Tensor:
    """About U V^T of each x = U S V^T, [B, m, n]: the same singular vectors, with every singular value near 1.

    Five Newton-Schulz steps X <- (a + b X X^T + c (X X^T)^2) X on X = x / ||x||. All factors are polynomials of one m x m
    matrix, so that they commute and x itself is multiplied only twice; m is the smaller side. Needs the full precision of
    float32: an error in a product of the small matrices grows 12-fold a step.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalized(x.mT).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    (a, b, c), one = QUINTIC, torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    gram = x @ x.mT
    factor = polynomial = a * one + b * gram + c * (gram @ gram)
    for _ in range(STEPS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = a * one + b * gram + c * (gram @ gram)
        factor = polynomial @ factor
    return factor @ x


class Muon(torch.optim.Adam):
    """Adam; in groups with "orthogonal": True, p <- p - lr 0.2 sqrt(max(m, n)) U V^T instead.

    U S V^T is the average gradient (Nesterov's, with momentum 0.95) of a weight [m, ...] as a matrix [m, n]. The factor makes
    the step as large as one of Adam's is on average, so that both do with one lr (Liu et al. 2025, arXiv:2502.16982, equation
    4). As in torch's fused Adam, where `found_inf` is set the step changes nothing.
    """

    @torch.no_grad()
    def step(self) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._step_orthogonal(group)
        torch.set_float32_matmul_precision(before)
        super().step()  # passes over weights without a gradient

    def _step_orthogonal(self, group: dict) -> None:
        by_shape = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault((p.shape[0], p[0].numel()), []).append(p)
        if not by_shape:
            return
        found = getattr(self, "found_inf", None)
        bad = torch.zeros((), device=group["params"][0].device) if found is None else found.squeeze()
        for shape, weights in by_shape.items():
            directions = torch.stack([self._average(p, bad).flatten(1) for p in weights])
            updates = orthogonalized(directions) * ((1 - bad) * (-0.2 * group["lr"] * max(shape) ** 0.5))
            for p, update in zip(weights, updates, strict=True):
                p += update.view(p.shape)
                p.grad = None

    def _average(self, p: Tensor, bad: Tensor) -> Tensor:
        """The gradient's running average, one step ahead."""
        state = self.state[p]
        if not state:
            state |= {"step": torch.zeros((), device=p.device), "momentum": torch.zeros_like(p)}
        state["step"] += 1 - bad
        gradient = torch.where(bad > 0, state["momentum"], p.grad)  # which leaves the average as it is
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)
