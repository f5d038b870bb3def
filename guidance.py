"""Guidance: wrappers that are networks themselves, net(xt, t, **condition), so that every sampler has it without knowing.

    diffusion.time_aware_net = ClassifierFreeGuidance(diffusion.time_aware_net, weight=2.0)
    diffusion.sample((16, 1, 28, 28), "dpm", 20, condition={"label": label})

`null_of` and `hide` say how a network is told nothing; training, which hides a share of what it tells, uses them, too.

Both extrapolate from a worse prediction through a better one: guided = worse + weight (better - worse). This is done to the
network's output, whatever its prediction is: at given x_t, the mean, x_0_hat and eps_hat are affine in the output (README,
equation 11), and weights that add up to 1 pass through an affine map. So guiding the output guides them all, before an x_0_hat
is kept in [-1, 1].
Of a network of symbols it is the logits that are guided: p_hat is then proportional to p_worse^(1 - weight) p_better^weight.

A guided network is for samples, and training does not go through it. Its outputs at the different t belong to no one density
of x_0, so the bound of its chain says nothing of the network that was trained.
"""

import math
from collections.abc import Collection, Mapping
from numbers import Real

import torch
from torch import Tensor, nn

ALWAYS = (0, math.inf)  # an interval that holds every time


def null_of(net: nn.Module) -> dict[str, float | Tensor]:
    """What the network reads as "not told", by the name of the condition: the label n_classes, and its own null_condition."""
    n_classes = getattr(net, "n_classes", None)
    return dict(getattr(net, "null_condition", None) or {}) | ({} if n_classes is None else {"label": n_classes})


