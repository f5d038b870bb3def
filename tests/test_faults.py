"""Faults: the trainer killed, starved, lied to and misled, and what is left on the disk afterwards."""

import contextlib
import errno
import fcntl
import functools
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import ENDLESS, KEEN, PATIENCE, RESUME, files, image_folder, run_argv
from runs import ROOT, assert_same_state, losses, tiny

import checkpoint
import image_files
import train
from config import load_config
from files import whole_file
from mistakes import Mistake
from training import run_folder
from training.ranks import Ranks
from training.run_folder import RunFolder
from training.signals import Stopper


def assert_whole(folder: Path) -> None:
    """Every checkpoint there is can be read."""
    for path in folder.glob("*.pth"):
        checkpoint.load(path)


def assert_same_run(folder: Path, whole: Path) -> None:
    """Files, records and every checkpoint are those of the run without faults."""
    assert losses(folder) == losses(whole)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    for name in sorted(name for name in names if name.endswith(".pth")):
        assert_same_state(checkpoint.load(whole / name), checkpoint.load(folder / name), name)


# Kills and signals


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_five_times_at_random_and_resumed_is_the_run_without_faults(seed, start, work, whole):
    rng, codes = random.Random(seed), []
    for _ in range(5):
        codes.append(start("train", RESUME, signal_after=(rng.uniform(0, 0.2) * whole.seconds, signal.SIGKILL)).end().code)
        assert_whole(work / "run")
    assert set(codes) <= {-signal.SIGPROF, 0}
    assert codes.count(-signal.SIGPROF) >= 3
    start("train", RESUME).end().assert_ended(0)
    assert_same_run(work / "run", whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 4, 6])
