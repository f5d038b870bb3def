"""Images of symbols all the way: the network's logits, configs, runs, resuming, bits per dimension."""

import json
import math

import pytest
import torch
from runs import ROOT, TINY, assert_same_state, metrics

import test as sampling
import train
from beta_schedule import LinearSchedule
from checkpoint import load
from config import load_config
from discrete_diffusion import DiscreteDiffusion
from gaussian_diffusion import GaussianDiffusion
from guidance import AutoGuidance, ClassifierFreeGuidance
from time_aware_module import TimeAwareUNet, logistic_logits

SMALL = {"base_channels": 8, "ch_mult": (1, 2), "num_res_blocks": 1}


def argv(folder, *more, config="Digits_d3pm", flags=()):
    settings = [*TINY, f"train_cfg.model_save_dirpath={folder}", *more]
    return [str(ROOT / "configs" / f"{config}.json"), "--device", "cpu", *flags, "--set", *settings]


# The network


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("logits", ["free", "logistic"])
def test_a_network_of_symbols_gives_logits_and_sees_the_mask(logits, patch_size):
    torch.manual_seed(0)
    net = TimeAwareUNet(3, **SMALL, patch_size=patch_size, n_levels=5, logits=logits).eval()
    torch.nn.init.normal_(net.conv_out.weight)
    x = torch.randint(0, 5, (2, 3, 8, 8))
    t = torch.tensor([1, 7])
    assert net(x, t).shape == (2, 3, 8, 8, 5)
    masked = x.clone()
    masked[0, 0, 0, 0] = 5
    middle = x.clone()
    middle[0, 0, 0, 0] = 2  # whose value is that of a masked one, 0
    assert not torch.allclose(net(masked, t)[0], net(middle, t)[0])
    assert torch.equal(net(masked, t)[1], net(x, t)[1])


def test_a_new_network_gives_every_level_the_same_probability():
    net = TimeAwareUNet(1, **SMALL, n_levels=5)
    assert (net(torch.zeros(1, 1, 4, 4, dtype=torch.long), torch.tensor([1])) == 0).all()


@pytest.mark.parametrize("n_levels", [2, 17, 256])
def test_logistic_logits_are_the_intervals_probabilities(n_levels):
    generator = torch.Generator().manual_seed(0)
    location = 2 * torch.rand(50, generator=generator) - 1
    log_scale = 1.5 * torch.randn(50, generator=generator)
    found = logistic_logits(location, log_scale, n_levels).softmax(-1)
    level, half = torch.linspace(-1, 1, n_levels, dtype=torch.float64), 1 / (n_levels - 1)
    z, scale = level - location[:, None].double(), (log_scale[:, None].double() - 2).exp()
    interval = torch.sigmoid((z + half) / scale) - torch.sigmoid((z - half) / scale)
    torch.testing.assert_close(found.double(), interval / interval.sum(1, keepdim=True), atol=1e-6, rtol=1e-3)
    far = logistic_logits(torch.tensor([-1.0]), torch.tensor([-3.0]), n_levels)
    assert far.isfinite().all()


# Equation 13 of Ho et al. for other numbers of levels


@pytest.mark.parametrize("n_levels", [2, 17])
def test_gaussian_probabilities_of_all_levels_add_up_to_1(n_levels):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(LinearSchedule(2, 0.1, 0.3), torch.nn.Identity())
    levels = torch.linspace(-1, 1, n_levels)[:, None]

    class Still(torch.nn.Module):
        """The noise that makes mu_1 equal to 0.3 whatever x_1 is."""

        def forward(self, xt, t):
            return (0.3 - diffusion.mu_from_xt[0] * xt) / diffusion.mu_from_out[0]

    diffusion.time_aware_net = Still()
    nll = diffusion.variational_bound(levels, discretized=n_levels).reconstruction
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-5)


# Configs


