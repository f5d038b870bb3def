import json
import re
import sys

import pytest
import torch
from runs import ROOT
from torch import nn

import checkpoint
import convert
import test as sampling
from config import SCHEDULES, build_diffusion, load_config, resolve
from mistakes import Mistake
from time_aware_module import TimeAwareUNet

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")

SMALL = {"n_channels": 3, "base_channels": 32, "ch_mult": [1, 2], "attention": [False, True], "num_groups": 8}
NETWORKS = {
    "attention below": SMALL,
    "no attention but in the middle": SMALL | {"attention": [False, False], "n_channels": 1},
    "four heads": SMALL | {"num_heads": 4},
    "attention everywhere, three levels": SMALL | {"ch_mult": [1, 1, 1], "attention": [True] * 3, "num_heads": 2},
    "one block a level, odd widths": SMALL | {"num_res_blocks": 1, "ch_mult": [1, 3, 2], "attention": [True, False, False]},
    "one level, narrow time, dropout": SMALL | {"ch_mult": [1], "attention": [False], "t_channels": 24, "dropout": 0.2},
    "as many groups as the paper's": {"n_channels": 3, "base_channels": 128, "ch_mult": [1, 1], "num_groups": 32},
    "groups by default": {"n_channels": 3, "base_channels": 24, "ch_mult": [1, 2]},
}
FOUND = {  # the options of google/ddpm-cifar10-32, narrow and of two levels
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
}


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert.py"])


def moved(net):
    """The network with every parameter random, of a size that keeps the output near 1."""
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    return net.eval()


def config_of(kwargs=SMALL, schedule=("LinearSchedule", {"timesteps": 10, "end": 0.3}), **diffusion):
    return resolve(
        {
            "schedule": {"name": schedule[0], "kwargs": schedule[1]},
            "time_aware_net": {"name": "TimeAwareUNet", "kwargs": kwargs},
            "diffusion": diffusion,
            "dataset": {"name": "Digits", "train": {}, "valid": {}},
            "train_cfg": {"epochs": 3, "batch_size": 8, "lr": 1e-3, "model_save_dirpath": "somewhere"},
        }
    )


def saved(path, config, size=(8, 8)):
    """A checkpoint of random weights, its average others than its raw ones."""
    model, ema = (build_diffusion(config) for _ in range(2))
    for diffusion in (model, ema):
        moved(diffusion.time_aware_net)
    shape = [config["time_aware_net"]["kwargs"]["n_channels"], *size]
    state = {"config": config, "shape": shape, "step": 5, "epoch": 1}
    checkpoint.save(path, state | {"model": model.state_dict(), "ema": ema.state_dict()})
    return path


def found(folder, scheduler=None, **options):
    """A folder as diffusers itself writes it."""
    unet = moved(diffusers.UNet2DModel(**FOUND | options))
    scheduler = diffusers.DDPMScheduler(**{"num_train_timesteps": 10, "variance_type": "fixed_large"} | (scheduler or {}))
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return unet


def assert_same_outputs(net, unet, channels=3, size=(16, 8)):
    x = torch.randn(4, channels, *size)
    t = torch.tensor([1, 2, 77, 1000])
    with torch.no_grad():
        ours, theirs = net(x, t), unet(x, t - 1).sample
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def assert_same_weights(state, weights):
    for part in ("model", "ema"):
        assert weights.keys() == state[part].keys()
        assert all(torch.equal(state[part][key], weights[key]) for key in weights)


# Networks


