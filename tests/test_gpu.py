"""What only a GPU can show: training in every precision, exact resuming, and loops that never wait for the device."""

import os
import re
import subprocess
import sys

import pytest
import torch
from runs import ROOT, assert_same_state, losses, metrics, stop_at, tiny

import checkpoint
import train
from beta_schedule import LinearSchedule
from gaussian_diffusion import GaussianDiffusion
from samplers import SAMPLERS
from time_aware_module import TimeAwareUNet
from training.muon import Muon
from training.state import take_state
from training.writer import Writer

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch 2.6 reads it once, at a process's first product
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def every_kernel():
    """A test after one with --deterministic may use every kernel again."""
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(argv: list[str]) -> list[str]:
    return ["cuda" if word == "cpu" else word for word in argv]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_trains(precision, optimizer, tmp_path):
    more = (f"train_cfg.precision={precision}", "train_cfg.epochs=30", "train_cfg.batch_size=64", "train_cfg.sample_period=0")
    more += (f"train_cfg.optimizer={optimizer}",)
    assert train.main(on_gpu(tiny(tmp_path / "a", *more))) == 0
    lines = metrics(tmp_path / "a")
    assert lines[-1]["valid_loss"] < 0.7 * lines[0]["train_loss"]


@pytest.mark.parametrize("cuda_graph", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resuming_is_exact_with_deterministic_kernels(precision, cuda_graph, tmp_path, monkeypatch):
    def run(name: str, *flags: str) -> int:
        more = (f"train_cfg.precision={precision}", f"train_cfg.cuda_graph={cuda_graph}", "train_cfg.batch_size=256")
        more += ("train_cfg.lr_schedule=linear", "train_cfg.warmup_steps=3")
        return train.main(on_gpu(tiny(tmp_path / name, *more, flags=("--deterministic", *flags))))

    assert run("whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 9)
        assert run("parts") == 143
    assert run("parts", "--resume") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_state(checkpoint.load(tmp_path / "whole" / "last.pth"), checkpoint.load(tmp_path / "parts" / "last.pth"))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_recorded_and_replayed_gives_the_same_bits(precision, optimizer, tmp_path):
    """With labels, dropout, a learnable variance, two parts a batch, a falling rate, and an epoch's short last batch."""
    more = ["train_cfg.batch_size=256", f"train_cfg.precision={precision}", f"train_cfg.optimizer={optimizer}"]
    more += ["train_cfg.grad_accum=2", "train_cfg.lr_schedule=linear", "train_cfg.warmup_steps=3"]
    more += ["time_aware_net.kwargs.n_classes=10", "diffusion.reverse_variance=learnable"]
    for name in ("true", "false"):
        settings = (*more, f"train_cfg.cuda_graph={name}")
        assert train.main(on_gpu(tiny(tmp_path / name, *settings, flags=("--deterministic",)))) == 0
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    states = [checkpoint.load(tmp_path / name / "last.pth") for name in ("true", "false")]
    for state in states:
        del state["config"]
        state["optimizer"] = state["optimizer"]["state"]
    assert_same_state(*states)


WAITING = """
import sys, train
from gaussian_diffusion import GaussianDiffusion
forward = GaussianDiffusion.forward
def waiting(self, *args, **kwargs):
    loss = forward(self, *args, **kwargs)
    return loss if loss.item() < 1e9 else loss * 0
GaussianDiffusion.forward = waiting
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_step_that_waits_cannot_be_recorded_and_the_user_is_told(tmp_path):
    argv = on_gpu(tiny(tmp_path / "a", "train_cfg.batch_size=64", "train_cfg.cuda_graph=true"))
    done = subprocess.run([sys.executable, "-c", WAITING, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "train_cfg.cuda_graph" in done.stderr.strip().splitlines()[-1]


def test_a_worker_that_is_forked_leaves_the_graphs_of_its_parent_alone(tmp_path):
    for name in ("a", "b"):  # the first of which is garbage in the second's workers
        more = ("train_cfg.batch_size=64", "train_cfg.cuda_graph=true", "train_cfg.num_workers=2", "train_cfg.cache_gb=0")
        trainer = trainer_on_gpu(tmp_path / name, *more)
        for batch in trainer.train_data.epoch(0):
            trainer.train_step(*batch)
        assert trainer.work.graph is not None
    assert trainer.step == trainer.train_data.steps


def test_muon_steps_as_on_a_cpu_where_the_network_runs_in_tf32():
    torch.set_float32_matmul_precision("high")
    gradient = torch.randn(64, 576) * torch.logspace(-3, 0, 64)[:, None]
    steps = []
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(torch.zeros(64, 576, device=device))
        p.grad = gradient.to(device)
        Muon([{"params": [p], "orthogonal": True}], lr=1.0, fused=True).step()
        steps.append(p.detach().cpu())
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    assert (steps[1] - steps[0]).norm() < 1e-3 * steps[0].norm()


@pytest.fixture
def no_waiting():
    """Make every wait of the host for the device an error, once called."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_never_waits_for_the_device(sampler, no_waiting):
    net = TimeAwareUNet(1, 32, ch_mult=(1, 2), attention=(False, True))
    diffusion = GaussianDiffusion(LinearSchedule(20, 1e-3, 0.3), net).cuda()
    states = diffusion.trajectory((4, 1, 8, 8), sampler)
    next(states), next(states)
    no_waiting()
    assert len(list(states)) == 19


def trainer_on_gpu(folder, *more: str) -> train.Trainer:
    config, settings = tiny(folder)[0], tiny(folder, *more)[4:]
    return train.Trainer(train.load_config(config, settings), "cuda")


@pytest.mark.parametrize("cuda_graph", ["false", "true"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_never_waits_for_the_device(precision, optimizer, cuda_graph, tmp_path, no_waiting):
    more = ("train_cfg.batch_size=64", f"train_cfg.precision={precision}", f"train_cfg.optimizer={optimizer}")
    trainer = trainer_on_gpu(tmp_path, *more, f"train_cfg.cuda_graph={cuda_graph}")
    batches = trainer.train_data.epoch(0)
    for _ in range(5):
        trainer.train_step(*next(batches))
    no_waiting()
    for _ in range(5):
        trainer.train_step(*next(batches))
        trainer.meter.recent_bad_steps(now=False)
    assert trainer.step == 10
    assert (cuda_graph == "true") == (getattr(trainer.work, "graph", None) is not None)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_checkpoint_is_of_its_moment_while_steps_that_never_wait_go_on(optimizer, tmp_path, no_waiting):
    """The copies to pinned memory are under way, and the thread writes, as the next steps change the weights."""
    trainer = trainer_on_gpu(tmp_path, "train_cfg.batch_size=64", f"train_cfg.optimizer={optimizer}")
    writer, batches = Writer(), trainer.train_data.epoch(0)
    trainer.train_step(*next(batches))
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    writer.save(tmp_path / "last.pth", take_state(trainer))
    no_waiting()
    for _ in range(20):
        trainer.train_step(*next(batches))
    torch.cuda.set_sync_debug_mode("default")
    writer.wait()
    writer.close()
    state = checkpoint.load(tmp_path / "last.pth")
    assert state["step"] == 1
    assert_same_state(state["model"], {name: value.cpu() for name, value in expected.items()})
    name = "time_aware_net.conv_in.weight"
    assert not torch.equal(state["model"][name], trainer.model.state_dict()[name].cpu())


def test_the_average_is_compiled_too_and_its_checkpoint_is_like_any_other(tmp_path):
    more = ("train_cfg.precision=bf16", "train_cfg.epochs=30", "train_cfg.batch_size=64", "train_cfg.sample_period=0")
    trainer = trainer_on_gpu(tmp_path / "a", *more, "train_cfg.compile=true")
    assert trainer.ema.time_aware_net._compiled_call_impl is not None
    trainer.run()
    lines = metrics(tmp_path / "a")
    assert lines[-1]["valid_loss"] < 0.7 * lines[0]["train_loss"]
    ema, _ = checkpoint.load_diffusion(tmp_path / "a" / "last.pth")  # which knows nothing of compiling
    x0 = trainer.valid_data.images.to_float(next(trainer.valid_data.epoch(0))[0])
    with torch.no_grad():
        plain = ema.cuda().loss(x0, 10, torch.ones_like(x0)).mean()
        compiled = trainer.ema.loss(x0, 10, torch.ones_like(x0)).mean()
    assert compiled.item() == pytest.approx(plain.item(), rel=0.02)


def test_bad_steps_are_noticed_a_few_steps_late_at_the_most(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        GaussianDiffusion, "forward", lambda self, *_, **__: sum(p.sum() for p in self.parameters()) * torch.nan
    )
    more = ("train_cfg.epochs=100", "train_cfg.record_period=1000", "train_cfg.max_bad_steps=5", "train_cfg.batch_size=32")
    assert train.main(on_gpu(tiny(tmp_path / "a", *more))) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert 5 <= int(re.search(r"up to step (\d+)", message)[1]) <= 20


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_step_that_overflows_in_fp16_is_skipped_and_the_scale_halved(optimizer, tmp_path, monkeypatch):
    forward, calls = GaussianDiffusion.forward, []

    def sometimes_infinite(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs) * (torch.inf if len(calls) == 2 else 2.0**-16)  # the others cannot overflow

    monkeypatch.setattr(GaussianDiffusion, "forward", sometimes_infinite)
    more = ("train_cfg.precision=fp16", f"train_cfg.optimizer={optimizer}", "train_cfg.sample_period=0")
    assert train.main(on_gpu(tiny(tmp_path / "a", *more))) == 0
    assert metrics(tmp_path / "a")[-1]["bad_steps"] == 1
    state = checkpoint.load(tmp_path / "a" / "last.pth")
    assert state["scaler"]["scale"] == 2.0**15
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {7}


def test_the_peak_memory_of_loss_full_does_not_grow_with_T():
    net, peaks = TimeAwareUNet(1, 32, ch_mult=(1, 2), attention=(False, True)).cuda(), []
    for T in (1, 50, 1000):  # the first one warms up
        torch.cuda.reset_peak_memory_stats()
        GaussianDiffusion(LinearSchedule(T, 1e-4, 0.02), net, loss_mode="full").cuda()(
            torch.zeros(4, 1, 8, 8).cuda()
        ).backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] < 1.2 * peaks[1]
