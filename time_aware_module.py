"""Time-aware networks: net(xt, t, label=None) -> tensor of xt's shape, with t a long tensor [B] of times in 1..T.

With n_classes, label is a long tensor [B] in 0..n_classes, where n_classes itself means "no label", and None no label for all.

`TimeAwareUNet` is for images [B, C, H, W], signals [B, C, L] and volumes [B, C, D, H, W], `TimeAwareMLP` for vectors
[B, n_features]. Neither knows of beta, and neither mixes the samples of a batch: what a sample gets does not depend on its
batch mates (no BatchNorm).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from numbers import Integral
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_CHANNELS, MAX_LAYERS = 2**16, 2**8
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of x with one dimension besides [B, C], with two, with three
CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
KINDS = (  # what such an x is called, its sides, and what these must be
    ("signals", "L", "values: length must be a multiple"),
    ("images", "H, W", "pixels: height and width must be multiples"),
    ("volumes", "D, H, W", "voxels: depth, height and width must be multiples"),
)


def _check_range(maximum: int, **values: int | None) -> None:
    """Each value is None, or whole and in 1..maximum: more is a mistake, and would run out of memory before it were seen."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, Integral) and 1 <= value <= maximum):
            whole = "lie" if isinstance(value, Integral) else "be a whole number"
            raise ValueError(f"{name} = {value}: must {whole} in 1..{maximum}")


def _check_choice(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(allowed)}")


def _groups_of_all(base_channels: int) -> int:
    """The most of 32, 16, 8, ... groups that part base_channels evenly, with at least 4 channels each, or 1 group."""
    return next((g for g in (32, 16, 8, 4, 2) if base_channels % g == 0 and base_channels >= 4 * g), 1)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t through a two-layer MLP: [B] -> [B, t_channels], with n_classes plus a vector of the label.

    sin and cos of (t - 1) w_i, w_i = 10000^(-i / (n/2 - 1)), i = 0..n/2-1 (Vaswani et al. 2017, section 3.5, spaced and
    counted from time 0 as by Ho et al. 2020, so that weights trained elsewhere mean the same here).

    The labels' vectors are learned (Dhariwal & Nichol 2021, section 2.2), the last of them that of "no label". They start at
    zero: a new network is, to the bit, that without classes, and what the classes have in common stays with the embedding of
    time. Zero is no trap: the vectors are added, so each has the gradient of the embedding of time.
    """

    def __init__(self, n_sinusoids: int, t_channels: int, n_classes: int | None = None):
        super().__init__()
        _check_range(MAX_CHANNELS, n_classes=n_classes)
        half = n_sinusoids // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / max(half - 1, 1))
        self.register_buffer("frequency", frequency, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, t_channels), nn.SiLU(), nn.Linear(t_channels, t_channels))
        self.n_classes = n_classes
        if n_classes is not None:  # no random numbers are drawn for it
            self.label = nn.Embedding.from_pretrained(torch.zeros(n_classes + 1, t_channels), freeze=False)

    def _apply(self, fn, recurse=True):
        """As any module, but the frequencies stay in float32 at least: three digits of them tell no time from the next."""
        frequency = self.frequency
        super()._apply(fn, recurse)
        if self.frequency.dtype in (torch.bfloat16, torch.float16):
            self.frequency = frequency.to(self.frequency.device)
        return self

    def forward(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        angle = (t - 1)[:, None] * self.frequency
        time = self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1).to(self.mlp[0].weight.dtype))
        if self.n_classes is not None:
            return time + self.label(self._labels(label, t))
        if label is not None:
            raise ValueError("label: this network has no classes; one that takes labels is built with n_classes")
        return time

    def _labels(self, label: Tensor | None, t: Tensor) -> Tensor:
        """label as a long tensor [B]; ValueError if it is not one, or leaves 0..n_classes."""
        if label is None:
            return torch.full_like(t, self.n_classes, dtype=torch.long)
        if not isinstance(label, Tensor) or label.shape != t.shape or label.dtype != torch.long:
            found = f"{label.dtype} of shape {list(label.shape)}" if isinstance(label, Tensor) else repr(label)
            raise ValueError(f"label: {found}: must be a long tensor [{len(t)}], one a sample")
        # on another device the look-up itself checks the range, without waiting for the result
        if label.device.type == "cpu" and len(label) and (label.min() < 0 or label.max() > self.n_classes):
            allowed = f"must lie in 0..{self.n_classes}, where {self.n_classes} is no label"
            raise ValueError(f"label = {label.tolist()}: every label {allowed}")
        return label


class _GroupNorm(nn.GroupNorm):
    """GroupNorm in the precision of its weights: on CUDA autocast sees to that, on a CPU it would take 3 times as long."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class _LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of [B, C, ...], in the precision of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1).to(self.weight.dtype)).movedim(-1, 1)


