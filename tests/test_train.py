"""The trainer and the sampler as a user runs them: files, resuming, mistakes, signals, ranks."""

import copy
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from children import files
from PIL import Image
from runs import CROP, ROOT, TINY, assert_same_state, losses, metrics, stop_at, tiny, torchrun

import checkpoint
import test as sampling
import train
from config import load_config
from dataset import Digits
from evaluation.metrics import METRICS, Evaluation
from files import whole_file
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake
from training.batches import Batches
from training.checks import check_resume
from training.ranks import Ranks
from training.run_folder import RunFolder
from training.seeds import WEIGHTS, mixed_seed
from training.signals import SIGNALS, Stopped, Stopper
from training.state import read_state


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a tiny run to its end."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train.main(tiny(folder)) == 0
    return folder


def test_a_run_leaves_what_the_head_of_train_py_says(run):
    names = {path.name for path in run.iterdir() if path.is_file()}
    assert names == {"last.pth", "best.pth", "metrics.jsonl", "train.log", "epoch_1.png", "epoch_2.png"}
    assert [line["step"] for line in metrics(run)] == [3, 4, 6, 8]
    assert [line["epoch"] for line in metrics(run)] == [1, 1, 2, 2]
    assert [line["valid_loss"] is None for line in metrics(run)] == [True, False, True, False]
    assert all(line["img_per_s"] > 0 and 0 <= line["data_wait_share"] < 1 and line["lr"] > 0 for line in metrics(run))


def test_training_lowers_the_loss_and_the_average_follows_the_weights(tmp_path):
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=4", "train_cfg.batch_size=64", "train_cfg.sample_period=0")) == 0
    lines = metrics(tmp_path / "a")
    assert lines[-1]["valid_loss"] < 0.7 * lines[0]["train_loss"]
    state = checkpoint.load(tmp_path / "a" / "last.pth")
    torch.manual_seed(mixed_seed(WEIGHTS, 0))
    start = train.build_diffusion(state["config"]).state_dict()
    name = "time_aware_net.conv_in.weight"
    moved = (state["model"][name] - start[name]).norm()
    assert (state["ema"][name] - start[name]).norm() > 0.5 * moved
    assert not torch.equal(state["ema"][name], state["model"][name])


def test_a_second_enter_loses_nothing_and_names_three_ways_on(run, capsys):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert train.main(tiny(run)) == 2
    message = capsys.readouterr().err
    assert all(way in message for way in ("--resume", "--overwrite", "train_cfg.model_save_dirpath"))
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_overwrite_starts_anew(tmp_path):
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1")) == 0
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1", flags=("--overwrite",))) == 0
    assert [line["step"] for line in metrics(tmp_path / "a")] == [3, 4]


def test_records_that_are_missing_or_cut_short_leave_each_step_once(run, tmp_path, monkeypatch):
    """A checkpoint alone is gone on with elsewhere, that run dies without a word, its last line is half written."""
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 5)
        assert train.main(tiny(tmp_path / "first")) == 143
    last = tmp_path / "alone" / "last.pth"
    last.parent.mkdir()
    shutil.copy(tmp_path / "first" / "last.pth", last)
    calls, train_step = [], train.Trainer.train_step

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError("no power")
        train_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", dying)
        assert train.main(tiny(tmp_path / "second", flags=("--resume", str(last)))) == 1
    assert [line["step"] for line in metrics(tmp_path / "second")] == [6]
    records = tmp_path / "second" / "metrics.jsonl"
    records.write_text('{"step": 5}\n[]\n' + records.read_text() + '{"step": 7, "epo')  # two of someone else's, one cut short
    assert train.main(tiny(tmp_path / "second", flags=("--resume",))) == 0
    assert [line["step"] for line in metrics(tmp_path / "second")] == [6, 8]
    assert losses(tmp_path / "second")[-1] == losses(run)[-1]


def test_overwrite_deletes_what_was_found_of_the_run_too(tmp_path):
    assert train.main(tiny(tmp_path / "a", "train_cfg.max_steps=1")) == 0
    flags = ["--device", "cpu", "-n", "2", "--timesteps", "2", "--fit-variance", "2"]
    assert sampling.main([str(tmp_path / "a" / "last.pth"), *flags, "--metrics", "bpd", "--bpd-images", "2"]) == 0
    shutil.copy(tmp_path / "a" / "last_fitted.pth", tmp_path / "a" / "epoch_1_fitted.pth")  # of the run, and of test.py
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    assert sampling.main([str(tmp_path / "a" / "last.pth"), *flags[:-2], "--from", str(tmp_path / "grey.png")]) == 0
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / "last_from" / "mine.png").write_text("mine")
    assert (tmp_path / "a" / "last_gen" / "metrics.json").exists()
    assert train.main(tiny(tmp_path / "a", "train_cfg.max_steps=2", flags=("--overwrite",))) == 0
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} >= {"last.pth", "notes.txt", "mine.png"}
    assert not {"last_fitted.pth", "metrics.json", "grid.png", "0.png"} & {path.name for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)])
def test_models_in_a_folder_without_a_run_are_kept(flags, tmp_path):
    folder = tmp_path / "a"
    (folder / "last_gen").mkdir(parents=True)
    kept = [folder / "last_fitted.pth", folder / "last_ema0.1.pth", folder / "last_gen" / "report.html"]
    kept.append(folder / "first_draft.png")
    for path in kept:
        path.write_text("mine")
    assert train.main(tiny(folder, "train_cfg.max_steps=1", flags=flags)) == 0
    assert all(path.read_text() == "mine" for path in kept)


