"""How the network runs on this machine: its precision, TF32, compiling. What is "auto" is decided here, once a run.

Only the network runs low: the mathematics and the weights are float32 always.
"""

import contextlib
import ctypes
import logging
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import build_train_config
from dataset import ImageDataset
from diffusion_process import CHUNK_ROWS
from gaussian_diffusion import GaussianDiffusion
from guidance import hide, null_of
from mistakes import Mistake, one_line
from time_aware_module import TimeAwareMLP, TimeAwareUNet
from training.optimizers import OPTIMIZERS
from training.ranks import Ranks, buffers_kept

log = logging.getLogger("train")
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what the network runs in
PROBE_ROWS = 16  # images in a step of the probe on a CPU; on CUDA it is a whole step's, which decide what takes the time
PROBE_TURNS = 8
PROBE_SECONDS = 3.0  # after which it takes no further turn
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_MEMORY, LARGE_TENSOR = 2**30, 2**25  # bytes; of the latter no more, which some versions of glibc refuse
FEW_ROWS = 2  # images whose pass takes what launching takes
HOST_BOUND = 0.6  # of a pass's time: from there on, with the optimizer's launches, the device waits for the host
COMPILE_PAYS = 1800.0  # seconds of training from which on minutes of compiling are worth their tenth or more of each step


def device_name(device: torch.device) -> str:
    """The card, or the processor and the threads that torch has of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Let the network, and nothing else, run in the precision."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def set_flags(precision: str, deterministic: bool = False) -> None:
    """Switches of the whole process: TF32 unless float32 is asked for; the fastest kernels, or repeatable ones; kept memory."""
    _keep_memory()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _keep_memory() -> None:
    """Let glibc keep up to KEPT_MEMORY that tensors of less than LARGE_TENSOR have freed, at the end of its heap, for the next.

    Else it gives the pages back to the system, and to get them again took a tenth of training and a quarter of sampling.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt and mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR):  # from now on glibc adapts neither
        mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)


def channels_last(model: torch.nn.Module) -> None:
    """Order the weights of its convolutions of images by channel last, in place, as the fastest kernels want them.

    model.to(memory_format=torch.channels_last) would refuse a network of one's own with convolutions of volumes.
    """
    for p in (*model.parameters(), *model.buffers()):
        if p.ndim == 4:
            p.data = p.data.to(memory_format=torch.channels_last)


def prepare(run, deterministic: bool) -> bool:
    """Set torch and the networks of a Trainer up, and put what was "auto" into its config.

    Is a step to be recorded as a CUDA graph? Each machine decides that anew.
    """
    cfg, net, device = run.cfg, run.model.time_aware_net, run.device
    rows, calls = _network_calls(run)
    x0 = run.model.x0_of(torch.rand(rows if device.type == "cuda" else min(PROBE_ROWS, rows), *run.shape, device=device))
    step, few = (probe_step(run.model, x0[:count], run.train_data.example(len(x0[:count]))) for count in (len(x0), FEW_ROWS))
    set_flags("bf16", deterministic)  # as for all but fp32, while it is being chosen
    with buffers_kept(run.model):
        precision = choose_precision(cfg.precision, step, run.ranks, "train_cfg.precision")
        set_flags(precision, deterministic)
        net.activation_checkpointing = cfg.activation_checkpointing
        recording = choose_cuda_graph(cfg.cuda_graph, few, step, precision, run)
        compiling = choose_compile(cfg.compile, step, precision, run.total_steps * calls, run.ranks)
    if compiling:
        check_compiler(device, "train_cfg.compile")
        compile_for(net, rows)
        run.ema.time_aware_net.compile()
    run.config["train_cfg"] |= {"precision": precision, "compile": compiling}  # which a resume keeps
    run.cfg = build_train_config(run.config)
    return recording


def loss_of_two(run, model: nn.Module) -> Tensor:
    """The loss of two grey images by the model of a Trainer, or by what is wrapped around it."""
    x0, condition = torch.zeros(2, *run.shape, device=run.device), run.train_data.example(2)
    hidden = torch.tensor([run.cfg.label_dropout > 0, False], device=run.device)  # as in a step: all parameters take part
    condition = hide(condition, null_of(run.model.time_aware_net), hidden)
    with autocast(run.device, run.cfg.precision):
        return model(run.model.x0_of(x0), run.cfg.chunk_size, condition=condition)


