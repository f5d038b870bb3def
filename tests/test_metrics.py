"""metrics.py against numpy, scipy and closed forms; the classifier on scikit-learn's digits."""

import math
import re
import resource
import sys
import types

import numpy as np
import pytest
import torch
from closed_form import Textbook
from sklearn.datasets import load_digits

from beta_schedule import LinearSchedule
from dataset import from_uint8, to_uint8
from discrete_diffusion import DiscreteDiffusion
from evaluation import features
from evaluation.features import (
    cached_classifier,
    classifier_accuracy,
    inception_features,
    split,
    train_classifier,
)
from evaluation.metrics import FeatureStatistics, bits_by_time, bits_per_dimension, frechet_distance, image_statistics
from evaluation.nearest import feature_vectors
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareUNet
from training.ranks import Ranks


def statistics_of(features: torch.Tensor, sizes: list[int] | None = None) -> FeatureStatistics:
    statistics = FeatureStatistics()
    for batch in features.split(sizes or len(features)):
        statistics.update(batch)
    return statistics


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 1000) -> FeatureStatistics:
    """Statistics with exactly these moments."""
    statistics = FeatureStatistics()
    statistics.count, statistics._mean, statistics._scatter = count, mean.double(), covariance.double() * (count - 1)
    return statistics


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_covariance(dimensions: int, seed: int, rank: int | None = None) -> torch.Tensor:
    factor = normal(dimensions, rank or dimensions, seed=seed)
    return factor @ factor.T


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * 255 / 16).astype(np.uint8))[:, None]
    return images, torch.from_numpy(bunch.target)


@pytest.fixture(scope="module")
def classifier(digits):
    return train_classifier(*digits, epochs=2)


# Statistics


def test_streaming_equals_numpy_with_a_large_offset_and_uneven_batches():
    spread = normal(1003, 7) @ normal(7, 7, seed=1)
    features = spread + 1e6
    statistics = statistics_of(features, [1, 500, 2, 0, 1, 499])
    assert statistics.count == 1003
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-14)
    expected = np.cov((features - 1e6).numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_an_offset_costs_less_than_the_sum_of_squares_does():
    """At 1e8 the sum of squares has lost every digit of a variance of 1; streaming has not."""
    features = normal(4000, 3) + 1e8
    exact = np.cov((features - 1e8).numpy(), rowvar=False)
    np.testing.assert_allclose(statistics_of(features, [1] * 4000).covariance, exact, atol=1e-6)


def test_float32_features_are_summed_in_float64():
    features = (normal(20000, 2) + 3000).float()
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics_of(features, [7] * 2857 + [1]).covariance, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_type_is_accepted(dtype):
    features = normal(50, 3).to(dtype)
    np.testing.assert_allclose(statistics_of(features).mean, features.double().mean(0), atol=1e-15)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3), r"shape \[3\]; must be floats of shape \[B, D\]"),
        (torch.zeros(3, 2, dtype=torch.long), "torch.int64"),
        (torch.tensor([[1.0, math.nan], [math.inf, 0.0]]), "2 of 4 values are not finite"),
        (torch.zeros(3, 5), "5 dimensions, where the samples before had 2"),
    ],
)
def test_bad_features_are_refused_and_change_nothing(features, message):
    statistics = statistics_of(normal(4, 2))
    before = statistics.covariance
    with pytest.raises(ValueError, match=message):
        statistics.update(features)
    assert statistics.count == 4
    assert torch.equal(statistics.covariance, before)


def test_moments_of_nothing_and_of_other_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"count = 0.*at least 1"):
        _ = FeatureStatistics().mean
    with pytest.raises(ValueError, match=r"count = 1.*at least 2"):
        _ = statistics_of(normal(1, 2)).covariance
    with pytest.raises(ValueError, match="3 dimensions"):
        statistics_of(normal(4, 2)).update(normal(4, 3))


# The distance


