"""Classes, guidance and editing as a user runs them: train.py with labels, and the flags of test.py."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import assert_same_state, losses, stop_at, tiny

import checkpoint
import test as sampling
import train
from dataset import Digits
from evaluation.metrics import METRICS
from evaluation.sampling import condition_by_row

CLASSES = ("time_aware_net.kwargs.n_classes=10", "dataset.train.pipeline=[]", "dataset.valid.pipeline=[]")
CLASSES += ("train_cfg.lr=0.05", "train_cfg.warmup_steps=0", "train_cfg.ema_decay=0.5")  # so that eight steps show


def classes(folder: Path, *more: str, flags: tuple[str, ...] = ()) -> list[str]:
    return tiny(folder, *CLASSES, *more, flags=flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a tiny run with labels, and of images to edit."""
    folder = tmp_path_factory.mktemp("runs") / "classes"
    assert train.main(classes(folder)) == 0
    images = folder.parent
    digits = Digits(train=False)
    digits.image(0).save(images / "a.png")
    digits.image(1).save(images / "b.png")
    digits.image(0).resize((4, 4)).save(images / "small.png")
    mask = Image.new("L", (8, 8), 255)
    mask.paste(0, (0, 4, 8, 8))
    mask.save(images / "mask.png")
    return folder


def draw(run: Path, *flags: str) -> int:
    return sampling.main([str(run / "last.pth"), "--device", "cpu", "--timesteps", "5", *flags])


def test_a_run_with_labels_stopped_and_resumed_is_the_run_never_stopped(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 6)
        assert train.main(classes(tmp_path / "parts")) == 143
    assert train.main(classes(tmp_path / "parts", flags=("--resume",))) == 0
    assert losses(tmp_path / "parts") == losses(run)
    assert_same_state(checkpoint.load(run / "last.pth"), checkpoint.load(tmp_path / "parts" / "last.pth"))


def test_data_with_other_classes_than_the_network_learned_are_not_measured(run, tmp_path, capsys):
    state = checkpoint.load(run / "last.pth")
    state["class_names"][3] = "tree"
    checkpoint.save(tmp_path / "other.pth", state)
    for metric in ("bpd", "accuracy"):
        assert sampling.main([str(tmp_path / "other.pth"), "--device", "cpu", "--timesteps", "2", "--metrics", metric]) == 2
        assert re.search(r"dataset\.valid: has the classes \[.*, and the network learned \[.*'tree'", capsys.readouterr().err)


def test_the_labels_reach_the_network_and_a_checkpoint_knows_their_names(run):
    state = checkpoint.load(run / "last.pth")
    assert state["class_names"] == [str(i) for i in range(10)]
    moved = state["model"]["time_aware_net.time_embedding.label.weight"].abs().amax(1) > 0  # they start at zero
    assert moved.tolist() == [True] * 11  # each digit, and "no label", was seen


def test_every_sample_of_all_classes_is_that_of_its_class_alone_from_the_same_noise(run):
    assert draw(run, "-n", "20", "--class", "all") == 0
    picture = Image.open(run / "last_gen" / "grid.png")
    assert picture.size == (2 * 66 + 2, 10 * 66 + 2)  # ten rows of two
    ours = (run / "last_gen" / "7.png").read_bytes()  # the second sample of the fourth row
    assert draw(run, "-n", "20", "--class", "3") == 0
    assert (run / "last_gen" / "7.png").read_bytes() == ours
    assert draw(run, "-n", "20", "--class", "4") == 0
    assert (run / "last_gen" / "7.png").read_bytes() != ours


def test_all_classes_have_a_row_where_not_all_samples_have_a_place(run):
    assert draw(run, "-n", "100", "--class", "all") == 0
    assert Image.open(run / "last_gen" / "grid.png").size == (6 * 66 + 2, 10 * 66 + 2)
    assert len(list((run / "last_gen").glob("[0-9]*.png"))) == 60
    assert draw(run, "-n", "3") == 0
    assert {path.stem for path in (run / "last_gen").glob("[0-9]*.png")} == {"0", "1", "2"}  # none of the call before


def test_what_is_transparent_in_a_mask_is_unknown(run, capsys):
    given, mask = run.parent / "a.png", Image.new("LA", (8, 8), (255, 255))
    mask.paste((255, 0), (0, 4, 8, 8))
    mask.save(run.parent / "erased.png")
    pictures = []
    for name in ("mask.png", "erased.png"):
        assert draw(run, "-n", "1", "--class", "2", "--inpaint", str(given), "--mask", str(run.parent / name)) == 0
        pictures.append((run / "last_inpaint" / "0.png").read_bytes())
    assert pictures[0] == pictures[1]
    Image.new("L", (8, 8), 255).save(run.parent / "white.png")
    assert draw(run, "--inpaint", str(given), "--mask", str(run.parent / "white.png")) == 2
    assert "white.png: every pixel is white" in capsys.readouterr().err