def refusal(capsys, *settings, config="Digits_d3pm"):
    assert train.main([str(ROOT / "configs" / f"{config}.json"), "--device", "cpu", "--set", *settings]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_mistakes_are_one_line(capsys, tmp_path):
    folder = f"train_cfg.model_save_dirpath={tmp_path / 'run'}"
    cases = {
        "diffusion.name=Discrete": "did you mean 'DiscreteDiffusion'?",
        "diffusion.name=3": "diffusion.name = 3: unknown",
        "diffusion.n_levels=18": "time_aware_net.kwargs.n_levels = 17: must be 18",
        "time_aware_net.kwargs.n_levels=null": "time_aware_net.kwargs.n_levels = null: must be 17",
        "diffusion.transition=binomial": "diffusion.transition = 'binomial': is for n_levels = 2, not 17",
        "diffusion.prediction=denoising": "diffusion.prediction: unknown key",
        "time_aware_net.kwargs.logits=ordered": "time_aware_net.kwargs.logits",
        "time_aware_net.kwargs.n_levels=70000": "n_levels = 70000",
    }
    for setting, words in cases.items():
        assert words in refusal(capsys, folder, setting), setting
    assert not (tmp_path / "run").exists()


def test_without_a_name_the_diffusion_is_the_gaussian_one():
    path = ROOT / "configs" / "Digits_den.json"
    diffusion = load_config(path)["diffusion"]
    assert diffusion == {"time_sampling": "uniform"} | json.loads(path.read_text())["diffusion"]
    assert load_config(path, ["diffusion.name=GaussianDiffusion"])["diffusion"] == {"name": "GaussianDiffusion"} | diffusion


# Runs


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        ("Digits_d3pm", "diffusion.transition=absorbing"),
        ("Digits_d3pm", "diffusion.transition=gaussian"),
        ("Digits_binary", "diffusion.loss_mode=hybrid"),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, config, setting):
    assert train.main(argv(tmp_path / "whole", setting, config=config)) == 0
    assert train.main(argv(tmp_path / "part", setting, "train_cfg.max_steps=3", config=config)) == 0
    assert train.main(argv(tmp_path / "part", setting, config=config, flags=("--resume",))) == 0
    whole, part = (load(tmp_path / name / "last.pth") for name in ("whole", "part"))
    for key in ("model", "ema", "optimizer"):
        assert_same_state(whole[key], part[key], key)
    assert (tmp_path / "whole" / "epoch_2.png").exists()


@pytest.mark.slow
def test_two_ranks_train_resume_and_sample_symbols(tmp_path, run_ranks):
    run_ranks("train", argv(tmp_path / "whole"))
    run_ranks("train", argv(tmp_path / "part", "train_cfg.max_steps=3"))
    run_ranks("train", argv(tmp_path / "part", flags=("--resume",)))
    whole, part = (load(tmp_path / name / "last.pth") for name in ("whole", "part"))
    for key in ("model", "ema", "optimizer"):
        assert_same_state(whole[key], part[key], key)
    assert train.main(argv(tmp_path / "one")) == 0
    assert metrics(tmp_path / "whole")[-1]["valid_loss"] == pytest.approx(metrics(tmp_path / "one")[-1]["valid_loss"], rel=0.2)
    sampled = [str(tmp_path / "whole" / "last.pth"), "-n", "5", "--batch-size", "2", "--device", "cpu"]
    run_ranks("test", sampled)
    shared = (tmp_path / "whole" / "last_gen" / "grid.png").read_bytes()
    assert sampling.main(sampled) == 0
    assert (tmp_path / "whole" / "last_gen" / "grid.png").read_bytes() == shared