def test_a_run_killed_at_its_file_operations_and_resumed_is_the_run_without_faults(first, start, work, whole):
    """One after the other, each resumption is killed at another one: among them between any two files of an epoch's end."""
    codes = []
    for kill_at in range(first, 40, 6):
        codes.append(start("train", RESUME, kill_at=kill_at).end().code)
        assert_whole(work / "run")
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert codes.count(-signal.SIGKILL) >= 3
    start("train", RESUME).end().assert_ended(0)
    assert_same_run(work / "run", whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_signalled_at_random_and_resumed_is_the_run_without_faults(number, start, work, whole):
    rng, codes = random.Random(number), []
    for _ in range(5):
        outcome = start("train", RESUME, signal_after=(rng.uniform(0, 0.2) * whole.seconds, number)).end()
        codes.append(outcome.code)
        if outcome.code:
            outcome.assert_ended(128 + number, "stopped")
        assert_whole(work / "run")
    assert codes.count(128 + number) >= 3
    start("train", RESUME).end().assert_ended(0)
    assert_same_run(work / "run", whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["train_step", "validate", "save_picture", "save_last"])
def test_a_second_signal_stops_at_once_with_the_files_whole(place, start, work, whole):
    outcome = start("train", run_argv(), signals_at=place).end()
    assert outcome.code == -signal.SIGTERM
    assert "stopped" not in outcome.output
    assert_whole(work / "run")
    start("train", RESUME).end().assert_ended(0)
    assert_same_run(work / "run", whole.folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_images_are_decoded_is_heeded_there(number, tmp_path, work, monkeypatch, capsys):
    settings = image_folder(tmp_path / "images", 600)
    read, calls = image_files._read_image, []

    def signalling(path):
        calls.append(path)
        if len(calls) == 10:
            os.kill(os.getpid(), number)
        return read(path)

    monkeypatch.setattr(image_files, "_read_image", signalling)
    assert train.main(run_argv(*settings)) == 128 + number
    assert len(calls) < 300
    message = capsys.readouterr().err.rsplit("\r", 1)[-1].strip()
    assert message == f"stopped before the first step by {number.name}; nothing was written"
    assert not (work / "run").exists()


def test_a_run_saves_before_its_first_step_so_that_resume_always_finds_last_pth(work, monkeypatch):
    """Otherwise a kill between the first best.pth and the first last.pth leaves what --resume refuses."""

    def crash(*_):
        raise KeyError

    monkeypatch.setattr(train.Trainer, "train_step", crash)
    with pytest.raises(KeyError):
        train.main(run_argv())
    assert checkpoint.load("run/last.pth")["step"] == 0


# Ranks


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_ranks_stopped_at_random_and_resumed_are_the_run_without_faults(number, start_ranks, work, tmp_path):
    begin = time.monotonic()
    assert [rank.end().code for rank in start_ranks("train", run_argv())] == [0, 0]
    seconds = time.monotonic() - begin
    (work / "run").rename(tmp_path / "whole")
    rng, stopped = random.Random(number), 0
    for _ in range(3):
        ranks = start_ranks("train", RESUME)
        ranks[0].wait_for_output("steps on")
        time.sleep(rng.uniform(0, 0.1 * seconds))
        for rank in ranks if number == signal.SIGKILL else ranks[1:]:  # one rank's word is enough to stop
            rank.send(number)
        codes = {rank.end().code for rank in ranks}
        before_its_loop = {-number, 1}  # the rank was still being set up: it ends at once, and takes the other one with it
        assert codes <= {-signal.SIGKILL if number == signal.SIGKILL else 128 + number, 0} or codes == before_its_loop
        stopped += codes != {0}
        assert_whole(work / "run")
    assert stopped
    assert [rank.end().code for rank in start_ranks("train", RESUME)] == [0, 0]
    assert_same_run(work / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGHUP,
        *(pytest.param(getattr(signal, name), marks=pytest.mark.slow) for name in ("SIGINT", "SIGTERM", "SIGUSR1")),
    ],
)
def test_a_signal_to_the_workers_too_and_a_console_that_is_gone_lose_nothing(number, tmp_path):
    """As of a cluster, of timeout, or of Ctrl-C where `tee` ends as well; images are decoded by worker processes."""
    crop = 'dataset.train.pipeline=[{"name": "RandomCrop", "size": 4}]'
    argv = tiny(tmp_path / "run", crop, "train_cfg.save_minutes=60", "train_cfg.sample_period=0", ENDLESS)
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    heed = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, preexec_fn=heed, **how)
    try:
        for line in iter(process.stdout.readline, b""):
            if b"step 9," in line:
                break
        if number != signal.SIGTERM:
            process.stdout.close()
        os.killpg(process.pid, number)
        left = b"" if process.stdout.closed else process.stdout.read()
        assert process.wait(PATIENCE) == 128 + number, left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    said = (tmp_path / "run" / "train.log").read_text()
    step = checkpoint.load(tmp_path / "run" / "last.pth")["step"]
    assert step >= 9
    assert f"stopped at step {step} by {number.name}" in said
    assert not re.search(rb"Traceback|Exception ignored|terminate called", left), left


