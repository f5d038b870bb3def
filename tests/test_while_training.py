"""Pictures and metrics while a model trains: they change nothing of it, say what they measured, and stay within their share."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_state, losses, metrics, tiny

import checkpoint
import evaluation.metrics
import test as sampling
import train
from beta_schedule import CosineSchedule
from config import build_dataset, load_config
from dataset import Digits, from_uint8, to_uint8
from evaluation import while_training
from evaluation.metrics import BitsPerDimension, Evaluation
from evaluation.pictures import grid
from evaluation.sampling import draw
from evaluation.while_training import Quality
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareMLP
from training.ranks import Ranks

WHOLE = ["dataset.train.pipeline=[]", "dataset.valid.pipeline=[]"]  # the classifier takes no smaller images
OFTEN = [*WHOLE, "train_cfg.metric_period=1", "train_cfg.metric_samples=150", "train_cfg.metric_share=1"]
FEW = [*OFTEN[2:], "train_cfg.metric_samples=4", "train_cfg.sample_period=0"]  # of small images, and no picture
IMAGES = SimpleNamespace(images=SimpleNamespace(is_float=False))
UNMEASURED = SimpleNamespace(metric_period=0, metrics=(), sampler="dpm", sample_timesteps=250)
OWN = """
class Brightness:
    uses_model = False

    def __init__(self, evaluation):
        self.evaluation = evaluation

    def measure(self):
        e = self.evaluation
        classes = None if e.labels is None else e.labels.bincount(minlength=10)
        return {"mean": e.samples.mean(), "samples": len(e.samples), "classes": classes}

    @staticmethod
    def describe(found):
        return f"brightness {found['mean']}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the classifier of the digits is kept."""
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    """A run with both metrics after each of its two epochs."""
    extracted, statistics = [], evaluation.metrics.image_statistics
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(evaluation.metrics, "image_statistics", lambda *args: extracted.append(1) or statistics(*args))
        assert train.main(tiny(folder / "measured", *OFTEN)) == 0
    assert len(extracted) == 3  # of the samples twice, of the validation images once
    return folder / "measured"


def test_a_run_with_metrics_and_an_early_picture_trains_the_same_weights(measured, here, monkeypatch):
    monkeypatch.setattr(while_training, "FIRST_PICTURE", 0.0)
    assert train.main(tiny(here / "plain", *WHOLE, "train_cfg.sample_period=9")) == 0
    plain, states = metrics(here / "plain"), [checkpoint.load(path / "last.pth") for path in (measured, here / "plain")]
    for part in ("model", "ema", "optimizer", "loss_sums", "loss_by_t", "best_loss"):
        assert_same_state(states[0][part], states[1][part], part)
    for key in ("step", "train_loss", "valid_loss", "loss_by_t"):
        assert [line[key] for line in metrics(measured)] == [line[key] for line in plain]


def test_the_first_picture_is_drawn_inside_an_epoch_and_said_at_once(here, monkeypatch, capsys):
    monkeypatch.setattr(while_training, "FIRST_PICTURE", 0.0)
    assert train.main(tiny(here / "early", "train_cfg.sample_period=9", "train_cfg.max_steps=6")) == 0
    said = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "first samples" in line]
    assert said == [f"{here}/early/first.png: the first samples, after 1 steps"]
    assert {path.name for path in (here / "early").glob("*.png")} == {"first.png", "epoch_2.png"}  # and at the end


def test_the_distance_recorded_is_that_of_best_fd_pth_by_numpy(measured, here):
    """Samples drawn from the file again, their statistics and the matrix root by numpy."""
    found = [line["metrics"]["fd"] for line in metrics(measured) if "metrics" in line]
    assert len(found) == 2
    best = min(found, key=lambda one: one["distance"])
    diffusion, state = checkpoint.load_diffusion(measured / "best_fd.pth")
    run = train.Trainer({**state["config"], "train_cfg": {**state["config"]["train_cfg"], "model_save_dirpath": "x"}}, "cpu")
    run.folder.close()
    extractor = run.quality.metrics["fd"].extractor
    samples = draw(diffusion, 150, state["shape"], "dpm", 3, batch_size=64, seed=0).samples
    real = torch.stack(list(build_dataset(state["config"], "valid")))
    assert (best["samples"], best["real"], best["features"]) == (150, len(real), extractor.name)
    a, b = (extractor.features(from_uint8(to_uint8(x))).double().numpy() for x in (samples, real))
    difference, (C_a, C_b) = a.mean(0) - b.mean(0), (np.cov(x.T) for x in (a, b))
    root = np.sqrt(np.linalg.eigvals(C_a @ C_b).astype(complex)).sum().real  # tr (C_a C_b)^{1/2}
    assert best["distance"] == pytest.approx(difference @ difference + np.trace(C_a + C_b) - 2 * root, rel=1e-4)
    assert state["quality"]["best_fd"] == best["distance"] == checkpoint.load(measured / "last.pth")["quality"]["best_fd"]