def _group_norm(channels: int, num_groups: int | None) -> nn.Module:
    """GroupNorm of num_groups, or for None of the most groups that divide 32, as in the paper, and a quarter of the channels.

    So a group has at least 4 channels, or all of fewer. With one, the normalisation would erase each channel's mean, and with
    it the brightness of the image.
    """
    if num_groups is None:
        num_groups = math.gcd(32, channels, max(channels // 4, 1))
    if channels % num_groups:
        raise ValueError(f"num_groups = {num_groups}: must divide the channels of every layer, of which one has {channels}")
    return _GroupNorm(num_groups, channels, eps=1e-6)


def _zeroed(layer: nn.Module) -> nn.Module:
    """The layer, starting at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + conv(dropout(SiLU(norm(conv(SiLU(norm(x))) + linear(time))))), the second convolution starting at zero."""

    def __init__(
        self, c_in: int, c_out: int, conv: type[nn.Module], t_channels: int, dropout: float, norm: Callable[[int], nn.Module]
    ):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(t_channels, c_out)
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(conv(c_out, c_out, 3, padding=1))
        self.skip = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time).view(h.shape[:2] + (1,) * (h.ndim - 2))
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class SelfAttention(nn.Module):
    """x + proj(attention(norm(x))) over the pixels, the projection starting at zero."""

    def __init__(self, channels: int, num_heads: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads = {num_heads}: must divide the {channels} channels of the level with attention")
        self.num_heads = num_heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, H * W, C]
        qkv = self.qkv(pixels)
        if x.device.type == "cpu":  # where attention in bfloat16 takes up to 7 times as long as in float32
            qkv = qkv.to(pixels.dtype)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", enabled=False):
            h = F.scaled_dot_product_attention(q, k, v)  # [B, heads, H*W, C / heads]
        h = self.proj(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Strided 3x3 convolution, padded at the bottom and right only: [B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, channels: int, conv: type[nn.Module] = nn.Conv2d):
        super().__init__()
        self.conv = conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1) * (x.ndim - 2)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution: [B, C, H, W] -> [B, c_out, 2H, 2W], None for C of them.

    Both at once, as a transposed convolution of stride 2 in 4/9 of the operations: an output pixel's three taps a direction
    fall on two input pixels only, so that the weights w_0, w_1, w_2 act as w_2, w_1 + w_2, w_0 + w_1, w_0 at four distances.
    """

    def __init__(self, channels: int, c_out: int | None = None, conv: type[nn.Module] = nn.Conv2d):
        super().__init__()
        self.conv = conv(channels, c_out or channels, 3, padding=1)
        self.dims = len(self.conv.kernel_size)
        sums = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        sums = reduce(torch.kron, [sums] * self.dims)  # [4 * 4, 3 * 3], of both directions
        self.register_buffer("sums", sums, persistent=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        kernel = (self.conv.weight.flatten(2) @ self.sums.T).unflatten(2, (4,) * self.dims).transpose(0, 1)
        return CONV_TRANSPOSE[self.dims - 1](x, kernel, self.conv.bias, stride=2, padding=1)


class Stage(nn.Sequential):
    """Modules called one after the other as module(x, time)."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for module in self:
            x = module(x, time)
        return x


def _check_unet(base_channels: int, ch_mult: Sequence[int], attention: Sequence[bool], dropout: float) -> None:
    """ValueError unless these arguments of TimeAwareUNet are in range and fit each other."""
    if not 1 <= len(ch_mult) <= MAX_LAYERS or not all(1 <= multiple <= MAX_LAYERS for multiple in ch_mult):
        raise ValueError(f"ch_mult = {list(ch_mult[:9])}: must be 1 to {MAX_LAYERS} numbers, each in 1..{MAX_LAYERS}")
    if len(attention) != len(ch_mult):
        raise ValueError(f"attention = {list(attention)}: must have one entry a level, as ch_mult = {list(ch_mult)} has")
    if base_channels % 2:
        raise ValueError(f"base_channels = {base_channels}: must be even, half sines and half cosines of t")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout}: must be at least 0 and below 1")


