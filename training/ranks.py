"""The processes that work together: one, or those that torchrun started."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mistakes import Mistake

PATIENCE = timedelta(hours=2)  # of ranks that wait while one reads images, downloads them or trains a classifier of them


class Ranks:
    """This process among those that torchrun started; one process without it.

    device  cpu, cuda, cuda:1, ...; None for CUDA where there is one, else the CPU. cuda is the card of the local rank
    alone   leave the other processes out of it
    """

    def __init__(self, device: str | None = None, alone: bool = False):
        alone |= "RANK" not in os.environ  # a cluster may set WORLD_SIZE for ends of its own
        self.world, self.rank = (1, 0) if alone else (int(os.environ.get("WORLD_SIZE", 1)), int(os.environ["RANK"]))
        local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = _device(device, local_rank, 1 if alone else local_world)
        self.cpu_group = None
        if self.world > 1:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=PATIENCE)
            self.cpu_group = dist.new_group(backend="gloo", timeout=PATIENCE)  # for words that must not wait for the GPU

    def largest(self, value: float) -> float:
        """The largest of the ranks' values, known to all."""
        if self.world == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.cpu_group)
        return values.item()

    def in_turn(self, work: Callable[[], Any]) -> Any:
        """What work gives: first on rank 0, and then on the others, who find done what it does once, such as a download."""
        if self.rank:
            self.largest(0)
        try:
            return work()
        finally:  # the others meet by themselves what rank 0 may have failed at
            if not self.rank:
                self.largest(0)

    def copy_first(self, tensors: list[Tensor]) -> None:
        """Give all ranks what the first one has, in place."""
        for x in tensors if self.world > 1 else ():
            dist.broadcast(x, 0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def parallel(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> nn.Module:
        """The model, with its gradients averaged over the ranks. loss(model) is of a few images; no trace of it is left.

        torch chooses the order in which it sums gradients after a first pass, which is none of the run's: else three ranks or
        more would round otherwise after a resume than without one.
        """
        if self.world == 1:
            return model
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # the older name is deprecated
        how = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        with torch.random.fork_rng(devices=[]), buffers_kept(model):
            loss(model).backward()
            how["find_unused_parameters"] = any(p.requires_grad and p.grad is None for p in model.parameters())
            model.zero_grad()
            parallel = DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None, **how)
            loss(parallel).backward()
        model.zero_grad()
        return parallel

    def gather(self, items: list) -> list:
        """The items of all ranks, on rank 0; on the others, their own."""
        if self.world == 1:
            return items
        of_all = []
        for i in range(int(self.largest(len(items)))):  # one of each rank at a time: all at once are in memory four times
            gathered = [None] * self.world if self.rank == 0 else None
            dist.gather_object(items[i : i + 1], gathered, group=self.cpu_group)
            of_all += [item for part in gathered or () for item in part]
        return of_all if self.rank == 0 else items

    def gather_everywhere(self, items: list) -> list:
        """The items of all ranks, on every rank."""
        if self.world == 1:
            return items
        gathered = [None] * self.world
        dist.all_gather_object(gathered, items, group=self.cpu_group)
        return [item for part in gathered for item in part]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the buffers of a model, which BatchNorm, say, changes, are what they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


def leave_ranks() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str | None, local_rank: int, local_world: int) -> torch.device:
    """The device of a name, by default CUDA where there is one; Mistake if it is not to be had."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Mistake(f"--device {name}: no such kind of device; try cuda or cpu") from error
    if device.type == "cuda":
        return _cuda_device(device, local_rank, local_world)
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # each kind of device has its own way to be missing
        raise Mistake(f"--device {name}: is not available here; try --device cpu") from error
    return device


def _cuda_device(device: torch.device, local_rank: int, local_world: int) -> torch.device:
    if not torch.cuda.is_available():
        raise Mistake(f"--device {device}: CUDA is not available here; try --device cpu")
    if device.index is not None and local_world > 1:
        raise Mistake(f"--device {device}: would put all {local_world} processes on one card; give --device cuda")
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise Mistake(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(device)
    return device
