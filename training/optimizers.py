"""The optimizer of a run, how its learning rate falls, and the moments that a resumed run takes over.

Its groups of parameters have names: "network", with Muon also "hidden", and "variance" where sigma_t^2 is learnable.
"""

import math
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from config import find
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake
from training.muon import Muon

OPTIMIZERS = {"adam": torch.optim.Adam, "muon": Muon}
# The share of the learning rate that is left once `done` of the steps after the warm-up are, from 0 to 1
LR_SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
}


def optimizer_of(cfg) -> type[torch.optim.Optimizer]:
    return find(cfg.optimizer, OPTIMIZERS, torch.optim.Optimizer, "train_cfg.optimizer")


def fall_of(cfg) -> Callable[[float], float]:
    """Of the learning rate: one of LR_SCHEDULES, or a function of the user's own."""
    return find(cfg.lr_schedule, LR_SCHEDULES, FunctionType, "train_cfg.lr_schedule")


def build_optimizer(cfg, diffusion: GaussianDiffusion, device: torch.device) -> torch.optim.Optimizer:
    """Adam, Muon for the hidden layers' matrices and Adam for the rest, or a class of the user's own, built of (groups, lr=lr).

    cfg has optimizer, lr, muon_momentum and variance_lr. A Mistake where optimizer is "muon" and the network does not say which
    of its layers are hidden.
    """
    if device.type not in ("cpu", "cuda"):
        raise Mistake(f"--device {device}: training needs cuda or cpu, whose fused optimizers can leave out a step")
    variance = getattr(diffusion, "log_sigma_square", None)  # of a learnable reverse variance
    network = [p for p in diffusion.parameters() if p is not variance]  # and what a diffusion of one's own learns besides
    hidden = _hidden_matrices(diffusion.time_aware_net) if cfg.optimizer == "muon" else []
    inside = set(hidden)
    groups: list[dict[str, Any]] = [{"name": "network", "params": [p for p in network if p not in inside]}]
    if cfg.optimizer == "muon":
        groups.append({"name": "hidden", "params": hidden, "orthogonal": True, "momentum": cfg.muon_momentum})
    if isinstance(variance, nn.Parameter):  # and not computed from others
        groups.append({"name": "variance", "params": [variance], "lr": cfg.variance_lr})
    fused = {"fused": True} if cfg.optimizer in OPTIMIZERS else {}
    return optimizer_of(cfg)(groups, lr=cfg.lr, **fused)


def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer; where bad is 1, and not 0, everything stays as it is.

    A fused step heeds that on the device. For the optimizer of one's own that has none, the host waits to know it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's word for it
        optimizer.grad_scale, optimizer.found_inf = None, bad  # not by scaler.step, which would set its own
        optimizer.step()
    elif not bad.item():
        optimizer.step()
    else:
        optimizer._opt_called = True  # or torch would warn that the schedule goes on before the first step


def lr_schedule(cfg, total_steps: Callable[[], int], optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate at each step, counted from 0: a rise over cfg.warmup_steps, then cfg.lr_schedule.

    total_steps is asked at every step, since a run may learn on its way how long it is.
    """
    left = fall_of(cfg)

    def factor(step: int) -> float:
        warm = min(1, (step + 1) / (cfg.warmup_steps + 1))
        done = max(0, step - cfg.warmup_steps) / max(1, total_steps() - cfg.warmup_steps)
        return warm * float(left(done))  # of one's own, that may be numpy's

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _hidden_matrices(net: nn.Module) -> list[nn.Parameter]:
    """The network's weights of two dimensions or more, from hidden layer to hidden layer."""
    if not hasattr(net, "hidden_layers"):
        raise Mistake(
            f'train_cfg.optimizer = "muon": {type(net).__name__} must name the modules that are its hidden layers, as in '
            'hidden_layers = ("down", "middle", "up")'
        )
    layers = [getattr(net, name) for name in net.hidden_layers]
    return list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.ndim >= 2))


def restore_moments(optimizer: torch.optim.Optimizer, saved: Mapping, step: int) -> None:
    """Take over what an optimizer of the same parameters had after `step` steps, its state_dict(): of one's own, all of it.

    Of ours it is "state" alone, since an older run's groups may have been others. moments[i] there is of the i-th parameter,
    counted through all groups: "step" [], and of the parameter's shape "momentum" (Muon) or "exp_avg" and "exp_avg_sq" (Adam).
    A parameter that never had a gradient has none. ValueError where that is not so. Rates stay as they are.
    """
    if type(optimizer) in OPTIMIZERS.values():
        _check_moments(optimizer, saved["state"], step)
        saved = {**optimizer.state_dict(), "state": saved["state"]}
    optimizer.load_state_dict(saved)


def _check_moments(optimizer: torch.optim.Optimizer, moments: Any, step: int) -> None:
    averages = [
        (p, ("momentum",) if group.get("orthogonal") else ("exp_avg", "exp_avg_sq"))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    if not isinstance(moments, Mapping) or bool(moments) != bool(step) or not moments.keys() <= set(range(len(averages))):
        raise ValueError(f"optimizer: no moments of these {len(averages)} parameters after {step} steps")
    for i, found in moments.items():
        p, names = averages[i]
        shapes = {name: getattr(value, "shape", None) for name, value in found.items()} if isinstance(found, Mapping) else None
        if shapes != {"step": (), **dict.fromkeys(names, p.shape)}:
            raise ValueError(f"optimizer: moments of shapes {shapes} for a weight of shape {list(p.shape)}")
