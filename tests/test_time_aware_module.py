import pytest
import torch
from closed_form import MIXTURE
from torch import nn

from beta_schedule import LinearSchedule
from convert import unet_options
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake
from time_aware_module import CONV, ResidualBlock, SelfAttention, TimeAwareMLP, TimeAwareUNet, TimeEmbedding, Upsample


def small_unet(**kwargs):
    """A U-Net of two levels whose zero-initialised layers have been moved, so that everything in it matters."""
    net = TimeAwareUNet(**{"n_channels": 3, "base_channels": 16, "ch_mult": (1, 2), "attention": (False, True)} | kwargs)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


CIFAR10 = {"n_channels": 3, "attention": (False, True, False, False)}  # of Ho et al. 2020, appendix B


def size(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_the_cifar10_unet_has_the_35_7_million_parameters_of_ho_et_al():
    with torch.device("meta"):
        assert size(TimeAwareUNet(**CIFAR10)) == 35_746_307


@pytest.mark.parametrize("ch_mult", [(1,), (1, 2, 2, 2), (1, 1, 2, 2, 4, 4)])
def test_without_attention_named_a_unet_of_any_depth_has_it_in_the_middle_alone(ch_mult):
    with torch.device("meta"):
        net = TimeAwareUNet(3, 8, ch_mult=ch_mult)
    assert [name for name, module in net.named_modules() if isinstance(module, SelfAttention)] == ["middle.1"]


def groups_of(net):
    return [(module.num_groups, module.num_channels) for module in net.modules() if isinstance(module, nn.GroupNorm)]


@pytest.mark.parametrize(
    ("base_channels", "groups"), [(128, 32), (64, 16), (32, 8), (96, 16), (40, 8), (24, 4), (8, 2), (6, 1), (2, 1), (256, 32)]
)
def test_auto_is_one_number_of_groups_for_all_layers_of_at_least_4_channels_each(base_channels, groups):
    with torch.device("meta"):
        net = TimeAwareUNet(3, base_channels, ch_mult=(1, 3), num_res_blocks=1)
    assert {number for number, _ in groups_of(net)} == {groups}
    assert all(channels % groups == 0 for _, channels in groups_of(net))
    assert min(channels // groups for _, channels in groups_of(net)) >= min(4, base_channels)


def test_null_groups_are_those_of_each_layer_as_in_older_checkpoints():
    with torch.device("meta"):
        net = TimeAwareUNet(3, 32, ch_mult=(1, 2, 4), num_res_blocks=1, num_groups=None)
    assert {channels: groups for groups, channels in groups_of(net)} == {32: 8, 64: 16, 96: 8, 128: 32, 192: 16, 256: 32}


def test_null_groups_of_a_network_with_two_channels_are_not_of_one_channel_each():
    with torch.device("meta"):
        net = TimeAwareUNet(3, 2, ch_mult=(1, 2), num_res_blocks=1, num_groups=None)
    assert {channels: groups for groups, channels in groups_of(net)} == {2: 1, 4: 1, 6: 1, 8: 2}


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 7), (1,), (6,), (1, 1, 1), (3, 4, 2)])
def test_upsampling_and_convolution_in_one_are_the_two_one_after_the_other(size):
    upsample = Upsample(6, conv=CONV[len(size) - 1]).double()
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    expected = upsample.conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(upsample(x, torch.zeros(3)), expected)


def lifted(weight):
    """The weight of a network of one dimension more: its convolutions have one tap along the new, last one, in the middle."""
    if weight.ndim < 3:
        return weight
    if weight.shape[-1] == 1:
        return weight[..., None]
    return torch.stack([torch.zeros_like(weight), weight, torch.zeros_like(weight)], dim=-1)