def test_the_bits_are_recorded_with_their_number_of_images_and_error(measured):
    for line in metrics(measured):
        if found := line.get("metrics"):
            parts = found["bpd"]
            assert parts["total"] == pytest.approx(parts["prior"] + parts["kl"] + parts["reconstruction"], rel=1e-6)
            assert parts["images"] == 150
            assert parts["standard_error"] > 0


def test_a_metric_of_ones_own_and_a_resumed_best(here):
    (here / "my_metric.py").write_text(OWN)
    more = [*OFTEN, 'train_cfg.metrics=["my_metric.Brightness","fd"]', "train_cfg.lr_schedule=constant"]
    assert train.main(tiny(here / "own", *more, "train_cfg.epochs=1")) == 0
    path = here / "own" / "last.pth"
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"quality": state["quality"] | {"best_fd": 0.0}})  # nothing is better
    before = (here / "own" / "best_fd.pth").read_bytes()
    assert train.main(tiny(here / "own", *more, flags=("--resume",))) == 0
    assert (here / "own" / "best_fd.pth").read_bytes() == before
    found = metrics(here / "own")[-1]["metrics"]["my_metric.Brightness"]
    assert found["samples"] == 150
    assert -1 < found["mean"] < 1
    assert found["classes"] is None


def test_a_metric_of_ones_own_knows_what_each_sample_was_asked_to_be(here):
    (here / "my_metric.py").write_text(OWN)
    more = [*OFTEN, 'train_cfg.metrics=["my_metric.Brightness"]', "time_aware_net.kwargs.n_classes=10", "train_cfg.epochs=1"]
    assert train.main(tiny(here / "labelled", *more)) == 0
    found = metrics(here / "labelled")[-1]["metrics"]["my_metric.Brightness"]
    labels = Digits(train=False).labels
    assert found["classes"] == labels[torch.arange(150) * len(labels) // 150].bincount(minlength=10).tolist()
    flags = ["--metrics", "my_metric.Brightness", "-n", "20", "--class", "3", "--timesteps", "2", "--device", "cpu"]
    assert sampling.main([str(here / "labelled" / "last.pth"), *flags]) == 0
    results = json.loads((here / "labelled" / "last_gen" / "metrics.json").read_text())
    assert results["my_metric.Brightness"]["classes"] == [0, 0, 0, 20, 0, 0, 0, 0, 0, 0]


def test_samples_that_are_not_finite_end_no_run_and_the_bits_are_measured_all_the_same(here, monkeypatch, caplog):
    def spoilt(*args, **kwargs):
        drawn = draw(*args, **kwargs)
        return drawn._replace(samples=drawn.samples * math.nan)

    monkeypatch.setattr(while_training, "draw", spoilt)
    assert train.main(tiny(here / "spoilt", *OFTEN, "train_cfg.epochs=1")) == 0
    assert "samples at step 4 are not finite: the metrics that look at them are left out" in caplog.text
    assert metrics(here / "spoilt")[-1]["metrics"].keys() == {"bpd"}


@pytest.mark.parametrize("flip", ["RandomHorizontalFlip", "RandomVerticalFlip"])
def test_images_to_measure_on_are_the_same_every_time(flip):
    config = load_config("configs/Digits_den.json", [f'dataset.valid.pipeline=[{{"name":"{flip}"}}]'])
    found = Evaluation(GaussianDiffusion(CosineSchedule(4), TimeAwareMLP(2)), config, Ranks("cpu"), 8)
    first, again = (torch.cat([x0 for x0, _ in found.images("valid")]) for _ in range(2))
    images = build_dataset(config, "valid")
    assert torch.equal(first, again)
    assert torch.equal(first, from_uint8(torch.stack([images.pixels(i) for i in range(180)])))


def test_images_to_measure_on_are_scaled_as_those_to_train_on():
    class Negative(Digits):
        def to_float(self, pixels):
            return -super().to_float(pixels)

    images = Negative(train=False)
    how = {"datasets": {"valid": images}}
    found = Evaluation(GaussianDiffusion(CosineSchedule(4), TimeAwareMLP(2)), {}, Ranks("cpu"), 8, **how)
    x0 = torch.cat([x0 for x0, _ in found.images("valid")])
    assert torch.equal(x0, -from_uint8(torch.stack([images.pixels(i) for i in range(180)])))


def test_the_least_distance_outlives_a_part_of_the_run_without_metrics(measured, here):
    least = checkpoint.load(measured / "last.pth")["quality"]["best_fd"]
    last, more = str(measured / "last.pth"), [*OFTEN, "train_cfg.metric_period=0"]
    assert train.main(tiny(here / "without", *more, "train_cfg.epochs=3", flags=("--resume", last))) == 0
    assert checkpoint.load(here / "without" / "last.pth")["quality"]["best_fd"] == least
    assert (here / "without" / "best_fd.pth").read_bytes() == (measured / "best_fd.pth").read_bytes()


def test_a_distance_that_is_no_number_is_not_the_least():
    quality = Quality(
        SimpleNamespace(cfg=UNMEASURED, ema=SimpleNamespace(n_levels=None, T=1000), train_data=IMAGES, ranks=Ranks("cpu"))
    )
    for distance, better in ((math.nan, False), (2.0, True), (math.nan, False), (3.0, False), (1.0, True)):
        quality._note_best({"fd": {"distance": distance}})
        assert quality.better == better
    assert quality.best_fd == 1.0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["train_cfg.metric_samples=128"], "train_cfg.metric_samples = 128: the Fréchet distance needs at least 129"),
        (["train_cfg.metrics=[\"fid\"]"], "train_cfg.metrics = \"fid\": unknown"),
        (["train_cfg.metric_share=0"], "train_cfg.metric_share = 0: must be a number"),
        (["train_cfg.metrics=[\"my_file.Missing\"]"], "train_cfg.metrics = \"my_file.Missing\": no file my_file.py"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_the_first_step(more, words, here, capsys):
    assert train.main(tiny(here / "refused", *OFTEN, *more)) == 2
    assert f"train.py: {words}" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (here / "refused").exists()


PART = """
class Whole:
    def __init__(self, evaluation):
        pass

    uses_model = False

    def measure(self):
        return {}

    def describe(self, found):
        return ""


for part in ("uses_model", "measure", "describe"):
    kept = {name: value for name, value in vars(Whole).items() if name not in (part, "__dict__", "__weakref__")}
    globals()[f"without_{part}"] = type(f"without_{part}", (), kept)
"""


@pytest.mark.parametrize("part", ["uses_model", "measure", "describe"])
def test_a_metric_that_lacks_a_part_is_refused_before_the_first_step_and_the_first_sample(part, measured, here, capsys):
    (here / "my_lacking.py").write_text(PART)
    name, before = f"my_lacking.without_{part}", {path: path.stat().st_mtime_ns for path in measured.rglob("*")}
    assert train.main(tiny(here / "lacking", *OFTEN, f'train_cfg.metrics=["my_lacking.Whole","{name}"]')) == 2
    assert f"train.py: train_cfg.metrics = {name}: has no {part};" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (here / "lacking").exists()
    argv = [str(measured / "last.pth"), "--device", "cpu", "-n", "1", "--metrics", "my_lacking.Whole", name]
    assert sampling.main(argv) == 2
    assert f"test.py: --metrics = {name}: has no {part};" in capsys.readouterr().err.strip().splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in measured.rglob("*")} == before


