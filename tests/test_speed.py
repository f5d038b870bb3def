"""What is "auto": decided by the machine and a probe, told, stored, and kept."""

import logging
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import tiny

import checkpoint
import train
from beta_schedule import LinearSchedule
from dataset import Digits
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake
from time_aware_module import TimeAwareMLP
from training import speed
from training.ranks import Ranks

CPU = Ranks("cpu")
IMAGES = Digits()
ROOT = Path(__file__).parent.parent


@pytest.fixture
def taking(clock):
    """Make a step that takes so many seconds in each precision."""

    def step_of(bf16: float, fp32: float):
        def step(precision: str) -> None:
            clock.now += bf16 if precision == "bf16" else fp32

        return step

    return step_of


class Scaled(Digits):
    def to_float(self, pixels):
        return super().to_float(pixels) / 2


def never(precision: str) -> None:
    raise AssertionError("probed, though the answer was known")


@pytest.mark.parametrize(("bf16", "fp32", "chosen"), [(0.01, 0.05, "bf16"), (0.05, 0.01, "fp32")])
def test_auto_takes_the_faster_precision_where_the_instructions_exist(bf16, fp32, chosen, taking, monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda device: True)
    assert speed.choose_precision("auto", taking(bf16, fp32), CPU, "key") == chosen


def test_auto_is_fp32_without_a_probe_where_the_instructions_do_not_exist(monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda device: False)
    assert speed.choose_precision("auto", never, CPU, "key") == "fp32"


@pytest.mark.parametrize("asked", ["fp32", "tf32"])
def test_what_is_asked_for_by_name_is_taken(asked):
    assert speed.choose_precision(asked, never, CPU, "key") == asked


def test_bf16_by_name_where_it_is_slow_is_one_warning_with_the_factor(taking, caplog):
    speed.log.propagate = True
    assert speed.choose_precision("bf16", taking(0.8, 0.2), CPU, "train_cfg.precision") == "bf16"
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    factor = float(record.message.split(" times")[0].split()[-1])
    assert factor == 4


def test_fp16_on_a_cpu_is_refused_by_its_key():
    with pytest.raises(Mistake, match=r"--precision = 'fp16'.*CUDA"):
        speed.choose_precision("fp16", never, CPU, "--precision")


def test_this_processor_has_bfloat16_if_the_kernel_says_so():
    cpuinfo = Path("/proc/cpuinfo")
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    if not lines:
        pytest.skip("no flags of an x86 processor in /proc/cpuinfo")
    flags = lines[0].split()
    assert speed.has_bfloat16(torch.device("cpu")) == ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_a_processor_for_which_torch_has_no_onednn_has_no_bfloat16(monkeypatch):
    """As on a Mac, where torch.ops.mkldnn is empty."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not speed.has_bfloat16(torch.device("cpu"))


def test_a_graph_is_for_cuda_alone_and_a_run_that_had_one_goes_on_without(tmp_path, caplog):
    speed.log.propagate = True
    assert train.main(tiny(tmp_path / "a", "train_cfg.cuda_graph=true", "train_cfg.epochs=1")) == 0
    assert "train_cfg.cuda_graph = true: needs one CUDA device" in caplog.text
    assert train.main(tiny(tmp_path / "a", "train_cfg.cuda_graph=false", "train_cfg.epochs=2", flags=("--resume",))) == 0


@pytest.mark.parametrize(("few", "whole", "recorded"), [(0.020, 0.022, True), (0.020, 0.053, False)])
def test_auto_records_a_step_of_ours_whose_time_goes_into_launching(few, whole, recorded, monkeypatch):
    monkeypatch.setattr(speed, "_seconds", lambda step, precision: step)
    cfg = SimpleNamespace(activation_checkpointing=False, optimizer="adam")
    model = GaussianDiffusion(LinearSchedule(20), TimeAwareMLP(2))
    run = SimpleNamespace(device=torch.device("cuda"), ranks=CPU, cfg=cfg, model=model)
    run.train_data = SimpleNamespace(images=IMAGES)
    assert speed.choose_cuda_graph("auto", few, whole, "bf16", run) == recorded
    assert speed.choose_cuda_graph(True, never, never, "bf16", run)
    run.model = GaussianDiffusion(LinearSchedule(20), torch.nn.Identity())  # of which nobody knows what its Python does
    assert not speed.choose_cuda_graph("auto", few, whole, "bf16", run)
    run.model, run.train_data.images = model, Scaled()
    assert not speed.choose_cuda_graph("auto", few, whole, "bf16", run)


@pytest.mark.parametrize("asked", [True, "auto"])
def test_what_is_computed_again_in_the_backward_pass_is_never_recorded(asked, monkeypatch):
    monkeypatch.setattr(speed, "_seconds", lambda step, precision: 1.0)
    run = SimpleNamespace(
        device=torch.device("cuda"), ranks=CPU, cfg=SimpleNamespace(activation_checkpointing=True, optimizer="adam")
    )
    run.train_data = SimpleNamespace(images=IMAGES)
    run.model = GaussianDiffusion(LinearSchedule(20), TimeAwareMLP(2))
    assert not speed.choose_cuda_graph(asked, never, never, "bf16", run)
    run.cfg.activation_checkpointing = False
    assert speed.choose_cuda_graph(asked, never, never, "bf16", run)
    run.model = GaussianDiffusion(LinearSchedule(20), TimeAwareMLP(2), loss_mode="full")
    assert not speed.choose_cuda_graph(asked, never, never, "bf16", run)


@pytest.mark.parametrize(
    ("more", "rows", "calls"), [({}, 8, 2), ({"loss_mode": "full"}, 128, 14), ({"loss_mode": "full", "chunk_size": 50}, 400, 4)]
)
def test_the_calls_of_a_step_are_those_that_the_network_gets(more, rows, calls, tmp_path):
    """Two parts of 8 images; the full loss of T = 100 takes 128 // 8 times of each in a call, the last of fewer."""
    settings = [f"{'diffusion' if key == 'loss_mode' else 'train_cfg'}.{key}={value}" for key, value in more.items()]
    settings += ["train_cfg.batch_size=16", "train_cfg.grad_accum=2", "schedule.kwargs.timesteps=100"]
    config, _, _, _, *defaults = tiny(tmp_path)
    run = train.Trainer(train.load_config(config, [*defaults, *settings]), "cpu")
    run.folder.close()
    assert speed._network_calls(run) == (rows, calls)
    seen = []
    run.model.time_aware_net.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    with torch.no_grad():
        run.model(torch.zeros(8, *run.shape), run.cfg.chunk_size)
    assert len(seen) == calls // 2
    assert seen[0] == rows