def test_a_bug_ends_a_run_also_where_workers_decode_its_images(tmp_path):
    """At once: its workers, which would live on for longer than the test waits, are ended by it."""
    crop = 'dataset.train.pipeline=[{"name": "RandomCrop", "size": 4}]'
    bug = (
        f"import train; from training import batches; batches.GRACE = {10 * PATIENCE}; "
        f"train.Trainer._after_step = lambda self, bar: 1 / 0; train.main({tiny(tmp_path / 'run', crop)})"
    )
    done = subprocess.run([sys.executable, "-c", bug], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ZeroDivisionError: division by zero")


def test_under_nohup_a_closed_terminal_is_not_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper(Ranks("cpu")) as stopper:
            signal.raise_signal(signal.SIGHUP)
            stopper.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_another_process_finished_meanwhile_is_not_deleted(tmp_path):
    late = train.Trainer(load_config(str(ROOT / "configs" / "Digits_den.json"), tiny(tmp_path / "run")[4:]), "cpu")
    assert train.main(tiny(tmp_path / "run")) == 0
    before = files(tmp_path / "run")
    with pytest.raises(Mistake, match="run holds a run already: add --resume"):
        late.run()
    late.folder.close()
    assert files(tmp_path / "run") == before


def torchrun(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    with open(folder / "stderr", "ab") as output:
        return subprocess.Popen(
            [*command, *tiny(folder / "run", *KEEN, ENDLESS)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that a torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a rank killed", "torchrun terminated", "Ctrl-C in its terminal"])
def test_torchrun_ends_in_time_with_the_files_whole(how, tmp_path):
    process = torchrun(tmp_path)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "run" / "best.pth").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "stderr").read_text()  # noqa: PT018
            time.sleep(0.05)
        pids = ranks_of(process)
        assert len(pids) == 2
        if how == "a rank killed":
            os.kill(pids[1], signal.SIGKILL)
        elif how == "torchrun terminated":
            process.terminate()
        else:
            for pid in (process.pid, *pids):  # a terminal signals all of the group
                os.kill(pid, signal.SIGINT)
        process.wait(PATIENCE)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert_whole(tmp_path / "run")
        if how != "a rank killed":  # it says that it saved, and did
            said = re.findall(r"stopped at step (\d+)", (tmp_path / "stderr").read_text())
            assert set(said) == {str(checkpoint.load(tmp_path / "run" / "last.pth")["step"])}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Files cut, altered and half written


def test_a_checkpoint_cut_at_any_kilobyte_is_refused_by_name(whole, work):
    path = Path(shutil.copy(whole.folder / "last.pth", "cut.pth"))
    for size in reversed(range(0, path.stat().st_size, 1024)):
        os.truncate(path, size)
        with pytest.raises(ValueError, match=r"^cut\.pth: cut short, damaged.*$"):
            checkpoint.load(path)


@pytest.mark.slow
def test_a_changed_bit_is_refused_by_name_or_changes_nothing(whole, state, work):
    data = (whole.folder / "last.pth").read_bytes()
    rng, path, refused = random.Random(0), Path("altered.pth"), 0
    directory = data.rindex(b"PK\x05\x06") - 10_000  # the archive's table of contents, where a flip does most
    for at in [rng.randrange(len(data)) for _ in range(150)] + [rng.randrange(directory, len(data)) for _ in range(150)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            altered = checkpoint.load(path)
        except ValueError as error:
            assert re.fullmatch(r"altered\.pth: .*", str(error))  # noqa: PT017
            refused += 1
        else:
            assert_same_state(altered, state)
    assert refused > 150


def test_a_half_written_last_line_of_metrics_is_cut_off_on_resume(work, whole):
    run = Path(shutil.copytree(whole.folder, "run"))
    before = losses(run)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9, "epo')
    assert train.main(RESUME) == 0
    assert losses(run) == before


# Disks and folders


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """disk(size): a folder with a file system of that size; called again, it resizes it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        options = f"size={size}" + (",remount" if os.path.ismount(folder) else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.004, 0.15, 0.6, 0.95])
def test_a_full_disk_stops_the_run_and_spares_its_files_and_with_room_it_goes_on(share, start, disk, whole):
    """On a disk that holds so much of what the whole run leaves."""
    needed = sum(path.stat().st_size for path in whole.folder.iterdir())
    folder = disk(f"{math.ceil(share * needed / 4096) * 4}k")
    start("train", run_argv(), folder=folder).end().assert_ended(1, "No space left on device")
    assert_whole(folder / "run")
    disk("30m")
    start("train", RESUME, folder=folder).end().assert_ended(0)
    assert_same_run(folder / "run", whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("fill_at", range(2, 37, 7))
def test_a_disk_full_at_any_moment_spares_the_files_and_with_room_the_run_goes_on(fill_at, start, work, whole):
    start("train", run_argv(), fill_at=fill_at).end().assert_ended(1, "File too large")
    assert_whole(work / "run")
    start("train", RESUME).end().assert_ended(0)
    assert_same_run(work / "run", whole.folder)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None])
def test_a_file_that_cannot_be_written_is_named(error, work):
    path = work / "a" if error else work / "nowhere" / "a"
    with pytest.raises(OSError, match=f"{path}'$") as raised, whole_file(path):
        raise error
    assert raised.value.errno == (errno.ENOSPC if error else errno.ENOENT)
    assert list(work.iterdir()) == []


def test_a_folder_that_cannot_be_synced_is_no_error(work, monkeypatch):
    """As on some network file systems; the file itself has been."""
    sync, synced = os.fsync, []

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append(handle)
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with whole_file(work / "a") as file:
        file.write(b"all")
    assert (work / "a").read_bytes() == b"all"
    assert len(synced) == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["read-only", "vanished"])
def test_a_folder_that_turns_read_only_or_vanishes_stops_the_run_and_spares_its_files(what, start, work, tmp_path):
    folder = work / "run"
    child = start("train", run_argv(ENDLESS), unprivileged=True)
    child.wait_for((folder / "best.pth").exists)
    if what == "read-only":
        folder.chmod(0o555)
        child.end().assert_ended(1, "Permission denied", "run/")
        folder.chmod(0o755)
    else:
        folder = folder.rename(tmp_path / "moved")
        child.end().assert_ended(1, "No such file or directory", "run/")
        assert not (work / "run").exists()
    assert_whole(folder)
    assert checkpoint.load(folder / "last.pth")["step"] > 0


@pytest.mark.parametrize("script", ["train", "test"])
def test_a_folder_that_is_read_only_from_the_start_is_one_line(script, start, work, whole):
    (work / "run").mkdir()
    shutil.copy(whole.folder / "last.pth", "run")
    (work / "run").chmod(0o555)
    argv = RESUME if script == "train" else ["run/last.pth", "--device", "cpu", "-n", "1000000"]
    start(script, argv, unprivileged=True).end().assert_ended(1, f"{script}.py: ", "Permission denied", "run")
    assert [path.name for path in (work / "run").iterdir()] == ["last.pth"]


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_second_process_in_a_folder_is_refused_before_it_changes_anything(flag, start, work, whole):
    shutil.copytree(whole.folder, "run")
    before = files(work)
    handle = os.open("run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        start("train", run_argv(flags=(flag,))).end().assert_ended(2, "train.py: run: another process trains there")
        assert files(work) == before
    finally:
        os.close(handle)


def test_a_run_locks_its_folder_and_lets_go_at_its_end(work, monkeypatch, capsys):
    handles = []

    def try_lock(*_):
        handles.append(os.open("run", os.O_RDONLY))
        fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(train.Trainer, "train_step", try_lock)
    assert train.main(run_argv()) == 1
    assert os.strerror(errno.EAGAIN) in capsys.readouterr().err.splitlines()[-1]
    try_lock()
    for handle in handles:
        os.close(handle)


def test_a_worker_process_does_not_hold_the_lock(work):
    """Else --resume right after a kill would be refused until the workers notice."""
    folder = RunFolder(str(work), writes=True)
    folder.lock()
    pid = os.fork()
    if not pid:
        os._exit(len(run_folder._locked))
    assert os.waitpid(pid, 0)[1] == 0
    folder.close()
    assert run_folder._locked == {}


def test_a_file_system_without_locks_is_warned_of(work, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    train.log.propagate = True
    folder = RunFolder(str(work), writes=True)
    folder.lock()
    folder.close()
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_second_trainer_of_this_process_leaves_the_first_one_its_lock(work):
    first, second = RunFolder(str(work), writes=True), RunFolder(str(work), writes=True)
    first.lock()
    second.lock()
    second.close()
    taken = os.open(work, os.O_RDONLY)  # as another process would
    with pytest.raises(BlockingIOError):
        fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.close()
    fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(taken)
