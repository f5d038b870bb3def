"""Carry a model between this library and diffusers, whose UNet2DModel in the DDPM arrangement is TimeAwareUNet.

    python convert.py --from-diffusers FOLDER CHECKPOINT                # then: python test.py CHECKPOINT
    python convert.py --from-diffusers FOLDER CHECKPOINT --config configs/CIFAR10_den.json
    python convert.py --to-diffusers CHECKPOINT FOLDER                  # then: DDPMPipeline.from_pretrained(FOLDER)

FOLDER is one that DDPMPipeline.from_pretrained reads: the network, its weights, the scheduler's settings. Weights are carried
bit by bit. Time counts from 1 here and from 0 there: net(x, t) here is unet(x, t - 1) there.

UNet2DModel has no patches. A network with patch_size p goes out as the same process on patches [p^2 C, H/p, W/p], which differ
from the images [C, H, W] in the order of their values alone. The pipeline's samples then are patches, and to be made images:

    samples = torch.as_tensor(pipeline(4, output_type="np").images).permute(0, 3, 1, 2)
    images = torch.pixel_shuffle(samples, p)

DDPMScheduler rounds alpha_t to float32, where the first beta_t, some 1e-4, keep three digits: of two trained models, images in
[0, 1] after 1000 steps were up to 1.0e-4 and 1.3e-4 from this library's. They were up to 1.0e-6 and 4.5e-7 from it after this:

    pipeline.scheduler.alphas_cumprod = (1 - pipeline.scheduler.betas.double()).cumprod(0)

diffusers keeps no data set, no training settings and no loss. They go out in a file of ours, gaussian_diffusion.json, which is
the config of the checkpoint, and come back from it. Where a folder has none, they come from --config, or else are a folder of
images "data" and train_cfg's defaults. What training alone needs (optimizer, step) is carried neither way.
"""

import contextlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
from config import SCHEDULES, build_diffusion, load_config, resolve
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake, OneLineParser, as_mistake, run_script
from time_aware_module import Downsample, ResidualBlock, SelfAttention, TimeAwareUNet, Upsample

CONFIG = "gaussian_diffusion.json"  # in a folder that this script wrote
OF_TRAINING = ("loss_mode", "time_sampling", "bounded")  # in a config's section diffusion
PREDICTIONS = {"denoising": "epsilon", "reconstruction": "sample", "velocity": "v_prediction"}
VARIANCES = {"sigma_bar_square": "fixed_small", "beta": "fixed_large"}

# What UNet2DModel can vary and TimeAwareUNet has one way of
FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}


def _require(good: bool, name: str, value: Any, allowed: str) -> None:
    if not good:
        raise Mistake(f"{name} = {json.dumps(value)}: {allowed}")


def _diffusers():
    """The package, which only this file and the benchmarks need."""
    try:
        import diffusers
        import safetensors  # noqa: F401
    except ImportError as error:
        raise Mistake(f"{error}; needed to convert: pip install diffusers safetensors") from error
    return diffusers


# The network's options


def unet_options(kwargs: Mapping[str, Any], size: int | Sequence[int]) -> dict[str, Any]:
    """The options of the UNet2DModel that is TimeAwareUNet(**kwargs), for images of the size; Mistake if there is none.

    With a patch_size, that of the network inside, which sees patches.
    """
    with torch.device("meta"):
        net = TimeAwareUNet(**kwargs)
    bound = inspect.signature(TimeAwareUNet).bind(**kwargs)
    bound.apply_defaults()
    k = bound.arguments
    _require(k["n_classes"] is None, "n_classes", k["n_classes"], "DDPMPipeline has no labels to give to its network")
    _require(k["skips"] == "concatenate", "skips", k["skips"], "UNet2DModel concatenates them")
    _require(k["norm"] == "group", "norm", k["norm"], "UNet2DModel has GroupNorm")
    _require(k["dims"] == 2, "dims", k["dims"], "UNet2DModel is for images")
    attention = k["attention"] or [False] * len(k["ch_mult"])
    patch = k["patch_size"]
    groups = {module.num_groups for module in net.modules() if isinstance(module, nn.GroupNorm)}
    allowed = f"its layers have {sorted(groups)} groups, and UNet2DModel has one number for all"
    _require(len(groups) == 1, "num_groups", k["num_groups"], allowed)
    widths = {module.proj.in_features for module in net.modules() if isinstance(module, SelfAttention)}
    allowed = f"UNet2DModel's heads are equally wide, and attention here has {sorted(widths)} channels"
    _require(k["num_heads"] == 1 or len(widths) == 1, "num_heads", k["num_heads"], allowed)
    return FIXED | {
        "sample_size": size // patch if isinstance(size, int) else [pixels // patch for pixels in size],
        "in_channels": k["n_channels"] * patch**2,
        "out_channels": k["n_channels"] * patch**2,
        "block_out_channels": [k["base_channels"] * multiple for multiple in k["ch_mult"]],
        "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "layers_per_block": k["num_res_blocks"],
        "time_embedding_dim": k["t_channels"],
        "attention_head_dim": None if k["num_heads"] == 1 else widths.pop() // k["num_heads"],
        "norm_num_groups": groups.pop(),
        "dropout": k["dropout"],
    }