def test_one_dimension():
    """(m_a - m_b)^2 + (s_a - s_b)^2 of standard deviations s."""
    a, b = gaussian(torch.tensor([1.0]), torch.tensor([[4.0]])), gaussian(torch.tensor([-2.0]), torch.tensor([[0.25]]))
    assert frechet_distance(a, b) == pytest.approx(3**2 + 1.5**2, rel=1e-13)


def test_covariances_that_commute():
    """In their common basis it is the one-dimensional distance, summed."""
    basis = torch.linalg.qr(normal(6, 6))[0]
    s_a, s_b = torch.arange(1.0, 7).double(), torch.tensor([3.0, 0.5, 0.0, 2, 9, 1]).double()
    mean = normal(6, seed=3)
    a = gaussian(mean, basis * s_a**2 @ basis.T)
    b = gaussian(torch.zeros(6), basis * s_b**2 @ basis.T)
    expected = (mean.square().sum() + (s_a - s_b).square().sum()).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_two_dimensions_that_do_not_commute():
    """Of 2 x 2 matrices, Tr (A B)^{1/2} = sqrt(Tr(A B) + 2 sqrt(det A det B))."""
    a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[5.0, -2.0], [-2.0, 1.0]]).double()
    root = math.sqrt((a @ b).trace() + 2 * math.sqrt(5 * 1))  # det a = 5, det b = 1
    expected = 4 + (2 + 3 + 5 + 1) - 2 * root
    assert frechet_distance(gaussian(torch.tensor([0.0, 2.0]), a), gaussian(torch.zeros(2), b)) == pytest.approx(expected)


@pytest.mark.parametrize("dimensions", [3, 40])
def test_scipy_agrees_where_the_covariances_do_not_commute(dimensions):
    linalg = pytest.importorskip("scipy.linalg")
    c_a, c_b = random_covariance(dimensions, 1), random_covariance(dimensions, 2)
    m_a, m_b = normal(dimensions, seed=3), normal(dimensions, seed=4)
    root = linalg.sqrtm((c_a @ c_b).numpy()).real
    expected = ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * root.trace()).item()
    assert frechet_distance(gaussian(m_a, c_a), gaussian(m_b, c_b)) == pytest.approx(expected, rel=1e-6)