FAILING = """
from pathlib import Path


class Mine:
    uses_model = False

    def __init__(self, evaluation):
        pass

    def measure(self):
        if Path("not mended").exists():
            raise RuntimeError("mine")
        return {"found": 3}

    describe = staticmethod(str)
"""


GREY = """
def grey(predict_x0, x, levels, normal):
    for level in levels[1:]:
        yield 0 * x
"""


def test_a_sampler_of_ones_own_draws_the_pictures_and_one_that_is_not_there_is_refused(here, capsys):
    (here / "my_grey.py").write_text(GREY)
    assert train.main(tiny(here / "grey", "train_cfg.max_steps=1", "train_cfg.sampler=my_grey.grey")) == 0
    assert set(np.unique(np.asarray(Image.open(here / "grey" / "epoch_1.png")))) == {128, 255}  # white between samples
    assert train.main(tiny(here / "none", "train_cfg.sampler=dmp")) == 2
    assert "train_cfg.sampler = \"dmp\": unknown; did you mean 'dpm'?" in capsys.readouterr().err
    assert not (here / "none").exists()


def test_a_picture_has_whole_rows_a_class(here, monkeypatch):
    seen = []
    monkeypatch.setattr(while_training, "grid", lambda x, columns: seen.append((len(x), columns)) or grid(x, columns))
    assert train.main(tiny(here / "rows", "train_cfg.max_steps=1", "time_aware_net.kwargs.n_classes=10")) == 0
    assert seen == [(60, 6)]