def network_kwargs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the TimeAwareUNet that is a UNet2DModel of these options; Mistake names one that does not fit."""
    for name, value in FIXED.items():
        _require(options[name] == value, name, options[name], f"TimeAwareUNet has {json.dumps(value)}")
    channels, groups = options["block_out_channels"], options["norm_num_groups"]
    base, out = channels[0], options["out_channels"]
    _require(out == options["in_channels"], "out_channels", out, "must equal in_channels (twice as many: a learned variance)")
    _require(not any(c % base for c in channels), "block_out_channels", channels, f"must be multiples of the first, {base}")
    _require(isinstance(groups, int), "norm_num_groups", groups, "must be a number")
    in_attention = options["attn_norm_num_groups"]
    _require(in_attention in (None, groups), "attn_norm_num_groups", in_attention, f"must equal norm_num_groups = {groups}")
    down, up = list(options["down_block_types"]), list(options["up_block_types"])
    for kind in down:
        _require(kind in ("DownBlock2D", "AttnDownBlock2D"), "down_block_types", down, "must be DownBlock2D or AttnDownBlock2D")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    _require(up == mirrored, "up_block_types", up, f"must mirror down_block_types, {json.dumps(mirrored)}")
    attention = [kind == "AttnDownBlock2D" for kind in down]
    widths = {c for c, a in zip(channels, attention, strict=True) if a} | {channels[-1]}  # the last one's in the middle
    width = options["attention_head_dim"]
    heads = {c / (width or c) for c in widths}
    allowed = f"attention of {sorted(widths)} channels must have one whole number of heads"
    _require(len(heads) == 1 and min(heads).is_integer(), "attention_head_dim", width, allowed)
    return {
        "n_channels": options["in_channels"],
        "base_channels": base,
        "t_channels": options["time_embedding_dim"],
        "ch_mult": [c // base for c in channels],
        "num_res_blocks": options["layers_per_block"],
        "attention": attention,
        "num_heads": int(heads.pop()),
        "dropout": options["dropout"],
        "num_groups": groups,
    }


# The network's weights

PARTS = {ResidualBlock: "resnets", SelfAttention: "attentions", Downsample: "downsamplers", Upsample: "upsamplers"}
LEAVES = {"time": ["time_emb_proj"], "skip": ["conv_shortcut"], "norm": ["group_norm"], "proj": ["to_out.0"]}
LEAVES["qkv"] = ["to_q", "to_k", "to_v"]  # rows of one matrix here, three matrices there
OUTSIDE = {
    "time_embedding.mlp.0": "time_embedding.linear_1",
    "time_embedding.mlp.2": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}


def _stages_per_level(net: TimeAwareUNet) -> int:
    """num_res_blocks + 1, on the way up as on the way down (there one of them halves the image, except at the last level)."""
    levels = (net.size_multiple // net.patch_size).bit_length()  # 2^(levels - 1)
    return len(net.up) // levels


def parameter_names(net: TimeAwareUNet) -> dict[str, list[str]]:
    """For each parameter here, the names of the parameters of UNet2DModel that it is made of, stacked."""
    modules = {ours: [theirs] for ours, theirs in OUTSIDE.items()}
    for name, module in net.named_modules():
        if type(module) not in PARTS:
            continue
        side, stage, *_ = name.split(".")
        level, block = divmod(int(stage), _stages_per_level(net))
        if side == "middle":  # residual block, attention, residual block
            path = f"mid_block.{PARTS[type(module)]}.{int(stage) // 2}"
        else:
            path = f"{side}_blocks.{level}.{PARTS[type(module)]}.{0 if isinstance(module, Downsample | Upsample) else block}"
        for leaf, child in module.named_children():
            if any(True for _ in child.parameters()):
                modules[f"{name}.{leaf}"] = [f"{path}.{theirs}" for theirs in LEAVES.get(leaf, [leaf])]
    return {
        f"{ours}.{kind}": [f"{name}.{kind}" for name in theirs]
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def weights_to_diffusers(net: TimeAwareUNet) -> dict[str, Tensor]:
    """The state dictionary of the UNet2DModel that is this network."""
    ours = net.state_dict()
    names = parameter_names(net)
    return {name: part for key in names for name, part in zip(names[key], ours[key].chunk(len(names[key])), strict=True)}


def weights_from_diffusers(net: TimeAwareUNet, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of this network, of a UNet2DModel's; Mistake names a key that is missing or too many."""
    names = parameter_names(net)
    known = {name for theirs in names.values() for name in theirs}
    for name in sorted(known.symmetric_difference(weights)):
        raise Mistake(f"{name}: {'missing from' if name in known else 'unknown in'} the weights of a network of these options")
    return {key: torch.cat([weights[name] for name in theirs]).float() for key, theirs in names.items()}


