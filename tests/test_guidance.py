import math

import pytest
import torch
from closed_form import PREDICTIONS, LabelNet, Mixture, OptimalNet, even_in_log_snr
from torch import nn

from beta_schedule import LinearSchedule
from discrete_diffusion import DiscreteDiffusion
from gaussian_diffusion import GaussianDiffusion
from guidance import AutoGuidance, ClassifierFreeGuidance
from time_aware_module import TimeAwareMLP

CLASSES = Mixture([0.2, 0.5, 0.3], [[-1.0, 0.5, 0.2], [0.8, -0.4, 0.0], [0.3, 0.6, -0.7]], [0.1, 0.2, 0.3])
SCHEDULE = LinearSchedule(60, 1e-3, 0.2)
LABEL = torch.tensor([0, 1, 2, 3, 1])
T = torch.tensor([60, 31, 30, 10, 9])


def gaussian(mean, variance):
    return Mixture([1.0], [[mean]], [variance])


def labelled(prediction="denoising", schedule=SCHEDULE, data=CLASSES):
    return LabelNet(data.components(), data, schedule.beta, prediction)


@pytest.fixture
def mlp():
    """A network whose labels matter."""
    net = TimeAwareMLP(3, n_classes=3)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return net


# The label


def sampled_class(sampler, k, size=4000):
    schedule = even_in_log_snr(500)
    data, alpha_bar = CLASSES.components()[k], schedule.alpha_bar[-1]
    x_T = alpha_bar.sqrt() * data.sample(size) + (1 - alpha_bar).sqrt() * torch.randn(size, 3)
    diffusion = GaussianDiffusion(schedule, labelled(schedule=schedule), "sigma_bar_square")
    steps = 500 if sampler == "ddpm" else 60
    return diffusion.sample((size, 3), sampler, steps, x_T=x_T.float(), condition={"label": torch.full((size,), k)})


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("sampler", ["ddpm", "dpm"])
def test_the_samples_of_a_class_have_its_mean_and_covariance(sampler, k):
    x = sampled_class(sampler, k).double()
    variance = CLASSES.variances[k].item()
    assert (x.mean(0) - CLASSES.means[k]).abs().max() < 4 * math.sqrt(variance / len(x))
    error = x.T.cov() / variance - torch.eye(3)
    assert error.diagonal().abs().max() < 4 * math.sqrt(2 / len(x)) + 0.01  # the chain's own error, at 500 and 60 steps
    assert (error - error.diagonal().diag()).abs().max() < 4 / math.sqrt(len(x))


def test_the_bound_given_the_label_falls_to_the_entropy_of_the_class():
    for k, data in enumerate(CLASSES.components()):
        x0 = data.sample(1000)
        entropy = -data.log_prob(x0) / data.n  # of the same draws, which cancels their noise
        gaps = []
        for steps in (20, 80, 320):
            schedule = even_in_log_snr(steps)
            diffusion = GaussianDiffusion(schedule, labelled(schedule=schedule), "sigma_bar_square")
            bound = diffusion.variational_bound(x0, condition={"label": torch.full((1000,), k)})
            gaps.append(bound.total - entropy)
        mean, error = (torch.stack(gaps).double() for gaps in ([g.mean() for g in gaps], [g.std() / 1000**0.5 for g in gaps]))
        assert (mean > -4 * error).all()
        assert (mean[1:] < mean[:-1] / 2 + 4 * error[1:]).all()  # like 1 / T
        assert mean[2] < 0.1


# Guidance against the exact solution


def exact_flow(weight, schedule, times, x, data, none):
    """Solution of the guided probability-flow equation of two Gaussians, from x at the first of the times to the second.

    In y = x / sqrt(alpha_bar) and nu, a Gaussian N(m, v) has dy / dnu = nu (y - m) / (v + nu^2). The weighted sum of two
    such is linear in y. Solved here where the variances are equal, or the means.
    """
    alpha_bar = [schedule.alpha_bar[t - 1].item() for t in times]
    nu_square = [(1 - a) / a for a in alpha_bar]
    (m, v), (m0, v0) = ((d.means.item(), d.variances.item()) for d in (data, none))
    assert v == v0 or m == m0
    mean = weight * m + (1 - weight) * m0
    spread = [(v + nu) ** (weight / 2) * (v0 + nu) ** ((1 - weight) / 2) for nu in nu_square]
    return math.sqrt(alpha_bar[1]) * (mean + spread[1] / spread[0] * (x / math.sqrt(alpha_bar[0]) - mean))


