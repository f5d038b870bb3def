"""What only a GPU can show: training in every precision, exact resuming, and loops that never wait for the device."""

import pytest
import torch
from runs import assert_same_state, losses, metrics, stop_at, tiny

import checkpoint
import train
from beta_schedule import LinearSchedule
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareUNet
from training.muon import Muon

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resuming_is_exact_with_deterministic_kernels(precision, tmp_path, monkeypatch):
    def run(name: str, *flags: str) -> int:
        more = (f"train_cfg.precision={precision}",)
        return train.main(on_gpu(tiny(tmp_path / name, *more, flags=("--deterministic", *flags))))

    assert run("whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 6)
        assert run("parts") == 143
    assert run("parts", "--resume") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_state(checkpoint.load(tmp_path / "whole" / "last.pth"), checkpoint.load(tmp_path / "parts" / "last.pth"))


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


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_sampling_never_waits_for_the_device(sampler, no_waiting):
    net = TimeAwareUNet(1, 32, ch_mult=(1, 2), attention=(False, True))
    diffusion = GaussianDiffusion(LinearSchedule(20, 1e-3, 0.3), net).cuda()
    states = diffusion.trajectory((4, 1, 8, 8), sampler)
    next(states), next(states)
    no_waiting()
    assert len(list(states)) == 19


def test_training_never_waits_for_the_device(tmp_path, no_waiting):
    config = train.load_config(on_gpu(tiny(tmp_path))[0])
    trainer = train.Trainer(config, "cuda")
    batches = trainer.train_data.epoch(0)
    trainer.train_step(*next(batches))
    no_waiting()
    for _ in range(5):
        trainer.train_step(*next(batches))
    assert trainer.step == 6


def test_the_peak_memory_of_loss_full_does_not_grow_with_T():
    net, peaks = TimeAwareUNet(1, 32, ch_mult=(1, 2), attention=(False, True)).cuda(), []
    for T in (1, 50, 1000):  # the first one warms up
        torch.cuda.reset_peak_memory_stats()
        GaussianDiffusion(LinearSchedule(T, 1e-4, 0.02), net, loss_mode="full").cuda()(
            torch.zeros(4, 1, 8, 8).cuda()
        ).backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] < 1.2 * peaks[1]
