"""A run that an older version of this project began goes on under this one, and ends bitwise as it would have."""

import os
import subprocess
import sys

import pytest
from runs import ROOT, assert_same_state, losses, tiny

import checkpoint
import train

OLDER = "7456adf"  # before precision, compile and num_groups could be "auto", and checkpoints were written by a thread
MORE = ("train_cfg.lr_schedule=constant",)


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> str:
    """The older version's files."""
    folder = tmp_path_factory.mktemp("older") / "checkout"
    try:
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True, capture_output=True)
        subprocess.run(["git", "checkout", "-q", OLDER], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"needs git and the history back to {OLDER}")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("train_cfg.optimizer=muon", "diffusion.reverse_variance=learnable")])
def test_an_older_run_goes_on_and_ends_bitwise_as_it_would_have(more, older, tmp_path):
    def begin(name: str, *settings: str) -> None:
        argv = tiny(tmp_path / name, *MORE, *more, *settings)
        command = [sys.executable, "train.py", os.path.join(older, "configs", "Digits_den.json"), *argv[1:]]
        subprocess.run(command, cwd=older, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    begin("whole")
    begin("parts", "train_cfg.max_steps=5")
    as_then = "diffusion.bounded=false"  # which the config has set since
    assert train.main(tiny(tmp_path / "parts", *MORE, *more, as_then, flags=("--resume",))) == 0
    whole, parts = (checkpoint.load(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    for part in ("step", "model", "ema"):
        assert_same_state(whole[part], parts[part], part)
    assert_same_state(whole["optimizer"]["state"], parts["optimizer"]["state"])
    assert losses(tmp_path / "parts")[-1][3] == losses(tmp_path / "whole")[-1][3]