@pytest.mark.parametrize("kwargs", NETWORKS.values(), ids=NETWORKS)
def test_the_network_goes_to_diffusers_and_comes_back(kwargs):
    net = moved(TimeAwareUNet(**kwargs))
    options = convert.unet_options(kwargs, 16)
    unet = diffusers.UNet2DModel(**options).eval()
    unet.load_state_dict(convert.weights_to_diffusers(net))
    assert_same_outputs(net, unet, kwargs["n_channels"])

    again = TimeAwareUNet(**convert.network_kwargs(unet.config)).eval()
    again.load_state_dict(convert.weights_from_diffusers(again, unet.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    x, t = torch.randn(2, kwargs["n_channels"], 8, 8), torch.tensor([3, 9])
    assert torch.equal(net(x, t), again(x, t))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_head_dim": 16, "block_out_channels": (32, 32)},
        {"layers_per_block": 3, "in_channels": 1, "out_channels": 1},
        {"time_embedding_dim": 48, "dropout": 0.1, "attn_norm_num_groups": 8},
    ],
)
def test_a_network_of_diffusers_comes_here(options):
    unet = moved(diffusers.UNet2DModel(**FOUND | options))
    net = TimeAwareUNet(**convert.network_kwargs(unet.config)).eval()
    net.load_state_dict(convert.weights_from_diffusers(net, unet.state_dict()))
    assert_same_outputs(net, unet, unet.config.in_channels)


def test_the_cifar10_network_has_the_options_of_google_ddpm_cifar10_32():
    options = convert.unet_options({"n_channels": 3, "attention": [False, True, False, False]}, 32)
    published = {  # its config.json
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [128, 256, 256, 256],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }
    assert {name: options[name] for name in published} == published
    assert convert.network_kwargs(diffusers.UNet2DModel(**FOUND | {"block_out_channels": (32, 64)}).config)["ch_mult"] == [1, 2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (SMALL | {"num_groups": None}, r"num_groups = null: its layers have \[8, 16, 32\]"),
        (SMALL | {"num_heads": 2, "attention": [True, False]}, r"num_heads = 2: .*\[32, 64\]"),
        (SMALL | {"n_classes": 3}, r"n_classes = 3: DDPMPipeline has no labels"),
        (SMALL | {"dims": 3}, r"dims = 3: UNet2DModel is for images"),
    ],
)
def test_a_network_that_diffusers_lacks_is_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert.unet_options(kwargs, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsample_padding": 1}, "downsample_padding = 1: TimeAwareUNet has 0"),
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos = true"),
        ({"freq_shift": 0}, "freq_shift = 0"),
        ({"norm_eps": 1e-5}, "norm_eps = 1e-05: TimeAwareUNet has 1e-06"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"mid_block_type": None}, "mid_block_type = null"),
        ({"add_attention": False}, "add_attention = false"),
        ({"num_class_embeds": 10}, "num_class_embeds = 10"),
        ({"out_channels": 6}, "out_channels = 6: .*in_channels"),
        ({"block_out_channels": (64, 96)}, r"block_out_channels = \[64, 96\]"),
        (
            {"attention_head_dim": 8, "down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
            "head",
        ),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "down_block_types = .*SkipDownBlock2D"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types = .*mirror"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups = 4"),
    ],
)
def test_a_network_of_another_arrangement_is_refused_by_name(options, message):
    defaults = {"time_embedding_dim": None, "dropout": 0.0, "in_channels": 3, "out_channels": 3, "layers_per_block": 2}
    with pytest.raises(ValueError, match=message):
        convert.network_kwargs(convert.FIXED | defaults | {"attn_norm_num_groups": None} | FOUND | options)


@pytest.mark.parametrize(("change", "message"), [("missing", "missing"), ("extra", "unknown")])
def test_weights_of_another_network_are_refused_by_key(change, message):
    net = TimeAwareUNet(**SMALL)
    weights = convert.weights_to_diffusers(net)
    if change == "missing":
        del weights["mid_block.attentions.0.to_k.bias"]
    else:
        weights["mid_block.attentions.0.to_k.bias.more"] = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"^mid_block.attentions.0.to_k.bias.*: {message}"):
        convert.weights_from_diffusers(net, weights)


# Processes

CHAINS = [
    ("LinearSchedule", {"timesteps": 10, "start": 1e-3, "end": 0.3}),
    ("QuadraticSchedule", {"timesteps": 10, "start": 1e-3, "end": 0.3}),
    ("CosineSchedule", {"timesteps": 10, "s": 0.008}),
    ("ConstantSchedule", {"timesteps": 10, "constant": 0.1}),
    ("SqrtSchedule", {"timesteps": 10, "start": 1e-3, "end": 0.3}),
    ("SineSchedule", {"timesteps": 10, "scale": 0.3}),
    ("SigmoidSchedule", {"timesteps": 10, "scale": 0.3}),
]