@pytest.mark.parametrize(("more", "calls"), [("diffusion.loss_mode=simple", 1), ("diffusion.loss_mode=full", 20)])
def test_a_batch_larger_than_the_data_set_makes_calls_of_all_its_images(more, calls, tmp_path):
    config, _, _, _, *defaults = tiny(tmp_path)
    run = train.Trainer(train.load_config(config, [*defaults, more, "train_cfg.batch_size=4096"]), "cpu")
    run.folder.close()
    (batch,) = run.train_data.epoch(0)
    assert len(batch[0]) == len(run.train_data.images) < 4096
    assert speed._network_calls(run) == (len(batch[0]), calls)


@pytest.mark.parametrize(("images", "rows"), [(9, 3), (3, 1)])
def test_the_rows_of_a_call_are_those_of_the_first_part_of_a_small_data_set(images, rows):
    cfg = SimpleNamespace(batch_size=16, grad_accum=4, chunk_size=None)
    model, data = GaussianDiffusion(LinearSchedule(20), TimeAwareMLP(2)), SimpleNamespace(numbers=range(images))
    run = SimpleNamespace(cfg=cfg, ranks=CPU, model=model, train_data=data)
    assert speed._network_calls(run) == (rows, 4)
    assert len(torch.zeros(images, 2).chunk(4)[0]) == rows
    model.loss_mode = "full"
    assert speed._network_calls(run) == (rows * 20, 4)


# The order of weights in memory


def test_the_weights_of_image_convolutions_alone_are_ordered_by_channel_last():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2),
        torch.nn.Conv2d(3, 4, 1),  # of which both orders are one, and yet the strides say which it is to the kernels
        torch.nn.Conv3d(3, 4, 2),
        torch.nn.Linear(2, 3),
    )
    net.register_buffer("kernel", torch.randn(2, 3, 4, 5))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    own = {id(parameter) for parameter in net.parameters()}
    speed.channels_last(net)
    assert {id(parameter) for parameter in net.parameters()} == own  # which an optimizer may have
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
        if tensor.ndim == 4:
            _, channels, height, width = tensor.shape
            assert tensor.stride() == (channels * height * width, 1, width * channels, channels)
        else:
            assert tensor.stride() == before[name].stride()