# The process


def scheduler_options(config: Mapping) -> dict[str, Any]:
    """The options of the DDPMScheduler that is the process of a config; Mistake names a setting that it does not have.

    A schedule that diffusers has no name for goes out as the table of its betas.
    """
    diffusion, name, kwargs = config["diffusion"], config["schedule"]["name"], config["schedule"]["kwargs"]
    kind = diffusion.get("name", "GaussianDiffusion")
    _require(kind == "GaussianDiffusion", "diffusion.name", kind, "DDPMScheduler is a Gaussian one")
    for setting, known in (("prediction", PREDICTIONS), ("reverse_variance", VARIANCES)):
        allowed = f"DDPMScheduler has only {', '.join(known)}"
        _require(diffusion[setting] in known, f"diffusion.{setting}", diffusion[setting], allowed)
    _require(name in SCHEDULES, "schedule.name", name, f"must be one of {', '.join(SCHEDULES)}")
    if name in ("LinearSchedule", "QuadraticSchedule"):
        kind = "linear" if name == "LinearSchedule" else "scaled_linear"
        betas = {"beta_schedule": kind, "beta_start": kwargs["start"], "beta_end": kwargs["end"]}
    elif name == "CosineSchedule" and kwargs["s"] == 0.008:
        betas = {"beta_schedule": "squaredcos_cap_v2"}
    else:
        betas = {"trained_betas": SCHEDULES[name](**kwargs).beta.tolist()}
    return {
        "num_train_timesteps": kwargs["timesteps"],
        "prediction_type": PREDICTIONS[diffusion["prediction"]],
        "variance_type": VARIANCES[diffusion["reverse_variance"]],
        **betas,
    }


def process_settings(scheduler) -> tuple[dict, dict]:
    """A config's sections schedule and diffusion, without loss_mode, of a DDPMScheduler; Mistake names what does not fit."""
    options = scheduler.config
    settings = {}
    # fixed_small_log is the same variance by way of its logarithm
    variance = options.variance_type.replace("fixed_small_log", "fixed_small")
    for ours, theirs, value, known in (
        ("prediction", "prediction_type", options.prediction_type, PREDICTIONS),
        ("reverse_variance", "variance_type", variance, VARIANCES),
    ):
        _require(value in known.values(), theirs, value, f"this library has only {', '.join(known.values())}")
        settings[ours] = next(here for here, there in known.items() if there == value)
    _require(not options.thresholding, "thresholding", options.thresholding, "this library has no such clipping")
    if options.clip_sample:
        reach = options.clip_sample_range
        _require(reach == 1, "clip_sample_range", reach, "this library keeps x_0 in [-1, 1], or does not")
    else:
        print("clip_sample = false: test.py --no-clip samples so")
    return _schedule(scheduler), settings


def _schedule(scheduler) -> dict:
    """The section schedule: whichever schedule of this library has the scheduler's betas."""
    options, betas, table = scheduler.config, scheduler.betas.double(), scheduler.config.trained_betas
    T = len(betas)
    first, last = (betas[0].item(), betas[-1].item()) if table is None else (table[0], table[-1])  # the table is more exact
    ends = {"start": first, "end": last} if table is not None else {"start": options.beta_start, "end": options.beta_end}
    candidates = {
        "ConstantSchedule": {"constant": ends["start"]},
        "LinearSchedule": ends,
        "CosineSchedule": {"s": 0.008},
        "QuadraticSchedule": ends,
        "SqrtSchedule": ends,
        "SineSchedule": {"scale": last},
        "SigmoidSchedule": {"scale": last / torch.tensor(6.0).double().sigmoid().item()},
    }
    for name, kwargs in candidates.items():
        with contextlib.suppress(ValueError):  # of an end that the schedule does not allow
            if torch.allclose(SCHEDULES[name](T, **kwargs).beta, betas, rtol=1e-4, atol=0):
                return {"name": name, "kwargs": {"timesteps": T, **kwargs}}
    name, value = ("beta_schedule", options.beta_schedule) if table is None else ("trained_betas", [first, "...", last])
    raise Mistake(f"{name} = {json.dumps(value)}: no schedule of this library has the {T} betas of this scheduler")


