"""Power-function averages of the weights: each step, those made afterwards, and what a stop or a kill leaves."""

import copy
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from children import run_argv
from runs import assert_same_state, stop_at, tiny
from torch import nn

import checkpoint
import test as sampling
import train
from beta_schedule import LinearSchedule
from gaussian_diffusion import GaussianDiffusion
from training.averages import MAX_LENGTH, Averages, average_of, coefficients, gamma_of, snapshots

POWER = ("train_cfg.power_ema=[0.1,0.2]", "train_cfg.power_ema_snapshots=4", "train_cfg.sample_period=0")
SAVING = (*POWER, "train_cfg.save_period=1")


def profile(gamma: float, t: int, steps: int) -> np.ndarray:
    """The weight of each of `steps` steps in the average after step t: the integral of the profile over (i - 1, i]."""
    i = np.minimum(np.arange(steps + 1), t)
    return np.diff((i / t) ** (gamma + 1))


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_a_length_has_the_published_exponent(length, gamma):
    assert gamma_of(length) == pytest.approx(gamma, abs=0.005)  # Karras et al. 2024, section 3.1


@pytest.mark.parametrize("length", [0.001, 0.02, 0.1, 0.28, MAX_LENGTH])
def test_the_length_is_the_standard_deviation_of_the_profile(length):
    assert scipy.stats.beta(gamma_of(length) + 1, 1).std() == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0, -0.1, 0.29, math.nan])
def test_no_average_has_another_length(length):
    with pytest.raises(ValueError, match="length"):
        gamma_of(length)


def test_each_step_gives_the_average_computed_directly():
    model, history = nn.Linear(30, 20), []
    cfg = SimpleNamespace(ema_decay=0.9, power_ema=[0.05, 0.1, 0.25], power_ema_snapshots=3)
    averages = Averages(SimpleNamespace(cfg=cfg, model=model, ema=nn.Linear(30, 20), total_steps=100))
    assert averages.snapshot_steps == {33, 67, 100}
    for step in range(1, 101):
        with torch.no_grad():
            model.weight.normal_(mean=step / 10)
        history.append(model.weight.detach().double().numpy().copy())
        averages.update(step)
        for length, average in zip(cfg.power_ema, averages.state(), strict=True):
            direct = np.tensordot(profile(gamma_of(length), step, step), np.stack(history), 1)
            np.testing.assert_allclose(average["weight"].numpy(), direct, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("length", "count"), [(0.03, 8), (0.08, 8), (0.15, 16), (0.25, 16)])
def test_an_average_made_afterwards_has_the_error_that_it_must_have(length, count):
    """For independent weights of variance 1, that is the norm of the profile's error, least among all factors with sum 1."""
    steps = 2000
    times = np.repeat([np.round(steps * np.arange(1, count + 1) / count)], 2, axis=0).ravel()
    gammas = np.repeat([gamma_of(0.05), gamma_of(0.10)], count)
    recorded = np.stack([profile(gamma, t, steps) for gamma, t in zip(gammas, times, strict=True)])
    wanted = profile(gamma_of(length), steps, steps)
    best = (
        recorded[-1]
        - wanted
        + (recorded[:-1] - recorded[-1]).T
        @ np.linalg.lstsq((recorded[:-1] - recorded[-1]).T, wanted - recorded[-1], rcond=None)[0]
    )  # without the condition, in the coordinates that fulfil it
    factors, error = coefficients(torch.tensor(gammas), torch.tensor(times), gamma_of(length), steps)
    assert factors.sum().item() == pytest.approx(1, abs=1e-9)
    assert error == pytest.approx(np.linalg.norm(best) / np.linalg.norm(wanted), rel=0.02)
    history = np.random.default_rng(0).standard_normal((steps, 5000))
    difference = factors.numpy() @ (recorded @ history) - wanted @ history
    assert np.sqrt((difference**2).mean()) == pytest.approx(np.linalg.norm(best), rel=0.05)