@pytest.mark.parametrize("power", ["[]", "[0.1]"], ids=["one average", "snapshots of others, all of them earlier"])
def test_going_on_from_an_earlier_epoch_deletes_only_the_best_of_later_ones(power, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Trainer, "validate", lambda run: {1: 0.3, 2: 0.4, 3: 0.2}[run.epoch])
    folder = tmp_path / "a"
    argv = tiny(folder, "train_cfg.save_period=1", "train_cfg.epochs=3", f"train_cfg.power_ema={power}")
    assert train.main(argv) == 0
    assert checkpoint.load(folder / "best.pth")["step"] > 4
    shutil.copy(folder / "best.pth", folder / "best_mine.pth")
    assert train.main([*argv, "train_cfg.epochs=2", "--resume", str(folder / "epoch_1.pth")]) == 0
    assert checkpoint.load(folder / "best.pth")["step"] == 8
    assert checkpoint.load(folder / "best_mine.pth")["step"] > 8


def test_a_best_checkpoint_that_is_not_there_is_written_again(tmp_path, monkeypatch):
    argv = tiny(tmp_path / "a", "train_cfg.epochs=1")
    monkeypatch.setattr(train.Trainer, "validate", lambda run: 0.3 if run.epoch == 1 else 0.4)
    assert train.main(argv) == 0
    (tmp_path / "a" / "best.pth").unlink()
    assert train.main([*argv, "train_cfg.epochs=2", "--resume"]) == 0
    assert checkpoint.load(tmp_path / "a" / "best.pth")["best_loss"] == 0.4


def test_a_run_among_its_own_images_is_warned_of(tmp_path, capsys):
    for i in range(12):
        Image.effect_noise((4, 4), 50).save(tmp_path / f"{i}.png")
    part = {"root": str(tmp_path), "mode": "L", "pipeline": []}
    section = {"name": "ImageFolder", "train": part | {"train": True}, "valid": part | {"train": False}}
    argv = tiny(tmp_path / "images" / "run", "train_cfg.batch_size=4", "train_cfg.max_steps=1")
    argv = [*(each for each in argv if not each.startswith("dataset.")), f"dataset={json.dumps(section)}"]
    assert train.main(argv) == 0
    assert "run: lies among the images of dataset.train: its pictures" in capsys.readouterr().err


@pytest.mark.parametrize(("here", "there"), [(5, None), (None, 5), (3, 5)])
def test_ranks_that_do_not_go_on_from_the_same_step_are_refused(here, there):
    mine, other = (-1 if step is None else step for step in (here, there))
    ranks = SimpleNamespace(largest=lambda value: max(value, other if value == mine else -other))
    with pytest.raises(Mistake, match="not all ranks see that checkpoint"):
        check_resume(here and {"step": here}, ranks)
    check_resume(here and {"step": here}, SimpleNamespace(largest=lambda value: value))


@pytest.mark.parametrize(("rank", "expected"), [(0, ["work", "meet"]), (1, ["meet", "work"])])
def test_the_first_rank_works_first_and_lets_the_others_go_on_if_it_fails(rank, expected):
    did, ranks = [], Ranks("cpu", alone=True)
    ranks.rank, ranks.largest = rank, lambda value: did.append("meet")

    def work():
        did.append("work")
        raise Mistake("no network")

    with pytest.raises(Mistake, match="no network"):
        ranks.in_turn(work)
    assert did == expected


def test_a_signal_at_the_very_end_loses_nothing(tmp_path, monkeypatch):
    """It comes while the last checkpoint is written, when nothing is left to be stopped."""
    save = checkpoint.save

    def signalled(path, state):
        if path.name == "last.pth" and state["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        save(path, state)

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("it was not heeded"))
    try:
        monkeypatch.setattr(checkpoint, "save", signalled)
        assert train.main(tiny(tmp_path / "a")) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoint.load(tmp_path / "a" / "last.pth")["step"] == 8