@pytest.mark.parametrize("skips", ["concatenate", "add"])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_network_of_one_dimension_more_does_the_same_on_what_is_constant_along_it(dims, skips):
    settings = {"ch_mult": (1, 2), "attention": (False, True), "num_heads": 2, "skips": skips, "n_classes": 3}
    net, larger = (small_unet(**settings, dims=d).double().eval() for d in (dims, dims + 1))
    larger.load_state_dict({name: lifted(weight) for name, weight in net.state_dict().items()})
    x, t, label = torch.randn(2, 3, *[8, 6][:dims], dtype=torch.float64), torch.tensor([1, 700]), torch.tensor([2, 3])
    repeated = x[..., None].expand(*x.shape, 4)
    out = net(x, t, label)
    assert out.std() > 0.1
    torch.testing.assert_close(larger(repeated, t, label), out[..., None].expand(*x.shape, 4))
    for wrong in (x[0], repeated, x[:, :2]):
        with pytest.raises(
            ValueError, match=r"(signals|images) of shape .*: this network takes \[B, n_channels = 3, (L|H, W)\]"
        ):
            net(wrong, t, label)


def test_signals_and_volumes_have_no_patches():
    for dims in (1, 3):
        with pytest.raises(ValueError, match=f"patch_size = 2: must be 1 with dims = {dims}"):
            small_unet(dims=dims, patch_size=2)
    with pytest.raises(ValueError, match=r"dims = 4: must lie in 1\.\.3"):
        small_unet(dims=4)


def test_patches_are_pixels_as_channels():
    """A net of patches of 2 is the net of 4 times the channels on the four images of every second row and column."""
    net = small_unet(patch_size=2)
    channels = small_unet(n_channels=12)
    channels.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([1, 700])
    apart = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2).flatten(1, 2)
    expected = channels(apart, t).unflatten(1, (3, 4))
    found = net(x, t)
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        torch.testing.assert_close(found[:, :, i::2, j::2], expected[:, :, k])
    with pytest.raises(ValueError, match=r"6 x 8 pixels.*multiples of 4"):
        net(torch.randn(1, 3, 6, 8), torch.tensor([1]))


def test_added_skips_pair_each_block_of_the_way_up_with_one_of_the_way_down():
    net = small_unet(base_channels=8, ch_mult=(1, 3, 2), num_res_blocks=2, attention=(False, True, False), skips="add")
    seen, order = {}, []

    def keep(name):
        def hook(_, inputs, output):
            seen[name] = inputs[0], output
            order.append(name)

        return hook

    for side in ("down", "up"):
        for i, stage in enumerate(getattr(net, side)):
            stage.register_forward_hook(keep(f"{side}{i}"))
    net.middle.register_forward_hook(keep("middle"))
    net(torch.randn(2, 3, 8, 4), torch.tensor([1, 9]))
    down = [f"down{i}" for i, stage in enumerate(net.down) if isinstance(stage[0], ResidualBlock)]
    assert len(down) == len(net.up) == 3 * 2
    for i, partner in enumerate(reversed(down)):
        before = seen[order[order.index(f"up{i}") - 1]][1]
        torch.testing.assert_close(seen[f"up{i}"][0], (before + seen[partner][1]) / 2**0.5)


def test_added_skips_are_fewer_operations_and_no_network_of_diffusers():
    with torch.device("meta"):
        added, beside = (TimeAwareUNet(1, 64, ch_mult=(1, 1), num_res_blocks=1, skips=how) for how in ("add", "concatenate"))
    assert size(added) < size(beside)
    with pytest.raises(Mistake, match='skips = "add": UNet2DModel concatenates'):
        unet_options({"n_channels": 1, "skips": "add"}, 8)