def test_a_metric_that_does_not_exist_is_told_also_where_none_is_measured(here, capsys):
    assert train.main(tiny(here / "told", 'train_cfg.metrics=["fdd"]', "train_cfg.max_steps=1")) == 0
    assert "train_cfg.metrics = \"fdd\": unknown; did you mean 'fd'?" in capsys.readouterr().err


def test_a_run_is_saved_before_it_is_measured(here, monkeypatch):
    """For what sends a signal may not wait until a metric is done."""

    def dies(metric) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(BitsPerDimension, "measure", dies)
    assert train.main(tiny(here / "dies", *FEW, 'train_cfg.metrics=["bpd"]')) != 0
    assert checkpoint.load(here / "dies" / "last.pth")["step"] > 0


def test_a_metric_of_ones_own_that_fails_loses_no_step_and_is_measured_once_it_is_mended(here):
    (here / "my_failing.py").write_text(FAILING)
    (here / "not mended").touch()
    more = [*FEW, 'train_cfg.metrics=["my_failing.Mine"]']
    with pytest.raises(RuntimeError, match=r"^mine$"):
        train.main(tiny(here / "failing", *more))
    assert checkpoint.load(here / "failing" / "last.pth")["step"] == 4  # an epoch
    (here / "not mended").unlink()
    assert train.main(tiny(here / "failing", *more, flags=("--resume",))) == 0
    lines = metrics(here / "failing")
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert [line.get("metrics") for line in lines] == [None, {"my_failing.Mine": {"found": 3}}] * 2
    assert train.main(tiny(here / "never failed", *more)) == 0
    assert losses(here / "failing") == losses(here / "never failed")


def test_of_a_process_of_one_step_the_bits_are_measured(here):
    """They have no KL term."""
    more = [*FEW, "schedule.kwargs.timesteps=1", 'train_cfg.metrics=["bpd"]', "train_cfg.max_steps=1"]
    assert train.main(tiny(here / "one", *more)) == 0
    found = metrics(here / "one")[-1]["metrics"]["bpd"]
    assert (found["kl"], found["images"]) == (0, 4)
    assert found["total"] == pytest.approx(found["prior"] + found["reconstruction"], rel=1e-6)


@pytest.fixture(scope="module")
def with_a_best(folder):
    """The settings of a run that has stopped after one epoch, whose least distance was 1.5."""
    more = ["train_cfg.metric_samples=150", "train_cfg.sample_period=0", "train_cfg.epochs=1"]
    assert train.main(tiny(folder / "best", *more)) == 0
    path = folder / "best" / "last.pth"
    state = checkpoint.load(path) | {"quality": {"seconds": 0.0, "run_seconds": 9.0, "best_fd": 1.5}}
    for name in ("last.pth", "best_fd.pth"):
        checkpoint.save(path.with_name(name), state)
    return more


@pytest.mark.parametrize(
    ("setting", "least"),
    [
        ("metric_samples=151", math.inf),
        ("metric_features=inception", math.inf),
        ("sample_timesteps=4", math.inf),
        ("sampler=ddim", math.inf),
        ("metric_share=0.5", 1.5),
        ("epochs=3", 1.5),
    ],
)
def test_the_least_distance_is_kept_only_while_the_next_ones_compare_with_it(setting, least, with_a_best, folder):
    argv = tiny(folder / "best", *with_a_best, f"train_cfg.{setting}")
    run = train.Trainer(load_config(argv[0], argv[argv.index("--set") + 1 :]), "cpu", resume="")
    run.folder.close()
    assert (run.step, run.quality.best_fd) == (4, least)