def test_under_torchrun_the_same_signal_again_does_not_end_what_saves(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        stopper = Stopper(Ranks("cpu", alone=True)).__enter__()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            stopper.check()
        stopper.__exit__(stopped.type, stopped.value, None)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_fitted_checkpoint_holds_the_weights_that_it_was_fitted_to(tmp_path, capsys):
    assert train.main(tiny(tmp_path / "a", "train_cfg.power_ema=[0.1]", "train_cfg.max_steps=4")) == 0
    last = tmp_path / "a" / "last.pth"
    flags = ["--device", "cpu", "-n", "1", "--timesteps", "2"]
    for raw in ([], ["--raw"]):
        assert sampling.main([str(last), *flags, "--fit-variance", "2", *raw]) == 0
    whole = checkpoint.load(last)
    fitted, raw = (checkpoint.load(last.with_name(f"last{name}_fitted.pth")) for name in ("", "_raw"))
    name = "time_aware_net.conv_in.weight"
    assert torch.equal(fitted["ema"][name], whole["ema"][name])
    assert torch.equal(raw["ema"][name], whole["model"][name])
    assert not torch.equal(fitted["ema"]["x0_error"], raw["ema"]["x0_error"])
    capsys.readouterr()
    for other in (["--raw"], ["--ema-length", "0.1"]):
        assert sampling.main([str(last.with_name("last_fitted.pth")), *flags, *other]) == 2
        assert "last_fitted.pth: " in capsys.readouterr().err


def test_a_fitted_checkpoint_is_not_gone_on_with(tmp_path, capsys):
    assert train.main(tiny(tmp_path / "a", "train_cfg.max_steps=1")) == 0
    last = tmp_path / "a" / "last.pth"
    assert sampling.main([str(last), "--device", "cpu", "-n", "1", "--timesteps", "2", "--fit-variance", "2"]) == 0
    argv = tiny(tmp_path / "a", "train_cfg.max_steps=2")
    assert train.main([*argv, "--resume", str(tmp_path / "a" / "last_fitted.pth")]) == 2
    assert "last_fitted.pth: its variance was fitted after training" in capsys.readouterr().err
    checkpoint.save(tmp_path / "a" / "last_fitted.pth", checkpoint.load(last))  # as older ones were, which do not say it
    last.write_bytes(last.read_bytes()[:9000])
    assert train.main([*argv, "--resume"]) == 2
    assert f"the newest good one is {tmp_path / 'a' / 'best.pth'}" in capsys.readouterr().err


def test_data_that_have_moved_are_found_and_those_that_have_changed_are_told(tmp_path, capsys, caplog):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        Digits().image(i).save(images / f"{i}.png")
    part = f'{{"root": "{images}", "mode": "L", "train": %s, "pipeline": [{CROP}]}}'
    data = ["dataset.name=ImageFolder", f"dataset.train={part % 'true'}", f"dataset.valid={part % 'false'}"]
    assert train.main(tiny(tmp_path / "a", *data, "train_cfg.epochs=1")) == 0
    images = images.rename(tmp_path / "elsewhere")
    measure = [str(tmp_path / "a" / "last.pth"), "--device", "cpu", "-n", "1", "--timesteps", "2", "--metrics", "bpd"]
    assert sampling.main(measure) == 2
    assert "no such folder" in capsys.readouterr().err
    assert sampling.main([*measure, "--set", f"dataset.valid.root={images}"]) == 0
    assert sampling.main([*measure, "--set", "schedule.kwargs.timesteps=5"]) == 2
    assert "--set schedule.kwargs.timesteps=5: of a checkpoint, only" in capsys.readouterr().err
    moved = [*data, f"dataset.train.root={images}", f"dataset.valid.root={images}"]
    assert train.main(tiny(tmp_path / "a", *moved, "train_cfg.epochs=2", flags=("--resume",))) == 0
    assert "the training images are not those of the run" not in capsys.readouterr().err
    Digits().image(20).save(images / "more.png")
    Digits().image(21).save(images / "most.png")
    assert train.main(tiny(tmp_path / "a", *moved, "train_cfg.epochs=3", flags=("--resume",))) == 0
    assert "the training images are not those of the run: 18 then, 19 now" in capsys.readouterr().err


MORE = {
    "plain": [],
    "learnable": ["diffusion.reverse_variance=learnable"],
    "grad_accum": ["train_cfg.grad_accum=2"],
    "muon": ["train_cfg.optimizer=muon"],
    "random crops by workers": [
        'dataset.train.pipeline=[{"name":"RandomCrop","kwargs":{"size":4,"padding":1}},{"name":"RandomHorizontalFlip"}]'
    ],
}


@pytest.mark.parametrize(
    ("place", "call", "more"),
    [
        ("train_step", 1, "plain"),
        ("train_step", 4, "plain"),
        ("train_step", 5, "learnable"),
        ("train_step", 6, "grad_accum"),
        ("train_step", 3, "muon"),
        pytest.param("train_step", 7, "random crops by workers", marks=pytest.mark.slow),
        ("validate", 1, "plain"),
        ("save_picture", 2, "plain"),
    ],
)
def test_a_run_stopped_anywhere_and_resumed_is_the_run_never_stopped(place, call, more, tmp_path, monkeypatch, run):
    whole = run
    if more != "plain":
        whole = tmp_path / "whole"
        assert train.main(tiny(whole, *MORE[more])) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, place, call)
        assert train.main(tiny(tmp_path / "parts", *MORE[more])) == 128 + signal.SIGTERM
    assert train.main(tiny(tmp_path / "parts", *MORE[more], flags=("--resume",))) == 0
    assert losses(tmp_path / "parts") == losses(whole)
    for name in ("last.pth", "best.pth"):
        assert_same_state(checkpoint.load(whole / name), checkpoint.load(tmp_path / "parts" / name))


def test_muon_steps_the_matrices_of_hidden_layers_and_adam_the_rest(tmp_path):
    settings = [*TINY, f"train_cfg.model_save_dirpath={tmp_path / 'a'}", "train_cfg.optimizer=muon"]
    run = train.Trainer(train.load_config(ROOT / "configs" / "Digits_den.json", settings), "cpu")
    run.train_step(*next(run.train_data.epoch(0)))
    for name, p in run.model.time_aware_net.named_parameters():
        hidden_matrix = name.split(".")[0] in ("down", "middle", "up") and p.ndim > 1
        assert ("momentum" in run.optimizer.state[p]) == hidden_matrix, name
        assert ("exp_avg_sq" in run.optimizer.state[p]) != hidden_matrix, name


def test_resume_refuses_another_config_by_its_keys(run, capsys):
    assert train.main(tiny(run, "train_cfg.lr=0.5", "schedule.kwargs.timesteps=30", flags=("--resume",))) == 2
    message = capsys.readouterr().err
    assert "train_cfg.lr (0.002 then, 0.5 now)" in message
    assert "schedule.kwargs.timesteps (20 then, 30 now)" in message
    assert "epochs" in message.split("only these may change")[1]


def test_resume_of_a_finished_run_trains_on_only_if_epochs_were_added(tmp_path):
    settings = ("train_cfg.lr_schedule=constant",)
    assert train.main(tiny(tmp_path / "a", *settings)) == 0
    assert train.main(tiny(tmp_path / "a", *settings, flags=("--resume",))) == 0
    assert len(metrics(tmp_path / "a")) == 4
    assert train.main(tiny(tmp_path / "a", *settings, "train_cfg.epochs=3", flags=("--resume",))) == 0
    assert metrics(tmp_path / "a")[-1]["step"] == 12