@pytest.mark.parametrize("schedule", CHAINS, ids=[name for name, _ in CHAINS])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_the_schedule_goes_and_comes_back(schedule, timesteps):
    config = config_of(schedule=(schedule[0], schedule[1] | {"timesteps": timesteps}))
    scheduler = diffusers.DDPMScheduler(**convert.scheduler_options(config))
    beta = SCHEDULES[schedule[0]](**config["schedule"]["kwargs"]).beta
    torch.testing.assert_close(scheduler.betas.double(), beta, rtol=2e-6, atol=1e-8)
    again, _ = convert.process_settings(scheduler)
    assert again["name"] == schedule[0]
    assert again["kwargs"] == pytest.approx(config["schedule"]["kwargs"], rel=1e-14)


@pytest.mark.parametrize("prediction", ["denoising", "reconstruction", "velocity"])
@pytest.mark.parametrize("reverse_variance", ["beta", "sigma_bar_square"])
def test_the_pipeline_samples_the_same_trajectory(tmp_path, prediction, reverse_variance):
    config = config_of(prediction=prediction, reverse_variance=reverse_variance)
    source = saved(tmp_path / "last.pth", config)
    convert.to_diffusers(source, tmp_path / "folder")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)

    theirs = []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda *args, **kwargs: theirs.append(step(*args, **kwargs)) or theirs[-1]
    images = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=10, output_type="np").images
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    diffusion, _ = checkpoint.load_diffusion(source)
    ours = diffusion.trajectory((2, 3, 8, 8), clip_x0=True, generator=torch.Generator().manual_seed(3))
    times, states = zip(*ours, strict=True)
    assert times == tuple(range(10, -1, -1))
    for x, out in zip(states[1:], theirs, strict=True):
        torch.testing.assert_close(x, out.prev_sample, rtol=0, atol=2e-5)
    torch.testing.assert_close((states[-1] / 2 + 0.5).clamp(0, 1), torch.as_tensor(images), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "direct"}, "diffusion.prediction = .direct.: .*denoising, reconstruction, velocity"),
        ({"reverse_variance": "learnable"}, "diffusion.reverse_variance = .learnable."),
    ],
)
def test_a_process_that_diffusers_lacks_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        convert.scheduler_options(config_of(**change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance_type": "learned_range"}, "variance_type = .learned_range.: .*fixed_small, fixed_large"),
        ({"prediction_type": "flow"}, "prediction_type = .flow."),
        ({"rescale_betas_zero_snr": True}, "beta_schedule = .linear.: no schedule"),
        ({"trained_betas": [0.1, 0.5, 0.2]}, "trained_betas = .*3 betas"),
        ({"thresholding": True}, "thresholding = true"),
        ({"clip_sample_range": 3.0}, "clip_sample_range = 3.0"),
    ],
)
def test_a_process_of_another_kind_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        convert.process_settings(diffusers.DDPMScheduler(**options))


def test_a_process_that_does_not_clip_says_how_to_sample_so(capsys):
    convert.process_settings(diffusers.DDPMScheduler(clip_sample=False))
    assert "--no-clip" in capsys.readouterr().out