def test_a_network_with_weights_of_five_dimensions_can_be_trained(tmp_path, monkeypatch):
    def build(config):
        model = build_diffusion(config)
        model.time_aware_net.kernel = torch.nn.Parameter(torch.ones(2, 3, 2, 2, 2))
        return model

    build_diffusion = train.build_diffusion
    monkeypatch.setattr(train, "build_diffusion", build)
    config, _, _, _, *settings = tiny(tmp_path)
    run = train.Trainer(train.load_config(config, settings), "cpu")
    run.folder.close()
    assert run.model.time_aware_net.kernel.stride() == run.ema.time_aware_net.kernel.stride() == (24, 8, 4, 2, 1)
    convolutions = [p for p in run.model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert len(convolutions) > 10
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)


def test_compiling_is_tried_only_where_it_would_pay(monkeypatch):
    monkeypatch.setattr(speed, "check_compiler", lambda device, option: never(option))
    monkeypatch.setattr(speed, "_seconds", lambda step, precision: 0.02)
    on_cuda = SimpleNamespace(device=torch.device("cuda"), largest=lambda value: value)
    assert not speed.choose_compile("auto", never, "bf16", 1000, on_cuda)
    with pytest.raises(AssertionError, match="probed"):
        speed.choose_compile("auto", never, "bf16", 1000000, on_cuda)


def test_the_choice_is_told_stored_and_kept_on_resume(tmp_path, monkeypatch, caplog):
    speed.log.propagate = True
    argv = ("train_cfg.precision=auto", "train_cfg.epochs=1", "train_cfg.sample_period=0")
    with monkeypatch.context() as patch:
        patch.setattr(speed, "has_bfloat16", lambda device: True)
        patch.setattr(speed, "_slowdown", lambda step: 0.5)
        assert train.main(tiny(tmp_path / "a", *argv)) == 0
    assert "train_cfg.precision = auto: bf16, since a step takes 0.50 times as long in bf16" in caplog.text
    assert checkpoint.load(tmp_path / "a" / "last.pth")["config"]["train_cfg"]["precision"] == "bf16"
    monkeypatch.setattr(speed, "_slowdown", lambda step: 3.0)  # another machine
    more = ("train_cfg.precision=auto", "train_cfg.epochs=2", "train_cfg.lr_schedule=linear", "train_cfg.sample_period=0")
    assert train.main(tiny(tmp_path / "a", *more, flags=("--resume",))) == 0
    assert checkpoint.load(tmp_path / "a" / "last.pth")["config"]["train_cfg"]["precision"] == "bf16"
    assert "train_cfg.precision = bf16: a step takes 3.00 times as long" in caplog.text


def test_the_probe_leaves_no_trace(tmp_path, monkeypatch):
    """A run whose precision was probed is bitwise the one whose precision was given."""
    states = []
    for name, precision in (("given", "fp32"), ("probed", "auto")):
        monkeypatch.setattr(speed, "has_bfloat16", lambda device: True)
        monkeypatch.setattr(speed, "_slowdown", lambda step: [step("bf16"), step("fp32"), 2.0][-1])
        assert train.main(tiny(tmp_path / name, "train_cfg.epochs=1", f"train_cfg.precision={precision}")) == 0
        states.append(checkpoint.load(tmp_path / name / "last.pth"))
    assert all(torch.equal(weights, states[1]["model"][key]) for key, weights in states[0]["model"].items())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told to keep memory")
def test_freed_memory_is_used_again():
    """Pages that are given back to the system come again one fault each; 200 MB have 47,000 of 4 KiB."""
    script = """
import resource, torch
from training import speed
speed.set_flags("fp32")
def use(): [torch.ones(6_000_000) for _ in range(8)]
for _ in range(5): use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10_000


def test_other_work_on_the_machine_does_not_decide_the_precision(clock, monkeypatch):
    """bf16 takes 1 s and fp32 2 s, but the first of each is slow, and most of bf16's turns are disturbed."""
    taken = {"bf16": iter([9, 5, 4, 1, 5, 5, 5, 5]), "fp32": iter([9, 2, 2, 2, 3, 2, 2, 2])}
    monkeypatch.setattr(speed, "PROBE_SECONDS", 1000)

    def step(precision):
        clock.now += next(taken[precision])

    assert speed._slowdown(step) == 0.5


def test_where_a_step_takes_long_one_turn_decides(clock):
    turns = []

    def step(precision):
        turns.append(precision)
        clock.now += {"bf16": 60, "fp32": 20}[precision]

    assert speed._slowdown(step) == 3
    assert turns == ["bf16", "fp32"]