@pytest.mark.parametrize("older", [False, True])
def test_a_validation_loss_that_is_no_number_spoils_nothing_after_it(older, tmp_path, monkeypatch):
    """Of one epoch: the run can be resumed, and best.pth is written again. An older run has kept it as its best."""
    found = iter([math.nan, 0.5])
    monkeypatch.setattr(train.Trainer, "validate", lambda self: next(found))
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1")) == 0
    assert "valid nan" in (tmp_path / "a" / "train.log").read_text()
    assert not (tmp_path / "a" / "best.pth").exists()
    if older:
        state = checkpoint.load(tmp_path / "a" / "last.pth") | {"best_loss": math.nan}
        checkpoint.save(tmp_path / "a" / "last.pth", state)
    assert train.main(tiny(tmp_path / "a", flags=("--resume",))) == 0
    assert checkpoint.load(tmp_path / "a" / "best.pth")["best_loss"] == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [1, 8, 8]}, ["the data are not the run's: shape [1, 8, 8] then, [1, 4, 4] now"]),
        ({"class_names": ["a"]}, ["the data are not the run's: class_names ['a'] then"]),
        ({"class_counts": [1, 2]}, ["the training images are not those of the run"]),
        ({"class_names": None, "class_counts": None}, ["finished"]),  # an older run's
    ],
)
def test_other_data_than_the_runs_are_seen(change, words, tmp_path, capsys):
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1")) == 0
    last = tmp_path / "a" / "last.pth"
    checkpoint.save(last, checkpoint.load(last) | change)
    assert train.main(tiny(tmp_path / "a", flags=("--resume",))) == (0 if "class_counts" in change else 2)
    assert all(word in capsys.readouterr().err for word in words)


def test_resume_takes_a_folder_and_names_what_is_not_there(tmp_path, capsys):
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1")) == 0
    assert train.main(tiny(tmp_path / "a", flags=("--resume", str(tmp_path / "a")))) == 0
    assert checkpoint.load(tmp_path / "a" / "last.pth")["step"] == 8
    assert train.main(tiny(tmp_path / "a", flags=("--resume", str(tmp_path / "b")))) == 2
    assert f"--resume {tmp_path / 'b'}: no such checkpoint" in capsys.readouterr().err


