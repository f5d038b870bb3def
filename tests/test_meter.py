"""What a record says of the steps since the last one."""

from datetime import datetime

import numpy as np
import pytest
import torch
from runs import ROOT, metrics, tiny

import checkpoint
import train
from gaussian_diffusion import GaussianDiffusion
from training.meter import Meter, end_time, rounded
from training.ranks import Ranks


def bins(T: int) -> np.ndarray:
    """The bin of each t = 1..T: the eighth of [0, 1) that (t - 1) / T lies in."""
    return np.digitize(np.arange(T) / T, np.arange(1, 8) / 8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("T", [4, 20, 1000])
def test_the_loss_by_noise_level_is_the_mean_over_the_good_samples_of_each_eighth_of_the_times(T, weighted):
    rng, seen = np.random.default_rng(0), []
    weight = rng.random(T) if weighted else np.ones(T)
    meter = Meter(torch.device("cpu"), T, torch.tensor(weight) if weighted else None)
    for step in range(6):
        t, loss, bad = rng.integers(1, T + 1, 50), rng.random(50), step == 2
        loss[7] = np.nan if bad else loss[7]
        parts = [(torch.tensor(t[part]), torch.tensor(loss[part])) for part in (slice(0, 20), slice(20, 50))]
        meter.add(torch.tensor(loss.mean()), torch.tensor(float(bad)), parts)
        seen += [] if bad else [(t, loss)]
    t, loss = map(np.concatenate, zip(*seen, strict=True))
    in_bin = [bins(T)[t - 1] == k for k in range(8)]
    found = meter.record(Ranks(alone=True), 1.0)["loss_by_t"]
    assert [value is None for value in found] == [not chosen.any() for chosen in in_bin]
    expected = [np.average(loss[chosen], weights=weight[t - 1][chosen]) for chosen in in_bin if chosen.any()]
    assert [value for value in found if value is not None] == pytest.approx(expected)
    assert meter.record(Ranks(alone=True), 1.0)["loss_by_t"] is None  # it starts again


@pytest.mark.parametrize(("config", "parts"), [("Digits_den", 1), ("Digits_den", 2), ("Digits_fast", 1), ("Digits_d3pm", 1)])
def test_the_losses_of_the_noise_levels_average_to_the_loss(config, parts, tmp_path):
    """Since the times of a part of a batch are spread evenly, up to one sample a time."""
    argv = [str(ROOT / "configs" / f"{config}.json"), *tiny(tmp_path / "a", f"train_cfg.grad_accum={parts}")[1:]]
    assert train.main(argv) == 0
    for line in metrics(tmp_path / "a"):
        share = np.bincount(bins(20), minlength=8) / 20
        assert np.dot(line["loss_by_t"], share) == pytest.approx(line["train_loss"], rel=0.05)
        assert len(set(line["loss_by_t"])) == 8


def test_the_full_loss_has_none(tmp_path):
    settings = ["diffusion.loss_mode=full", "train_cfg.max_steps=1", "train_cfg.sample_period=0"]
    assert train.main(tiny(tmp_path / "a", *settings)) == 0
    assert metrics(tmp_path / "a")[-1]["loss_by_t"] is None


def test_a_checkpoint_of_before_it_is_gone_on_with(tmp_path):
    assert train.main(tiny(tmp_path / "a", "train_cfg.max_steps=2", "train_cfg.lr_schedule=constant")) == 0
    state = checkpoint.load(tmp_path / "a" / "last.pth")
    del state["loss_by_t"], state["quality"]
    checkpoint.save(tmp_path / "a" / "last.pth", state)
    assert train.main(tiny(tmp_path / "a", "train_cfg.lr_schedule=constant", flags=("--resume",))) == 0
    assert len(metrics(tmp_path / "a")[-1]["loss_by_t"]) == 8


@pytest.mark.parametrize(
    ("seconds", "done", "left", "words"),
    [
        (100, 50, 30, "14:33"),  # 2 s a step: a minute
        (3600, 10, 100, "Wed 00:32"),  # ten hours
        (3600, 1, 24 * 6, "Mon 14:32"),
        (3600, 1, 24 * 7, "01 Dec 14:32"),
    ],
)
def test_the_time_at_which_a_run_ends(seconds, done, left, words):
    assert end_time(datetime(2026, 11, 24, 14, 32), seconds, done, left) == words  # a Tuesday


def test_a_run_without_a_foreseeable_end_is_told_so():
    assert end_time(datetime(2026, 11, 24), 1.0, 1, 3 * 10**11) == "in 9513 years or so"


def test_a_record_holds_what_json_has():
    assert rounded(0.123456789012) == 0.12345679
    assert rounded(float("nan")) is rounded(float("inf")) is rounded(None) is None


def test_no_step_has_no_speed():
    meter = Meter(torch.device("cpu"), 8)
    assert meter.record(Ranks("cpu"), 0.1)["img_per_s"] is None


def test_a_short_run_of_bad_steps_alone_is_stopped_where_the_count_comes_late(tmp_path, monkeypatch, capsys):
    def bad(self, *_, **__):
        return sum(p.sum() for p in self.parameters()) * torch.nan

    monkeypatch.setattr(GaussianDiffusion, "forward", bad)
    set_up = Meter.__init__

    class Late:
        """What a GPU has not sent yet."""

        def copy_(self, *_, **__): ...

        def __int__(self):
            return 0

    monkeypatch.setattr(Meter, "__init__", lambda self, *a: (set_up(self, *a), setattr(self, "_seen", Late()))[0])
    assert train.main(tiny(tmp_path / "a", "train_cfg.sample_period=0", "train_cfg.num_workers=0")) == 2
    assert "not finite in the last 8 steps, up to step 8" in capsys.readouterr().err
