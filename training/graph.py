"""The work of a training step on CUDA, launched kernel by kernel, or recorded once as a CUDA graph and launched whole."""

import gc
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from mistakes import Mistake

WARM_UP = 3  # calls before the recording: cuDNN chooses its kernels, and the optimizer makes its state


class Launcher:
    """function(*tensors), a step of the optimizer, whose results are what it does to weights and counters.

    With `record`, the call after WARM_UP with tensors of the same shapes is recorded, and it and all later ones with such are
    replays: one launch each, where a small network's kernels run faster than the host can launch them. What Python does in the
    function is done no more. The weights are the same, bit for bit, as without: a replay takes seed and offset of torch's
    generator anew, and the learning rates lie on the device, as float32, either way.
    """

    def __init__(self, function: Callable[..., None], optimizer: torch.optim.Optimizer, record: bool):
        self.function, self.groups, self.record = function, optimizer.param_groups, record
        self.rates = torch.zeros(len(self.groups), device=self.groups[0]["params"][0].device)
        for group in self.groups:
            group["capturable"] = record  # else Adam refuses to be recorded
        self.calls, self.graph, self.inputs = Counter(), None, ()

    def __call__(self, *inputs: Tensor | None) -> None:
        numbers = [group["lr"] for group in self.groups]
        for group, rate, number in zip(self.groups, self.rates, numbers, strict=True):
            group["lr"] = rate.fill_(number)
        self._launch(inputs)
        for group, number in zip(self.groups, numbers, strict=True):
            group["lr"] = number

    def _launch(self, inputs: tuple[Tensor | None, ...]) -> None:
        shapes = _shapes(inputs)
        if self.record and not self.graph and self.calls[shapes] == WARM_UP:
            self._record(inputs)
        if self.graph and shapes == _shapes(self.inputs):
            for mine, given in zip(self.inputs, inputs, strict=True):
                if mine is not None:
                    mine.copy_(given)
            self.graph.replay()
        else:  # while it warms up, and for the short last batch of an epoch
            self.calls[shapes] += 1
            self.function(*inputs)

    def _record(self, inputs: tuple[Tensor | None, ...]) -> None:
        """A recording bears no freeing of other graphs, and of other threads only those that are left out of it."""
        self.inputs = tuple(x if x is None else x.clone() for x in inputs)
        graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.function(*self.inputs)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise Mistake(f"train_cfg.cuda_graph: this step cannot be recorded ({reason}); false trains without") from error
        finally:
            if collecting:
                gc.enable()
        self.graph = graph


def _shapes(inputs: tuple[Tensor | None, ...]) -> tuple[torch.Size | None, ...]:
    return tuple(x if x is None else x.shape for x in inputs)