def test_resume_where_no_checkpoint_was_written_starts_anew_and_deletes_no_other(tmp_path, capsys):
    """As after a kill, or a full disk, before the first one: a script that always says --resume is not stuck."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.log").write_text("begun\n")
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1", "train_cfg.save_period=1", flags=("--resume",))) == 0
    assert checkpoint.load(tmp_path / "a" / "last.pth")["step"] == 4
    for gone in ("last.pth", "best.pth"), ("epoch_1.pth", "epoch_1.png"):
        for name in gone:
            (tmp_path / "a" / name).unlink()
        left = files(tmp_path / "a")
        assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1", flags=("--resume",))) == 2
        said = capsys.readouterr().err
        assert "last.pth is not there, and" in said
        assert "metrics.jsonl would be lost" in said
        assert files(tmp_path / "a") == left


def test_a_home_is_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.main(tiny(Path("~/run"), "train_cfg.epochs=1")) == 0
    assert (tmp_path / "run" / "last.pth").exists()


def test_a_run_goes_on_without_a_compiler(tmp_path):
    """That was compiled where there was one."""
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1")) == 0
    state = checkpoint.load(tmp_path / "a" / "last.pth")
    state["config"]["train_cfg"]["compile"] = True
    checkpoint.save(tmp_path / "a" / "last.pth", state)
    assert train.main(tiny(tmp_path / "a", "train_cfg.compile=false", flags=("--resume",))) == 0
    assert checkpoint.load(tmp_path / "a" / "last.pth")["step"] == 8


def test_only_what_the_library_chose_is_kept_where_a_resume_says_auto():
    """Another "auto" is a value as any other: of a network of one's own, or cuda_graph, which each machine decides anew."""
    config = load_config("configs/Digits_den.json")
    run = copy.deepcopy(config)
    run["train_cfg"] |= {"precision": "bf16", "compile": True, "cuda_graph": False}
    run["time_aware_net"]["kwargs"]["num_groups"] = None
    state = {"config": run, "step": 1, "closed": 0, "records": 0, "world": 1, "best_loss": 1.0}
    state |= {"loss_sums": [0, 0], "bad_steps": [0, 0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda path: copy.deepcopy(state))
        read_state(Path("last.pth"), config)
        assert config["time_aware_net"]["kwargs"]["num_groups"] is None
        assert [config["train_cfg"][key] for key in ("precision", "compile", "cuda_graph")] == ["bf16", True, "auto"]
        run["time_aware_net"]["kwargs"]["act"], config["time_aware_net"]["kwargs"]["act"] = "fast", "auto"
        with pytest.raises(Mistake, match=r'time_aware_net\.kwargs\.act \("fast" then, "auto" now\)'):
            read_state(Path("last.pth"), config)


def test_a_run_that_goes_on_in_another_folder_takes_its_best_along(tmp_path, monkeypatch):
    """But not one of later than the step from which it goes on."""
    found = iter([0.5, 0.4, 0.6, 0.6])
    monkeypatch.setattr(train.Trainer, "validate", lambda self: next(found))
    assert train.main(tiny(tmp_path / "a", "train_cfg.save_period=1", "train_cfg.epochs=1")) == 0
    best = (tmp_path / "a" / "best.pth").read_bytes()
    assert train.main(tiny(tmp_path / "a", "train_cfg.save_period=1", flags=("--resume",))) == 0
    last, first = (str(tmp_path / "a" / name) for name in ("last.pth", "epoch_1.pth"))
    assert (tmp_path / "a" / "best.pth").read_bytes() != best
    assert train.main(tiny(tmp_path / "b", "train_cfg.epochs=3", flags=("--resume", last))) == 0
    assert (tmp_path / "b" / "best.pth").read_bytes() == (tmp_path / "a" / "best.pth").read_bytes()
    assert train.main(tiny(tmp_path / "c", flags=("--resume", first))) == 0
    assert checkpoint.load(tmp_path / "c" / "best.pth")["best_loss"] == 0.6  # of what is left


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """The folder of a run with a checkpoint of each epoch, and best.pth of the first."""
    folder, found = tmp_path_factory.mktemp("runs") / "two", iter([0.4, 0.5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "validate", lambda self: next(found))
        assert train.main(tiny(folder, "train_cfg.save_period=1", "train_cfg.sample_period=0")) == 0
    assert [checkpoint.load(folder / name)["step"] for name in ("best.pth", "epoch_1.pth", "epoch_2.pth")] == [4, 4, 8]
    return folder


@pytest.mark.parametrize("best", ["earlier", "later", "broken"])
@pytest.mark.parametrize("place", ["the same folder", "another folder"])
def test_a_run_that_goes_on_from_an_earlier_checkpoint_has_no_best_of_later(best, place, two_epochs, tmp_path, monkeypatch):
    """And one of before it keeps; whatever best.pth is, the run goes on."""
    old = shutil.copytree(two_epochs, tmp_path / "old")
    folder = old if place == "the same folder" else tmp_path / "new"
    if best == "later":
        shutil.copy(old / "epoch_2.pth", old / "best.pth")
    elif best == "broken":
        (old / "best.pth").write_bytes(b"broken")
    before = (old / "best.pth").read_bytes()
    stop_at(monkeypatch, "train_step", 1)
    more = ("train_cfg.save_period=1", "train_cfg.sample_period=0")
    assert train.main(tiny(folder, *more, flags=("--resume", str(old / "epoch_1.pth")))) == 128 + signal.SIGTERM
    assert checkpoint.load(folder / "last.pth")["step"] == 5
    if best == "earlier":
        assert (folder / "best.pth").read_bytes() == before
    elif best == "later":
        assert not (folder / "best.pth").exists()
    kept = {path.name for path in folder.glob("*_step_*")}  # of what was done after that, nothing is lost
    in_place = place == "the same folder"
    assert kept == {"last_step_8.pth", *(["best_step_8.pth"] if best == "later" else [])} if in_place else not kept
    assert not in_place or checkpoint.load(folder / "last_step_8.pth")["step"] == 8


def test_max_steps_ends_inside_an_epoch_and_more_of_them_go_on_as_if_there_had_been_no_end(tmp_path, run):
    """Eight steps in two epochs of four: ended at six, then resumed without an end."""
    more = ("train_cfg.lr_schedule=constant", "train_cfg.sample_period=0")
    assert train.main(tiny(tmp_path / "whole", *more)) == 0
    assert train.main(tiny(tmp_path / "a", *more, "train_cfg.max_steps=6")) == 0
    assert [line["step"] for line in metrics(tmp_path / "a")] == [3, 4, 6]
    assert [line["valid_loss"] is None for line in metrics(tmp_path / "a")] == [True, False, False]
    assert train.main(tiny(tmp_path / "a", *more, flags=("--resume",))) == 0
    assert [line["step"] for line in metrics(tmp_path / "a")] == [3, 4, 6, 8]
    assert losses(tmp_path / "a")[-1][3] == losses(tmp_path / "whole")[-1][3]
    states = [checkpoint.load(tmp_path / name / "last.pth") for name in ("whole", "a")]
    for part in ("model", "ema", "optimizer"):
        assert_same_state(states[0][part], states[1][part], part)


def test_the_learning_rate_falls_to_zero_at_max_steps(tmp_path):
    assert train.main(tiny(tmp_path / "a", "train_cfg.lr_schedule=linear", "train_cfg.max_steps=5", "train_cfg.warmup_steps=0",
                           "train_cfg.lr=0.001", "train_cfg.record_period=1")) == 0  # fmt: skip
    assert [line["lr"] for line in metrics(tmp_path / "a")] == pytest.approx([0.0008, 0.0006, 0.0004, 0.0002, 0])


@pytest.mark.parametrize("size", [150, 1000])
def test_a_checkpoint_cut_short_is_named_with_the_newest_good_one(tmp_path, size, capsys, run):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "best.pth").write_bytes((run / "best.pth").read_bytes())
    (folder / "last.pth").write_bytes((run / "last.pth").read_bytes()[:-size])
    assert train.main(tiny(folder, flags=("--resume",))) == 2
    message = capsys.readouterr().err
    assert f"{folder}/last.pth: cut short" in message
    assert f"--resume {folder}/best.pth" in message


def test_a_changed_byte_is_seen(run, tmp_path):
    whole = (run / "last.pth").read_bytes()
    weights = checkpoint.load(run / "last.pth")["model"]["time_aware_net.time_embedding.mlp.0.weight"].numpy().tobytes()
    at = whole.index(weights) + len(weights) // 2
    (tmp_path / "a.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"a\.pth: cut short, damaged"):
        checkpoint.load(tmp_path / "a.pth")


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("hostile"),))


def test_a_checkpoint_that_would_run_code_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "version": 1, "config": Hostile()}, "a.pth")
    Path("b.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(ValueError, match=name):
            checkpoint.load(name)
    assert not Path("hostile").exists()


def test_a_checkpoint_of_something_else_or_of_a_bad_config_is_refused(run, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not a checkpoint of this library"):
        checkpoint.load_diffusion(tmp_path / "other.pth")
    state = checkpoint.load(run / "last.pth")
    state["config"]["time_aware_net"]["kwargs"]["dropout"] = "much"
    checkpoint.save(tmp_path / "bad.pth", state)
    with pytest.raises(ValueError, match=r"bad\.pth: time_aware_net\.kwargs\.dropout"):
        checkpoint.load_diffusion(tmp_path / "bad.pth")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half of it", None])
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["time_aware_net.kwargs.n_channels=3"], ["time_aware_net", "dataset.train", "n_channels = 3"]),
        (
            ["time_aware_net.kwargs.ch_mult=[1,1,1,1,1]", "time_aware_net.kwargs.attention=[false,false,false,false,false]"],
            ["16"],
        ),
        (["train_cfg.batch_size=511", "train_cfg.grad_accum=2"], ["train_cfg.batch_size", "511", "multiple of 2"]),
        (["train_cfg.precision=fp16"], ["train_cfg.precision", "CUDA"]),
        (["schedule.name=LinearSchedule", "schedule.kwargs={}", "train_cfg.epochs=0"], ["train_cfg.epochs"]),
    ],
)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(more, words, tmp_path, capsys):
    assert train.main(tiny(tmp_path / "a", *more)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("train.py: ")
    assert all(word in message for word in words), message
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("device", "words"), [("cuda", "CUDA is not available"), ("gpu", "no such kind")])
def test_a_device_that_is_not_there(device, words, tmp_path, capsys, run):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    for script, argv in (
        (train, [*tiny(tmp_path / "a"), "--device", device]),
        (sampling, [str(run / "last.pth"), "--device", device]),
    ):
        argv = argv if script is sampling else [*argv[:1], "--device", device, *argv[3:-2]]
        assert script.main(argv) == 2
        assert words in capsys.readouterr().err


