import functools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from children import SERVER, Child, Faults, Whole, run_argv
from runs import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
from mistakes import LIBRARY, OWN

torch.set_num_threads(1)  # the tensors of the tests are small: more threads only wait for each other on a shared machine


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def own_files_forgotten() -> Iterator[None]:
    """A process may take up a file of tests once more, with another folder: what it imported from the first is gone then."""
    path, before = [*sys.path], set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in OWN - LIBRARY:
            del sys.modules[name]


@pytest.fixture(scope="session")
def fake_cuda() -> None:
    """Skip where this torch cannot work on CUDA tensors without values unless a driver is there, as torch 2.6 cannot."""
    try:
        with FakeTensorMode():
            torch.zeros(3).to("cuda").addcmul_(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"))
    except RuntimeError as error:
        pytest.skip(f"no fake CUDA tensors here: {error}")


@pytest.fixture(scope="session", autouse=True)
def digits_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", functools.cache(sklearn.datasets.load_digits))
        yield


class Clock:
    """Seconds that pass only as a test says."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """What the functions of `time` give in this test, so that it does not depend on how fast a machine is."""
    clock = Clock()
    for name in ("monotonic", "perf_counter", "process_time"):
        monkeypatch.setattr(time, name, clock)
    return clock


# For the tests of faults


@pytest.fixture(scope="session")
def server() -> None:
    """The fork server, with the scripts imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        SERVER.set_forkserver_preload(["children"])
        forkserver.ensure_running()


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty folder, which is the current one."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def start(work, server) -> Iterator[Callable[..., Child]]:
    """start(script, argv, faults...) in the folder work, or another."""
    children = []

    def start(script: str, argv: list[str], folder: Path = work, **faults) -> Child:
        children.append(Child(script, [str(arg) for arg in argv], folder, Faults(**faults)))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.join()


@pytest.fixture
def start_ranks(start) -> Callable[..., list[Child]]:
    """start_ranks(script, argv, count) as torchrun starts them, without the seconds that its processes take to import torch."""

    def start_ranks(script: str, argv: list[str], count: int = 2) -> list[Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = (("WORLD_SIZE", str(count)), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port))
        own = [(("RANK", str(i)), ("LOCAL_RANK", str(i))) for i in range(count)]
        return [start(script, argv, environment=(*common, *each)) for each in own]

    return start_ranks


@pytest.fixture
def run_ranks(start_ranks) -> Callable[..., None]:
    """run_ranks(script, argv, count) until all have ended well."""

    def run_ranks(script: str, argv: list[str], count: int = 2) -> None:
        for rank in start_ranks(script, argv, count):
            rank.end().assert_ended(0)

    return run_ranks


@pytest.fixture(scope="session")
def whole(tmp_path_factory, server) -> Whole:
    """The run without faults."""
    work = tmp_path_factory.mktemp("whole") / "work"
    work.mkdir()
    child = Child("train", run_argv(), work, Faults())
    child.end().assert_ended(0)
    return Whole(work / "run", float(Path(f"{child.output}.seconds").read_text()))


@pytest.fixture(scope="session")
def state(whole) -> dict:
    return checkpoint.load(whole.folder / "last.pth")
