"""Several ranks: bits, networks of one's own, signals, and what is said when one of them fails."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import assert_same_state, losses, metrics, tiny

import checkpoint
import mistakes
from mistakes import Mistake, run_script
from training import signals
from training.signals import Stopped, Stopper

NETS = """
from torch import nn
from time_aware_module import TimeAwareUNet


class Unused(TimeAwareUNet):
    def __init__(self, n_channels: int):
        super().__init__(n_channels, 8, ch_mult=(1,), num_res_blocks=1)
        self.extra = nn.Linear(3, 3)


class Normed(nn.Module):
    def __init__(self, n_channels: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(n_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, n_channels, 1))

    def forward(self, xt, t):
        return self.layers(xt)
"""

DATA = """
import os
from dataset import Digits


class Data(Digits):
    def __init__(self, train: bool = True, pipeline=()):
        super().__init__(train, pipeline)
        if os.environ["RANK"] == "1":
            self.images, self.labels = self.images[:-600], self.labels[:-600]
"""


def of_net(folder: Path, net: str, *more: str, flags: tuple[str, ...] = ()) -> list[str]:
    argv = [each for each in tiny(folder, *more, flags=flags) if not each.startswith("time_aware_net")]
    return [*argv, f"time_aware_net.name=my_nets.{net}", 'time_aware_net.kwargs={"n_channels": 1}']


@pytest.mark.slow
def test_three_ranks_stopped_and_resumed_are_the_run_never_stopped(tmp_path, run_ranks):
    """With three, the order of a sum shows, which torch's DDP chooses after its first pass."""
    few = "train_cfg.batch_size=510"
    run_ranks("train", tiny(tmp_path / "whole", few), 3)
    for steps in ("3", "null"):
        run_ranks("train", tiny(tmp_path / "parts", few, f"train_cfg.max_steps={steps}", flags=("--resume",)), 3)
    whole, parts = (checkpoint.load(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    for name in ("model", "ema", "optimizer", "best_loss"):
        assert_same_state(whole[name], parts[name], name)


def test_two_ranks_train_a_network_with_a_parameter_that_it_does_not_use(work, run_ranks):
    (work / "my_nets.py").write_text(NETS)
    run_ranks("train", of_net(work / "run", "Unused"))
    assert losses(work / "run")[-1][0] == 8


@pytest.mark.slow
def test_two_ranks_validate_the_batchnorm_that_is_saved(work, run_ranks):
    (work / "my_nets.py").write_text(NETS)
    run_ranks("train", of_net(work / "whole", "Normed"))
    for steps in ("6", "null"):
        run_ranks("train", of_net(work / "parts", "Normed", f"train_cfg.max_steps={steps}", flags=("--resume",)))
    assert metrics(work / "whole")[-1]["valid_loss"] == metrics(work / "parts")[-1]["valid_loss"]


def test_two_ranks_with_other_data_are_refused_and_do_not_wait_for_each_other(work, start_ranks):
    (work / "my_data.py").write_text(DATA)
    first, second = (rank.end() for rank in start_ranks("train", tiny(work / "run", "dataset.name=my_data.Data")))
    first.assert_ended(2, "dataset.train: must be the same on all ranks, and is 1617 images")
    assert second.code == 2


def test_with_slow_steps_the_ranks_hear_a_signal_within_two(clock):
    stopper = Stopper(SimpleNamespace(world=2, largest=lambda value: value))
    for step in range(40):
        clock.now += 4
        stopper.signal = 15 * (step >= 25)
        try:
            stopper.check()
        except Stopped:
            break
    assert step <= 26


def test_fast_steps_cost_few_words(clock):
    words = []
    stopper = Stopper(SimpleNamespace(world=2, largest=lambda value: words.append(value) or value))
    for _ in range(1000):
        clock.now += 0.002
        stopper.check()
    assert len(words) <= 2 * 1000 / signals.RANKS_PERIOD + 4


def test_a_rank_that_has_lost_another_says_so_in_a_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(mistakes, "RANK_DELAY", 0.0)

    def work():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:413.")

    assert run_script("train.py", work) == 1
    assert capsys.readouterr().err == "train.py: rank 0 has lost another rank, whose own output says why\n"


def test_a_mistake_of_all_ranks_is_said_by_the_first_at_once(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def work():
        raise Mistake("no")

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_script("train.py", work) == 2
    assert len(slept) == 1