def hide(condition: Mapping[str, Tensor], null: Mapping[str, float | Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """The condition [B, ...] each, with the values of null, where it has any, in the rows in which hidden [B] is true."""
    condition = dict(condition)
    for name in null.keys() & condition.keys():
        rows, value = condition[name], null[name]
        if isinstance(value, Tensor):  # which, kept in a dictionary, does not go where its network goes
            value = value.to(rows.device, rows.dtype if rows.is_floating_point() else value.dtype)
        condition[name] = torch.where(hidden.view(-1, *[1] * (rows.ndim - 1)), value, rows)
    return condition


class Guidance(nn.Module):
    """What the wrappers share: the network, the weight, and the times lo <= t <= hi in which the weight acts."""

    def __init__(self, net: nn.Module, weight: float, interval: tuple[float, float]):
        super().__init__()
        one = isinstance(weight, Real) or (isinstance(weight, Tensor) and weight.numel() == 1)
        if not one or not math.isfinite(weight):
            raise ValueError(f"weight = {weight!r}: must be a finite number")
        numbers = isinstance(interval, Collection) and all(isinstance(time, Real | Tensor) for time in interval)
        if not numbers or len(interval) != 2 or not interval[0] <= interval[1]:  # nor is nan
            raise ValueError(f"interval = {interval}: must be two times, the lower one first")
        self.net, self.weight, self.interval = net, weight, tuple(interval)

    @property
    def n_classes(self) -> int | None:
        return getattr(self.net, "n_classes", None)

    @property
    def null_condition(self) -> Mapping[str, float | Tensor] | None:
        return getattr(self.net, "null_condition", None)

    def _rows(self, t: Tensor) -> Tensor | slice:
        """The rows in which the guidance acts: a slice for all, else their indices.

        Counting them waits for the device, once a call; the guidance that always acts, or never, does not wait.
        """
        if self.weight == 1:
            return slice(0)
        lowest, highest = self.interval
        if lowest <= 1 and highest == math.inf:
            return slice(None)
        return ((t >= lowest) & (t <= highest)).nonzero()[:, 0]

    def _guided(self, xt: Tensor, better: Tensor, worse: Tensor, rows: Tensor | slice) -> Tensor:
        """better, with worse + weight (better - worse) in those rows; of the precision of better."""
        if len(worse) == 0:
            return better
        if worse.shape != better[rows].shape:  # which would broadcast
            raise ValueError(f"the network to guide away from gives {list(worse.shape)} for {list(better[rows].shape)}")
        guided = torch.lerp(worse, better[rows], self.weight)
        if not xt.is_floating_point():  # a logit may be -inf in both, of which lerp makes nan
            guided = torch.where(worse == better[rows], worse, guided)
        return guided if isinstance(rows, slice) else better.index_copy(0, rows, guided)


class ClassifierFreeGuidance(Guidance):
    """out_none + weight (out_label - out_none), Ho & Salimans 2022 (arXiv:2207.12598), equation 6.

    net       a network with classes, net(xt, t, label=None), for which the label n_classes means "no label"; or one with
              null_condition = {name: value}, for which this value in the place of that condition means that it is not told:
              a number, or a tensor like a row. It was trained with both. Label and such conditions are left out together
    weight    1 is the network with its label, bitwise; 0 the one without; more than 1 exaggerates what the label changes. The
              paper's w is weight - 1: 0 there is 1 here. (`diffusers`, among others, counts as we do.)
    interval  the times lo <= t <= hi in which it acts (Kynkäänniemi et al. 2024, arXiv:2404.07724, who say it in noise levels).
              Outside, the network with its label alone, and no second half is computed

    Both halves go through the network in one call. With nothing to leave out the call is the network's own.
    """

    def __init__(self, net: nn.Module, weight: float, interval: tuple[float, float] = ALWAYS):
        super().__init__(net, weight, interval)
        if isinstance(net, ClassifierFreeGuidance):
            raise ValueError("net: is guided already, and guidance of guidance would be stronger than either weight says")
        if not null_of(net):
            raise ValueError(
                "net: classifier-free guidance needs a network with classes or a null_condition, and this one has no n_classes"
            )

    def forward(self, xt: Tensor, t: Tensor, label: Tensor | None = None, **condition) -> Tensor:
        condition = condition if label is None else {"label": label} | condition
        each, null, rows, size = _each(condition, len(xt)), null_of(self.net), self._rows(t), len(xt)
        if not null.keys() & condition.keys():
            return self.net(xt, t, **condition)
        labelled = "label" in null and label is not None
        if labelled and not (isinstance(label, Tensor) and label.dtype == torch.long and label.shape == t.shape):
            found = f"{label.dtype} of shape {list(label.shape)}" if isinstance(label, Tensor) else repr(label)
            raise ValueError(f"label: {found}: must be a long tensor [{size}], one a sample")  # the network checks the range
        if shared := null.keys() & (condition.keys() - each.keys()):
            raise ValueError(f"{min(shared)}: must be a tensor with a row for each of the {size} samples, as it can be hidden")
        some = {name: value[rows] for name, value in each.items()}
        none = hide(some, null, torch.ones_like(t[rows], dtype=torch.bool))
        again = {name: torch.cat([value, none[name]]) for name, value in each.items()}
        out = self.net(torch.cat([xt, xt[rows]]), torch.cat([t, t[rows]]), **(condition | again))
        out = out.to(_precision(xt))  # before it is amplified
        return self._guided(xt, out[:size], out[size:], rows)


class AutoGuidance(Guidance):
    """out_weaker + weight (out - out_weaker), Karras et al. 2024 (arXiv:2406.02507), equation 3.

    net       the network
    weaker    a worse one of the same prediction and the same T: less trained, or smaller. It gets the same condition
    weight    1 is the network alone, bitwise; 0 the weaker; more than 1 leads away from what the weaker does worse
    interval  as for ClassifierFreeGuidance
    """

    def __init__(self, net: nn.Module, weaker: nn.Module, weight: float, interval: tuple[float, float] = ALWAYS):
        super().__init__(net, weight, interval)
        self.weaker = weaker

    def forward(self, xt: Tensor, t: Tensor, **condition) -> Tensor:
        rows, out = self._rows(t), self.net(xt, t, **condition).to(_precision(xt))
        some = {name: value[rows] for name, value in _each(condition, len(xt)).items()}
        worse = self.weaker(xt[rows], t[rows], **(condition | some)) if len(t[rows]) else out[:0]
        return self._guided(xt, out, worse.to(_precision(xt)), rows)


def _precision(xt: Tensor) -> torch.dtype:
    """That of x_t, or where x_t is symbols, float32."""
    return xt.dtype if xt.is_floating_point() else torch.float32


def _each(condition: dict, size: int) -> dict[str, Tensor]:
    """Of the condition, what holds a value for each of the samples."""
    return {name: value for name, value in condition.items() if isinstance(value, Tensor) and value.shape[:1] == (size,)}
