"""The parts of the benchmarks that decide what is compared: what they print of it is not tested."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT
from torch import nn

sys.path.append(str(ROOT / "benchmarks"))
import common
import discrete
import epoch_end
import gpu
import race

from beta_schedule import LinearSchedule
from config import network_without_memory
from gaussian_diffusion import GaussianDiffusion

CPU = torch.device("cpu")


def test_the_network_of_the_comparisons_is_that_of_ho_et_al(tmp_path):
    config = common.config("cifar10", 4, str(tmp_path))
    assert sum(p.numel() for p in network_without_memory(config).parameters()) == 35_746_307  # 35.7 million, appendix B


@pytest.mark.parametrize(("sampler", "calls", "steps"), [("ddpm", 25, 25), ("heun", 25, 13), ("heun", 10, 5), ("dpm", 999, 40)])
def test_every_sampler_gets_the_same_number_of_network_calls(sampler, calls, steps):
    diffusion = GaussianDiffusion(LinearSchedule(40), nn.Identity())  # heun: two calls a step, but one in the last
    assert common.steps_within(diffusion, sampler, calls) == steps


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_a_side_runs_in_the_precision_in_which_its_own_step_is_faster(faster, monkeypatch):
    monkeypatch.setattr("training.speed.has_bfloat16", lambda device: True)
    net = nn.Linear(1, 1)

    def loss():
        slow = torch.is_autocast_enabled("cpu") != (faster == "bf16")
        time.sleep(0.05 if slow else 0.01)
        return net(torch.ones(1)).float().sum()

    assert common.choose_precision(loss, net, CPU) == faster
    assert all(p.grad is None for p in net.parameters())


def test_a_race_ends_at_each_budget(monkeypatch):
    """On a CPU, where a look at the clock costs nothing, at most one step late, and not at the next fiftieth."""
    monkeypatch.setattr(race, "_batches", lambda device: iter(lambda: torch.zeros(16), None))
    monkeypatch.setattr(race, "_first_images", lambda device: torch.zeros(16))
    net = nn.Linear(16, 1)

    def step(x0):
        begin = time.process_time()
        while time.process_time() - begin < 0.01:
            pass

    args = SimpleNamespace(budget=[0.2, 0.1], name="test", calls=1)
    first, second = race._race(args, CPU, net, "fp32", lambda x0: net(x0).sum(), step, None)
    assert (first.budget, second.budget) == (0.1, 0.2)
    assert 0.1 <= first.seconds < 0.15
    assert 0.2 <= second.seconds < 0.25
    assert 5 <= first.steps < second.steps <= 20


def test_the_shares_of_an_epochs_end_are_counted_as_the_config_says():
    """An epoch of 600 s, saved every 5 minutes: two last.pth with two best.pth at the most, of which one is there."""
    cfg = SimpleNamespace(save_minutes=5, save_period=100, sample_period=10)
    parts = {"validation": 12.0, "picture": 30.0, "copy of the state": 0.5, "steps slowed down by writing": 1.0}
    rows = epoch_end.table(SimpleNamespace(cfg=cfg), 600.0, parts)
    assert [row["ms an epoch"] for row in rows] == pytest.approx([12e3, 3e3, 1.5e3, 3.01e3, 19.51e3])
    assert rows[-1]["% of an epoch"] == pytest.approx(100 * 19.51 / 600)


def test_a_table_has_a_column_for_every_key():
    lines = common.markdown([{"a": 1, "b": 2.5}, {"a": 10, "c": "x"}]).splitlines()
    assert lines == ["| a  | b   | c |", "|----|-----|---|", "| 1  | 2.5 |   |", "| 10 |     | x |"]


def test_a_part_that_fails_is_on_the_page_with_its_last_line_and_the_others_too(tmp_path):
    bad = "import sys; print('before'); sys.exit('no such card\\n')"
    made = [
        gpu.script("bad", [sys.executable, "-c", bad], tmp_path),
        gpu.script("good", [sys.executable, "-c", "print('| a |')"], tmp_path),
    ]
    assert [part.failed for part in made] == [True, False]
    text = gpu.page(CPU, True, made)
    assert "Failed: `no such card`" in text
    assert "| a |" in text
    assert str(ROOT) not in text
    assert text.startswith(f"# {common.device_name(CPU)}, quick run")


def test_a_training_that_cannot_start_says_why(tmp_path):
    part = gpu.training("nothing", "configs/no_such_config.json", 5, tmp_path, [])
    assert part.failed
    assert "no_such_config.json" in part.lines[-1]


def test_results_of_a_quick_run_have_a_file_of_their_own(tmp_path):
    args = SimpleNamespace(quick=True, results=str(tmp_path), threads=1)
    common.write("limit", args, CPU, {"A table": [{"a": 1.0}]})
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-quick.json")
    result = json.loads(path.read_text())
    assert result["tables"] == {"A table": [{"a": 1.0}]}
    assert result["device"] == common.device_name(CPU)


def test_symbols_are_compared_and_drawn(tmp_path):
    few = ["--only", "gaussian-numbers", "absorbing", "--pictures", str(tmp_path), "--results", str(tmp_path)]
    discrete.main(["--quick", *few])
    (result,) = tmp_path.glob("discrete-*-quick.json")
    rows = json.loads(result.read_text())["tables"]["Digits, 17 levels"]
    assert [row["setting"] for row in rows] == ["gaussian-numbers", "absorbing"]
    assert all(1 < row["bits per dimension"] < 17 for row in rows)  # log2(17) is 4.1; after a second of training
    assert {path.name for path in tmp_path.glob("*.png")} == {"discrete.png", "discrete_trajectories.png"}