def test_one_card_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(Mistake, match=r"--device cuda:0: would put all 2 processes on one card; give --device cuda"):
        Ranks("cuda:0")


def test_compiling_without_a_compiler(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for main, argv, option in (
        (train.main, tiny(tmp_path / "a", "train_cfg.compile=true"), "train.py: train_cfg.compile: cannot compile here"),
        (sampling.main, [str(run / "last.pth"), "--device", "cpu", "--compile"], "test.py: --compile: cannot compile here"),
    ):
        torch._dynamo.reset()
        assert main(argv) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(option)
        assert "compiler" in message.removeprefix(option)
    assert not (tmp_path / "a").exists()


def test_an_unreadable_image_stops_the_run_by_name(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), i).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no")
    section = json.dumps({"root": str(tmp_path / "images"), "mode": "L"})
    folder = ["dataset.name=ImageFolder", f"dataset.train={section}", f"dataset.valid={section}"]
    assert train.main(tiny(tmp_path / "a", *folder)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"train.py: {tmp_path}/images/broken.png: cannot be read")
    skipping = [*folder, "dataset.train.skip_unreadable=true", "dataset.valid.skip_unreadable=true"]
    with pytest.warns(UserWarning, match=r"broken\.png"):
        assert train.main(tiny(tmp_path / "a", *skipping)) == 0  # a set smaller than a batch


def test_a_loss_of_zero_is_said_to_be_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(GaussianDiffusion, "forward", lambda self, *_, **__: 0 * sum(p.sum() for p in self.parameters()))
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1", "train_cfg.sample_period=0")) == 0
    assert [line["train_loss"] for line in metrics(tmp_path / "a")] == [0, 0]
    said = re.findall(r"step \d, epoch 1: (loss [^,]*),", (tmp_path / "a" / "train.log").read_text())
    assert said == ["loss 0", "loss 0"]


def test_a_record_has_null_for_what_is_no_number(tmp_path):
    RunFolder(str(tmp_path), writes=True).add_record({"step": 3, "metrics": {"mine": [math.nan, 1.5, -math.inf]}})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 3, "metrics": {"mine": [null, 1.5, null]}}\n'


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch, capsys):
    assert train.main(tiny(tmp_path / "a", "train_cfg.epochs=1", "train_cfg.lr_schedule=constant")) == 0
    good = (tmp_path / "a" / "last.pth").read_bytes()
    monkeypatch.setattr(
        GaussianDiffusion, "forward", lambda self, x0, *_, **__: sum(p.sum() for p in self.parameters()) * torch.nan
    )
    more = ["train_cfg.epochs=3", "train_cfg.max_bad_steps=2", "train_cfg.lr_schedule=constant"]
    assert train.main(tiny(tmp_path / "a", *more, flags=("--resume",))) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 6" in message
    assert f"{tmp_path}/a/last.pth" in message
    assert (tmp_path / "a" / "last.pth").read_bytes() == good


def test_a_run_too_short_for_so_many_bad_steps_is_stopped_if_it_has_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        GaussianDiffusion, "forward", lambda self, x0, *_, **__: sum(p.sum() for p in self.parameters()) * torch.nan
    )
    assert train.main(tiny(tmp_path / "a", "train_cfg.max_bad_steps=100")) == 2
    assert "not finite in the last 8 steps" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_bad_step_is_skipped_and_counted(optimizer, tmp_path, monkeypatch):
    forward, calls = GaussianDiffusion.forward, []

    def sometimes_nan(self, x0, chunk_size, condition):
        calls.append(1)
        return forward(self, x0, chunk_size, condition) * (torch.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(GaussianDiffusion, "forward", sometimes_nan)
    more = ("diffusion.reverse_variance=learnable", f"train_cfg.optimizer={optimizer}")
    assert train.main(tiny(tmp_path / "a", *more)) == 0
    assert metrics(tmp_path / "a")[-1]["bad_steps"] == 1
    state = checkpoint.load(tmp_path / "a" / "last.pth")
    assert all(weights.isfinite().all() for part in ("model", "ema") for weights in state[part].values())
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {7}


def test_the_prior_is_warned_of_when_it_is_not_pure_noise(tmp_path, caplog):
    train.log.propagate = True
    more = ["schedule.name=LinearSchedule", 'schedule.kwargs={"timesteps": 20}', "train_cfg.epochs=1"]
    assert train.main(tiny(tmp_path / "a", *more)) == 0
    expected = np.prod(1 - np.linspace(1e-4, 0.02, 20))
    assert f"alpha_bar_T = {expected:.3g}" in caplog.text


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_code_within_ten_seconds(number, tmp_path):
    argv = tiny(tmp_path / "a", "train_cfg.epochs=10000")
    process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "a" / "last.pth").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, message = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert "--resume" in message.splitlines()[-1], message
    assert checkpoint.load(tmp_path / "a" / "last.pth")["step"] > 0