@pytest.mark.parametrize("kind", ["classifier-free", "by a weaker network"])
@pytest.mark.parametrize(("data", "none"), [((0.9, 0.2), (-0.3, 0.2)), ((0.4, 0.1), (0.4, 0.5))], ids=["means", "variances"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm", 2), ("heun", 2)])
def test_guided_trajectories_come_to_the_exact_solution_at_the_order_of_the_sampler(sampler, order, data, none, kind):
    schedule, weight, last = LinearSchedule(4800, 0.1 / 4800, 12 / 4800), 2.5, 480  # above 0, as in test_samplers.py
    data, none = gaussian(*data), gaussian(*none)
    if kind == "classifier-free":
        net = ClassifierFreeGuidance(LabelNet([data], none, schedule.beta, "denoising"), weight)
        condition = {"label": torch.zeros(50, dtype=torch.long)}
    else:
        net = AutoGuidance(*(OptimalNet(x, schedule.beta, "denoising") for x in (data, none)), weight)
        condition = None
    diffusion, x_T = GaussianDiffusion(schedule, net), torch.randn(50, 1, dtype=torch.float64)
    exact = exact_flow(weight, schedule, (4800, last), x_T, data, none)
    errors = []
    for n in (20, 40, 80, 160):
        steps = torch.linspace(4800, last, n + 1).int().tolist()
        states = dict(diffusion.trajectory(x_T.shape, sampler, steps, x_T=x_T, condition=condition))
        errors.append((states[last] - exact).square().mean().sqrt().item())
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.25)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_the_output_guides_x0_and_eps_and_mu_alike(prediction):
    x, weight = torch.randn(5, 3, dtype=torch.float64), 3.0
    guided = ClassifierFreeGuidance(labelled(prediction), weight)
    readings = GaussianDiffusion(SCHEDULE, guided, prediction=prediction).predict(x, T, {"label": LABEL})
    for name in ("x0", "eps", "mu"):
        # from the network that predicts x0, with and without the label
        plain = GaussianDiffusion(SCHEDULE, labelled("reconstruction"), prediction="reconstruction")
        given, none = (getattr(plain.predict(x, T, {"label": label}), name) for label in (LABEL, None))
        torch.testing.assert_close(getattr(readings, name), none + weight * (given - none), rtol=1e-4, atol=1e-4)


# What is computed, and what is not


def test_weight_1_is_the_conditional_network_bitwise(mlp):
    x = torch.randn(5, 3)
    assert torch.equal(ClassifierFreeGuidance(mlp, 1)(x, T, LABEL), mlp(x, T, LABEL))
    weaker = TimeAwareMLP(3)
    assert torch.equal(AutoGuidance(mlp, weaker, 1)(x, T, label=LABEL), mlp(x, T, LABEL))


def test_weight_1_makes_one_call_without_a_second_half():
    net = labelled()
    ClassifierFreeGuidance(net, 1)(torch.randn(5, 3), T, LABEL)
    weaker = labelled()
    AutoGuidance(net, weaker, 1)(torch.randn(5, 3), T, label=LABEL)
    assert (net.rows, weaker.rows) == ([5, 5], [])


def test_weight_0_is_the_network_without_a_label_or_the_weaker_one(mlp):
    """In float64: how float32 rounds a row depends on how many there are, and on the processor."""
    mlp, x = mlp.double(), torch.randn(5, 3).double()
    torch.testing.assert_close(ClassifierFreeGuidance(mlp, 0)(x, T, LABEL), mlp(x, T))
    assert not torch.allclose(mlp(x, T), mlp(x, T, LABEL))
    weaker = TimeAwareMLP(3, n_classes=3).double()
    torch.testing.assert_close(AutoGuidance(mlp, weaker, 0)(x, T, label=LABEL), weaker(x, T, LABEL))


def test_without_a_label_the_call_is_the_networks_own(mlp):
    x = torch.randn(5, 3)
    assert torch.equal(ClassifierFreeGuidance(mlp, 4)(x, T), mlp(x, T))


def test_two_halves_go_through_the_network_in_one_call_and_rows_outside_the_interval_have_no_second():
    net, x = labelled(), torch.randn(5, 3)
    always = ClassifierFreeGuidance(net, 2)(x, T, LABEL)
    within = ClassifierFreeGuidance(net, 2, (10, 30))(x, T, LABEL)
    assert net.rows == [10, 7]
    acts = torch.tensor([False, False, True, True, False])
    torch.testing.assert_close(within[acts], always[acts])
    assert torch.equal(within[~acts], net(x, T, LABEL).float()[~acts])


@pytest.mark.parametrize(("interval", "rows"), [((0, 30), 8), ((1, 30), 8), ((30, math.inf), 8), ((30, 30), 6)])
def test_both_ends_of_an_interval_belong_to_it(interval, rows):
    net = labelled()
    ClassifierFreeGuidance(net, 2, interval)(torch.randn(5, 3), T, LABEL)
    assert net.rows == [rows]


def test_a_weaker_network_sees_only_the_rows_of_the_interval():
    net, weaker, x = labelled(), labelled(), torch.randn(5, 3)
    within = AutoGuidance(net, weaker, 2, (10, 30))(x, T, label=LABEL)
    assert (net.rows, weaker.rows) == ([5], [2])
    assert torch.equal(within, net(x, T, LABEL).float())  # the two networks are the same


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm", "heun"])
def test_every_sampler_computes_the_second_half_in_the_interval_alone(sampler):
    net = labelled()
    diffusion = GaussianDiffusion(SCHEDULE, ClassifierFreeGuidance(net, 2, (10, 30)))
    steps = [60, 40, 31, 30, 20, 10, 9, 1]
    diffusion.sample((4, 3), sampler, steps, condition={"label": torch.zeros(4, dtype=torch.long)})
    asked = [t for i, t in enumerate(steps) for _ in range(2 if sampler == "heun" and i else 1)]  # heun: at both ends
    assert net.rows == [8 if 10 <= t <= 30 else 4 for t in asked]


def test_what_else_conditions_a_sample_follows_it_into_the_second_half():
    class Offset(nn.Module):
        n_classes = 3

        def forward(self, xt, t, label, offset, table):
            assert table.shape == (2,)
            return label[:, None] * xt + offset

    x, offset = torch.ones(5, 3), torch.arange(5.0)[:, None]
    out = ClassifierFreeGuidance(Offset(), 2, (10, 30))(x, T, LABEL, offset=offset, table=torch.zeros(2))
    slope = torch.where((T >= 10) & (T <= 30), 3 + 2 * (LABEL - 3), LABEL)
    torch.testing.assert_close(out, slope[:, None] * x + offset)


class Own(nn.Module):
    """A network that looks at no label."""

    n_classes = 3

    def forward(self, xt, t, label=None, offset=0.0):
        return xt + offset


def test_without_a_label_the_rest_of_the_condition_is_still_the_networks():
    assert (ClassifierFreeGuidance(Own(), 2)(torch.zeros(5, 3), T, offset=7.0) == 7).all()


class Barred(nn.Module):
    """Logits of 4 levels: level 0 never occurs, and with a label level 1 is likelier."""

    n_classes = 2

    def forward(self, xt, t, label):
        logits = torch.zeros(*xt.shape, 4)
        logits[..., 0] = -math.inf
        logits[label < 2, ..., 1] = 1.5
        return logits


def test_a_level_that_neither_half_allows_stays_impossible():
    diffusion = DiscreteDiffusion(LinearSchedule(8, 0.1, 0.5), ClassifierFreeGuidance(Barred(), 2.0), 4, "absorbing")
    found = diffusion.predict(torch.zeros(3, 1, dtype=torch.long), 4, {"label": torch.zeros(3, dtype=torch.long)})
    expected = torch.tensor([-math.inf, 3.0, 0.0, 0.0]).log_softmax(0)
    torch.testing.assert_close(found, expected.expand(3, 1, 4))


def test_halves_of_low_precision_are_widened_before_they_are_amplified():
    class Low(nn.Module):
        n_classes = 1

        def forward(self, xt, t, label):
            return (1 + label[:, None] / 256 * torch.ones_like(xt)).bfloat16()

    out = ClassifierFreeGuidance(Low(), 100)(torch.zeros(1, 1), torch.ones(1).long(), torch.zeros(1).long())
    none, given = torch.tensor(1 + 1 / 256).bfloat16().float(), 1.0
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx((none + 100 * (given - none)).item())


def test_guidance_can_be_guided_again(mlp):
    x, weaker = torch.randn(5, 3), TimeAwareMLP(3, n_classes=3)
    out = ClassifierFreeGuidance(AutoGuidance(mlp, weaker, 2.0), 3.0)(x, T, LABEL)

    def auto(label):
        return weaker(x, T, label) + 2 * (mlp(x, T, label) - weaker(x, T, label))

    torch.testing.assert_close(out, auto(None) + 3 * (auto(LABEL) - auto(None)), rtol=1e-4, atol=1e-4)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFreeGuidance(TimeAwareMLP(3), 2), "net: .*no n_classes"),
        (lambda: ClassifierFreeGuidance(labelled(), math.nan), "weight = nan"),
        (lambda: ClassifierFreeGuidance(labelled(), math.inf), "weight = inf"),
        (lambda: AutoGuidance(labelled(), labelled(), -math.inf), "weight = -inf"),
        (lambda: ClassifierFreeGuidance(labelled(), 2, (30, 10)), r"interval = \(30, 10\)"),
        (lambda: AutoGuidance(labelled(), labelled(), 2, (math.nan, 10)), "interval"),
        (lambda: AutoGuidance(labelled(), labelled(), 2, (1, 2, 3)), "interval"),
        (lambda: ClassifierFreeGuidance(nn.Identity(), 2), "net: .*no n_classes"),
        (lambda: ClassifierFreeGuidance(labelled(), None), "weight = None: must be a finite number"),
        (lambda: ClassifierFreeGuidance(labelled(), torch.ones(2)), "weight = tensor.*must be a finite number"),
        (lambda: ClassifierFreeGuidance(labelled(), "2"), "weight = '2': must be"),
        (lambda: AutoGuidance(labelled(), labelled(), 2, None), "interval = None: must be two times"),
        (lambda: AutoGuidance(labelled(), labelled(), 2, 5), "interval = 5"),
        (lambda: AutoGuidance(labelled(), labelled(), 2, ("0", "9")), "interval = .*must be two times"),
    ],
)
def test_a_bad_argument_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_weaker_network_of_another_shape_is_refused(mlp):
    guided = AutoGuidance(mlp, lambda xt, t, **condition: xt[:, :1], 2)
    with pytest.raises(ValueError, match=r"the network to guide away from gives \[5, 1\] for \[5, 3\]"):
        guided(torch.randn(5, 3), torch.ones(5).long())