def _network_calls(run) -> tuple[int, int]:
    """Rows of a network call of training, and how many calls a step has."""
    batch, calls = min(run.cfg.batch_size, len(run.train_data.numbers)), run.cfg.grad_accum
    rows = math.ceil(batch // run.ranks.world / calls)
    if getattr(run.model, "loss_mode", None) != "full":
        return rows, calls
    times = min(run.cfg.chunk_size or max(1, CHUNK_ROWS // rows), run.model.T)  # of each image in a call
    return rows * times, calls * math.ceil(run.model.T / times)


# Precision


def choose_precision(asked: str, step: Callable[[str], object], ranks: Ranks, key: str) -> str:
    """What was asked for by name, or for "auto":

    bf16 on CUDA where the card has it in hardware, and on a CPU where its instructions exist and step(precision), timed in
    turns, is faster in it; else fp32. The choice is logged; bf16 by name on a CPU where it is slower is a warning.
    """
    device = ranks.device
    if asked == "fp16" and device.type != "cuda":
        raise Mistake(f"{key} = 'fp16': needs CUDA; bf16 and fp32 run on a CPU")
    if device.type == "cuda":
        if asked == "auto":
            has = torch.cuda.is_bf16_supported(including_emulation=False)
            return _logged(key, "bf16" if has else "fp32", f"this card has {'' if has else 'no '}bfloat16")
        return asked
    if asked == "auto" and not has_bfloat16(device):
        return _logged(key, "fp32", f"this {device.type} has no instructions for bfloat16")
    if asked not in ("auto", "bf16"):
        return asked
    factor = ranks.largest(_slowdown(step))
    words = f"a step takes {factor:.2f} times as long in bf16 as in fp32 here"
    if asked == "auto":
        return _logged(key, "bf16" if factor < 1 else "fp32", words)
    if factor > 1:
        log.warning(f"{key} = bf16: {words}")
    return asked


def _logged(key: str, choice: object, why: str) -> Any:
    log.info(f"{key} = auto: {choice}, since {why}")
    return choice


def has_bfloat16(device: torch.device) -> bool:
    """Does a CPU have instructions for products of bfloat16 (AVX512-BF16 or AMX of x86, those of Arm)?"""
    if device.type != "cpu":
        return False
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None), getattr(torch.cpu, "_is_amx_tile_supported", None)
    x86 = any(check() for check in supported if check)
    onednn = torch.backends.mkldnn.is_available()  # not on a Mac, where the operator does not exist
    arm = onednn and "AVX" not in torch.backends.cpu.get_cpu_capability() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x86 or arm


def _slowdown(step: Callable[[str], object]) -> float:
    """Seconds of a step in bf16 over those in fp32. They take turns, and the least of each counts, after one to warm up.

    Other work on the machine can only add seconds.
    """
    seconds, begin = {"bf16": [], "fp32": []}, time.perf_counter()
    for turn in range(PROBE_TURNS):
        if turn and time.perf_counter() - begin > PROBE_SECONDS:
            break
        for precision, taken in seconds.items():
            start = time.perf_counter()
            step(precision)
            taken.append(time.perf_counter() - start)
    bf16, fp32 = (min(taken[1:] or taken) for taken in seconds.values())
    return bf16 / fp32


def probe_step(model: nn.Module, x0: Tensor, condition: dict[str, Tensor] | None = None) -> Callable[[str], None]:
    """A step of choose_precision: forward and backward pass of the model's loss, of which no gradient and no draw is left."""

    def step(precision: str) -> None:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            with autocast(x0.device, precision):
                loss = model.loss(x0, _spread(x0, model.T), condition=condition).mean()
            loss.backward()
        model.zero_grad()

    return step


def probe_call(model: nn.Module, x0: Tensor, condition: dict[str, Tensor] | None = None) -> Callable[[str], None]:
    """A step of choose_precision for sampling: one call of the network."""

    @torch.no_grad()
    def step(precision: str) -> None:
        with autocast(x0.device, precision):
            model.predict(x0, _spread(x0, model.T), condition)

    return step


def _spread(x0: Tensor, T: int) -> Tensor:
    """A time for each of x0, from 1 to T."""
    return torch.linspace(1, T, len(x0), device=x0.device).long()


# Launching and compiling


def choose_cuda_graph(
    asked: bool | str, few: Callable[[str], object], step: Callable[[str], object], precision: str, run
) -> bool:
    """What was asked for, or for "auto": on one CUDA device, whether launching its kernels is what takes a step's time.

    That shows where a pass of a few images, few(precision), takes nearly as long as one of a batch, step(precision). Only for
    our own network, diffusion and data's to_float: what Python does in a step is not done again in a replay, and another's may
    matter. Never where something is computed again in the backward pass, for which the state of the random numbers is read.
    """
    again = run.cfg.activation_checkpointing or getattr(run.model, "loss_mode", None) == "full"
    possible = run.device.type == "cuda" and run.ranks.world == 1 and not again and run.cfg.optimizer in OPTIMIZERS
    if asked is True and not possible:
        what = f"{' or '.join(OPTIMIZERS)}, no full loss, no activation_checkpointing"
        log.warning(f"train_cfg.cuda_graph = true: needs one CUDA device, {what}; left out")
    if asked != "auto" or not possible:
        return asked is True and possible
    ours = type(run.model) is GaussianDiffusion and type(run.model.time_aware_net) in (TimeAwareUNet, TimeAwareMLP)
    if not ours or type(run.train_data.images).to_float is not ImageDataset.to_float:
        return _logged("train_cfg.cuda_graph", False, "the network, the diffusion or the data's to_float is not the library's")
    launching, whole = _seconds(few, precision), _seconds(step, precision)
    words = f"a pass takes {1000 * whole:.1f} ms, and {1000 * launching:.1f} ms with {FEW_ROWS} images"
    return _logged("train_cfg.cuda_graph", launching > HOST_BOUND * whole, words)


def choose_compile(asked: bool | str, step: Callable[[str], object], precision: str, passes: int, ranks: Ranks) -> bool:
    """What was asked for, or for "auto": on CUDA, with a compiler, whether so many passes take long enough to pay for it.

    On a CPU the answer is no: there compiling took more than 200 s to save 7 % of a step.
    """
    if asked != "auto":
        return asked
    if ranks.device.type != "cuda":
        return _logged("train_cfg.compile", False, f"compiling for a {ranks.device.type} takes minutes and saves little")
    expected = ranks.largest(passes * _seconds(step, precision))
    words = f"the run would take about {expected / 60:.0f} minutes"
    if expected <= COMPILE_PAYS:
        return _logged("train_cfg.compile", False, words)
    try:
        check_compiler(ranks.device, "train_cfg.compile")  # which takes many seconds
    except Mistake as mistake:
        return _logged("train_cfg.compile", False, str(mistake))
    return _logged("train_cfg.compile", True, words)


def _seconds(step: Callable[[str], object], precision: str) -> float:
    """Seconds of a step on CUDA, until the device is done: the median of three after one."""
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(precision)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def compile_for(net: nn.Module, rows: int, **how: Any) -> None:
    """Compile a network for batches of so many rows; others, as an epoch's short last one, run as they are.

    To compile for any number of rows once more took over a minute with the network of Ho et al. 2020.
    """
    plain = net._call_impl
    compiled = torch.compile(plain, dynamic=False, **how)

    def call(xt: Tensor, *args: Any, **condition: Any) -> Tensor:
        return (compiled if len(xt) == rows else plain)(xt, *args, **condition)

    net._compiled_call_impl = call  # where Module.compile keeps it, and copies of the network go without


def check_compiler(device: torch.device, option: str) -> None:
    """Mistake if torch.compile has no compiler that works here."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each kind of device has its own compiler, and its own errors
        raise Mistake(f"{option}: cannot compile here ({one_line(error)})") from error