def test_a_data_set_too_small_for_the_distance_is_refused(here, capsys, monkeypatch):
    from PIL import Image

    (here / "few").mkdir()
    for i in range(40):
        Image.new("L", (8, 8), i).save(here / "few" / f"{i}.png")
    section = f'{{"root": "{here / "few"}", "mode": "L"}}'
    data = ["dataset.name=ImageFolder", f"dataset.train={section}", f"dataset.valid={section}"]
    assert train.main(tiny(here / "small", *OFTEN[2:], *data)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("train.py: dataset.valid = 40: the Fréchet distance needs at least 129")
    assert not (here / "small").exists()


class Slow:
    """A metric of so many seconds."""

    uses_model, seconds = True, 3.0

    def __init__(self, clock):
        self.clock = clock

    def measure(self) -> dict:
        self.clock.now += self.seconds
        return {}

    describe = staticmethod(str)


@pytest.mark.parametrize(("share", "seconds"), [(0.05, 3.0), (0.2, 1.0), (0.2, 7.0)])
def test_metrics_never_take_more_than_their_share_of_the_time(share, seconds, clock, monkeypatch, caplog):
    """Epochs of ten seconds; a batch of samples takes a fifth of a measurement, so that its time is foreseen."""
    monkeypatch.setattr(train.log, "propagate", True)
    caplog.set_level("INFO")
    cfg = SimpleNamespace(**vars(UNMEASURED), metric_share=share, metric_samples=5 * 64, precision="fp32")
    monkeypatch.setattr(while_training, "take_state", lambda run: None)
    run = SimpleNamespace(
        cfg=cfg, ema=SimpleNamespace(n_levels=None, T=1000), train_data=IMAGES, ranks=Ranks("cpu"), save_last=lambda state: None
    )
    run.device = torch.device("cpu")
    quality = Quality(run)
    cfg.metric_period = 2
    quality.metrics, quality.evaluation = {"slow": Slow(clock)}, SimpleNamespace(check=None)
    Slow.seconds, spent, at = seconds * 0.8, [], []

    def draw(n: int) -> None:
        clock.now += seconds / 5 if n == 64 else seconds * 0.2  # the samples of a measurement cost the rest
        spent.append(seconds / 5)

    monkeypatch.setattr(quality, "_draw", draw)
    for epoch in range(1, 101):
        clock.now += 10
        if quality.measure(epoch, last=False):
            at.append(epoch)
            spent.append(Slow.seconds)
        assert sum(spent) <= share * (clock.now - 100.0) + 1e-9
    possible = share * (clock.now - 100.0) / seconds
    assert 0.5 * min(possible, 50) < len(at) <= min(possible, 50)
    assert all(epoch % 2 == 0 for epoch in at)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == (at != list(range(2, 101, 2)))


def test_a_class_is_known_to_take_more_calls_than_a_sample(clock, here, monkeypatch):
    """At most 256 calls for each of 10 classes, where a sample of the tiny run has 3."""
    found, step = [], train.Trainer.train_step

    def second(run, *args):
        clock.now += 1.0
        step(run, *args)

    def two_seconds(quality, n):
        clock.now += 2.0
        found.append(quality)

    monkeypatch.setattr(train.Trainer, "train_step", second)
    monkeypatch.setattr(Quality, "_draw", two_seconds)
    of_classes = ('train_cfg.metrics=["accuracy"]', "train_cfg.metric_period=1", "train_cfg.metric_samples=100")
    assert train.main(tiny(here / "classes", "train_cfg.max_steps=1", "time_aware_net.kwargs.n_classes=10", *of_classes)) == 0
    assert found[0].expected == pytest.approx(2.0 * 2 * 2560 / 3)  # of two batches
    assert "metrics" not in metrics(here / "classes")[0]  # left out, as it would take nearly all of the time


def test_the_time_spent_is_kept_when_a_run_goes_on(clock):
    run = SimpleNamespace(cfg=UNMEASURED, ema=SimpleNamespace(n_levels=None, T=1000), train_data=IMAGES)
    quality = Quality(run)
    quality.metrics, quality.seconds, quality.best_fd = {"slow": Slow(clock)}, 4.0, 1.5
    clock.now += 60
    state = quality.state()
    assert state == {"seconds": 4.0, "run_seconds": 60.0, "best_fd": 1.5}
    later = Quality(run)
    later.metrics = quality.metrics
    later.restore(state)
    clock.now += 5
    assert later.state() == {"seconds": 4.0, "run_seconds": 65.0, "best_fd": 1.5}
    later.restore({})
    assert later.best_fd == math.inf  # a checkpoint from before there were metrics


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])  # of 3 batches, the fourth rank has none
def test_ranks_measure_together(ranks, measured, here, run_ranks):
    argv = tiny(here / f"{ranks} ranks", *OFTEN)
    run_ranks("train", argv, ranks)
    for line in metrics(here / f"{ranks} ranks"):
        if found := line.get("metrics"):
            assert found["fd"]["samples"] == 150
            assert found["bpd"]["images"] == 150
    assert checkpoint.load(here / f"{ranks} ranks" / "best_fd.pth")["quality"]["best_fd"] > 0
