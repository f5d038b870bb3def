"""What can be known of a GPU without one: a training step on CUDA tensors without values, and what dynamo makes of the network.

test_samplers.py has the samplers, the bound and the fit on such tensors.

A value that the host would wait for is an error in such a step: FakeTensorMode has none to give (`.item()`, `if tensor:`), and
`NoWaiting` refuses the copies that wait.
"""

import contextlib
import copy
import gc
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from runs import ROOT, TINY
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from beta_schedule import LinearSchedule
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareUNet
from training import speed
from training.graph import Launcher
from training.optimizers import build_optimizer, lr_schedule

CUDA = torch.device("cuda", 0)


class HostWaits(Exception):
    """A copy between the host and the device that waits."""


class NoWaiting(TorchDispatchMode):
    """Refuses copies between the host and the device, but those to or from pinned memory that nobody waits for.

    convolutions: the types that convolutions ran in.
    """

    def __init__(self):
        super().__init__()
        self.convolutions = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in CONVOLUTIONS:
            self.convolutions |= {leaf.dtype for leaf in tree_leaves(result) if leaf is not None}
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim or func in COPIES}
        if func in COPIES and len(devices) > 1 and not (kwargs.get("non_blocking") or True in args[2:3]):
            raise HostWaits(f"{func} between {' and '.join(sorted(devices))}")
        return result


aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}