def test_a_checkpoint_is_sampled_and_measured(tmp_path, capsys):
    assert train.main(argv(tmp_path / "run")) == 0
    checkpoint = str(tmp_path / "run" / "last.pth")
    assert sampling.main([checkpoint, "-n", "3", "--device", "cpu", "--metrics", "bpd", "--bpd-images", "8"]) == 0
    found = json.loads((tmp_path / "run" / "last_gen" / "metrics.json").read_text())["bpd"]
    assert found["total"] == pytest.approx(found["prior"] + found["kl"] + found["reconstruction"], abs=1e-4)
    assert 0 < found["total"] < 2 * math.log2(17)
    for flags, words in {
        ("--sampler", "dpm"): "there is only 'ddpm'",
        ("--eta", "0.5"): "eta = 0.5",
        ("--fit-variance", "4"): "--fit-variance: this checkpoint is of symbols",
        ("--from", "digit.png"): "--from: this checkpoint is of symbols",
    }.items():
        assert sampling.main([checkpoint, "--device", "cpu", *flags]) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]


# Labels


class Known(torch.nn.Module):
    """The p_hat of a label, [n_classes + 1, n_levels], whatever x_t is; a logit's constant means nothing."""

    n_classes = 2

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, xt, t, label):
        logits = self.p.log()[label] + 3.0 * label[:, None]
        return logits[:, None, :].expand(*xt.shape, -1)


P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.3, 0.3, 0.4]])  # of two classes, and of none


def test_guided_symbols_have_the_guided_probabilities():
    """p_none (p_label / p_none)^w, normalised, is what extrapolated logits stand for."""
    net, xt, label = Known(P), torch.tensor([[0, 2], [1, 1]]), torch.tensor([0, 1])
    guided = DiscreteDiffusion(LinearSchedule(5, 0.1, 0.5), ClassifierFreeGuidance(net, 2.5), 3)
    expected = P[2] * (P[:2] / P[2]) ** 2.5
    expected = (expected / expected.sum(1, keepdim=True))[:, None, :].expand(2, 2, 3)
    torch.testing.assert_close(guided.predict(xt, 3, {"label": label}).exp(), expected)
    weaker = Known(P[[2, 2, 2]])
    guided.time_aware_net = AutoGuidance(net, weaker, 2.5)
    torch.testing.assert_close(guided.predict(xt, 3, {"label": label}).exp(), expected)


def test_the_bound_of_symbols_is_that_of_their_label():
    """Each sample with its own label at every t, as if the network knew only this class."""
    schedule, x0, label = LinearSchedule(5, 0.1, 0.5), torch.randint(0, 3, (4, 6)), torch.tensor([1, 0, 0, 1])
    bound = DiscreteDiffusion(schedule, Known(P), 3, "absorbing").variational_bound
    found = bound(x0, generator=torch.Generator().manual_seed(0), condition={"label": label}).total
    for k in (0, 1):
        one = DiscreteDiffusion(schedule, Known(P[[k, k, k]]), 3, "absorbing").variational_bound
        alone = one(x0, generator=torch.Generator().manual_seed(0), condition={"label": label}).total
        torch.testing.assert_close(found[label == k], alone[label == k])


def test_a_run_of_symbols_with_classes_is_trained_sampled_guided_and_measured(tmp_path, capsys):
    classes = ("time_aware_net.kwargs.n_classes=10", "train_cfg.label_dropout=0.2")
    assert train.main(argv(tmp_path / "run", *classes)) == 0
    checkpoint = tmp_path / "run" / "last.pth"
    assert load(checkpoint)["model"]["time_aware_net.time_embedding.label.weight"].any()  # zero at the start
    flags = ["-n", "10", "--device", "cpu", "--class", "all", "--guidance", "2"]
    assert sampling.main([str(checkpoint), *flags]) == 0
    assert sampling.main([str(checkpoint), *flags, "--guide", str(checkpoint)]) == 0
    assert sampling.main([str(checkpoint), "-n", "2", "--device", "cpu", "--metrics", "bpd", "--bpd-images", "8"]) == 0
    other = tmp_path / "other"
    assert train.main(argv(other, *classes, "diffusion.transition=uniform", "train_cfg.max_steps=1")) == 0
    capsys.readouterr()
    assert sampling.main([str(checkpoint), *flags, "--guide", str(other / "last.pth")]) == 2
    assert "is of another prediction" in capsys.readouterr().err
