"""The optimizer that a config asks for, and the moments of a run begun with the one optimizer of three groups."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from runs import assert_same_state, tiny
from torch import nn

import checkpoint
from beta_schedule import LinearSchedule
from config import load_config
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake
from time_aware_module import TimeAwareMLP
from train import Trainer, main
from training.muon import Muon
from training.optimizers import build_optimizer, restore_moments

CPU = torch.device("cpu")


def settings(optimizer, momentum=0.95):
    return SimpleNamespace(optimizer=optimizer, lr=0.01, muon_momentum=momentum, variance_lr=0.003)


def diffusion_of(variance="learnable", net=None):
    return GaussianDiffusion(LinearSchedule(10, 0.01, 0.3), net or TimeAwareMLP(3, 8, 2, 4), variance)


def train(diffusion, optimizer, steps=2):
    for _ in range(steps):
        diffusion(torch.randn(16, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()


def three_groups(diffusion, hidden):
    """As version 1's trainer built it, for Adam, too: the rest, the hidden matrices (of Adam none), the variance."""
    rest = [p for p in diffusion.time_aware_net.parameters() if all(p is not matrix for matrix in hidden)]
    groups = [{"params": rest}, {"params": hidden, "orthogonal": True}, {"params": [diffusion.log_sigma_square], "lr": 0.003}]
    return Muon(groups, 0.01, fused=True)


def hidden_of(net):
    return [p for name, p in net.named_parameters() if p.ndim > 1 and name.split(".")[0] in ("inner", "time", "outer")]


@pytest.mark.parametrize("variance", ["beta", "learnable"])
@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("muon", Muon)])
def test_the_groups_have_names_and_hold_every_parameter_once(name, kind, variance):
    diffusion = diffusion_of(variance)
    optimizer = build_optimizer(settings(name, momentum=0.8), diffusion, CPU)
    assert type(optimizer) is kind
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    assert list(groups) == ["network"] + ["hidden"] * (name == "muon") + ["variance"] * (variance == "learnable")
    assert sorted(id(p) for params in groups.values() for p in params) == sorted(id(p) for p in diffusion.parameters())
    if name == "muon":
        assert {id(p) for p in groups["hidden"]} == {id(p) for p in hidden_of(diffusion.time_aware_net)}
        assert optimizer.param_groups[1]["momentum"] == 0.8
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}.get("variance", 0.003) == 0.003


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_a_run_of_the_optimizer_with_three_groups_goes_on_bitwise(name):
    old, new = diffusion_of(), diffusion_of()
    before = three_groups(old, hidden_of(old.time_aware_net) if name == "muon" else [])
    train(old, before)
    new.load_state_dict(old.state_dict())
    after = build_optimizer(settings(name), new, CPU)
    restore_moments(after, deepcopy(before.state_dict()), 2)
    for diffusion, optimizer in ((old, before), (new, after)):
        torch.manual_seed(1)
        train(diffusion, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert [group["lr"] for group in after.param_groups] == [0.01] * (1 + (name == "muon")) + [0.003]


class Unused(nn.Module):
    """A network with a parameter that never has a gradient."""

    def __init__(self):
        super().__init__()
        self.unused, self.linear = nn.Parameter(torch.ones(2)), nn.Linear(3, 3)

    def forward(self, xt, t):
        return self.linear(xt)


def test_a_parameter_without_a_gradient_has_no_moments():
    diffusion = diffusion_of("beta", Unused())
    optimizer = build_optimizer(settings("adam"), diffusion, CPU)
    train(diffusion, optimizer)
    again = build_optimizer(settings("adam"), diffusion, CPU)
    restore_moments(again, optimizer.state_dict(), 2)
    assert again.state_dict()["state"].keys() == {1, 2}  # of weight and bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda moments: moments.clear(), "no moments of these .* after 2 steps"),
        (lambda moments: moments.update({99: moments[0]}), "no moments of these"),
        (lambda moments: moments[0].clear(), "moments of shapes {}"),
        (lambda moments: moments[0].update(exp_avg=torch.zeros(3)), "moments of shapes .*exp_avg.*3"),
        (lambda moments: moments[0].update(exp_avg="x"), "moments of shapes .*None"),
        (lambda moments: moments.update({0: 5}), "moments of shapes None"),
    ],
)
def test_moments_of_another_network_are_refused(change, message):
    diffusion = diffusion_of()
    optimizer = build_optimizer(settings("adam"), diffusion, CPU)
    train(diffusion, optimizer)
    moments = optimizer.state_dict()["state"]
    change(moments)
    with pytest.raises(ValueError, match=message):
        restore_moments(build_optimizer(settings("adam"), diffusion, CPU), {"state": moments}, 2)


def test_a_device_whose_optimizers_cannot_leave_out_a_step_is_refused():
    with pytest.raises(Mistake, match="--device meta: training needs cuda or cpu"):
        build_optimizer(settings("adam"), diffusion_of(), torch.device("meta"))


def test_muon_needs_to_know_the_hidden_layers():
    with pytest.raises(Mistake, match=r"Unused must name the modules .*hidden_layers = "):
        build_optimizer(settings("muon"), diffusion_of("beta", Unused()), CPU)


def run_frozen(folder, *more):
    """A run of eight steps of the last layer alone; and the variance that it began with."""
    config, _, _, _, *settings = tiny(folder, "diffusion.reverse_variance=learnable", *more)
    trainer = Trainer(load_config(config, settings), "cpu")
    trainer.model.requires_grad_(False)
    trainer.model.time_aware_net.conv_out.requires_grad_(True)
    before = trainer.model.log_sigma_square.clone()
    trainer.run()
    return trainer, before


def test_a_network_is_frozen_with_its_variance(tmp_path):
    trainer, before = run_frozen(tmp_path / "a")
    assert torch.equal(trainer.model.log_sigma_square, before)


def test_what_is_frozen_stays_so_when_the_run_goes_on(tmp_path):
    run_frozen(tmp_path / "whole")
    run_frozen(tmp_path / "a", "train_cfg.max_steps=3")
    assert main(tiny(tmp_path / "a", "diffusion.reverse_variance=learnable", flags=("--resume",))) == 0
    whole, resumed = (checkpoint.load(tmp_path / name / "last.pth") for name in ("whole", "a"))
    assert len(whole["optimizer"]["state"]) == 2
    for part in ("model", "ema", "optimizer", "frozen"):
        assert_same_state(whole[part], resumed[part])
