"""The averages of a run's weights: the one that is validated and sampled, and power-function averages of other lengths.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, section 3. After step
t, the average with the exponent gamma weights the past tau in (0, t] with the profile

    p_t(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)

With weights_t as the weights of all tau in (t - 1, t], each step takes them in, and nothing is approximated:

    average_t = beta_t average_{t-1} + (1 - beta_t) weights_t        beta_t = (1 - 1 / t)^(gamma + 1)

Its length sigma_rel is the standard deviation of the profile over t: always the same share of the run so far. A run records
averages of a few lengths, and snapshots of them, power_STEP.pth. Afterwards the average of any length is the sum of these whose
profile is nearest to its own.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from mistakes import Mistake, one_line

MAX_LENGTH = 12**-0.5  # of gamma = 0, where every step has the same weight


def gamma_of(length: float) -> float:
    """The exponent gamma >= 0 of a length sigma_rel in (0, 12^-1/2]: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    The largest of that cubic's roots, the eigenvalues of its companion matrix.
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"length = {length:g}: must be above 0 and at most {MAX_LENGTH:.4f}")
    companion = torch.tensor([[-7, length**-2 - 16, length**-2 - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    return max(torch.linalg.eigvals(companion).real.max().item(), 0.0)


class Averages:
    """The averages of a Trainer's weights, on their device. Buffers that training changes, as BatchNorm's, are copied.

    weights, ema    the parameters of its model, and their average with the decay train_cfg.ema_decay, in its model `ema`
    power           a model with the power-function average of each length in train_cfg.power_ema
    snapshot_steps  after which a snapshot of those is due
    """

    def __init__(self, run):
        cfg, self.decay = run.cfg, run.cfg.ema_decay
        self.weights, self.ema = list(run.model.parameters()), list(run.ema.parameters())
        self.power = [copy.deepcopy(run.ema) for _ in cfg.power_ema]
        self._gammas = [gamma_of(length) for length in cfg.power_ema]
        self._parameters = [list(average.parameters()) for average in self.power]
        self._models = run.model, run.ema
        saved = set(run.model.state_dict()) - {"x0_error"}  # which training does not change
        self._buffers = [name for name, _ in run.model.named_buffers() if name in saved]
        count = min(cfg.power_ema_snapshots, run.total_steps) if self.power else 0
        self.snapshot_steps = {round(run.total_steps * i / count) for i in range(1, count + 1)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        decay = min(self.decay, step / (step + 9))  # short at first
        torch._foreach_lerp_(self.ema, self.weights, 1 - decay)
        for gamma, average in zip(self._gammas, self._parameters, strict=True):
            torch._foreach_lerp_(average, self.weights, 1 - (1 - 1 / step) ** (gamma + 1))
        if self._buffers:  # none of our own networks
            now, kept = (dict(model.named_buffers()) for model in self._models)
            for name in self._buffers:
                kept[name].copy_(now[name])

    def buffers(self) -> list[Tensor]:
        """Those of the averaged model that training changes."""
        kept = dict(self._models[1].named_buffers())
        return [kept[name] for name in self._buffers]

    def tensors(self) -> list[Tensor]:
        """The weights and all averages of them."""
        return [*self.ema, *self.weights, *(p for average in self._parameters for p in average)]

    def state(self) -> list[dict[str, Tensor]]:
        """The power-function averages of the parameters, by name."""
        return [{name: p.detach() for name, p in each.named_parameters(remove_duplicate=False)} for each in self.power]

    def restore(self, state: list[dict[str, Tensor]]) -> None:
        for average, found in zip(self.power, state, strict=True):
            average.load_state_dict(average.state_dict() | {name: found[name] for name, _ in average.named_parameters()})


# Afterwards


def snapshots(folder: Path) -> dict[Path, int]:
    """The files power_STEP.pth of a run's folder, each with its step, ascending."""
    found = ((path, re.fullmatch(r"power_(\d+)\.pth", path.name)) for path in folder.glob("power_*.pth"))
    steps = {path: int(match[1]) for path, match in found if match}
    return dict(sorted(steps.items(), key=lambda item: item[1]))


def overlap(gamma: Tensor, t: Tensor, other_gamma: Tensor, other_t: Tensor) -> Tensor:
    """The inner products of profiles, integral of p_t(tau) p'_t'(tau) over tau, in float64; the arguments are broadcast."""
    longer = torch.where(t < other_t, other_gamma, gamma)  # the exponent of the later one
    first, last = torch.minimum(t, other_t), torch.maximum(t, other_t)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * (first / last) ** longer / last


def coefficients(gammas: Tensor, steps: Tensor, gamma: float, step: int) -> tuple[Tensor, float]:
    """The factors [n], float64, of averages with gammas [n] after steps [n], whose sum is to be the one with gamma after step.

    They have the least squared error of the profile among those with the sum 1, so that weights that never changed stay what
    they were (the paper leaves the sum free). And that error: its norm over the profile's own.
    """
    wanted = torch.tensor([gamma, step], dtype=torch.float64)
    inner = overlap(gammas[:, None], steps[:, None], gammas, steps)
    with_wanted, square = overlap(gammas, steps, *wanted), overlap(*wanted, *wanted)
    system = F.pad(inner, (0, 1, 0, 1), value=1.0)  # one row and column more: Lagrange's, for the sum
    system[-1, -1] = 0
    factors = torch.linalg.lstsq(system, F.pad(with_wanted, (0, 1), value=1.0)[:, None], driver="gelsd").solution[:-1, 0]
    error = (factors @ inner @ factors - 2 * factors @ with_wanted + square) / square
    return factors, error.clamp(min=0).sqrt().item()


def average_of(path: Path, length: float) -> tuple[dict, float]:
    """The state of a checkpoint or a snapshot with the power-function average of a length, at its step, as its "ema".

    And the error of its profile (`coefficients`). The averages that path holds are taken together with the snapshots of earlier
    steps in its folder; each file is read once, and none is kept.
    """
    state = checkpoint.load(path)
    if not state.get("power_ema") or not state.get("step"):
        raise Mistake(f"{path}: holds no power-function averages: they are recorded with train_cfg.power_ema, from step 1 on")
    files = {file: step for file, step in snapshots(path.parent).items() if step < state["step"]} | {path: state["step"]}
    gammas = [gamma_of(recorded) for recorded in state["config"]["train_cfg"]["power_ema"]]
    steps = torch.tensor(list(files.values())).double()
    every_gamma, every_step = torch.cartesian_prod(torch.tensor(gammas).double(), steps).unbind(1)
    factors, error = coefficients(every_gamma, every_step, gamma_of(length), state["step"])
    total: dict[str, Tensor] = {}
    for file, of_file in zip(files, factors.view(len(gammas), -1).T, strict=True):
        recorded = state if file == path else checkpoint.load(file)
        try:
            _add(total, recorded["power_ema"], of_file)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as cause:
            raise Mistake(f"{file}: does not hold the averages of the run of {path} ({one_line(cause)})") from cause
    buffers = state["buffers"] if "buffers" in state else state["ema"]
    return checkpoint.about_model(state) | {"ema": buffers | {name: p.float() for name, p in total.items()}}, error


def _add(total: dict[str, Tensor], averages: list[Mapping[str, Tensor]], factors: Tensor) -> None:
    """Add averages times their factors to total, in place; an empty one takes their names and shapes."""
    if not total:
        total.update({name: torch.zeros_like(p, dtype=torch.float64) for name, p in averages[0].items()})
    for average, factor in zip(averages, factors.tolist(), strict=True):
        for name, p in total.items():
            p += factor * average[name].double()