@pytest.mark.parametrize("label", [LABEL[:, None], LABEL.float()])
def test_a_bad_label_is_refused_where_the_network_would_take_it(label):
    with pytest.raises(ValueError, match="label"):
        ClassifierFreeGuidance(Own(), 2)(torch.zeros(5, 3), T, label)


@pytest.mark.parametrize("label", [torch.zeros(4).long(), torch.zeros(5), torch.tensor([0, 1, 2, 3, 4]), torch.full((5,), -1)])
def test_a_bad_label_is_refused(mlp, label):
    with pytest.raises(ValueError, match="label"):
        ClassifierFreeGuidance(mlp, 2)(torch.zeros(5, 3), T, label)


def test_a_label_that_is_no_tensor_is_named():
    net = ClassifierFreeGuidance(TimeAwareMLP(2, n_classes=3), 2.0)
    with pytest.raises(ValueError, match="label: 1: must be a long tensor"):
        net(torch.zeros(4, 2), torch.ones(4, dtype=torch.long), label=1)


def test_guidance_is_not_set_twice():
    net = TimeAwareMLP(2, 4, 1, 4, n_classes=3)
    with pytest.raises(ValueError, match="net: is guided already"):
        ClassifierFreeGuidance(ClassifierFreeGuidance(net, 2.0), 2.0)


