"""Clusters of alike images as classes: how they are found, and a run without labels that learns and samples from them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CROP, assert_same_state, losses, stop_at, tiny
from torchvision.transforms import v2

import checkpoint
import test as sampling
import train
from config import _clustered, build_dataset, load_config
from dataset import Digits, small_images
from evaluation.metrics import Evaluation, build_extractor
from evaluation.sampling import labels_in_shares
from training.ranks import Ranks
from training.state import restore_state

ROOT = Path(__file__).parent.parent
CLUSTERS = ("dataset.clusters=5", "time_aware_net.kwargs.n_classes=5", "train_cfg.label_dropout=0.5")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "clusters"
    assert train.main(tiny(folder, *CLUSTERS)) == 0
    return folder


def stripes(folder: Path) -> list[int]:
    """60 noisy images of 40 x 20 pixels below a folder, each with one of three stripes bright; the stripe of each, by name."""
    rng = np.random.default_rng(0)
    kinds = [int(kind) for kind in rng.permutation([0] * 30 + [1] * 20 + [2] * 10)]
    for i, kind in enumerate(kinds):
        pixels = rng.integers(0, 60, (40, 20), dtype=np.uint8)
        pixels[13 * kind : 13 * kind + 13] += 150
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return kinds


def test_clusters_are_the_kinds_of_image_in_both_splits(tmp_path):
    kinds = stripes(tmp_path / "images")
    part = '{"root": "%s", "mode": "L", "train": %s, "pipeline": []}'
    settings = ["dataset.name=ImageFolder", "dataset.clusters=3", "time_aware_net.kwargs.n_classes=3"]
    settings += [
        f"dataset.{split}={part % (tmp_path / 'images', flag)}" for split, flag in (("train", "true"), ("valid", "false"))
    ]
    config = load_config(ROOT / "configs" / "Digits_den.json", settings)
    train_images, valid_images = build_dataset(config, "train"), build_dataset(config, "valid")
    assert train_images.class_names == valid_images.class_names == ["0", "1", "2"]
    pairs = set(zip(kinds[::10], valid_images.labels.tolist(), strict=True))
    pairs |= set(zip([kind for i, kind in enumerate(kinds) if i % 10], train_images.labels.tolist(), strict=True))
    assert len(pairs) == 3  # each kind has one number, and each number one kind


def test_a_valid_image_has_the_cluster_with_the_nearest_mean():
    settings = ["dataset.clusters=4", "time_aware_net.kwargs.n_classes=4"]
    config = load_config(ROOT / "configs" / "Digits_den.json", settings)
    images, valid = build_dataset(config, "train"), build_dataset(config, "valid")
    x, others = (np.stack([np.asarray(part.image(i), float) for i in range(len(part))]) for part in (images, valid))
    means = np.stack([x[images.labels.numpy() == c].mean(0) for c in range(4)])
    distance = ((others[:, None] - means) ** 2).sum((2, 3))
    agree = distance.argmin(1) == valid.labels.numpy()
    assert agree.mean() > 0.95  # centres of minibatches are means but for their last steps


def test_large_images_are_averaged_over_squares():
    """64 x 8 pixels, each as bright as the number of its row: 16 x 8 means of four rows."""
    images = Digits()
    images.shape = torch.Size([3, 64, 8])
    images.pixels = lambda i: torch.arange(64, dtype=torch.uint8)[None, :, None].expand(images.shape)
    small = small_images(images).reshape(len(images), 3, 16, 8)
    expected = np.broadcast_to((4 * np.arange(16) + 1.5)[:, None] / 255, small.shape)
    np.testing.assert_allclose(small, expected, rtol=1e-6)


def test_images_with_a_random_transform_are_always_seen_alike_and_draw_none_of_the_runs_numbers():
    images, before = Digits(pipeline=[v2.RandomCrop(4)]), torch.get_rng_state()
    first, second = small_images(images), small_images(images)
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_with_clusters_stopped_and_resumed_is_the_run_never_stopped(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 6)
        assert train.main(tiny(tmp_path / "parts", *CLUSTERS)) == 143
    assert train.main(tiny(tmp_path / "parts", *CLUSTERS, flags=("--resume",))) == 0
    assert losses(tmp_path / "parts") == losses(run)
    assert_same_state(checkpoint.load(run / "last.pth"), checkpoint.load(tmp_path / "parts" / "last.pth"))


@pytest.fixture
def grown(tmp_path, monkeypatch) -> tuple[list[str], torch.Tensor]:
    """The arguments of a run whose folder of images has got one more since it stopped, and the clusters that it had found."""
    images, folder = Digits(), tmp_path / "images"
    folder.mkdir()
    for i in range(300):
        images.image(i).save(folder / f"{i:03}.png")
    part = f'{{"root": "{folder}", "mode": "L", "pipeline": [{CROP}]}}'
    data = ["dataset.name=ImageFolder", f"dataset.train={part}", f"dataset.valid={part}"]
    argv = tiny(tmp_path / "run", *CLUSTERS, *data)
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 1)
        assert train.main(argv) == 143
    config = checkpoint.load(tmp_path / "run" / "last.pth")["config"]
    before = build_dataset(config, "train").labels
    images.image(300).save(folder / "-1.png")  # the first by name
    _clustered.cache_clear()
    assert (build_dataset(config, "train").labels[1:] == before).float().mean() < 0.5  # without the run's centres
    return argv, before


def test_the_clusters_of_a_run_stay_when_its_images_change(grown, tmp_path, monkeypatch):
    argv, before = grown
    resumed, evaluations, evaluation_of = [], [], sampling.evaluation_of
    monkeypatch.setattr(train, "restore_state", lambda run, state: resumed.append(run) or restore_state(run, state))
    assert train.main([*argv, "--resume"]) == 0
    for batches in (resumed[0].train_data, resumed[0].valid_data):
        assert torch.equal(batches.images.labels[1:], before)
    monkeypatch.setattr(sampling, "evaluation_of", lambda *args: evaluations.append(evaluation_of(*args)) or evaluations[0])
    assert sampling.main([str(tmp_path / "run" / "last.pth"), "--device", "cpu", "-n", "2", "--timesteps", "2"]) == 0
    assert torch.equal(evaluations[0].dataset("valid").labels[1:], before)


def test_a_run_that_kept_no_clusters_does_not_go_on_with_others(grown, tmp_path, capsys):
    last = tmp_path / "run" / "last.pth"
    state = checkpoint.load(last)
    del state["cluster_centres"]
    checkpoint.save(last, state)
    assert train.main([*grown[0], "--resume"]) == 2
    assert "last.pth: the training images are not the run's, and so its clusters are lost" in capsys.readouterr().err


def test_a_run_that_kept_no_clusters_goes_on_where_one_image_lies_between_two(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 2)
        assert train.main(tiny(tmp_path / "run", *CLUSTERS)) == 143
    last = tmp_path / "run" / "last.pth"
    state = checkpoint.load(last)
    del state["cluster_centres"]
    state["class_counts"][0] += 1
    state["class_counts"][1] -= 1
    checkpoint.save(last, state)
    assert train.main(tiny(tmp_path / "run", *CLUSTERS, flags=("--resume",))) == 0


@pytest.mark.parametrize("centres", ["text", torch.zeros(5), torch.zeros(5, 7), torch.full((5, 16), torch.nan)])
def test_centres_that_are_not_of_the_images_are_one_line(run, centres, tmp_path, capsys):
    state = checkpoint.load(run / "last.pth") | {"cluster_centres": centres}
    checkpoint.save(tmp_path / "last.pth", state)
    assert sampling.main([str(tmp_path / "last.pth"), "--device", "cpu", "--timesteps", "2", "--metrics", "bpd"]) == 2
    assert "the centres of the run's clusters are not of images [1, 4, 4]" in capsys.readouterr().err


def test_samples_are_of_the_clusters_in_their_shares_unless_a_class_is_named(run, monkeypatch):
    seen, drawn = [], sampling.draw

    def listening(*args, condition, **more):
        seen.append(condition["label"])
        return drawn(*args, condition=condition, **more)

    monkeypatch.setattr(sampling, "draw", listening)
    for flags in ([], ["--class", "3"], ["--report"]):
        settings = ["-n", "40", "--timesteps", "2", "--bpd-images", "10", "--bpd-timesteps", "2"]
        assert sampling.main([str(run / "last.pth"), "--device", "cpu", *settings, *flags]) == 0
    state = checkpoint.load(run / "last.pth")
    labels = build_dataset(state["config"], "train").labels
    assert state["class_counts"] == torch.bincount(labels, minlength=5).tolist()
    for found in (seen[0], seen[2]):
        counts = torch.bincount(found, minlength=5)
        assert (counts - torch.tensor(state["class_counts"]) * 40 / len(labels)).abs().max() < 1
        assert found.diff().min() < 0  # in no order, so that the first of them are a fair choice
    assert seen[1].tolist() == [3] * 40


def test_an_average_made_afterwards_knows_the_shares_too(tmp_path):
    assert train.main(tiny(tmp_path / "run", *CLUSTERS, "train_cfg.power_ema=[0.1,0.2]")) == 0
    flags = ["--device", "cpu", "-n", "4", "--timesteps", "2", "--ema-length", "0.15"]
    assert sampling.main([str(tmp_path / "run" / "last.pth"), *flags]) == 0


def test_a_checkpoint_without_counts_is_told_apart(run, tmp_path, capsys):
    state = checkpoint.load(run / "last.pth")
    del state["class_counts"]
    torch.save(state, tmp_path / "last.pth")
    assert sampling.main([str(tmp_path / "last.pth"), "--device", "cpu", "-n", "4", "--timesteps", "2"]) == 2
    assert "--class data: the checkpoint is older" in capsys.readouterr().err


def test_the_features_are_of_the_datas_own_classes(run, tmp_path):
    state = checkpoint.load(run / "last.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.metrics.cached_classifier", lambda path, images, labels, *rest, **more: labels)
        labels = build_extractor(Evaluation(None, state["config"], Ranks("cpu"), 1, classifier=str(tmp_path / "c.pth")))
    assert torch.equal(labels, Digits().labels)


def test_each_data_set_has_a_classifier_of_its_own(run, tmp_path, monkeypatch):
    """Also another one of the same name: a second folder, or the same images cropped."""
    paths, config = [], checkpoint.load(run / "last.pth")["config"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluation.metrics.cached_classifier", lambda path, *rest, **more: paths.append(str(path)))
    for pipeline in ([], [{"name": "CenterCrop", "size": 6}], []):
        config["dataset"]["train"]["pipeline"] = pipeline
        build_extractor(Evaluation(None, config, Ranks("cpu"), 1))
    assert paths[0] == paths[2] != paths[1]
    assert all(path.startswith("models/classifier_Digits_") for path in paths)


def test_labels_in_shares_are_right_up_to_rounding_and_on_average():
    counts = [7, 1, 0, 12]
    labels = labels_in_shares(counts, 40)
    assert Counter(labels.tolist()) == {0: 14, 1: 2, 3: 24}
    assert labels_in_shares([0, 3], 3, offset=0.0).tolist() == [1, 1, 1]  # a class without images has no samples
    few = torch.cat([labels_in_shares(counts, 2, offset) for offset in (torch.arange(2000) + 0.5) / 2000])
    np.testing.assert_allclose(torch.bincount(few, minlength=4) / 4000, np.array(counts) / 20, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["dataset.clusters=1"], "dataset.clusters = 1: must be null or lie in 2..4096"),
        (["dataset.clusters=true"], "dataset.clusters = true: must be null or lie in"),
        (["dataset.cluster=4"], "dataset.cluster"),
        (
            ["dataset.clusters=4", "time_aware_net.kwargs.n_classes=5"],
            "dataset.clusters = 4: time_aware_net.kwargs.n_classes must be 4",
        ),
        (["dataset.clusters=4"], "dataset.clusters = 4: time_aware_net.kwargs.n_classes must be 4"),
        (["dataset.clusters=4000", "time_aware_net.kwargs.n_classes=4000"], "only 1617 images to train on"),
    ],
)
def test_clusters_that_cannot_be_are_refused(settings, words, tmp_path, capsys):
    assert train.main(tiny(tmp_path / "run", *settings)) == 2
    assert words in capsys.readouterr().err