def test_a_recorded_average_is_given_back():
    gammas, steps = torch.tensor([7.0, 17.0, 7.0, 17.0]).double(), torch.tensor([50.0, 50.0, 100.0, 100.0]).double()
    factors, error = coefficients(gammas, steps, 7.0, 100)
    torch.testing.assert_close(factors, torch.tensor([0.0, 0.0, 1.0, 0.0]).double(), atol=1e-9, rtol=0)
    assert error < 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 40 steps, and its weights after each of them."""
    folder, history = tmp_path_factory.mktemp("run") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        update = Averages.update

        def updating(self, step):
            update(self, step)
            history.append(torch.cat([p.detach().double().flatten() for p in self.weights]))

        patch.setattr(Averages, "update", updating)
        settings = ("train_cfg.epochs=10", "train_cfg.power_ema_snapshots=10", "train_cfg.lr=0.01", "train_cfg.save_period=5")
        assert train.main(tiny(folder, *POWER[:1], *POWER[2:], *settings)) == 0
    return folder, torch.stack(history)


@pytest.mark.parametrize(("name", "step"), [("last.pth", 40), ("epoch_5.pth", 20), ("power_20.pth", 20)])
@pytest.mark.parametrize("length", [0.07, 0.15])
def test_of_a_run_any_length_is_found_at_any_stored_step(name, step, length, run):
    folder, history = run
    state, error = average_of(folder / name, length)
    names = [name for name, _ in checkpoint.diffusion_of(state, "").named_parameters()]
    made = torch.cat([state["ema"][name].double().flatten() for name in names])
    direct = torch.from_numpy(profile(gamma_of(length), step, step)) @ history[:step]
    recorded = [torch.from_numpy(profile(gamma_of(near), step, step)) @ history[:step] for near in (0.1, 0.2)]
    nearest = min((average - direct).norm().item() for average in recorded)
    assert (made - direct).norm().item() < nearest / 5  # the profile is off by a tenth of what theirs are
    assert error < 0.06


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight


def test_weights_that_have_two_names_are_recorded_by_both():
    model = GaussianDiffusion(LinearSchedule(10), Tied())
    cfg = SimpleNamespace(ema_decay=0.9, power_ema=(0.1,), power_ema_snapshots=1)
    run = SimpleNamespace(model=model, ema=copy.deepcopy(model).eval(), cfg=cfg, total_steps=2)
    averages = Averages(run)
    with torch.no_grad():
        model.time_aware_net.first.weight += 1
    averages.update(1)
    (state,) = averages.state()
    assert torch.equal(state["time_aware_net.first.weight"], state["time_aware_net.second.weight"])
    averages.restore([state])


def test_of_a_recorded_length_the_checkpoint_has_the_average_itself(run):
    state, error = average_of(run[0] / "last.pth", 0.2)
    recorded = checkpoint.load(run[0] / "last.pth")["power_ema"][1]
    assert error < 1e-6
    for name, p in recorded.items():
        torch.testing.assert_close(state["ema"][name], p, atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of eight steps that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(tiny(folder, *SAVING)) == 0
    assert list(snapshots(folder).values()) == [2, 4, 6, 8]
    for path in (folder / "last.pth", *snapshots(folder)):
        assert set(checkpoint.ABOUT_MODEL) <= set(checkpoint.load(path))
    return folder


def test_the_averages_change_nothing_else(whole, tmp_path):
    assert train.main(tiny(tmp_path / "run", "train_cfg.save_period=1", "train_cfg.sample_period=0")) == 0
    bare, with_averages = (checkpoint.load(folder / "last.pth") for folder in (tmp_path / "run", whole))
    assert with_averages.keys() - bare.keys() == {"power_ema"}
    for part in bare.keys() - {"config"}:
        assert_same_state(bare[part], with_averages[part], part)
    assert not snapshots(tmp_path / "run")


# Stops


def assert_same_files(folder, whole):
    names = {path.name for path in whole.glob("*.pth")}
    assert {path.name for path in folder.glob("*.pth")} == names
    for name in names:
        assert_same_state(checkpoint.load(whole / name), checkpoint.load(folder / name), name)


@pytest.mark.parametrize(("place", "call"), [("train_step", 3), ("_after_step", 4), ("validate", 1)])
def test_a_stopped_run_has_the_same_averages_and_snapshots(place, call, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, place, call)
        assert train.main(tiny(tmp_path / "run", *SAVING)) == 143
    assert train.main(tiny(tmp_path / "run", *SAVING, flags=("--resume",))) == 0
    assert_same_files(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_killed_at_its_files_has_the_same_averages_and_snapshots(start, work, tmp_path):
    start("train", run_argv(*POWER)).end().assert_ended(0)
    (work / "run").rename(tmp_path / "whole")
    codes = [start("train", run_argv(*POWER, flags=("--resume",)), kill_at=at).end().code for at in (9, 14, 19)]
    assert set(codes) == {-9}
    start("train", run_argv(*POWER, flags=("--resume",))).end().assert_ended(0)
    assert_same_files(work / "run", tmp_path / "whole")


def test_resuming_from_an_older_checkpoint_drops_the_later_snapshots(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    stop_at(monkeypatch, "train_step", 1)
    assert train.main(tiny(folder, *SAVING, flags=("--resume", str(folder / "epoch_1.pth")))) == 143
    assert list(snapshots(folder).values()) == [2, 4]


def test_a_run_that_goes_on_in_another_folder_takes_its_snapshots_along(whole, tmp_path):
    assert train.main(tiny(tmp_path / "run", *SAVING, flags=("--resume", str(whole / "epoch_1.pth")))) == 0
    for path in snapshots(whole):
        assert_same_state(checkpoint.load(path), checkpoint.load(tmp_path / "run" / path.name))


def test_a_snapshot_is_never_proposed_for_resuming(whole, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for path in snapshots(whole):
        shutil.copy(path, tmp_path / "run")
    (tmp_path / "run" / "last.pth").write_bytes(b"broken")
    assert train.main(tiny(tmp_path / "run", *SAVING, flags=("--resume",))) == 2
    assert "there is no good one beside it" in capsys.readouterr().err


# test.py --ema-length


def test_the_length_with_the_least_metric_is_named(run, capsys):
    flags = ["-n", "4", "--timesteps", "3", "--device", "cpu", "--metrics", "bpd", "--bpd-images", "20", "--bpd-timesteps", "3"]
    assert sampling.main([str(run[0] / "last.pth"), "--ema-length", "0.05", "0.28", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = [float(line.split()[3]) for line in lines if line.startswith("bits per dimension")]
    best = ("0.05", "0.28")[int(np.argmin(figures))]
    assert figures[0] != figures[1]
    assert lines[-1] == f"least bpd: {min(figures):.4f}, with --ema-length {best}"
    assert (run[0] / f"last_ema{best}_gen" / "grid.png").exists()
    diffusion, _ = checkpoint.load_diffusion(run[0] / f"last_ema{best}.pth")
    assert_same_state(diffusion.state_dict(), average_of(run[0] / "last.pth", float(best))[0]["ema"])


@pytest.mark.parametrize(("name", "trained"), [("last.pth", "steps, 10 epochs"), ("power_20.pth", "steps, 5 epochs")])
def test_an_average_has_a_report(name, trained, run):
    flags = ["-n", "4", "--timesteps", "3", "--device", "cpu", "--bpd-images", "20", "--bpd-timesteps", "3"]
    assert sampling.main([str(run[0] / name), "--ema-length", "0.05", "--report", *flags]) == 0
    page = (run[0] / f"{name.removesuffix('.pth')}_ema0.05_gen" / "report.html").read_text()
    assert f">{trained}<" in page


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["last.pth", "--ema-length", "0.3"], "at most 0.2887"),
        (["last.pth", "--ema-length", "0.1", "0.2"], "--metrics"),
        (["last.pth", "--ema-length", "0.1", "--raw"], "--raw"),
        (["power_20.pth"], "--ema-length"),
        (["bare.pth", "--ema-length", "0.1"], "train_cfg.power_ema"),
        (["alien.pth", "--ema-length", "0.1"], "alien.pth: does not hold the averages"),
    ],
)
def test_what_cannot_be_is_refused(argv, words, run, capsys):
    state = checkpoint.load(run[0] / "last.pth")
    checkpoint.save(run[0] / "bare.pth", {**state, "power_ema": []})
    checkpoint.save(run[0] / "alien.pth", {**state, "power_ema": state["power_ema"][:1]})
    before = set(run[0].iterdir())
    assert sampling.main([str(run[0] / argv[0]), *argv[1:], "-n", "1", "--device", "cpu"]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert set(run[0].iterdir()) == before


def test_the_buffers_of_a_network_are_those_of_its_last_step():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_aware_net = nn.BatchNorm1d(2)

    model, ema = Model(), Model()
    cfg = SimpleNamespace(ema_decay=0.9, power_ema=[], power_ema_snapshots=1)
    averages = Averages(SimpleNamespace(cfg=cfg, model=model, ema=ema, total_steps=10))
    data = 3 + 2 * torch.randn(4000, 2)
    for step in range(1, 101):
        model.time_aware_net(data)
        averages.update(step)
    torch.testing.assert_close(ema.time_aware_net.running_mean, data.mean(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(ema.time_aware_net.running_var, data.var(0), rtol=1e-3, atol=0)
    assert ema.time_aware_net.num_batches_tracked == 100