# Both ways


def to_diffusers(source: str | Path, folder: str | Path, ema: bool = True) -> dict:
    """Write a checkpoint's model, with its averaged weights (ema) or the raw ones, to a new folder for DDPMPipeline.

    Returns the checkpoint's config.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Mistake(f"{folder}: exists already, and is not an empty folder")
    diffusers = _diffusers()
    diffusion, state = checkpoint.load_diffusion(source, ema)
    config, net = state["config"], diffusion.time_aware_net
    allowed = "only TimeAwareUNet has a counterpart in diffusers"
    _require(type(net) is TimeAwareUNet, "time_aware_net.name", config["time_aware_net"]["name"], allowed)
    is_float = bool(state.get("is_float"))
    _require(not (is_float and diffusion.bounded), "diffusion.bounded", True, "of floats, it has no place in DDPMPipeline")
    options = scheduler_options(config) | {"clip_sample": not is_float}  # as test.py does
    _check_not_fitted(diffusion, config)
    unet = diffusers.UNet2DModel(**unet_options(config["time_aware_net"]["kwargs"], _size(*state["shape"][1:])))
    unet.load_state_dict(weights_to_diffusers(net))
    pipeline = diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler(**options))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / "whole"
        pipeline.save_pretrained(whole)
        (whole / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
        os.replace(whole, folder)  # whole or not at all
    return config


def _size(height: int, width: int) -> int | tuple[int, int]:
    """As diffusers writes it."""
    return height if height == width else (height, width)


def _check_not_fitted(diffusion: GaussianDiffusion, config: Mapping) -> None:
    """Mistake if the variances are not those that their name says: fit_reverse_variance changes them."""
    named = build_diffusion(config, nn.Identity())
    if not torch.allclose(diffusion.sigma_square, named.sigma_square):
        raise Mistake(
            f"diffusion.reverse_variance = {diffusion.reverse_variance!r}: was fitted, and DDPMScheduler has no place for that"
        )


def from_diffusers(folder: str | Path, target: str | Path, config_path: str | Path | None = None) -> dict:
    """Write the model of a folder for DDPMPipeline to a new checkpoint; with dataset, train_cfg and loss of the config's.

    Returns the checkpoint's config.
    """
    folder, target = Path(folder), Path(target)
    if target.exists():
        raise Mistake(f"{target}: exists already")
    if not folder.is_dir():
        raise Mistake(f"{folder}: no such folder")
    given = load_config(config_path) if config_path else None
    ours = load_config(folder / CONFIG) if (folder / CONFIG).exists() else None
    unet, scheduler = _load_parts(folder)
    if ours:
        with as_mistake(f"{folder / CONFIG}: "):
            _check_same(ours, unet, scheduler)
    config = ours or _config_of(unet, scheduler, target)
    if given:
        config |= {"dataset": given["dataset"], "train_cfg": given["train_cfg"]}
        config["diffusion"] |= {key: given["diffusion"][key] for key in OF_TRAINING if key in given["diffusion"]}
    config = resolve(config)
    diffusion = build_diffusion(config)
    net = diffusion.time_aware_net
    net.load_state_dict(weights_from_diffusers(net, unet.state_dict()))
    weights = diffusion.state_dict()
    state = {"config": config, "shape": [net.n_channels, *_image_size(unet, net.patch_size)], "step": 0, "epoch": 0}
    state["is_float"] = ours is not None and not scheduler.config.clip_sample  # by to_diffusers; others may not clip images
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(target, state | {"model": weights, "ema": weights})
    return config


def _image_size(unet, patch_size: int) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    size = unet.config.sample_size
    _require(size is not None, "sample_size", size, "a checkpoint needs the size of the images")
    height, width = (size, size) if isinstance(size, int) else size
    return patch_size * height, patch_size * width


def _check_same(config: Mapping, unet, scheduler) -> None:
    """Mistake if a config of ours is not that of the network and the process beside it, which may have been replaced since."""
    name, kwargs = config["time_aware_net"]["name"], config["time_aware_net"]["kwargs"]
    _require(name == "TimeAwareUNet", "time_aware_net.name", name, "must be TimeAwareUNet")
    network = unet_options(kwargs, _size(*_image_size(unet, kwargs["patch_size"])))
    for expected, found in ((network, unet.config), (scheduler_options(config), scheduler.config)):
        for name, value in json.loads(json.dumps(expected)).items():
            other = list(found[name]) if isinstance(found[name], tuple) else found[name]
            allowed = f"the model beside it has {json.dumps(other)}; delete {CONFIG} if it is of another one"
            _require(other == value, name, value, allowed)


def _config_of(unet, scheduler, target: Path) -> dict:
    """A config for what diffusers itself wrote, which keeps no data set and no training settings."""
    schedule, diffusion = process_settings(scheduler)
    net = {"name": "TimeAwareUNet", "kwargs": network_kwargs(unet.config)}
    images = {"root": "data", "mode": "L" if unet.config.in_channels == 1 else "RGB"}
    return {
        "schedule": schedule,
        "time_aware_net": net,
        "diffusion": diffusion,
        "dataset": {"name": "ImageFolder", "train": images | {"train": True}, "valid": images | {"train": False}},
        "train_cfg": {"epochs": 1, "batch_size": 128, "lr": 2e-4, "model_save_dirpath": str(target.with_suffix(""))},
    }


def _load_parts(folder: Path):
    """UNet2DModel and DDPMScheduler of a folder, which has them in subfolders or, as the first pipelines had, side by side."""
    diffusers = _diffusers()
    paths = {name: folder / name if (folder / name).is_dir() else folder for name in ("unet", "scheduler")}
    try:
        kind = json.loads((paths["unet"] / "config.json").read_text(encoding="utf-8")).get("_class_name", "UNet2DModel")
        _require(kind == "UNet2DModel", "_class_name", kind, "only UNet2DModel has a counterpart here")
        unet, info = diffusers.UNet2DModel.from_pretrained(
            paths["unet"], local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
        scheduler = diffusers.DDPMScheduler.from_pretrained(paths["scheduler"], local_files_only=True)
    except Exception as error:  # whatever a damaged or foreign folder makes the readers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Mistake(f"{folder}: {reason}") from error
    for key in (*info["missing_keys"], *info["unexpected_keys"]):  # diffusers itself only warns, and draws what is missing
        raise Mistake(f"{folder}: {key}: {'missing' if key in info['missing_keys'] else 'unknown'} in the network's weights")
    return unet, scheduler


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        description="Carry a model from diffusers, or to it.", epilog="See the head of convert.py for examples."
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from-diffusers", nargs=2, metavar=("FOLDER", "CHECKPOINT"), help="make CHECKPOINT of a DDPMPipeline")
    way.add_argument("--to-diffusers", nargs=2, metavar=("CHECKPOINT", "FOLDER"), help="make a DDPMPipeline of CHECKPOINT")
    parser.add_argument("--config", help="with --from-diffusers: JSON file to take dataset, train_cfg and the loss from")
    parser.add_argument("--raw", action="store_true", help="with --to-diffusers: the weights themselves, not their average")
    args = parser.parse_args(argv)
    if args.from_diffusers and args.raw:
        parser.error("--raw: is of --to-diffusers")
    if args.to_diffusers and args.config:
        parser.error("--config: is of --from-diffusers")

    def work() -> None:
        if args.from_diffusers:
            folder, target = args.from_diffusers
            config = from_diffusers(folder, target, args.config)
            names = config["schedule"]["name"], config["diffusion"]["reverse_variance"], config["diffusion"]["prediction"]
            print(f"{target}: {', '.join(names)}; python test.py {target} samples from it")
            return
        source, folder = args.to_diffusers
        config = to_diffusers(source, folder, ema=not args.raw)
        print(f'{folder}: DDPMPipeline.from_pretrained("{folder}") reads it')
        patch = config["time_aware_net"]["kwargs"]["patch_size"]
        if patch > 1:
            sizes = f"{patch**2} C, H / {patch}, W / {patch}"
            print(f"Its samples [B, {sizes}] are patches: torch.pixel_shuffle(samples, {patch}) makes images [B, C, H, W]")

    return run_script("convert.py", work)


if __name__ == "__main__":
    sys.exit(main())
