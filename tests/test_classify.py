import dataclasses
from types import SimpleNamespace

import pytest
import torch
from closed_form import LabelNet, Mixture, Textbook, even_in_log_snr

from classify import _errors, _times, _weight, _worse
from evaluation.metrics import Accuracy, Evaluation
from gaussian_diffusion import GaussianDiffusion
from guidance import AutoGuidance
from mistakes import Mistake
from time_aware_module import TimeAwareMLP
from training.ranks import Ranks

CLASSES = Mixture([1 / 3] * 3, [[-1.0, 0.5], [0.8, -0.4], [0.3, 0.6]], [0.1, 0.2, 0.3])
SCHEDULE = even_in_log_snr(300)


def model(reverse_variance="beta"):
    return GaussianDiffusion(SCHEDULE, LabelNet(CLASSES.components(), CLASSES, SCHEDULE.beta, "denoising"), reverse_variance)


def bayes(x):
    """Probability of each class [B, 3]."""
    return CLASSES._joint(x.double(), torch.ones(len(x), dtype=torch.float64)).softmax(1)


def test_classes_may_be_told_in_float64():
    x = CLASSES.sample(50)
    probability, label = bayes(x).max(1)
    sure = probability > 0.9
    assert torch.equal(model("beta").double().classify(x.double(), 3)[sure], label[sure])


@pytest.mark.parametrize("reverse_variance", ["beta", "sigma_bar_square"])
def test_the_class_of_least_bound_is_that_of_bayes_wherever_it_is_nearly_certain(reverse_variance):
    x = CLASSES.sample(300)
    probability, label = bayes(x).max(1)
    found = model(reverse_variance).classify(x, 3)
    assert found.dtype == torch.long
    sure = probability > 0.9
    assert sure.sum() > 100
    assert torch.equal(found[sure], label[sure])
    assert (found == label).double().mean() > 0.9


def test_times_are_drawn_by_their_weight_and_noisy_ones_find_means_far_apart_too():
    diffusion = model()
    times = {weighting: _times(diffusion, weighting, 20_000, 16, None) for weighting in ("bound", "noisy")}
    alpha_bar = SCHEDULE.alpha_bar
    weight = _weight(diffusion).double() * (1 - alpha_bar)
    for weighting, expected in (("bound", weight), ("noisy", weight * (1 - alpha_bar))):
        counts = torch.bincount(times[weighting].flatten(), minlength=SCHEDULE.beta.numel() + 1)[1:] / times[weighting].numel()
        expected = expected / expected.sum()
        assert (counts - expected).abs().max() < 5 * (expected.max() / times[weighting].numel()).sqrt()
    found = model().classify((x := CLASSES.sample(300)), 3, "noisy")
    sure = bayes(x).max(1).values > 0.9
    assert torch.equal(found[sure], bayes(x).argmax(1)[sure])  # of means far apart it says the same


def test_classes_that_cannot_win_are_given_up_and_the_calls_are_counted():
    diffusion, x = model(), CLASSES.sample(100)
    _, calls = diffusion.classify(x, 3, return_calls=True)
    assert calls.sum() == sum(diffusion.time_aware_net.rows)
    assert calls.min() < 16 * 16 * 3 / 4
    sure = bayes(x).max(1).values > 0.99
    assert calls[sure].double().mean() < calls[~sure].double().mean() / 2
    assert calls.max() <= 16 * 16 * 3