def test_a_fitted_variance_is_refused(tmp_path):
    config = config_of()
    diffusion = build_diffusion(config)
    diffusion.x0_error.mul_(0.5)
    weights = diffusion.state_dict()
    checkpoint.save(tmp_path / "a.pth", {"config": config, "shape": [3, 8, 8], "model": weights, "ema": weights})
    with pytest.raises(ValueError, match=r"diffusion\.reverse_variance = 'beta': was fitted"):
        convert.to_diffusers(tmp_path / "a.pth", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# Files


def run(capsys, *args):
    try:
        code = convert.main([str(arg) for arg in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code == 2) == bool(err)
    assert err.count("\n") <= 1
    return code, out + err


@pytest.mark.parametrize("raw", [False, True])
def test_a_checkpoint_goes_and_comes_back_bit_by_bit(tmp_path, capsys, raw):
    config = config_of(SMALL | {"num_heads": 2}, ("SineSchedule", {"timesteps": 10, "scale": 0.3}), prediction="velocity")
    source = saved(tmp_path / "last.pth", config, size=(8, 16))
    code, _ = run(capsys, "--to-diffusers", source, tmp_path / "folder", *["--raw"] * raw)
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "folder"}
    code, _ = run(capsys, "--from-diffusers", tmp_path / "folder", tmp_path / "new" / "again.pth")
    assert code == 0
    old, new = checkpoint.load(source), checkpoint.load(tmp_path / "new" / "again.pth")
    weights = old["model" if raw else "ema"]
    assert_same_weights(new, weights)
    assert new["shape"] == [3, 8, 16]
    assert new["config"] == config


def test_a_config_that_names_its_diffusion_goes_and_comes_back(tmp_path, capsys):
    config = config_of()
    config["diffusion"] = {"name": "GaussianDiffusion", **config["diffusion"]}
    source = saved(tmp_path / "last.pth", config)
    assert run(capsys, "--to-diffusers", source, tmp_path / "folder")[0] == 0
    assert run(capsys, "--from-diffusers", tmp_path / "folder", tmp_path / "again.pth")[0] == 0
    new = checkpoint.load(tmp_path / "again.pth")
    assert_same_weights(new, checkpoint.load(source)["ema"])
    assert new["config"]["diffusion"] | {"name": "GaussianDiffusion"} == config["diffusion"]


def test_a_folder_of_diffusers_becomes_a_checkpoint_that_test_py_samples(tmp_path, capsys):
    unet = found(tmp_path / "folder")
    code, said = run(capsys, "--from-diffusers", tmp_path / "folder", tmp_path / "a.pth")
    assert code == 0
    assert "LinearSchedule, beta, denoising" in said
    diffusion, state = checkpoint.load_diffusion(tmp_path / "a.pth")
    assert_same_outputs(diffusion.time_aware_net, unet)
    assert state["config"]["dataset"]["name"] == "ImageFolder"
    args = [tmp_path / "a.pth", "-n", 2, "--device", "cpu", "--timesteps", 2]
    assert sampling.main([str(arg) for arg in args]) == 0
    assert (tmp_path / "a_gen" / "grid.png").exists()


def test_dataset_and_training_come_from_the_config_given(tmp_path, capsys):
    found(tmp_path / "folder")
    config = config_of(loss_mode="min_snr", prediction="reconstruction", time_sampling="importance", bounded=True)
    (tmp_path / "c.json").write_text(json.dumps(config))
    code, _ = run(capsys, "--from-diffusers", tmp_path / "folder", tmp_path / "a.pth", "--config", tmp_path / "c.json")
    assert code == 0
    new = checkpoint.load(tmp_path / "a.pth")["config"]
    assert (new["dataset"], new["train_cfg"]) == (config["dataset"], config["train_cfg"])
    process = {"prediction": "denoising", "reverse_variance": "beta", "bounded": True}
    assert new["diffusion"] == process | {"loss_mode": "min_snr", "time_sampling": "importance"}


def test_the_first_pipelines_files_are_read(tmp_path):
    """google/ddpm-cifar10-32 keeps its files side by side, its weights in a .bin and its attention under other names."""
    unet = found(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = unet.state_dict()
    for new_name, old_name in names.items():
        weights = {key.replace(f".{new_name}.", f".{old_name}."): value for key, value in weights.items()}
    torch.save(weights, old / "diffusion_pytorch_model.bin")
    options = {name: value for name, value in dict(unet.config).items() if name in {**FOUND, "act_fn": 0, "in_channels": 0}}
    (old / "config.json").write_text(json.dumps(options | {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}))
    scheduler = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "num_train_timesteps": 1000, "trained_betas": None}
    (old / "scheduler_config.json").write_text(json.dumps(scheduler | {"variance_type": "fixed_large", "clip_sample": True}))
    (old / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    config = convert.from_diffusers(old, tmp_path / "a.pth")
    assert config["schedule"] == {"name": "LinearSchedule", "kwargs": {"timesteps": 1000, "start": 1e-4, "end": 0.02}}
    assert_same_outputs(checkpoint.load_diffusion(tmp_path / "a.pth")[0].time_aware_net, unet)


SIZES = {
    "Digits": 8,
    "FashionMNIST": 28,
    "CIFAR10": 32,
    "CelebA_HQ_256": 32,
    "ImageFolder": 16,
}  # the last ones have 256 and 64


CONFIGS = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.json"))}
LABELLED = [name for name, text in CONFIGS.items() if "n_classes" in text and "clusters" not in text]
CONVERTIBLE = [name for name, text in CONFIGS.items() if name not in LABELLED and "DiscreteDiffusion" not in text]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_shipped_config_without_classes_samples_the_same_in_diffusers_and_comes_back(name, tmp_path, capsys, monkeypatch):
    """The structure is the config's own; no wider than 16 channels at the first level, and of 6 steps."""
    config = json.loads((ROOT / "configs" / name).read_text())
    width = min(16, config["time_aware_net"]["kwargs"]["base_channels"])
    settings = ["schedule.kwargs.timesteps=6", f"time_aware_net.kwargs.base_channels={width}"]
    settings += ["time_aware_net.kwargs.skips=concatenate", "time_aware_net.kwargs.norm=group"]  # UNet2DModel has no others
    settings += ["time_aware_net.kwargs.n_classes=null", "dataset.clusters=null"]
    config = load_config(ROOT / "configs" / name, settings)
    size = SIZES[config["dataset"]["name"]]
    source = saved(tmp_path / "last.pth", config, (size, size))
    _, said = run(capsys, "--to-diffusers", source, tmp_path / "folder")

    diffusion, old = checkpoint.load_diffusion(source)
    shape, patch = (2, *old["shape"]), config["time_aware_net"]["kwargs"]["patch_size"]
    assert (f"pixel_shuffle(samples, {patch})" in said) == (patch > 1)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    capsys.readouterr()  # its progress
    pipeline.set_progress_bar_config(disable=True)
    for module in (sys.modules[type(pipeline).__module__], sys.modules[type(pipeline.scheduler).__module__]):
        monkeypatch.setattr(module, "randn_tensor", lambda patches, generator, **_: as_patches(shape, patch, generator))
    images = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=6, output_type="np").images
    images = torch.pixel_shuffle(torch.as_tensor(images).permute(0, 3, 1, 2), patch)
    ours = diffusion.sample(shape, clip_x0=True, generator=torch.Generator().manual_seed(3))
    assert ours.std() > 0.1
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=1e-4)

    code, _ = run(capsys, "--from-diffusers", tmp_path / "folder", tmp_path / "again.pth")
    assert code == 0
    new = checkpoint.load(tmp_path / "again.pth")
    assert (new["config"], new["shape"]) == (config, old["shape"])
    assert_same_weights(new, old["ema"])