def test_layer_norm_takes_the_mean_and_the_spread_of_each_pixels_channels():
    """Against the formula in float64, wherever a normalisation stands; GroupNorm stands nowhere."""
    net, x, t, seen = small_unet(norm="layer"), torch.randn(2, 3, 8, 4), torch.tensor([1, 9]), []
    layers = [layer for layer in net.modules() if isinstance(layer, nn.LayerNorm)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        layer.register_forward_hook(lambda layer, inputs, out: seen.append((layer, inputs[0], out)))
    net(x, t)
    assert len(seen) == len(layers) == sum(name.rsplit(".")[-1].startswith("norm") for name, _ in net.named_modules())
    for layer, h, out in seen:
        h, weight, bias = h.double(), layer.weight.double()[:, None, None], layer.bias.double()[:, None, None]
        mean, variance = h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True)
        expected = (h - mean) / (variance + 1e-6).sqrt() * weight + bias
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_has_no_groups_and_no_network_of_diffusers():
    with pytest.raises(ValueError, match='num_groups = 8: norm = "layer" has no groups'):
        small_unet(norm="layer", num_groups=8)
    with pytest.raises(Mistake, match='norm = "layer": UNet2DModel has GroupNorm'):
        unet_options({"n_channels": 1, "norm": "layer"}, 8)