# Sampling


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sampling_writes_strips_grid_and_animation_that_the_seed_fixes(run):
    def draw(*flags: str) -> dict[str, bytes]:
        assert sampling.main([str(run / "last.pth"), "--device", "cpu", "-n", "3", *flags]) == 0
        return pictures(run / "last_gen")

    first = draw()
    assert first.keys() == {"0.png", "1.png", "2.png", "strips.png", "grid.png", "trajectory.gif"}
    assert draw() == first
    assert draw("-s", "1")["0.png"] != first["0.png"]
    assert draw("--raw")["0.png"] != first["0.png"]
    assert draw("--sampler", "dpm", "--timesteps", "5")["0.png"] != first["0.png"]


def test_strips_show_the_states_asked_for_enlarged_without_smoothing(run):
    assert sampling.main([str(run / "last.pth"), "--device", "cpu", "-n", "1", "--frames", "4"]) == 0
    strip = np.asarray(Image.open(run / "last_gen" / "0.png"))
    assert strip.shape == (64 + 4, 4 * 66 + 2, 3)
    tile = strip[2:66, 2:66, 0]
    assert (tile == tile[::16, ::16].repeat(16, 0).repeat(16, 1)).all()
    animation = Image.open(run / "last_gen" / "trajectory.gif")
    assert animation.n_frames == 21  # T = 20 steps and x_T


