"""Diffusions of one's own in a run: what they learn, what their network gets, and their gradients that are not finite."""

import sys

import pytest
from runs import metrics, tiny

import checkpoint
import test as sampling
from train import main

OWN = """
import torch
from gaussian_diffusion import GaussianDiffusion


class Weighted(GaussianDiffusion):
    \"\"\"Learns a weight for each t (Karras et al. 2024), and counts its losses.\"\"\"

    def __init__(self, schedule, time_aware_net):
        super().__init__(schedule, time_aware_net)
        self.u = torch.nn.Parameter(torch.zeros(self.T))
        self.register_buffer("calls", torch.zeros(()))

    def _loss(self, mode, x0, t, noise, condition):
        self.calls += 1
        return super()._loss(mode, x0, t, noise, condition) / self.u[t - 1].exp() + self.u[t - 1]


class Placed(GaussianDiffusion):
    \"\"\"Gives the network one more channel: how far down a pixel lies.\"\"\"

    def _net(self, xt, t, condition):
        down = torch.linspace(-1, 1, xt.shape[2], device=xt.device)[:, None].expand_as(xt[:, :1])
        return self.time_aware_net(torch.cat([xt, down], 1), t, **(condition or {}))[:, :1].to(xt.dtype)


class Deep(GaussianDiffusion):
    \"\"\"Learns a shift of the loss in a module of its own, whose gradient is no number in the second step.\"\"\"

    def __init__(self, schedule, time_aware_net):
        super().__init__(schedule, time_aware_net)
        self.head, self.calls = torch.nn.Linear(1, 1), 0

    def forward(self, x0, chunk_size=None, condition=None):
        self.calls += 1
        shift = self.head(torch.ones(1, 1)).sum()
        return super().forward(x0, chunk_size, condition) + shift * (torch.nan if self.calls == 2 else 1)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that trains a few steps with a class of OWN: the folder."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own.py").write_text(OWN)

    def train(name, *more):
        assert main(tiny(tmp_path / "a", "train_cfg.max_steps=3", f'diffusion={{"name": "my_own.{name}"}}', *more)) == 0
        return tmp_path / "a"

    yield train
    sys.modules.pop("my_own", None)


def test_what_it_learns_is_trained_and_averaged(run):
    state = checkpoint.load(run("Weighted") / "last.pth")
    assert state["model"]["u"].abs().max() > 0
    assert state["ema"]["u"].abs().max() > 0
    assert state["ema"]["calls"] >= 3


def test_it_may_give_the_network_more_than_x_and_t(run, capsys):
    folder = run("Placed", "time_aware_net.kwargs.n_channels=2")
    flags = ["-n", "2", "--sampler", "dpm", "--timesteps", "3", "--metrics", "bpd", "--bpd-images", "2", "--device", "cpu"]
    assert sampling.main([str(folder / "last.pth"), *flags]) == 0
    assert "bits per dimension" in capsys.readouterr().out


def test_a_gradient_of_its_own_module_that_is_not_finite_is_a_bad_step(run):
    folder = run("Deep")
    assert metrics(folder)[-1]["bad_steps"] == 1
    assert all(weights.isfinite().all() for weights in checkpoint.load(folder / "last.pth")["model"].values())