def as_patches(shape, patch, generator):
    """The next draw of our sampler, as what diffusers' network sees."""
    return nn.functional.pixel_unshuffle(torch.randn(shape, generator=generator), patch)


def test_the_configs_file_gives_way_to_another_dataset_and_training(tmp_path):
    source = saved(tmp_path / "last.pth", config_of(SMALL | {"patch_size": 2}, loss_mode="min_snr"))
    convert.to_diffusers(source, tmp_path / "folder")
    given = config_of(loss_mode="full")
    given["train_cfg"]["lr"] = 0.5
    (tmp_path / "c.json").write_text(json.dumps(given))
    new = convert.from_diffusers(tmp_path / "folder", tmp_path / "a.pth", tmp_path / "c.json")
    assert new["train_cfg"] == given["train_cfg"]
    assert new["diffusion"]["loss_mode"] == "full"
    assert new["time_aware_net"]["kwargs"]["patch_size"] == 2


def test_a_folder_that_has_lost_our_file_is_read_as_any_other(tmp_path):
    source = saved(tmp_path / "last.pth", config_of(SMALL | {"patch_size": 2}))
    convert.to_diffusers(source, tmp_path / "folder")
    (tmp_path / "folder" / "gaussian_diffusion.json").unlink()
    config = convert.from_diffusers(tmp_path / "folder", tmp_path / "a.pth")
    new = checkpoint.load(tmp_path / "a.pth")
    assert new["shape"] == [12, 4, 4]
    assert config["time_aware_net"]["kwargs"]["patch_size"] == 1
    assert_same_weights(new, checkpoint.load(source)["ema"])


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("time_aware_net", "base_channels", 64, r"block_out_channels = \[64, 128\]: .* has \[32, 64\]; delete"),
        ("time_aware_net", "attention", [True], "one entry a level"),
        ("schedule", "timesteps", 11, "num_train_timesteps = 11: .* has 10; delete"),
        ("schedule", "end", 2.0, "end = 2"),
    ],
)
def test_our_file_beside_another_model_is_refused(section, key, value, message, tmp_path):
    convert.to_diffusers(saved(tmp_path / "last.pth", config_of()), tmp_path / "folder")
    path = tmp_path / "folder" / "gaussian_diffusion.json"
    config = json.loads(path.read_text())
    config[section]["kwargs"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(Mistake, match=rf"gaussian_diffusion.json: .*{message}"):
        convert.from_diffusers(tmp_path / "folder", tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "weights_to_diffusers", lambda net: {}["conv_in"])
    with pytest.raises(KeyError, match="conv_in"):
        convert.main(["--to-diffusers", str(saved(tmp_path / "a.pth", config_of())), str(tmp_path / "folder")])


def damaged(folder, kind):
    unet, weights = folder / "unet", folder / "unet" / "diffusion_pytorch_model.safetensors"
    if kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "not JSON":
        (unet / "config.json").write_text("{")
    elif kind == "another class":
        (unet / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    else:
        tensors = safetensors.load_file(weights)
        del tensors["conv_out.bias"]
        safetensors.save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut short", "folder: "),
        ("no weights", "folder: "),
        ("not JSON", "folder: "),
        ("another class", "_class_name = .*UNet2DConditionModel"),
        ("a weight missing", "conv_out.bias: missing"),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_line(tmp_path, capsys, kind, message):
    found(tmp_path / "folder")
    damaged(tmp_path / "folder", kind)
    capsys.readouterr()
    code = convert.main(["--from-diffusers", str(tmp_path / "folder"), str(tmp_path / "a.pth")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert.py: ")]
    assert code == 2
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not (tmp_path / "a.pth").exists()


def test_another_arrangement_is_one_line_and_code_2(tmp_path, capsys):
    found(tmp_path / "folder", downsample_padding=1)
    code, said = run(capsys, "--from-diffusers", tmp_path / "folder", tmp_path / "a.pth")
    assert code == 2
    assert said == "convert.py: downsample_padding = 1: TimeAwareUNet has 0\n"
    assert not (tmp_path / "a.pth").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    source = saved(tmp_path / "last.pth", config_of())
    code, said = run(capsys, "--to-diffusers", source, tmp_path)
    assert (code, "not an empty folder" in said) == (2, True)
    code, said = run(capsys, "--from-diffusers", tmp_path, source)
    assert (code, "last.pth: exists already" in said) == (2, True)


@pytest.mark.parametrize(
    "args",
    [
        ["--to-diffusers", "none.pth", "folder"],
        ["--from-diffusers", "none", "a.pth"],
        ["--from-diffusers", "none", "a.pth", "--raw"],
        ["--to-diffusers", "none.pth", "folder", "--config", "c.json"],
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *args)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_takes_no_images_is_refused(tmp_path, capsys):
    config = config_of() | {"time_aware_net": {"name": "TimeAwareMLP", "kwargs": {"n_features": 4}}}
    weights = build_diffusion(resolve(config)).state_dict()
    checkpoint.save(tmp_path / "a.pth", {"config": config, "shape": [4, 1, 1], "model": weights, "ema": weights})
    code, said = run(capsys, "--to-diffusers", tmp_path / "a.pth", tmp_path / "folder")
    assert code == 2
    assert "a.pth: vectors of shape [1, 4, 1, 1]: this network takes [B, 4]" in said


def test_without_diffusers_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (tmp_path / "folder").mkdir()
    code, said = run(capsys, "--from-diffusers", tmp_path / "folder", tmp_path / "a.pth")
    assert code == 2
    assert "pip install diffusers safetensors" in said
