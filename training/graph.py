"""The work of a training step on CUDA, launched kernel by kernel, or recorded once as a CUDA graph and launched whole."""

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mistakes import Mistake, one_line
from training.optimizers import OPTIMIZERS

WARM_UP = 3  # calls before the recording: cuDNN chooses its kernels, and the optimizer makes its state


class Launcher:
    """function(*tensors), a step of the optimizer, and what it returns: tensors, which the next call may overwrite.

    With `record`, the call after WARM_UP with tensors of the same shapes is recorded. From then on such a call is one launch of
    the recording, which pays where a small network's kernels run faster than the host can launch them. What Python does in the
    function is done no more. The weights are the same, bit for bit, as without: a replay takes seed and offset of torch's
    generator anew, and the learning rates lie on the device, as float32, either way.
    """

    def __init__(self, function: Callable[..., Any], optimizer: torch.optim.Optimizer, record: bool):
        self.function, self.optimizer, self.record = function, optimizer, record
        self.rates = torch.zeros(len(optimizer.param_groups), device=optimizer.param_groups[0]["params"][0].device)
        for group in optimizer.param_groups:
            group["capturable"] = record  # else Adam refuses to be recorded
        self.calls, self.graph, self.inputs, self.outputs = Counter(), None, (), None

    def __call__(self, *inputs: Tensor) -> Any:
        groups = self.optimizer.param_groups  # which are others once the optimizer has loaded a state
        numbers = [group["lr"] for group in groups]
        try:
            for group, rate, number in zip(groups, self.rates, numbers, strict=True):
                group["lr"] = rate.fill_(number)
            return self._launch(inputs)
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    def _launch(self, inputs: tuple[Tensor, ...]) -> Any:
        kinds = _kinds(inputs)
        if self.record and not self.graph and self.calls[kinds] == WARM_UP:
            self._record(inputs)
        if not self.graph or kinds != _kinds(self.inputs):  # while it warms up, and for the short last batch of an epoch
            self.calls[kinds] += 1
            return self.function(*inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        """While it is recorded no other graph may be freed, hence no garbage collection; other threads are left out."""
        self.inputs = tuple(x.clone() for x in inputs)
        graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            stream = torch.cuda.Stream(self.rates.device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            reason = one_line(error.__context__ or error)
            raise Mistake(f"train_cfg.cuda_graph: this step cannot be recorded ({reason}); false trains without") from error
        finally:
            if collecting:
                gc.enable()
        self.graph = graph


def launcher(run, record: bool) -> Callable[..., Any]:
    """The work of a Trainer's step, by a Launcher on CUDA; an optimizer of one's own may want rates that are numbers."""
    ours = run.device.type == "cuda" and run.cfg.optimizer in OPTIMIZERS
    return Launcher(run._work, run.optimizer, record) if ours else run._work


def _kinds(inputs: tuple[Tensor, ...]) -> tuple:
    return tuple((x.shape, x.dtype) for x in inputs)