def test_it_is_symmetric_and_zero_between_identical_sets():
    a, b = statistics_of(normal(200, 12)), statistics_of(normal(300, 12, seed=1) @ normal(12, 12, seed=2) + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    for statistics in (a, b):
        assert 0 <= frechet_distance(statistics, statistics) < 1e-11 * statistics.covariance.trace()


@pytest.mark.parametrize("rank", [1, 5, 19])
def test_a_singular_covariance_gives_no_nan_and_keeps_its_digits(rank):
    covariance = random_covariance(20, rank, rank)
    a, b = gaussian(torch.zeros(20), covariance), gaussian(torch.zeros(20), 4 * covariance)
    assert 0 <= frechet_distance(a, a) <= 1e-11 * covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(covariance.trace().item(), rel=1e-11)  # (2 - 1)^2 Tr C
    nearly = gaussian(torch.zeros(20), covariance + 1e-14 * torch.eye(20))
    assert 0 <= frechet_distance(a, nearly) < 1e-10 * covariance.trace()


def test_constant_features_are_a_distance_of_means():
    zero = torch.zeros(3, 3)
    a, b = gaussian(torch.zeros(3), zero), gaussian(torch.tensor([1.0, 2.0, 2.0]), zero)
    assert frechet_distance(a, b) == 9


def test_scaling_the_features_scales_the_distance_by_the_square():
    features, others = normal(100, 4), normal(100, 4, seed=1) * 2
    distance = frechet_distance(statistics_of(features), statistics_of(others))
    scaled = frechet_distance(statistics_of(features * 1e5), statistics_of(others * 1e5))
    assert scaled == pytest.approx(1e10 * distance, rel=1e-10)


@pytest.mark.parametrize("count", [0, 3, 8])
def test_too_few_samples_are_refused_with_the_figures(count):
    enough = statistics_of(normal(9, 8))
    few = gaussian(torch.zeros(8), torch.eye(8), count)
    assert math.isfinite(frechet_distance(enough, enough))
    for pair, name in (((few, enough), "a"), ((enough, few), "b")):
        with pytest.raises(ValueError, match=f"{name} has {count} samples of 8 feature dimensions.*at least 9 samples"):
            frechet_distance(*pair)


def test_different_dimensions_are_refused():
    with pytest.raises(ValueError, match="a has 2 feature dimensions and b has 3"):
        frechet_distance(statistics_of(normal(9, 2)), statistics_of(normal(9, 3)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(FeatureStatistics(), FeatureStatistics())


# From images to features


def test_images_are_rounded_to_the_levels_of_a_saved_image():
    levels = torch.arange(256, dtype=torch.uint8)
    exact = from_uint8(levels)
    assert (exact[0], exact[-1]) == (-1, 1)
    assert torch.equal(to_uint8(exact), levels)
    assert torch.equal(to_uint8(exact + 0.49 * 2 / 255), levels)
    assert torch.equal(to_uint8(exact - 0.49 * 2 / 255), levels)
    assert to_uint8(torch.tensor([-7.0, -1.001, 1.001, 300.0])).tolist() == [0, 0, 255, 255]


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"images of type torch.uint8: must be floats in \[-1, 1\]"):
        to_uint8(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        to_uint8(torch.tensor([0.0, math.nan, 0.5, 1.0]))


class Pixels(torch.nn.Module):
    """The first two pixels, which BatchNorm would change in training mode."""

    name = "pixels"

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2, eps=1e-12)

    def features(self, images):
        assert images.dtype == torch.float32
        assert not torch.is_grad_enabled()
        return self.norm(images.flatten(1)[:, :2])


def test_image_statistics_are_those_of_quantised_images_in_eval_mode_without_gradients():
    images = normal(30, 1, 8, 8).float()
    extractor = Pixels()
    statistics = image_statistics(iter(images.split(7)), extractor)
    assert extractor.training
    assert statistics.count == 30
    saved = np.clip(np.round((images.double().numpy() + 1) * 127.5), 0, 255) / 127.5 - 1
    np.testing.assert_allclose(statistics.covariance, np.cov(saved.reshape(30, -1)[:, :2], rowvar=False), rtol=1e-5, atol=1e-7)
    assert torch.equal(extractor.norm.running_mean, torch.zeros(2))


# Speed that features are not measured with


def speeds() -> tuple:
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic


@pytest.fixture(params=["high", "medium"])
def fast(request) -> tuple:
    """What a caller in a hurry has set."""
    before, cudnn = speeds(), torch.backends.cudnn

    def choose(precision, *switches):
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = switches

    choose(request.param, True, True, False)
    yield speeds()
    choose(*before)


SLOW = ("highest", False, False, True)


class Noting(torch.nn.Module):
    """Notes what features are made with; fails at the call of that number."""

    def __init__(self, fails_at: int = 0):
        super().__init__()
        self.weight, self.fails_at, self.seen = torch.nn.Parameter(torch.zeros(1)), fails_at, []

    def features(self, images):
        self.seen.append(speeds())
        if len(self.seen) == self.fails_at:
            raise RuntimeError("of the extractor")
        return images.flatten(1)[:, :2]


def test_features_are_made_in_full_precision_and_the_images_as_fast_as_the_caller_likes(fast):
    made = []

    def batches():
        for _ in range(3):
            made.append(speeds())
            yield torch.rand(4, 1, 8, 8)

    extractor = Noting()
    image_statistics(batches(), extractor)
    assert extractor.seen == [SLOW] * 3
    assert made == [fast] * 3
    assert speeds() == fast
    with pytest.raises(RuntimeError, match="of the extractor"):
        image_statistics(batches(), Noting(fails_at=2))
    assert speeds() == fast


def test_distances_to_training_images_are_taken_in_full_precision(fast, digits):
    extractor, classifier = Noting(), features.SmallClassifier(1, 10)
    feature_vectors(torch.rand(4, 1, 8, 8), extractor)
    plain = classifier.forward
    classifier.forward = lambda x: (extractor.features(x), plain(x))[1]
    classifier_accuracy(classifier, digits[0][:20], digits[1][:20], batch_size=10)
    assert extractor.seen == [SLOW] * 3
    assert speeds() == fast


def test_a_classifier_is_trained_in_full_precision(fast, digits, monkeypatch):
    noting, plain = Noting(), features.SmallClassifier.features
    monkeypatch.setattr(features.SmallClassifier, "features", lambda self, x: (noting.features(x), plain(self, x))[1])
    train_classifier(digits[0][:20], digits[1][:20], epochs=2, batch_size=10)
    assert noting.seen == [SLOW] * 4
    assert speeds() == fast
    noting.fails_at = 6
    with pytest.raises(RuntimeError, match="of the extractor"):
        train_classifier(digits[0][:20], digits[1][:20], epochs=2, batch_size=10)
    assert speeds() == fast


# The classifier


def test_the_classifier_learns_the_digits_and_gives_its_features(digits, classifier):
    images, labels = digits
    trained = train_classifier(images[:1500], labels[:1500], epochs=4)
    assert classifier_accuracy(trained, images[1500:], labels[1500:]) > 0.85
    x = from_uint8(images[:20])
    features = classifier.features(x)
    assert features.shape == (20, 128)
    torch.testing.assert_close(classifier(x), classifier.head(features))
    torch.testing.assert_close(features[:3], classifier.features(x[:3]))  # a sample's features are its own
    assert not features.requires_grad
    assert not classifier.training
    assert classifier.features(torch.zeros(2, 1, 13, 50)).shape == (2, 128)


def test_the_distance_grows_with_the_damage(digits, classifier):
    images = from_uint8(digits[0])
    noise = normal(*images.shape).float()
    real, little, much = (image_statistics((images + s * noise).split(300), classifier) for s in (0, 0.1, 1))
    assert 0 <= frechet_distance(real, real) < 1e-10
    assert 1e-6 < frechet_distance(real, little) < 0.1 * frechet_distance(real, much)


def test_the_seed_decides_the_classifier_and_the_global_state_does_not(digits):
    images, labels = digits[0][:300], digits[1][:300]
    before = torch.get_rng_state()
    first = train_classifier(images, labels, epochs=1, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second, other = (train_classifier(images, labels, epochs=1, seed=seed) for seed in (3, 4))
    x = from_uint8(images)
    assert torch.equal(first.features(x), second.features(x))
    assert not torch.equal(first.features(x), other.features(x))


def test_ten_images_are_enough_to_run(digits):
    assert train_classifier(digits[0][:10], digits[1][:10], epochs=1).n_classes == 10


def test_the_second_use_reads_the_file(tmp_path, capsys, monkeypatch, digits):
    images, labels = digits
    path = tmp_path / "classifier.pth"
    first = cached_classifier(path, images, labels, "digits", epochs=4)
    out = capsys.readouterr().out
    accuracy = re.search(r"accuracy ([\d.]+) % on 179 held-out images of digits, 1618 trained on", out).group(1)
    assert first.name == f"classifier of digits, 128 features, {accuracy} % held-out accuracy"
    assert float(accuracy) > 80
    assert [entry.name for entry in tmp_path.iterdir()] == ["classifier.pth"]
    assert torch.load(path, weights_only=True)["data set"] == "digits"

    bytes_before, time_before = path.read_bytes(), path.stat().st_mtime_ns
    monkeypatch.setattr(features, "train_classifier", lambda *_: pytest.fail("trained again"))
    second = cached_classifier(path, images, labels, "digits", epochs=4)
    assert capsys.readouterr().out == ""
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (bytes_before, time_before)
    assert second.name == first.name
    assert not second.training
    x = from_uint8(images[:50])
    assert torch.equal(first.features(x), second.features(x))


def test_a_full_disk_at_the_classifier_is_one_error_of_the_systems(tmp_path, digits):
    """The limit is 16 KiB a file; Python ignores the signal, so that a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*classifier\.pth"):
            cached_classifier(tmp_path / "classifier.pth", digits[0][:100], digits[1][:100], "digits", epochs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_the_held_out_images_are_not_trained_on(monkeypatch, tmp_path, digits):
    """Every image has a number in its corner: the two parts are disjoint, and together they are everything."""
    images, labels = digits[0][:200].clone(), digits[1][:200]
    images[:, 0, 0, 0] = torch.arange(200, dtype=torch.uint8)
    seen = {}

    def record(part, function):
        def recorded(*args, **kwargs):
            seen.setdefault(part, []).append(args[0 if part == "train" else 1][:, 0, 0, 0].tolist())
            return function(*args, **kwargs)

        return recorded

    monkeypatch.setattr(features, "train_classifier", record("train", train_classifier))
    monkeypatch.setattr(features, "classifier_accuracy", record("held out", classifier_accuracy))
    for seed in (0, 1):
        cached_classifier(tmp_path / f"{seed}.pth", images, labels, "digits", epochs=1, seed=seed)
    assert len(seen["held out"][0]) == 20
    assert sorted(seen["train"][0] + seen["held out"][0]) == list(range(200))
    assert seen["held out"][0] == seen["held out"][1]  # the same, whatever the seed


@pytest.fixture
def cache(tmp_path, digits):
    path = tmp_path / "classifier.pth"
    cached_classifier(path, digits[0][:100], digits[1][:100], "digits", epochs=1)
    return path


@pytest.mark.parametrize(
    ("change", "found", "asked"),
    [
        ({"name": "letters"}, "data set digits", "data set letters"),
        ({"images": lambda x: x.expand(-1, 3, -1, -1)}, "channels 1", "channels 3"),
        ({"images": lambda x: torch.cat([x, x], 3)}, "image size [8, 8]", "image size [8, 16]"),
        ({"images": lambda x: x[:90], "labels": lambda y: y[:90]}, "number of images 100", "number of images 90"),
        ({"labels": lambda y: y.clamp(max=4)}, "classes 10", "classes 5"),
        ({"epochs": 2}, "epochs 1", "epochs 2"),
        ({"seed": 7}, "seed 0", "seed 7"),
        ({"images": lambda x: x.bitwise_xor(1)}, "contents", "contents"),  # another folder of as many images of this size
    ],
)
def test_a_file_of_other_data_is_refused_and_kept(cache, digits, change, found, asked):
    change = dict(change)
    images, labels = change.pop("images", lambda x: x)(digits[0][:100]), change.pop("labels", lambda y: y)(digits[1][:100])
    before = cache.read_bytes()
    with pytest.raises(ValueError, match=r"where .* was asked for; delete it, or give another path") as error:
        cached_classifier(cache, images, labels, **{"name": "digits", "epochs": 1, **change})
    assert all(part in str(error.value) for part in (str(cache), f"a classifier of {found}", f"where {asked}"))
    assert cache.read_bytes() == before


def test_an_older_file_that_does_not_say_its_contents_is_taken(cache, digits):
    saved = torch.load(cache, weights_only=True)
    del saved["contents"]
    torch.save(saved, cache)
    assert cached_classifier(cache, digits[0][:100], digits[1][:100], "digits", epochs=1).name.startswith(
        "classifier of digits"
    )


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half", {"format": "another"}, [1, 2]])
def test_a_file_that_is_no_classifier_is_refused_and_kept(cache, digits, content):
    if isinstance(content, bytes):
        cache.write_bytes(content)
    elif content == "half":
        cache.write_bytes(cache.read_bytes()[: cache.stat().st_size // 2])
    else:
        torch.save(content, cache)
    before = cache.read_bytes()
    with pytest.raises(ValueError, match=r"path = .*classifier.pth: .* a classifier.*delete it, or give another path"):
        cached_classifier(cache, digits[0][:100], digits[1][:100], "digits", epochs=1)
    assert cache.read_bytes() == before


def test_bad_training_data_is_refused_before_any_work(tmp_path, digits, monkeypatch):
    images, labels = digits
    monkeypatch.setattr(features, "train_classifier", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"the folder .*missing does not exist"):
        cached_classifier(tmp_path / "missing" / "c.pth", images, labels, "digits")
    for bad in (images.float(), images[:, 0], images[:9], images[..., :7]):
        with pytest.raises(ValueError, match=r"images: .* must be uint8 \[N, C, H, W\], N at least 10, H and W at least 8"):
            train_classifier(bad, labels[: len(bad)])
    for bad in (labels.float(), labels[:-1], labels - 1):
        with pytest.raises(ValueError, match=r"labels: .* must be \[1797\] integers from 0 up"):
            train_classifier(images, bad)
    with pytest.raises(ValueError, match="epochs = 0"):
        train_classifier(images, labels, epochs=0)


def test_images_of_another_shape_are_refused_by_the_features(classifier):
    for shape in ((2, 3, 8, 8), (2, 1, 7, 8), (1, 8, 8)):
        with pytest.raises(ValueError, match=r"must be \[B, 1, H, W\], H and W at least 8"):
            classifier.features(torch.zeros(shape))


# Inception


URL = "https://example.invalid/weights-inception-0123abcd.pth"


@pytest.fixture
def torch_fidelity(monkeypatch, tmp_path):
    """A stand-in with the interface of torch-fidelity 0.4; returns the folder where the weights belong."""

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048"])
            if (weights / "weights-inception-0123abcd.pth").read_bytes() != b"good":
                raise RuntimeError("bad magic number")

        def forward(self, x):
            assert x.dtype == torch.uint8
            assert x.shape[1] == 3
            return (x.float().mean((2, 3)),)

    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = FeatureExtractorInceptionV3, URL
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = tmp_path / "checkpoints"
    return weights


def test_inception_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity") as error:
        inception_features()
    assert "\n" not in str(error.value)


def test_inception_without_its_weights_says_where_they_belong(torch_fidelity, monkeypatch):
    def offline(url, path, hash_prefix):
        assert (url, hash_prefix) == (URL, "0123abcd")
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"needs its weights: put https.* at .*checkpoints.*no network") as error:
        inception_features()
    assert "\n" not in str(error.value)


def test_inception_takes_8_bit_images_of_three_channels(torch_fidelity):
    torch_fidelity.mkdir()
    (torch_fidelity / "weights-inception-0123abcd.pth").write_bytes(b"good")
    extractor = inception_features()
    levels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = extractor.features(from_uint8(levels))
    torch.testing.assert_close(grey, levels.float().mean((2, 3)).expand(-1, 3))
    assert extractor.features(from_uint8(levels).repeat(1, 3, 1, 1)).shape == (4, 3)
    with pytest.raises(ValueError, match=r"must be \[B, 1, H, W\] or \[B, 3, H, W\]"):
        extractor.features(torch.zeros(1, 2, 8, 8))


def test_inception_with_damaged_weights_says_which_file(torch_fidelity):
    torch_fidelity.mkdir()
    (torch_fidelity / "weights-inception-0123abcd.pth").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"weights-inception-0123abcd.pth: not the weights of the Inception, delete it"):
        inception_features()


# The bound


class Knows(torch.nn.Module):
    """A network that says 0.3 of every number, and of every symbol that each of three is as likely."""

    def forward(self, xt, t):
        return torch.full_like(xt, 0.3) if xt.is_floating_point() else torch.zeros(*xt.shape, 3)


def knowing(kind, values):
    """A diffusion that Knows; of an image of 0.2 alone, mean and mean square of the KL terms at t = 2..15, [14] each, and the
    variance of the term at 1.
    """
    schedule = LinearSchedule(15, 0.01, 0.4)
    book = Textbook(schedule.beta)
    if kind == "numbers":  # whose terms no noise changes
        ratio = book.posterior_variance / book.beta
        term = 0.5 * (ratio - 1 - ratio.log() + book.mu_from_x0**2 * (0.2 - 0.3) ** 2 / book.beta)[2:]
        return GaussianDiffusion(schedule, Knows(), prediction="reconstruction"), term, term**2, 0.0
    # log 3 for the share of the masked symbols that a step unmasks; so many are masked as alpha_bar says, give or take
    masked = 1 - book.alpha_bar
    unmasks = (math.log(3) * (book.previous - book.alpha_bar) / masked)[2:]
    variance = masked * book.alpha_bar / values
    square = unmasks**2 * (masked**2 + variance)[2:]
    of_first = math.log(3) ** 2 * variance[1].item()
    return DiscreteDiffusion(schedule, Knows(), 3, "absorbing"), unmasks * masked[2:], square, of_first


@pytest.mark.parametrize("kind", ["numbers", "symbols"])
def test_the_standard_error_of_a_quick_bound_is_the_spread_of_its_total(kind):
    """Of images that are all alike, so that the drawn times, and of symbols the masks, are all that varies."""
    diffusion, mean, square, variance = knowing(kind, values=64)
    for half in (slice(0, 7), slice(7, 14)):  # one term of each half of 2..15, times 7
        variance += 49 * (square[half].mean() - mean[half].mean() ** 2).item()
    expected = math.sqrt(variance / 40) / math.log(2)
    images = torch.full((40, 1, 8, 8), 0.2)  # level 153 of 255
    found = [bits_per_dimension(diffusion, [images], 2, seed) for seed in range(200)]
    total, kl, said = (torch.tensor([each[name] for each in found]) for name in ("total", "kl", "standard_error"))
    assert total.std().item() == pytest.approx(expected, rel=0.25)  # five standard errors
    assert said.mean().item() == pytest.approx(expected, rel=0.05)
    assert kl.mean().item() == pytest.approx(mean.sum().item() / math.log(2), abs=5 * expected / math.sqrt(200))


def test_a_rank_that_has_no_images_gets_what_the_others_measured():
    diffusion = GaussianDiffusion(LinearSchedule(10, 0.1, 0.2), TimeAwareUNet(1, 32, ch_mult=(1,), num_res_blocks=1))
    sent = []

    class First(Ranks):
        def gather_everywhere(self, items):
            sent.append(items)
            return items

    class Second(Ranks):
        def gather_everywhere(self, items):
            assert items == []
            return sent.pop(0)

    batches = list((torch.rand(6, 1, 4, 4) * 2 - 1).split(3))
    found = bits_by_time(diffusion, batches, 3, ranks=First(alone=True))
    assert bits_by_time(diffusion, [], 3, ranks=Second(alone=True)) == found
    assert found[0]["images"] == 6


def test_a_class_that_is_held_out_alone_makes_a_classifier(tmp_path):
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(40) % 2
    labels[split(40)[1][0]] = 2
    assert cached_classifier(tmp_path / "c.pth", images, labels, "x", epochs=1).n_classes == 3


def test_an_image_gets_the_same_noise_on_any_number_of_ranks():
    diffusion = GaussianDiffusion(LinearSchedule(15, 0.01, 0.4), Knows(), prediction="reconstruction")
    parts = torch.rand(4, 3, 2).mul(2).sub(1).unbind(0)

    def totals(rank, world):
        gathered = []
        ranks = types.SimpleNamespace(rank=rank, world=world, gather_everywhere=lambda items: gathered.append(items) or items)
        bits_by_time(diffusion, parts[rank::world], 5, ranks=ranks)
        return [bound[-1] for bound in gathered[0]]

    shared = [totals(rank, 2) for rank in range(2)]
    for alone, here in zip(totals(0, 1), (shared[0][0], shared[1][0], shared[0][1], shared[1][1]), strict=True):
        assert torch.equal(alone, here)
