"""Checkpoints written by a thread: in order, whole, and of the moment at which they were taken."""

import logging
import threading
import time

import numpy as np
import pytest
import torch
from runs import TINY

import checkpoint
import train
from config import load_config
from mistakes import Mistake
from training.state import take_state
from training.writer import Writer


def test_training_goes_on_while_a_checkpoint_is_written_and_files_come_in_order(tmp_path, monkeypatch):
    may_write, written = threading.Event(), []

    def slow(path, state):
        assert may_write.wait(30)
        written.append((path.name, state["step"]))

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = Writer()
    writer.save(tmp_path / "best.pth", {"step": 1})
    writer.save(tmp_path / "last.pth", {"step": 2})  # waits in the queue
    assert written == []
    may_write.set()
    writer.wait()
    assert written == [("best.pth", 1), ("last.pth", 2)]
    writer.close()


def test_an_error_of_the_thread_is_raised_by_the_run_and_nothing_newer_is_written(tmp_path, monkeypatch):
    calls = []

    def full(path, state):
        calls.append(path.name)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save", full)
    writer = Writer()
    writer.save(tmp_path / "best.pth", {})
    writer.jobs.join()
    with pytest.raises(OSError, match="No space left"):
        writer.check()
    with pytest.raises(OSError, match="No space left"):
        writer.save(tmp_path / "last.pth", {})
    writer.close()
    assert calls == ["best.pth"]


def test_an_error_that_nobody_has_met_is_told_when_the_thread_ends(tmp_path, monkeypatch, caplog):
    logging.getLogger("train").propagate = True

    def full(path, state):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save", full)
    writer = Writer()
    writer.save(tmp_path / "best.pth", {})
    writer.close()
    assert f"not all of the run is on the disk: [Errno 28] No space left on device: '{tmp_path / 'best.pth'}'" in caplog.text


def test_a_state_is_of_the_moment_at_which_it_was_taken(tmp_path):
    settings = [*TINY, f"train_cfg.model_save_dirpath={tmp_path / 'a'}"]
    run = train.Trainer(load_config("configs/Digits_den.json", settings), "cpu")
    batches = run.train_data.epoch(0)
    run.train_step(*next(batches))
    before = {name: weights.clone() for name, weights in run.ema.state_dict().items()}
    state = take_state(run)
    run.train_step(*next(batches))
    assert state["step"] == 1
    assert all(torch.equal(state["ema"][name], weights) for name, weights in before.items())
    last = len(run.parameters) - 1
    assert not torch.equal(state["optimizer"]["state"][last]["exp_avg"], run.optimizer.state[run.parameters[last]]["exp_avg"])


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("cat"), {3}])
def test_a_state_that_could_not_be_read_again_is_refused_by_its_place_and_nothing_is_written(value, tmp_path):
    state = {"step": 3, "config": {"time_aware_net": {"kwargs": {"gains": (torch.ones(1), [1.0, None, value])}}}}
    path = tmp_path / "last.pth"
    for before in ([], [path]):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        with pytest.raises(Mistake, match=rf"^state\.config\.time_aware_net\.kwargs\.gains\.1\.2: is of type {kind}, "):
            checkpoint.save(path, state)
        assert list(tmp_path.iterdir()) == before
        assert not before or path.read_bytes() == b"an older one"
        path.write_bytes(b"an older one")


def test_the_thread_is_gone_once_it_is_closed(tmp_path):
    """Python that ends while the thread does may abort, after hours of training."""

    class Lingering(Writer):
        def _work(self):
            super()._work()
            time.sleep(0.3)

    writer = Lingering()
    writer.close()
    assert not writer.thread.is_alive()