def test_guidance_of_weight_1_is_the_network_alone_and_others_are_not(run):
    pictures = {}
    for name, flags in {
        "alone": [],
        "1": ["--guidance", "1"],
        "3": ["--guidance", "3"],
        "never": ["--guidance", "3", "--interval", "0", "0"],
        "itself": ["--guidance", "3", "--guide", str(run / "last.pth")],
    }.items():
        assert draw(run, "-n", "2", "--class", "3", *flags) == 0
        pictures[name] = (run / "last_gen" / "grid.png").read_bytes()
    assert pictures["1"] == pictures["never"] == pictures["itself"] == pictures["alone"]
    assert pictures["3"] != pictures["alone"]


class Brightness:
    """A metric: how bright the samples are."""

    uses_model, figure = False, "mean"

    def __init__(self, evaluation):
        self.evaluation = evaluation

    def measure(self):
        return {"mean": self.evaluation.samples.mean().item()}

    describe = staticmethod(str)


def test_of_several_weights_the_one_with_the_least_metric_is_named(run, monkeypatch, capsys):
    """And each has a folder with the samples that it has alone."""
    monkeypatch.setitem(METRICS, "brightness", Brightness)
    flags = ["-n", "20", "--class", "all", "--metrics", "brightness"]
    assert sampling.main(["--guidance", "1,8,2", str(run / "last.pth"), "--device", "cpu", "--timesteps", "5", *flags]) == 0
    last, found = capsys.readouterr().out.splitlines()[-1], {}
    for weight in ("1", "8", "2"):
        folder = run / f"last_guidance{weight}_gen"
        results = json.loads((folder / "metrics.json").read_text())
        found[weight] = results["brightness"]["mean"]
        assert results["settings"]["guidance"] == float(weight)
        assert draw(run, *flags, "--guidance", weight) == 0
        assert (run / "last_gen" / "grid.png").read_bytes() == (folder / "grid.png").read_bytes()
    assert len(set(found.values())) == 3
    assert last == f"least brightness: {min(found.values()):.4f}, with --guidance {min(found, key=found.get)}"


class FirstIsNan(Brightness):
    """A metric that finds no number the first time, and each later time a larger one."""

    figure, found = "figure", iter([])

    def measure(self):
        return {"figure": next(self.found), "each": [1.0, math.inf]}