def test_the_samples_of_a_batch_do_not_change_each_others_class():
    x = CLASSES.sample(500)
    x = x[bayes(x).max(1).values > 0.99][:20]
    whole = model().classify(x, 3, chunk_size=1000)
    parts = torch.cat([model().classify(part, 3, chunk_size=20) for part in x.split(7)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("reverse_variance", ["beta", "sigma_bar_square"])
def test_the_weights_are_those_of_the_bound(reverse_variance):
    book = Textbook(SCHEDULE.beta)
    expected = book.mu_from_x0**2 / (2 * book.sigma_square(reverse_variance))
    torch.testing.assert_close(_weight(model(reverse_variance)).double(), expected[1:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_the_errors_are_those_of_x0_in_units_of_what_unit_variance_would_leave(chunk_size):
    centres = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.5, 2.0]])

    class Says(torch.nn.Module):
        n_classes = 3

        def forward(self, xt, t, label):
            return centres[label]

    diffusion = GaussianDiffusion(SCHEDULE, Says(), prediction="reconstruction")
    x0, alive = torch.randn(3, 2), torch.tensor([[True, True, True], [True, False, True], [False, True, True]])
    times = torch.tensor([[1, 300, 150, 2], [300, 299, 1, 77], [5, 6, 7, 8]])
    expected = (centres - x0[:, None]).square().mean(2)[..., None] / (1 - SCHEDULE.alpha_bar[times - 1])[:, None]
    expected = expected.masked_fill(~alive[..., None], torch.nan).float()
    found = _errors(diffusion, x0, alive, times, chunk_size, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize(("excess", "given_up"), [(2.30, False), (2.32, True)])
def test_a_class_is_given_up_beyond_four_standard_errors(excess, given_up):
    best = torch.tensor([5.0, -3.0, 0.0, 2.0])  # which all classes share
    errors = torch.stack([best + excess + torch.tensor([1.0, -1.0, 1.0, -1.0]), best])[None]  # 4 sqrt(4 / 3) / sqrt(4) = 2.309
    assert _worse(errors, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[given_up, False]]


def test_the_same_seed_gives_the_same_classes_and_calls():
    x = CLASSES.sample(50)
    first, again = (model().classify(x, 3, generator=torch.Generator().manual_seed(1), return_calls=True) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_of_the_classes_asked_for_the_last_may_be_left_out():
    assert model().classify(CLASSES.sample(50), 2).max() <= 1
    assert model().classify(CLASSES.sample(4), 1).tolist() == [0] * 4


def test_the_fewest_trials_are_one_round_of_two():
    _, calls = model().classify(CLASSES.sample(5), 3, rounds=1, trials=2, return_calls=True)
    assert calls.tolist() == [6] * 5


@pytest.mark.parametrize(
    ("net", "kwargs", "message"),
    [
        (TimeAwareMLP(2), {"n_classes": 3}, "n_classes = 3: this network has no classes"),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 4}, "n_classes = 4: must lie in 1..3"),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 0}, "n_classes = 0"),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 3, "trials": 1}, "trials = 1"),
        (
            TimeAwareMLP(2, n_classes=3),
            {"n_classes": 3, "weighting": "simple"},
            "weighting = 'simple': must be one of bound, noisy",
        ),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 3, "rounds": 0}, "rounds = 0"),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 3, "rounds": 1.5}, "rounds = 1.5: must be a whole number"),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 3, "trials": 2.5}, "trials = 2.5: must be a whole number"),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 2.0}, "n_classes = 2.0: must be a whole number"),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 3, "chunk_size": 0}, "chunk_size = 0"),
        (TimeAwareMLP(2, n_classes=3), {"n_classes": 3, "chunk_size": None}, "chunk_size = None"),
    ],
)
def test_a_bad_argument_is_refused(net, kwargs, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(SCHEDULE, net).classify(torch.zeros(2, 2), **kwargs)


class OfTheMixture(Evaluation):
    """Measures samples of CLASSES in the place of images of files."""

    def dataset(self, split):
        return SimpleNamespace(conditions={})

    def images(self, split, count):
        torch.manual_seed(3)
        self.label = torch.randint(3, (count,))
        each = [CLASSES.components()[i].sample(1) for i in self.label.tolist()]
        self.x0 = torch.cat(each)
        yield from zip(self.x0.split(100), ({"label": label} for label in self.label.split(100)), strict=True)


def test_the_metric_accuracy_is_that_of_bayes_rule():
    measured = OfTheMixture(model(), {}, Ranks("cpu", alone=True), n=0, bpd_images=400)
    found = Accuracy(measured).measure()
    best = (bayes(measured.x0).argmax(1) == measured.label).double().mean().item()
    assert 0.5 < best < 0.99
    assert abs(found["accuracy"] - best) < 0.03
    assert found["standard_error"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / 400) ** 0.5)
    assert 3 * 16 <= found["calls"] < 3 * 16 * 16
    said = Accuracy.describe(found | {"accuracy": 0.75, "standard_error": 0.0125, "calls": 49.6})
    assert said.endswith("75.0 % +- 1.2 % of 400 valid images, with 50 network calls each (weighting 'bound')")
    guided = model()
    guided.time_aware_net = AutoGuidance(guided.time_aware_net, guided.time_aware_net, 2)
    with pytest.raises(Mistake, match="measure it without guidance"):
        Accuracy(dataclasses.replace(measured, diffusion=guided))


def test_where_no_signal_is_left_at_T_the_classes_are_found_as_well():
    class ZeroTerminal:
        alpha_bar = SCHEDULE.alpha_bar * torch.linspace(1, 0, 300, dtype=torch.float64) ** 2

    beta = 1 - ZeroTerminal.alpha_bar / torch.cat([torch.ones(1).double(), ZeroTerminal.alpha_bar[:-1]])
    net = LabelNet(CLASSES.components(), CLASSES, beta, "velocity")
    x = CLASSES.sample(300)
    probability, label = bayes(x).max(1)
    for weighting in ("bound", "noisy"):
        found = GaussianDiffusion(ZeroTerminal(), net, prediction="velocity").classify(x, 3, weighting)
        assert torch.equal(found[probability > 0.9], label[probability > 0.9])