@pytest.fixture
def fake(monkeypatch, fake_cuda) -> FakeTensorMode:
    """The mode, not entered; autocast believes in a card with bfloat16."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    return FakeTensorMode()


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """loss.backward(), node by node: without a driver, the engine of a torch built for CUDA fails to look for streams."""
    waiting, todo = Counter(), [loss.grad_fn]
    while todo:  # count the nodes that give each node a gradient
        for node, _ in todo.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                todo += [node] if waiting[node] == 1 else []
    gradients, ready = defaultdict(dict), [loss.grad_fn]
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        results = node(*(given.get(i) for i in range(len(node._input_metadata))))
        results = results if isinstance(results, tuple) else (results,)
        for result, (following, i) in zip(results, node.next_functions, strict=False):
            if following is None:
                continue
            if result is not None:
                wanted, before = following._input_metadata[i], gradients[following].get(i)
                result = result.sum_to_size(wanted.shape).to(wanted.dtype)  # as the engine does
                gradients[following][i] = result if before is None else before + result
            waiting[following] -= 1
            ready += [following] if not waiting[following] else []


def on_fake_cuda(module: nn.Module) -> nn.Module:
    """The module, built with values on the CPU, as it would be on CUDA. Inside the mode."""
    for child in module.modules():
        for group in (child._parameters, child._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                    group[name] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    return module


def fake_trainer(folder, mode: FakeTensorMode, precision: str, *settings: str) -> train.Trainer:
    """A tiny Trainer whose weights, averages, optimizer and counters are on a CUDA device without values."""
    path = ROOT / "configs" / "Digits_den.json"
    data = ['dataset.train.pipeline=[{"name":"RandomHorizontalFlip"}]', "dataset.valid.pipeline=[]"]
    run = train.Trainer(train.load_config(path, [*TINY, *data, f"train_cfg.model_save_dirpath={folder}", *settings]), "cpu")
    run.folder.close()
    run.device = run.ranks.device = CUDA
    run.cfg = replace(run.cfg, precision=precision)  # not by train_cfg.precision, which would be tried on the CPU
    with mode:
        run.parallel = on_fake_cuda(run.model)
        on_fake_cuda(run.ema)
        run.optimizer = build_optimizer(run.cfg, run.model, run.device)
        run.scheduler = lr_schedule(run.cfg, lambda: run.total_steps, run.optimizer)
        run._start_counters()
    return run  # its work is launched with rates that are numbers: there are no fused steps of fake tensors with others


STEPS = {
    "adam": [],
    "muon": ["train_cfg.optimizer=muon"],
    "learnable": ["diffusion.reverse_variance=learnable"],
    "grad_accum": ["train_cfg.grad_accum=2"],
}


@pytest.mark.parametrize(
    ("more", "precision"), [("adam", "fp32"), ("adam", "bf16"), ("muon", "bf16"), ("learnable", "fp32"), ("grad_accum", "bf16")]
)
def test_a_training_step_mixes_no_devices_and_waits_for_nothing(more, precision, tmp_path, fake, monkeypatch):
    run = fake_trainer(tmp_path, fake, precision, *STEPS[more])
    monkeypatch.setattr(Tensor, "backward", backward)
    with fake, NoWaiting() as watch:
        pixels = torch.empty(8, *run.shape, dtype=torch.uint8, device=CUDA)
        for _ in range(2):  # the optimizer has a state in the second
            run.train_step(pixels)
    assert run.step == 2
    assert watch.convolutions == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert {p.device for p in [*run.averages.tensors(), run.meter.loss_sum, run.norm]} == {CUDA}
    moments = [moment for state in run.optimizer.state.values() for moment in state.values()]
    assert len(moments) > len(run.parameters)
    assert {moment.device for moment in moments} == {CUDA}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: 1 if (x > 0).all() else 0,
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3).to(CUDA),
        lambda x: torch.ones(3).copy_(x),
    ],
)
def test_a_wait_in_a_step_is_seen(wait, fake):
    with fake, NoWaiting():
        x = torch.ones(3, device=CUDA)
        with pytest.raises((HostWaits, DataDependentOutputException, DynamicOutputShapeException)):
            wait(x)


def test_the_backward_pass_of_these_tests_is_torchs():
    net = TimeAwareUNet(1, 8, ch_mult=(1, 2), num_res_blocks=1, attention=(False, True))
    diffusion = GaussianDiffusion(LinearSchedule(20), net, "learnable")
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    x0, t = torch.rand(4, 1, 4, 4) * 2 - 1, torch.tensor([1, 2, 10, 20])
    gradients = []
    for method in (Tensor.backward, backward):
        torch.manual_seed(0)
        diffusion.zero_grad()
        method(diffusion.loss(x0, t).mean())
        gradients.append([p.grad for p in diffusion.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


# Recording


class Replayed:
    """In the place of torch.cuda.CUDAGraph: counts its replays."""

    def __init__(self):
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graph(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: contextlib.nullcontext())


def test_a_step_is_recorded_once_it_has_run_a_few_times_with_such_a_batch(graph):
    """Its kernels are chosen by then. Batches of other shapes run as they are, and the learning rates stay numbers."""
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([weight], lr=0.25)
    ran = []

    def step(pixels: Tensor, labels: Tensor) -> int:
        ran.append((len(pixels), len(labels), optimizer.param_groups[0]["lr"].item()))
        return len(ran)

    launcher = Launcher(step, optimizer, record=True)
    for rows in (8, 3, 8, 8):  # 3 is a short last batch
        launcher(torch.full((rows,), 1.0), torch.zeros(rows))
    assert launcher.graph is None
    optimizer.param_groups[0]["lr"] = 0.5
    launcher(torch.full((8,), 2.0), torch.zeros(8))
    assert [row[0] for row in ran] == [8, 3, 8, 8, 8]
    assert [row[2] for row in ran] == [0.25, 0.25, 0.25, 0.25, 0.5]
    assert launcher.graph.replays == 1
    assert launcher(torch.full((8,), 3.0), torch.full((8,), 7.0)) == 5  # of the recorded call, and filled anew
    assert launcher(torch.full((3,), 4.0), torch.zeros(3)) == 6
    assert launcher.graph.replays == 2
    assert [row[0] for row in ran[5:]] == [3]
    assert [x.tolist() for x in launcher.inputs] == [[3.0] * 8, [7.0] * 8]  # what the second replay reads
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert gc.isenabled()


def test_without_recording_every_step_runs_as_it_is(graph):
    weight, ran = nn.Parameter(torch.zeros(())), []
    launcher = Launcher(lambda x: ran.append(x), torch.optim.Adam([weight]), record=False)
    for _ in range(6):
        launcher(torch.zeros(8))
    assert len(ran) == 6
    assert launcher.graph is None


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_rate_on_the_device_trains_as_a_number_does(optimizer, tmp_path):
    weights, seen = [], []
    for launched in (False, True):
        folder = tmp_path / str(launched)
        more = [f"train_cfg.optimizer={optimizer}", "train_cfg.warmup_steps=2", f"train_cfg.model_save_dirpath={folder}"]
        run = train.Trainer(train.load_config(ROOT / "configs" / "Digits_den.json", [*TINY, *more]), "cpu")
        run.folder.close()

        def work(*batch, run=run):
            seen.append(run.optimizer.param_groups[0]["lr"])
            return run._work(*batch)

        if launched:
            run.work = Launcher(work, run.optimizer, record=False)
            run.optimizer.load_state_dict(run.optimizer.state_dict())  # as a run that is resumed does: its groups are others
        for batch in run.train_data.epoch(0):
            run.train_step(*batch)
        weights.append(torch.cat([p.detach().flatten() for p in run.parameters]))
    assert (weights[1] - weights[0]).norm() < 1e-5 * weights[0].norm()
    assert [rate.dtype for rate in seen] == 4 * [torch.float32]
    assert [rate.data_ptr() for rate in seen] == 4 * [run.work.rates.data_ptr()]
    assert type(run.optimizer.param_groups[0]["lr"]) is float


# Compiling


@pytest.fixture
def counter() -> CompileCounter:
    """A backend that runs the graphs as they are, and counts them."""
    torch._dynamo.reset()
    return CompileCounter()


@pytest.mark.parametrize(
    ("reverse_variance", "loss_mode", "time_sampling"),
    [("beta", "simple", "uniform"), ("learnable", "min_snr", "uniform"), ("beta", "min_snr", "importance")],
)
def test_network_and_loss_are_one_graph(reverse_variance, loss_mode, time_sampling, counter):
    net = TimeAwareUNet(1, 8, ch_mult=(1, 2), num_res_blocks=1, attention=(False, True), dropout=0.1)
    more = {"loss_mode": loss_mode, "time_sampling": time_sampling}
    diffusion = GaussianDiffusion(LinearSchedule(20), net, reverse_variance, **more).to("meta")  # not the CPU's t
    diffusion.compile(backend=counter, fullgraph=True)  # an error where the graph breaks
    diffusion(torch.empty(4, 1, 8, 8, device="meta")).backward()
    assert counter.frame_count == 1


def test_an_epoch_compiles_the_network_once_and_not_for_its_short_last_batch(tmp_path, counter):
    settings = [*TINY, f"train_cfg.model_save_dirpath={tmp_path}"]
    run = train.Trainer(train.load_config(ROOT / "configs" / "Digits_den.json", settings), "cpu")
    run.folder.close()
    speed.compile_for(run.model.time_aware_net, 512, backend=counter, fullgraph=True)
    compiled = []
    for epoch in (0, 1):
        for batch in run.train_data.epoch(epoch):
            run.train_step(*batch)
            compiled.append((len(batch[0]), counter.frame_count))
    assert compiled == 2 * [(512, 1), (512, 1), (512, 1), (81, 1)]
    assert copy.deepcopy(run.model).time_aware_net._compiled_call_impl is None