def plain_json(text: str) -> dict:
    """What a reader makes of it that keeps to the standard, which knows neither NaN nor Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_weight_whose_metric_is_no_number_is_not_the_best(run, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "nans", FirstIsNan)
    monkeypatch.setattr(FirstIsNan, "found", iter([math.nan, 0.5, 0.75]))
    assert draw(run, "-n", "2", "--class", "3", "--metrics", "nans", "--guidance", "1,2,3") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "least nans: 0.5000, with --guidance 2"
    found = [plain_json((run / f"last_guidance{weight}_gen" / "metrics.json").read_text())["nans"] for weight in (1, 2)]
    assert found == [{"figure": None, "each": [1.0, None]}, {"figure": 0.5, "each": [1.0, None]}]


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (["--inpaint", "a.png", "--mask", "mask.png"], "inpaint"),
        (["--from", "a.png", "--strength", "0.4"], "from"),
        (["--interpolate", "a.png", "b.png"], "interpolate"),
        (["--upscale", "small.png"], "upscale"),
    ],
)
def test_an_edit_writes_its_samples_and_keeps_what_it_must(flags, kind, run):
    flags = [str(run.parent / flag) if flag.endswith(".png") else flag for flag in flags]
    assert draw(run, "-n", "3", "--class", "2", *flags) == 0
    assert {path.name for path in (run / f"last_{kind}").iterdir()} == {"0.png", "1.png", "2.png", "grid.png"}
    if kind == "inpaint":
        given, drawn = (Image.open(path).convert("L") for path in (run.parent / "a.png", run / "last_inpaint" / "1.png"))
        for x in range(8):
            assert abs(given.getpixel((x, 2)) - drawn.getpixel((x, 2))) <= 1  # known
        again = ["--from", str(run / "last_inpaint" / "1.png"), "--strength", "0"]  # what was drawn can be given
        assert draw(run, "-n", "1", "--class", "2", *again) == 0
        assert (run / "last_from" / "0.png").read_bytes() == (run / "last_inpaint" / "1.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--class", "10"], ["--class 10", "0..9"]),
        (["--class", "cat"], ["--class cat", "be all"]),
        (["--class", "all", "-n", "9"], ["-n 9", "10 classes"]),
        (["--guidance", "2,nan"], ["--guidance 2.0,nan", "weight"]),
        (["--guidance", "2,1"], ["--guidance with several values needs --metrics"]),
        (["--guidance", "2,1", "--metrics", "fd", "--upscale", "small.png"], ["and --upscale has none"]),
        (["--guide", "last.pth"], ["need --guidance"]),
        (["--guidance", "2", "--guide", "none.pth"], ["none.pth: no such checkpoint"]),
        (["--guidance", "2", "--class", "3", "--metrics", "bpd"], ["without guidance"]),
        (["--guidance", "2"], ["--guidance", "add --class"]),
        (["--from", "a.png", "--precision", "bf16", "--eta", "0.5"], ["--from: leave out --eta, --precision"]),
        (["--upscale", "small.png", "--metrics", "bpd", "--fit-variance", "5"], ["leave out --metrics, --fit-variance"]),
        (["--upscale", "small.png", "--frames", "3", "--features", "inception"], ["leave out --frames, --features"]),
        (["--colour", "a.png", "--sampler", "dpm"], ["leave out --sampler"]),
        (["--interpolate", "a.png", "a.png", "-n", "1"], ["-n 1", "at least 2"]),
        (["--interpolate", "a.png", "b.png", "--class", "all"], ["--interpolate", "--class all"]),
        (["--interpolate", "a.png", "b.png", "--class", "data"], ["--interpolate", "--class data"]),
        (["--interpolate", "a.png", "b.png", "-n", "1000000000000000"], ["1000000000000000 samples", "268,435,456 values"]),
        (["--strength", "0.3"], ["--strength is of --from"]),
        (["--strength", "0.5", "--upscale", "small.png"], ["--strength is of --from"]),
        (["--inpaint", "a.png"], ["--inpaint needs --mask"]),
        (["--inpaint", "a.png", "--mask", "small.png"], ["small.png: 4 x 4 pixels"]),
        (["--from", "none.png"], ["none.png: cannot be read"]),
        (["--from", "a.png", "--strength", "2"], ["--strength 2"]),
        (["--upscale", "a.png"], ["a.png: 8 x 8 pixels", "divided"]),
        (["--colour", "a.png"], ["--colour", "grey"]),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(flags, words, run, capsys):
    flags = [str(run.parent / flag) if flag.endswith(".png") else flag for flag in flags]
    before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}
    assert draw(run, *flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("test.py: ")
    assert all(word in message for word in words), message
    assert {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")} == before


def test_guidance_needs_a_network_that_knows_both(run, tmp_path, capsys):
    for name, settings, words in (
        ("no classes", ["time_aware_net.kwargs.n_classes=null"], "no n_classes"),
        ("no dropout", ["train_cfg.label_dropout=0"], "label_dropout = 0"),
    ):
        assert train.main(classes(tmp_path / name, "train_cfg.max_steps=1", "train_cfg.sample_period=0", *settings)) == 0
        capsys.readouterr()
        assert draw(tmp_path / name, "--guidance", "2") == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert draw(tmp_path / "no classes", "--class", "2") == 2
    assert "--class 2: this network has no classes" in capsys.readouterr().err


def test_a_network_of_other_classes_cannot_guide(run, tmp_path, capsys):
    """Its label 3 would mean something else, or "no label"."""
    settings = ["train_cfg.max_steps=1", "train_cfg.sample_period=0", "time_aware_net.kwargs.n_classes=null"]
    assert train.main(classes(tmp_path / "none", *settings)) == 0
    state = checkpoint.load(run / "last.pth")
    state["class_names"][3], state["class_names"][4] = "4", "3"
    checkpoint.save(tmp_path / "names.pth", state)
    flags = ("-n", "2", "--class", "3", "--guidance", "2", "--guide")
    for weaker in (tmp_path / "none" / "last.pth", tmp_path / "names.pth"):
        assert draw(run, *flags, str(weaker)) == 2
        assert "classes or conditions than what it is to guide" in capsys.readouterr().err.strip().splitlines()[-1]
    del state["class_names"]  # as older ones were
    checkpoint.save(tmp_path / "older.pth", state)
    assert draw(run, *flags, str(tmp_path / "older.pth")) == 0
    assert draw(run, *flags, str(run / "last.pth"), "--interval", "4", "2") == 2
    assert "--guidance: interval" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_network_that_never_went_without_a_label_gets_one(tmp_path, run, capsys, monkeypatch):
    seen, drawn = [], sampling.draw
    assert train.main(classes(tmp_path / "a", "train_cfg.max_steps=1", "train_cfg.label_dropout=0")) == 0
    monkeypatch.setattr(sampling, "draw", lambda *args, **more: seen.append(more["condition"]["label"]) or drawn(*args, **more))
    assert draw(tmp_path / "a", "-n", "50") == 0
    counts = checkpoint.load(tmp_path / "a" / "last.pth")["class_counts"]
    assert (torch.bincount(seen[0], minlength=10) - 50 * torch.tensor(counts) / sum(counts)).abs().max() < 1
    assert draw(tmp_path / "a", "--from", str(run.parent / "a.png")) == 2
    assert "--class: the network was trained with train_cfg.label_dropout = 0" in capsys.readouterr().err


def test_the_average_that_an_edit_is_of_is_saved_too(tmp_path, run):
    assert train.main(classes(tmp_path / "a", "train_cfg.max_steps=2", "train_cfg.power_ema=[0.1]")) == 0
    flags = ["-n", "1", "--class", "2", "--ema-length", "0.2", "--from", str(run.parent / "a.png")]
    assert draw(tmp_path / "a", *flags) == 0
    assert (tmp_path / "a" / "last_ema0.2.pth").exists()
    assert (tmp_path / "a" / "last_ema0.2_from" / "0.png").exists()


class OfNumbers:
    """A metric that gives no dictionary."""

    uses_model, describe = False, staticmethod(str)

    def __init__(self, evaluation):
        pass

    def measure(self):
        return 0.5


def test_a_metric_that_gives_no_dictionary_is_told_so(run, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "numbers", OfNumbers)
    assert draw(run, "-n", "2", "--class", "3", "--metrics", "numbers") == 2
    assert "OfNumbers.measure: gives a float" in capsys.readouterr().err


def test_data_that_the_network_does_not_take_are_refused_before_sampling(run, tmp_path, capsys):
    for label in range(10):
        (tmp_path / "odd" / str(label)).mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / "odd" / str(label) / "a.png")
    data = {"root": str(tmp_path / "odd"), "mode": "L", "labels": "folders", "pipeline": []}
    state = checkpoint.load(run / "last.pth")
    state["config"]["dataset"] |= {"name": "ImageFolder", "train": data, "valid": data}
    checkpoint.save(tmp_path / "last.pth", state)
    assert draw(tmp_path, "-n", "1", "--metrics", "bpd") == 2
    assert "dataset.valid: images of 9 x 9 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["time_aware_net.kwargs.n_classes=5"], "dataset.train has labels from 0 to 9"),
        (["time_aware_net.kwargs.n_classes=11"], "dataset.train has 10 classes"),
    ],
)
def test_classes_that_are_not_the_data_sets_are_refused(settings, words, tmp_path, capsys):
    assert train.main(classes(tmp_path / "a", *settings)) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "a").exists()


def test_a_picture_of_all_classes_has_every_one_of_them():
    condition, columns = condition_by_row(40, 80, max_rows=40)
    assert columns == 2
    assert condition["label"].tolist() == [i // 2 for i in range(80)]
    condition, columns = condition_by_row(40, 64)  # while training: the first sixteen
    assert columns == 4
    assert condition["label"].unique().tolist() == list(range(16))


@pytest.mark.parametrize(("n_classes", "n"), [(10, 16), (100, 160), (10, 199), (7, 129), (3, 2)])
def test_no_class_is_asked_for_much_oftener_than_another(n_classes, n):
    labels = condition_by_row(n_classes, n, max_rows=n_classes)[0]["label"]
    counts = labels.bincount(minlength=n_classes)
    assert len(labels) == n
    assert counts.max() - counts.min() <= 1


def test_the_bound_of_classes_says_that_they_are_given(tmp_path, capsys):
    out = tmp_path / "a"
    arguments = tiny(out, "time_aware_net.kwargs.n_classes=10", "train_cfg.max_steps=1")
    assert train.main(arguments) == 0
    command = [str(out / "last.pth"), "--device", "cpu", "--timesteps", "2", "--bpd-images", "4", "--metrics", "bpd"]
    assert sampling.main(command) == 0
    assert "on 4 valid images, given their class (" in capsys.readouterr().out
