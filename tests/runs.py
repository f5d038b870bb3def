"""Runs of train.py that take a second, and what tests read of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

import train

ROOT = Path(__file__).parent.parent
CROP = '{"name": "CenterCrop", "kwargs": {"size": 4}}'
TINY = [
    f"dataset.train.pipeline=[{CROP}]",
    f"dataset.valid.pipeline=[{CROP}]",
    "time_aware_net.kwargs.base_channels=4",
    "time_aware_net.kwargs.ch_mult=[1, 1]",
    "time_aware_net.kwargs.num_res_blocks=1",
    "time_aware_net.kwargs.dropout=0.1",
    "schedule.kwargs.timesteps=20",
    "train_cfg.epochs=2",
    "train_cfg.batch_size=512",
    "train_cfg.record_period=3",
    "train_cfg.sample_period=1",
    "train_cfg.sample_timesteps=3",
    "train_cfg.precision=fp32",  # and not the faster one, which may be another in the next run
]

LOSSES = ("step", "epoch", "train_loss", "valid_loss", "lr", "loss_by_t")  # what is the same whenever a run is stopped


def tiny(folder: Path, *more: str, flags: tuple[str, ...] = ()) -> list[str]:
    """Arguments of a run of eight steps in two epochs."""
    settings = [*TINY, f"train_cfg.model_save_dirpath={folder}", *more]
    return [str(ROOT / "configs" / "Digits_den.json"), "--device", "cpu", *flags, "--set", *settings]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple]:
    return [tuple(line.get(key) for key in LOSSES) for line in metrics(folder)]


def assert_same_state(a: object, b: object, path: str = "") -> None:
    """Bitwise equality of nested dictionaries, lists, tensors and plain values."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "model_save_dirpath":
                assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}.{i}")
    else:
        assert a == b, path


def stop_at(monkeypatch, place: str, call: int) -> None:
    """Deliver SIGTERM to this process as the trainer enters a method for the call-th time."""
    method, calls = getattr(train.Trainer, place), []

    def stopping(self, *args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return method(self, *args)

    monkeypatch.setattr(train.Trainer, place, stopping)


def torchrun(*argv: str, ranks: int = 2, folder: Path = ROOT) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