def _as_values(xt: Tensor, n_levels: int) -> Tensor:
    """Symbols [B, C, H, W] as float channels [B, 2 C, H, W]: the levels spread over [-1, 1], 0 for the mask; masked or not."""
    masked = xt >= n_levels
    value = torch.where(masked, 0.0, xt * (2 / max(n_levels - 1, 1)) - 1)
    return torch.cat([value, masked.to(value.dtype)], dim=1)


def logistic_logits(location: Tensor, log_scale: Tensor, n_levels: int) -> Tensor:
    """[..., n_levels]: log of the probability of the interval around each level in [-1, 1], up to a constant (softmax's).

    Austin et al. 2021, appendix A.8. Of a logistic distribution with the location and the scale exp(log_scale - 2):
    sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), of which the last factor is the same for every level.
    """
    levels = torch.linspace(-1, 1, n_levels, device=location.device)
    half = 1 / max(n_levels - 1, 1)
    distance, inverse = levels - location[..., None], torch.exp(2 - log_scale)[..., None]
    return F.logsigmoid((distance + half) * inverse) + F.logsigmoid((half - distance) * inverse)


class TimeAwareUNet(nn.Module):
    """The U-Net of Ho et al. 2020, appendix B: [B, n_channels, H, W], t [B], label [B] or None -> [B, n_channels, H, W].

    With dims = 1 it is one of signals, [B, n_channels, L], and with dims = 3 of volumes, [B, n_channels, D, H, W].

    n_channels      channels of the images
    base_channels   channels of the first level (even); level i has base_channels * ch_mult[i]
    t_channels      width of the time embedding, None for 4 * base_channels
    ch_mult         one factor a level; each level but the last halves height and width
    num_res_blocks  residual blocks a level on the way down (one more on the way up)
    attention       for each level: self-attention after each of its residual blocks? None for no level. (The middle, between
                    the way down and the way up, always has one.) The paper's: at 16 x 16 pixels, of 32 x 32 the second level
    num_heads       heads of the attention
    dropout         probability of zeroing a feature in a residual block
    num_groups      groups of every GroupNorm; "auto": the paper's 32, or fewer so that at the first level, and so everywhere, a
                    group has at least 4 channels; None, as before "auto": in each layer the most groups that divide both 32 and
                    a quarter of its channels
    norm            "group": GroupNorm, as in the paper; or "layer": LayerNorm over the channels of each pixel, as in ConvNeXt
                    (Liu et al. 2022): a third of the time of GroupNorm on a CPU, and no num_groups
    patch_size      side of the squares of pixels that the first level sees as channels: 2 saves the level of full resolution
                    (Hoogeboom et al. 2023, section 3.2)
    skips           how the way up gets the states of the way down: "concatenate", beside its own, in one block a level more; or
                    "add", one for each block, of which there are as many as on the way down: (own + other) / sqrt(2), for
                    half of the operations on the way up (as in LinkNet, Chaurasia & Culurciello 2017)
    n_classes       classes of the labels, None for a network that takes no labels
    n_levels        None, or for images of symbols the number of levels: symbols 0..n_levels - 1 in, or n_levels where one is
                    masked, logits [B, n_channels, H, W, n_levels] out. The first convolution sees each channel twice: the
                    levels spread over [-1, 1], 0 where masked, and whether it is masked
    logits          "free": one output a level. "logistic", for ordered levels: a logistic distribution's logarithms at the
                    levels, of a location and a scale (Austin et al. 2021, appendix A.8), two outputs whatever n_levels is
    dims            dimensions of x besides [B, n_channels]: 2 for images, 1 for signals, 3 for volumes (without patches)

    H and W (L; D, H and W) must be multiples of patch_size * 2^(levels - 1), else ValueError. `activation_checkpointing = True`
    computes the inside of each block again in the backward pass instead of keeping it.
    """

    hidden_layers = ("down", "middle", "up")  # whose weights neither take in nor give out x, nor take in t

    def __init__(
        self,
        n_channels: int,
        base_channels: int = 128,
        t_channels: int | None = None,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention: Sequence[bool] | None = None,
        num_heads: int = 1,
        dropout: float = 0.0,
        num_groups: int | Literal["auto"] | None = "auto",
        patch_size: int = 1,
        n_classes: int | None = None,
        n_levels: int | None = None,
        logits: Literal["free", "logistic"] = "free",
        skips: Literal["concatenate", "add"] = "concatenate",
        norm: Literal["group", "layer"] = "group",
        dims: int = 2,
    ):
        super().__init__()
        if not isinstance(ch_mult, Sequence):
            raise ValueError(f"ch_mult = {ch_mult}: must be a list, one factor a level")
        t_channels = 4 * base_channels if t_channels is None else t_channels
        attention = (False,) * len(ch_mult) if attention is None else attention
        if norm == "layer" and num_groups != "auto":
            raise ValueError(f'num_groups = {num_groups}: norm = "layer" has no groups; leave num_groups out')
        num_groups = _groups_of_all(base_channels) if num_groups == "auto" else num_groups
        _check_range(MAX_CHANNELS, n_channels=n_channels, base_channels=base_channels, t_channels=t_channels)
        _check_range(MAX_CHANNELS, num_heads=num_heads, num_groups=num_groups, n_levels=n_levels)
        _check_range(MAX_LAYERS, num_res_blocks=num_res_blocks, patch_size=patch_size)
        _check_choice("logits", logits, "free", "logistic")
        _check_choice("skips", skips, "concatenate", "add")
        _check_choice("norm", norm, "group", "layer")
        _check_unet(base_channels, ch_mult, attention, dropout)
        _check_range(3, dims=dims)
        if dims != 2 and patch_size > 1:
            raise ValueError(f"patch_size = {patch_size}: must be 1 with dims = {dims}, since only images have patches")
        self.n_channels = n_channels
        self.n_levels = n_levels
        self.logits = logits
        self.adds_skips = skips == "add"
        self.patch_size = patch_size
        self.n_classes = n_classes
        c_in = n_channels if n_levels is None else 2 * n_channels
        c_out = n_channels if n_levels is None else n_channels * (n_levels if logits == "free" else 2)
        self.size_multiple = patch_size * 2 ** (len(ch_mult) - 1)
        self.activation_checkpointing = False
        widths = [base_channels * multiple for multiple in ch_mult]
        norm_of = partial(_group_norm, num_groups=num_groups) if norm == "group" else partial(_LayerNorm, eps=1e-6)
        self.dims, conv = dims, CONV[dims - 1]
        residual = partial(ResidualBlock, conv=conv, t_channels=t_channels, dropout=dropout, norm=norm_of)
        self_attention = partial(SelfAttention, num_heads=num_heads, norm=norm_of)

        self.time_embedding = TimeEmbedding(base_channels, t_channels, n_classes)
        self.conv_in = conv(c_in * patch_size**2, base_channels, 3, padding=1)
        self._build_levels(base_channels, widths, num_res_blocks, attention, residual, self_attention)
        self.norm_out = norm_of(widths[0])
        self.conv_out = _zeroed(conv(widths[0], c_out * patch_size**2, 3, padding=1))

    def _build_levels(
        self,
        base_channels: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attention: Sequence[bool],
        residual: Callable[[int, int], nn.Module],
        self_attention: Callable[[int], nn.Module],
    ) -> None:
        """The way down, the middle and the way up, of levels of these widths."""

        def block(c_in: int, level: int) -> Stage:
            stage = Stage(residual(c_in, widths[level]))
            if attention[level]:
                stage.append(self_attention(widths[level]))
            return stage

        self.down = nn.ModuleList()
        channels = [base_channels]  # of every state of the way down
        for level in range(len(widths)):
            for _ in range(num_res_blocks):
                self.down.append(block(channels[-1], level))
                channels.append(widths[level])
            if level < len(widths) - 1:
                self.down.append(Stage(Downsample(channels[-1], CONV[self.dims - 1])))
                channels.append(channels[-1])

        c = channels[-1]
        self.middle = Stage(residual(c, c), self_attention(c), residual(c, c))

        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(num_res_blocks if self.adds_skips else num_res_blocks + 1):
                self.up.append(block(c if self.adds_skips else c + channels.pop(), level))
                c = widths[level]
            if level > 0:
                c = widths[level - 1] if self.adds_skips else c
                self.up[-1].append(Upsample(widths[level], c, CONV[self.dims - 1]))

    def forward(self, xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self._check_shape(xt)
        time = F.silu(self.time_embedding(t, label))
        x = xt if self.n_levels is None else _as_values(xt, self.n_levels).to(self.conv_in.weight.dtype)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        skips = [] if self.adds_skips else [h]  # what the way up gets: of "add" the states after residual blocks alone
        for stage in self.down:
            h = self._run(stage, h, time)
            if not (self.adds_skips and isinstance(stage[0], Downsample)):
                skips.append(h)
        h = self._run(self.middle, h, time)
        for stage in self.up:
            skip = skips.pop()
            h = (h + skip) * 0.5**0.5 if self.adds_skips else torch.cat([h, skip], dim=1)
            h = self._run(stage, h, time)
        out = self.conv_out(F.silu(self.norm_out(h)))
        out = F.pixel_shuffle(out, self.patch_size) if self.patch_size > 1 else out
        if self.n_levels is None:
            return out
        if self.logits == "free":
            return out.unflatten(1, (self.n_channels, self.n_levels)).movedim(2, -1)
        location, log_scale = out.float().chunk(2, dim=1)
        return logistic_logits(torch.tanh(location + x[:, : self.n_channels]), log_scale, self.n_levels)

    def _check_shape(self, xt: Tensor) -> None:
        kind, sides, must = KINDS[self.dims - 1]
        if xt.ndim != 2 + self.dims or xt.shape[1] != self.n_channels:
            takes = f"this network takes [B, n_channels = {self.n_channels}, {sides}]"
            raise ValueError(f"{kind} of shape {list(xt.shape)}: {takes}")
        if any(size % self.size_multiple for size in xt.shape[2:]):
            size = " x ".join(map(str, xt.shape[2:]))
            raise ValueError(f"{kind} of {size} {must} of {self.size_multiple}, patch_size * 2^(levels - 1)")

    def _run(self, stage: Stage, h: Tensor, time: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, time, use_reentrant=False)
        return stage(h, time)


class TimeAwareMLP(nn.Module):
    """A residual MLP for vectors: [B, n_features], t [B], label [B] or None -> [B, n_features].

    hidden      width of each layer
    depth       number of residual layers h + linear(SiLU(linear(h) + linear(time)))
    t_channels  width of the time embedding (even)
    n_classes   classes of the labels, None for a network that takes no labels
    """

    hidden_layers = ("inner", "time", "outer")

    def __init__(self, n_features: int, hidden: int = 128, depth: int = 3, t_channels: int = 64, n_classes: int | None = None):
        super().__init__()
        _check_range(MAX_CHANNELS, n_features=n_features, hidden=hidden, t_channels=t_channels)
        _check_range(MAX_LAYERS, depth=depth)
        if t_channels % 2:
            raise ValueError(f"t_channels = {t_channels}: must be even, half sines and half cosines of t")
        self.n_features = n_features
        self.n_classes = n_classes
        self.time_embedding = TimeEmbedding(t_channels, t_channels, n_classes)
        self.linear_in = nn.Linear(n_features, hidden)
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.time = nn.ModuleList(nn.Linear(t_channels, hidden) for _ in range(depth))
        self.outer = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.linear_out = nn.Linear(hidden, n_features)

    def forward(self, xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if xt.ndim != 2 or xt.shape[1] != self.n_features:
            raise ValueError(f"vectors of shape {list(xt.shape)}: this network takes [B, {self.n_features}]")
        time = F.silu(self.time_embedding(t, label))
        h = self.linear_in(xt)
        for inner, add_time, outer in zip(self.inner, self.time, self.outer, strict=True):
            h = h + outer(F.silu(inner(h) + add_time(time)))
        return self.linear_out(F.silu(h))