def test_the_parameters_are_as_many_as_those_of_diffusers_network():
    """Of every shape, too; its attention has three matrices where ours has one of three times the height."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        net = TimeAwareUNet(**CIFAR10)
        peer = diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        )
    assert size(net) == size(peer) == 35_746_307
    parts = [part for name, p in net.named_parameters() for part in (p.chunk(3) if ".qkv." in name else [p])]
    assert sorted(p.shape for p in parts) == sorted(p.shape for p in peer.parameters())


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 4, 12), (5, 16, 2)])
def test_any_channels_and_any_size_of_the_multiple(channels, height, width):
    x = torch.randn(2, channels, height, width)
    assert small_unet(n_channels=channels)(x, torch.tensor([1, 9])).shape == x.shape


@pytest.mark.parametrize(("height", "width"), [(6, 8), (8, 6), (2, 2)])
def test_another_size_is_refused_with_the_multiple(height, width):
    net = TimeAwareUNet(1, 4, ch_mult=(1, 1, 1), attention=(False,) * 3)
    with pytest.raises(ValueError, match=f"{height} x {width}.*multiples of 4"):
        net(torch.zeros(1, 1, height, width), torch.ones(1, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8)])
def test_wrong_channels_are_refused(shape):
    with pytest.raises(ValueError, match="n_channels = 3"):
        small_unet()(torch.zeros(shape), torch.ones(shape[0], dtype=torch.long))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_channels": 0}, "n_channels = 0"),
        ({"num_res_blocks": 0}, "num_res_blocks = 0"),
        ({"skips": "none"}, "skips = 'none': must be one of concatenate, add"),
        ({"norm": "batch"}, "norm = 'batch': must be one of group, layer"),
        ({"ch_mult": (1, 0)}, "ch_mult = .1, 0.*each in 1.."),
        ({"ch_mult": 2}, "ch_mult = 2: must be a list"),
        ({"base_channels": 8.0}, r"base_channels = 8\.0: must be a whole number in 1\.\."),
        ({"num_res_blocks": 1.5}, r"num_res_blocks = 1\.5: must be a whole number in 1\.\."),
        ({"num_groups": "all"}, "num_groups = all: must be a whole number"),
        ({"ch_mult": (), "attention": ()}, "ch_mult = .*must be 1 to 256 numbers"),
        ({"attention": (True,)}, "attention = .*one entry a level"),
        ({"base_channels": 15}, "base_channels = 15.*even"),
        ({"dropout": 1.0}, "dropout = 1"),
        ({"num_heads": 5}, "num_heads = 5.*divide"),
        ({"num_groups": 7}, "num_groups = 7.*divide"),
        ({"num_groups": 0}, "num_groups = 0"),
    ],
)
def test_bad_unet_arguments_are_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_unet(**kwargs)


def test_a_new_unet_says_zero():
    out = TimeAwareUNet(3, 16)(torch.randn(2, 3, 8, 8), torch.tensor([1, 5]))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("net", ["unet", "mlp"])
def test_a_sample_does_not_depend_on_its_batch_mates(net):
    net, x = (small_unet(), torch.randn(6, 3, 8, 8)) if net == "unet" else (TimeAwareMLP(4), torch.randn(6, 4))
    t = torch.tensor([1, 2, 30, 400, 1000, 7])
    together = net(x, t)
    for i in range(6):
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", ["unet", "mlp"])
def test_time_matters(net):
    net, x = (small_unet(), torch.randn(1, 3, 8, 8)) if net == "unet" else (TimeAwareMLP(4), torch.randn(1, 4))
    out = net(x.expand(4, *x.shape[1:]), torch.tensor([1, 2, 500, 1000]))
    differences = torch.pdist(out.flatten(1))
    assert differences.min() > 1e-3


@pytest.mark.parametrize("net", ["unet", "mlp"])
def test_every_parameter_gets_a_gradient(net):
    net, x = (small_unet(), torch.randn(4, 3, 8, 8)) if net == "unet" else (TimeAwareMLP(4), torch.randn(4, 4))
    net(x, torch.tensor([1, 20, 300, 1000])).square().sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_activation_checkpointing_gives_the_same_gradient_from_less_kept():
    net, x, t = small_unet(), torch.randn(4, 3, 8, 8), torch.tensor([1, 20, 300, 1000])
    gradients, kept = [], []
    for net.activation_checkpointing in (False, True):
        net.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            out = net(x, t)
        kept.append(sum(sizes))
        out.square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert kept[1] < 0.5 * kept[0]


def test_attention_sits_at_the_levels_named():
    def attentions(attention):
        net = TimeAwareUNet(1, 8, ch_mult=(1, 1), attention=attention)
        return sum(type(module).__name__ == "SelfAttention" for module in net.modules())

    # one in the middle; at a level with attention two on the way down and three on the way up
    assert [attentions(a) for a in ((False, False), (True, False), (False, True), (True, True))] == [1, 6, 6, 11]


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 1), (4,)])
def test_the_mlp_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\[B, 4\]"):
        TimeAwareMLP(4)(torch.zeros(shape), torch.ones(shape[0], dtype=torch.long))


def test_the_mlp_learns_the_weights_and_means_of_a_mixture():
    diffusion = GaussianDiffusion(LinearSchedule(100, 1e-3, 0.12), TimeAwareMLP(2, hidden=64))
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        optimizer.zero_grad()
        diffusion(MIXTURE.sample(256)).backward()
        optimizer.step()
        schedule.step()
    x = diffusion.sample((5000, 2)).double()
    nearest = torch.cdist(x, MIXTURE.means).argmin(1)
    for k in range(2):
        assert (nearest == k).double().mean().item() == pytest.approx(MIXTURE.weights[k].item(), abs=0.05)
        torch.testing.assert_close(x[nearest == k].mean(0), MIXTURE.means[k], rtol=0, atol=0.1)
        assert x[nearest == k].var(0).mean().item() == pytest.approx(MIXTURE.variances[k].item(), abs=0.025)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_under_autocast_normalisation_and_attention_stay_in_float32(norm):
    net, seen = small_unet(num_heads=2, norm=norm), []
    for module in net.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    attend = nn.functional.scaled_dot_product_attention
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 700])

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.extend([q.dtype, attend(q, k, v).dtype])
        return attend(q, k, v)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        low = net(x, t)
    assert low.dtype == torch.bfloat16  # of the convolutions
    assert set(seen) == {torch.float32}
    exact = net(x, t)
    assert (low - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_time_is_told_from_the_next(dtype):
    embedding = TimeEmbedding(64, 64)
    exact = embedding(torch.tensor([500, 501, 502])).double()
    low = embedding.to(dtype)(torch.tensor([500, 501, 502])).double()
    assert (low - exact).norm() / exact.norm() < 0.02
    assert not torch.equal(low[0], low[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_symbols_takes_any_precision(dtype):
    net = TimeAwareUNet(1, 32, ch_mult=(1,), num_res_blocks=1, n_levels=4).to(dtype)
    assert net(torch.zeros(2, 1, 8, 8, dtype=torch.long), torch.ones(2, dtype=torch.long)).dtype == dtype