def test_another_size_and_sizes_that_do_not_fit(run, capsys):
    assert sampling.main([str(run / "last.pth"), "12", "16", "--device", "cpu", "-n", "1", "--frames", "2"]) == 0
    assert Image.open(run / "last_gen" / "grid.png").size == (16 * 6, 12 * 6)
    assert sampling.main([str(run / "last.pth"), "9", "16", "--device", "cpu"]) == 2
    assert "multiples of 2" in capsys.readouterr().err
    assert sampling.main([str(run / "last.pth"), "12", "--device", "cpu"]) == 2
    assert "two numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-n", "0"], "-n = 0"),
        (["--timesteps", "21"], "must lie in 1..20"),
        (["--eta", "2", "--sampler", "ddim"], "eta = 2"),
        (["--eta", "0.5"], "only the sampler 'ddim'"),
        (["12", "16", "--metrics", "fd"], "compares with images of 4 x 4, dataset.valid's, where samples have 12 x 16"),
        (["--metrics", "bpd", "--bpd-images", "1"], "needs at least 2 images"),
    ],
)
def test_bad_flags_are_refused(flags, words, run, capsys):
    assert sampling.main([str(run / "last.pth"), "--device", "cpu", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(capsys):
    assert sampling.main(["nowhere.pth", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "test.py: nowhere.pth: no such checkpoint\n"


def test_metrics_are_printed_and_written_with_their_settings_and_the_fitted_variance_is_saved(tmp_path, capsys):
    folder, whole_images = tmp_path / "a", ("dataset.train.pipeline=[]", "dataset.valid.pipeline=[]")
    settings = ("train_cfg.epochs=1", "train_cfg.sample_period=0", "diffusion.bounded=false")
    assert train.main(tiny(folder, *whole_images, *settings)) == 0
    flags = ["-n", "130", "--sampler", "dpm", "--timesteps", "3", "--pictures", "1", "--device", "cpu", "--fit-variance", "4"]
    flags += ["--metrics", "bpd", "fd", "--bpd-images", "6", "--classifier", str(tmp_path / "classifier.pth")]
    assert sampling.main([str(folder / "last.pth"), *flags]) == 0
    results = json.loads((folder / "last_gen" / "metrics.json").read_text())
    bpd, fd = results["bpd"], results["fd"]
    assert bpd["images"] == 6
    assert bpd["prior"] + bpd["kl"] + bpd["reconstruction"] == pytest.approx(bpd["total"], rel=1e-6)
    assert (fd["samples"], fd["real"]) == (130, 180)
    assert fd["distance"] > 0
    assert "classifier of Digits" in fd["features"]
    assert (results["settings"]["sampler"], results["settings"]["step"]) == ("dpm", 4)
    printed = capsys.readouterr().out
    assert f"{bpd['total']:.4f}" in printed
    assert f"{fd['distance']:.4f} of 130 samples" in printed
    fitted, _ = checkpoint.load_diffusion(folder / "last_fitted.pth")
    before, _ = checkpoint.load_diffusion(folder / "last.pth")
    # at t = T, where beta is 0.999, an error of eps as good as untrained (of variance 1) is one of mu of beta^2 / alpha
    assert before.sigma_square[-1] == pytest.approx(0.999)
    assert fitted.sigma_square[-1] == pytest.approx(0.999**2 / 0.001, rel=0.3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-n", "8", "--metrics", "bpd", "fd"], "-n = 8: the Fréchet distance needs at least 129"),
        (["-n", "200", "--metrics", "bpd", "fd", "--classifier", "none.pth"], "[1617, 1, 4, 4]; must be uint8 [N, C, H, W]"),
        (["--metrics", "accuracy"], "--metrics accuracy: this network has no classes"),
        (["--metrics", "bpd", "--bpd-timesteps", "20"], "--bpd-timesteps = 20: must lie in 1..19"),
        (["--metrics", "fid"], "--metrics = \"fid\": unknown; did you mean 'fd'?"),
        (["--sampler", "dpmm"], "--sampler = \"dpmm\": unknown; did you mean 'dpm'?"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_network_call(flags, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GaussianDiffusion, "_net", lambda *_: pytest.fail("the network was called"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert sampling.main([str(run / "last.pth"), "--device", "cpu", *flags]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("test.py: ")
    assert words in message
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


NANS = """
import torch


def nans(predict_x0, x, levels, normal):
    for level in levels[1:]:
        x = torch.where(x > 3, torch.nan, 0 * x)
        x[0, 0, 0, 0] = torch.nan
        yield x
"""


def test_samples_that_are_not_finite_are_one_line_and_no_pictures(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    Path("my_nans.py").write_text(NANS)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    flags = ["-n", "2", "--timesteps", "3", "--sampler", "my_nans.nans", "--no-clip"]
    assert sampling.main([str(run / "last.pth"), "--device", "cpu", *flags]) == 2
    said = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.startswith("test.py")]
    assert said == ["test.py: --sampler my_nans.nans: 1 values of the samples are not finite"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_fitted_variance_does_not_depend_on_what_was_drawn_before(tmp_path):
    """Though the training images are flipped by chance."""
    flip = 'dataset.train.pipeline=[{"name":"RandomHorizontalFlip"}]'
    config = train.load_config(ROOT / "configs" / "Digits_den.json", [*TINY, flip])
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        diffusion = train.build_diffusion(config)
        torch.nn.init.normal_(diffusion.time_aware_net.conv_out.weight)  # of zeros, x_0 would not matter
        torch.manual_seed(seed)
        evaluation, state = Evaluation(diffusion, config, Ranks("cpu"), n=1), {"config": config, "shape": [1, 8, 8]}
        sampling.fit_variance(evaluation, state, 6, tmp_path / "fitted.pth")
        found.append(checkpoint.load(tmp_path / "fitted.pth")["ema"])
    assert_same_state(*found)


def test_what_was_measured_is_kept_when_the_next_metric_fails(run, monkeypatch):
    class Failing:
        uses_model, describe = False, str

        def __init__(self, evaluation):
            pass

        def measure(self):
            raise RuntimeError("a bug")

    monkeypatch.setitem(METRICS, "failing", Failing)
    flags = ["-n", "2", "--timesteps", "2", "--bpd-images", "4", "--metrics", "bpd", "failing"]
    with pytest.raises(RuntimeError, match="a bug"):
        sampling.main([str(run / "last.pth"), "--device", "cpu", *flags])
    assert json.loads((run / "last_gen" / "metrics.json").read_text())["bpd"]["images"] == 4
    assert (run / "last_gen" / "grid.png").exists()


# Ranks


def test_ranks_share_an_epoch_without_overlap():
    config = train.load_config(*[tiny(Path("a"))[0]], TINY)
    config["train_cfg"].update(batch_size=99)
    cfg = train.build_train_config(config | {"train_cfg": config["train_cfg"]})
    parts = []
    for rank in range(3):
        ranks = Ranks("cpu")
        ranks.world, ranks.rank = 3, rank
        parts.append([i for batch in Batches(Digits(), cfg, ranks, shuffle=True).indices(0) for i in batch.tolist()])
    assert len(parts[0]) == len(parts[1]) == len(parts[2]) == 539
    assert sorted(sum(parts, [])) == list(range(1617))  # noqa: RUF017


def test_two_ranks_train_and_sample_and_resume_like_one(tmp_path, run_ranks):
    torchrun("train.py", *tiny(tmp_path / "two"))
    assert train.main(tiny(tmp_path / "one")) == 0
    one, two = metrics(tmp_path / "one")[-1], metrics(tmp_path / "two")[-1]
    assert two["step"] == one["step"]
    assert two["valid_loss"] == pytest.approx(one["valid_loss"], rel=0.2)  # other draws of t and eps
    run_ranks("train", tiny(tmp_path / "two", flags=("--resume",)))
    sampled = [str(tmp_path / "two" / "last.pth"), "-n", "5", "--batch-size", "2", "--device", "cpu"]
    run_ranks("test", sampled)
    shared = pictures(tmp_path / "two" / "last_gen")
    assert sampling.main(sampled) == 0
    assert pictures(tmp_path / "two" / "last_gen") == shared


GIVEN = """
from gaussian_diffusion import GaussianDiffusion


class Given(GaussianDiffusion):
    \"\"\"Its loss is that at t and eps that are functions of the image alone.\"\"\"

    def forward(self, x0, chunk_size=None, condition=None):
        t = 1 + (1000 * x0.flatten(1).sum(1).abs()).long() % self.T
        return self.loss(x0, t, (100 * x0.flatten(1).cumsum(1)).sin().view_as(x0)).mean()
"""


@pytest.mark.parametrize("accum", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_ranks_have_the_gradient_of_one_on_given_t_and_eps(accum, work, start, run_ranks):
    (work / "my_given.py").write_text(GIVEN)
    given = ("diffusion.name=my_given.Given", "train_cfg.max_steps=1", "time_aware_net.kwargs.dropout=0")
    start("train", tiny(work / "one", *given)).end().assert_ended(0)
    run_ranks("train", tiny(work / "two", *given, f"train_cfg.grad_accum={accum}"))
    gradients = []
    for name in ("one", "two"):
        moments = torch.load(work / name / "last.pth", weights_only=True)["optimizer"]["state"]
        gradients.append(10 * torch.cat([moment["exp_avg"].flatten() for moment in moments.values()]))  # a tenth, after a step
    one, two = gradients
    assert one.norm() > 0.1
    assert (two - one).norm() < 1e-5 * one.norm()


def test_the_precision_that_was_used_is_written(tmp_path):
    assert train.main(tiny(tmp_path / "a", "train_cfg.max_steps=1")) == 0
    command = [str(tmp_path / "a" / "last.pth"), "--device", "cpu", "--timesteps", "2", "--bpd-images", "4", "--metrics", "bpd"]
    assert sampling.main([*command, "--precision", "auto"]) == 0
    assert json.loads((tmp_path / "a" / "last_gen" / "metrics.json").read_text())["settings"]["precision"] in ("fp32", "bf16")


def test_a_restart_by_torchrun_does_not_overwrite_its_own_run(tmp_path, monkeypatch, capsys):
    assert train.main(tiny(tmp_path / "a", "train_cfg.max_steps=1")) == 0
    before = (tmp_path / "a" / "last.pth").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main(tiny(tmp_path / "a", "train_cfg.max_steps=2", flags=("--overwrite",))) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert (tmp_path / "a" / "last.pth").read_bytes() == before


def test_a_world_without_a_rank_is_another_ones(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    ranks = Ranks("cpu")
    assert (ranks.world, ranks.rank) == (1, 0)