# Other conditions


class Told(nn.Module):
    """The sum of what it is told, and times t."""

    n_classes = 3

    def __init__(self):
        super().__init__()
        self.null_condition = {"text": torch.tensor([-1.0, 4.0]), "size": 9.0}

    def forward(self, xt, t, label=None, text=None, size=0.0, kept=0.0):
        label = torch.full_like(t, 3) if label is None else label
        told = label + (0.0 if text is None else text.sum(1)) + size + kept
        return xt + (t * told)[:, None]


def test_guidance_leaves_out_all_that_a_network_can_do_without():
    net, guided = Told(), ClassifierFreeGuidance(Told(), 2.5, interval=(10, 40))
    xt, t, acts = torch.randn(5, 3), torch.tensor([60, 31, 30, 10, 9]), torch.tensor([False, True, True, True, False])
    told = {"text": torch.randn(5, 2), "size": torch.randn(5), "kept": torch.randn(5), "label": LABEL}
    null = {"text": torch.tensor([-1.0, 4.0]).expand(5, 2), "size": torch.full((5,), 9.0), "label": torch.full((5,), 3)}
    for names in (["text"], ["kept", "size"], ["label", "text", "kept"], ["text", "size", "kept", "label"]):
        given = {name: told[name] for name in names}
        with_it, without = net(xt, t, **given), net(xt, t, **given | {name: null[name] for name in names if name in null})
        expected = torch.where(acts[:, None], without + 2.5 * (with_it - without), with_it)
        torch.testing.assert_close(guided(xt, t, **given), expected)
    assert torch.equal(guided(xt, t, kept=told["kept"]), net(xt, t, kept=told["kept"]))
    with pytest.raises(ValueError, match=r"^size: must be a tensor with a row for each of the 5 samples"):
        guided(xt, t, size=2.0)
    assert AutoGuidance(net, net, 2).null_condition is net.null_condition
