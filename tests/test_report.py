"""The report: one page that needs nothing else, with the figures that were measured, and copies that are seen to be copies."""

import base64
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, TINY, metrics, tiny

import evaluation.metrics
import test as sampling
import train
from beta_schedule import LinearSchedule
from checkpoint import load, load_diffusion, save
from config import build_dataset, load_config
from dataset import Digits, from_uint8, to_uint8
from discrete_diffusion import DiscreteDiffusion
from evaluation.charts import Axis, Series, line_chart
from evaluation.features import cached_classifier
from evaluation.metrics import bits_by_time
from evaluation.nearest import Copies, nearer_than, nearest_training_images, training_image
from evaluation.pictures import grid, save_gif
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake

VOID = {"meta", "link", "img", "input", "br"}
DIGITS = ["dataset.train.pipeline=[]", "dataset.valid.pipeline=[]"]  # whole, so that the classifier takes them
QUICK = ["--device", "cpu", "--timesteps", "4", "--bpd-images", "20", "--bpd-timesteps", "5"]


class Page(HTMLParser):
    """What a page holds; an element that is not closed, or closes another, is an error."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.seen, self.text, self.images = [], [], "", []
        self.bytes = path.read_bytes()
        self.feed(self.bytes.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID and not (tag in ("path", "circle") and self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text += " ".join(data.replace("\u00a0", " ").split()) + " "
        if self.open and self.open[-1] == "script" and data.startswith("{"):
            self.frames = json.loads(data)


def picture(data: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def train_run(folder: Path, *settings: str, config: str = "Digits_den") -> Path:
    cut = [setting for setting in TINY if "pipeline" not in setting] + DIGITS
    argv = [str(ROOT / "configs" / f"{config}.json"), "--device", "cpu"]
    settings = [*cut, "train_cfg.sample_period=0", f"train_cfg.model_save_dirpath={folder}", *settings]
    assert train.main([*argv, "--set", *settings]) == 0
    return folder / "last.pth"


def report(checkpoint: Path, *flags: str) -> Page:
    assert sampling.main([str(checkpoint), "--report", *QUICK, *flags]) == 0
    return Page(checkpoint.parent / "last_gen" / "report.html")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder to start scripts in, with a run of digits and its report."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        checkpoint = train_run(Path("run"))
        with open("run/metrics.jsonl", "a", encoding="utf-8") as file:  # as later versions write them, and cut short
            for step in (9, 12):
                metrics = {"fd": {"distance": 9.5, "samples": 150}, "bpd": {"total": 7.5, "images": 20}}
                losses = [0.5, 0.4, None, 0.3, 0.2, 0.2, 0.1, 0.1]
                file.write(json.dumps({"step": step, "train_loss": 0.3, "loss_by_t": losses, "metrics": metrics}) + "\n")
            file.write('{"step": 15, "train')
        page = report(checkpoint, "-n", "140")
        yield folder, page


@pytest.fixture
def folder(runs, monkeypatch) -> Path:
    monkeypatch.chdir(runs[0])
    return runs[0]


def test_the_page_is_whole_by_itself(runs):
    _, page = runs
    assert len(page.bytes) < 5e6
    for tag, attrs in page.seen:
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs[name][:80])
        assert tag not in ("iframe", "object", "embed")
    assert not re.search(rb"https?://|@import|url\(|fetch\(|XMLHttpRequest", page.bytes)
    assert {"width=device-width, initial-scale=1"} <= {attrs.get("content") for _, attrs in page.seen}


def test_every_picture_decodes_and_says_what_it_shows(runs):
    _, page = runs
    images = [attrs for tag, attrs in page.seen if tag == "img"]
    assert len(images) == 3 + 3 + 1 + 16  # samples, real images, strips; stills; the frame; nearest
    for attrs in images:
        image = picture(attrs["src"].removeprefix("data:image/png;base64,"))
        assert image.size == (int(attrs["width"]), int(attrs["height"]))
        assert attrs["alt"]
    assert page.frames["times"] == [1000 // 50, 14, 7, 1, 0]
    frames = [picture(data) for data in page.frames["pictures"]]
    assert len({frame.tobytes() for frame in frames}) == 5
    shown = next(attrs for attrs in images if attrs.get("id") == "frame")
    assert picture(shown["src"].split(",")[1]).tobytes() == frames[-1].tobytes()
    samples = np.asarray(Image.open(runs[0] / "run/last_gen/grid.png").convert("L"))
    assert np.array_equal(np.asarray(picture(images[0]["src"].split(",")[1])), samples)


def test_the_figures_are_those_of_metrics_json(runs):
    folder, page = runs
    found = json.loads((folder / "run/last_gen/metrics.json").read_text())
    bpd, fd = found["bpd"], found["fd"]
    assert (bpd["images"], fd["samples"], fd["real"]) == (20, 140, 180)
    for value in (*(bpd[name] for name in ("prior", "kl", "reconstruction", "total", "standard_error")), fd["distance"]):
        assert f"{value:.4f}" in page.text
    assert f"{bpd['total']:.4f} ± {bpd['standard_error']:.4f} bits per dimension" in page.text
    assert f"{fd['distance']:.4f} (without a unit; the smaller, the better) between 140 samples and 180 validation" in page.text
    size = sum(p.numel() for name, p in load(folder / "run/last.pth")["ema"].items() if name.startswith("time_aware_net"))
    assert f"{size:,} parameters of TimeAwareUNet" in page.text
    assert "140 real training images are" in page.text


def test_the_curves_are_there_and_a_line_cut_short_is_left_out(runs):
    _, page = runs
    labels = [attrs.get("aria-label", "") for tag, attrs in page.seen if tag == "svg"]
    for words in ("Loss “simple”", "Training loss by noise level", "Fréchet distance to", "Likelihood bound, measured"):
        assert sum(words in label for label in labels) == 1, words
    assert "t = 1..3" in page.text  # of 20 times, the first of eight bins holds (t - 1) 8 // 20 = 0
    assert "t = 4..5" in page.text
    assert "The dashed line is step 8" in page.text


def test_without_metrics_jsonl_there_are_no_curves_and_it_says_so(folder, tmp_path):
    state = load("run/last.pth")
    state["class_names"] = ["<b>&", *state["class_names"][1:]]
    save(tmp_path / "last.pth", state)
    page = report(tmp_path / "last.pth", "-n", "3", "--metrics", "bpd")
    assert "There are no curves: " in page.text
    assert "metrics.jsonl: No such file or directory" in page.text
    assert "No fd: -n = 3: the Fréchet distance needs at least 129" in page.text
    assert "Features: the classifier of Digits" in page.text
    (tmp_path / "metrics.jsonl").write_text("not a record\n[1]\n")
    assert "the metrics.jsonl beside the checkpoint holds no record" in report(tmp_path / "last.pth", "-n", "3").text


def test_bpd_is_measured_once(folder, tmp_path, monkeypatch):
    calls, measure = [], GaussianDiffusion.bound_by_time
    monkeypatch.setattr(GaussianDiffusion, "bound_by_time", lambda *a, **k: calls.append(1) or measure(*a, **k))
    save(tmp_path / "last.pth", load("run/last.pth"))
    report(tmp_path / "last.pth", "-n", "2", "--metrics", "bpd")
    assert len(calls) == 1  # of 20 images in one batch


def test_data_that_are_gone_are_left_out_and_it_says_so(folder, tmp_path):
    state = load("run/last.pth")
    for split in ("train", "valid"):
        state["config"]["dataset"][split] = {"root": str(tmp_path / "gone <&>"), "pipeline": []}
    state["config"]["dataset"]["name"] = "ImageFolder"
    save(tmp_path / "last.pth", state)
    page = report(tmp_path / "last.pth", "-n", "3")
    assert page.text.count("the data cannot be loaded") == 5  # no real image, bpd twice, fd, copies
    assert "gone <&>" in page.text
    assert len([1 for tag, _ in page.seen if tag == "img"]) == 2 + 3 + 1


@pytest.mark.slow
def test_large_images_of_noise_stay_under_five_megabytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder = tmp_path / "noise"
    image_folder.mkdir()
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (160, 144, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image_folder / f"{i}.png")
    data = {split: {"root": str(image_folder), "train": split == "train"} for split in ("train", "valid")}
    settings = [f"dataset={json.dumps({'name': 'ImageFolder', **data})}", "time_aware_net.kwargs.n_channels=3"]
    settings += ["time_aware_net.kwargs.patch_size=8", "time_aware_net.kwargs.attention=null", "train_cfg.max_steps=1"]
    checkpoint = train_run(tmp_path / "run", *settings, "dataset.train.pipeline=[]", "train_cfg.batch_size=2")
    page = report(checkpoint, "-n", "8", "--timesteps", "19", "--bpd-timesteps", "1")
    assert 2e6 < len(page.bytes) < 5e6
    assert "In pixels only: " in page.text
    assert len([1 for tag, _ in page.seen if tag == "img"]) == 3 + 3 + 1 + 8


def test_a_row_a_class(folder, tmp_path):
    checkpoint = train_run(tmp_path / "run", config="Digits_class")
    page = report(checkpoint, "-n", "40", "--pictures", "30")
    assert "A row a class: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in page.text
    sizes = [(int(attrs["width"]), int(attrs["height"])) for tag, attrs in page.seen if tag == "img"]
    assert sizes[0] == sizes[1] == (3 * 66 + 2, 10 * 66 + 2)  # 64 pixels an image, and two between them
    real = np.asarray(
        picture(next(attrs["src"] for tag, attrs in page.seen if tag == "img" and "real" in attrs["alt"]).split(",")[1])
    )
    valid = build_dataset(load(checkpoint)["config"], "valid")
    first = [int((valid.labels == label).nonzero()[0]) for label in range(10)]
    for row, number in enumerate(first):
        assert np.array_equal(real[2 + 66 * row : 66 + 66 * row : 8, 2:66:8], valid.pixels(number)[0].numpy())
    settings = json.loads((tmp_path / "run/last_gen/metrics.json").read_text())["settings"]
    assert (settings["label"], settings["n"]) == ("all", 40)
    page = report(checkpoint, "-n", "40", "--pictures", "4", "--guidance", "2", "--guide", str(checkpoint))
    assert "A row a class: 0, 1, 2, 3." in page.text
    size = sum(p.numel() for p in load_diffusion(checkpoint)[0].time_aware_net.parameters())
    assert page.text.count(f"{size:,}") == 2  # of the network, and not of its guide
    assert f"{2 * size:,}" not in page.text


def test_the_distance_beside_it_is_of_real_images_of_the_same_classes(folder, tmp_path):
    checkpoint = train_run(tmp_path / "run", "train_cfg.max_steps=1", config="Digits_class")
    page = report(checkpoint, "-n", "140")
    data = {split: build_dataset(load(checkpoint)["config"], split) for split in ("train", "valid")}
    levels = {name: torch.stack([one.pixels(i) for i in range(len(one))]) for name, one in data.items()}
    extractor = cached_classifier("models/classifier_Digits.pth", levels["train"], data["train"].labels, "Digits")
    of_class = [np.flatnonzero(data["train"].labels.numpy() == label) for label in range(10)]
    numbers = [each[round(i)] for each in of_class for i in np.linspace(0, len(each) - 1, 14)]  # 14 of each class
    made, real = (extractor.features(from_uint8(x)).double().numpy() for x in (levels["train"][numbers], levels["valid"]))
    a, b = np.cov(made.T), np.cov(real.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    distance = ((made.mean(0) - real.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    shown = re.search(r"140 real training images, as many of each class, are ([\d.]+) from the same images", page.text)
    assert float(shown[1]) == pytest.approx(distance, abs=2e-3)


def test_validation_images_that_training_saw_are_not_called_unseen(folder, tmp_path):
    page = report(train_run(tmp_path / "run", "train_cfg.max_steps=1", "dataset.valid.train=true"), "-n", "3")
    assert "which training never saw" not in page.text
    assert page.text.count("of which 1617 of 1617 are among those to train on") >= 1


def test_samples_of_another_size_have_no_distance_and_one_image_no_likelihood(folder, tmp_path):
    page = report(train_run(tmp_path / "run", "train_cfg.max_steps=1"), "16", "12", "-n", "3")
    assert "compares with images of 8 x 8, dataset.valid's, where samples have 16 x 12" in page.text
    (tmp_path / "images").mkdir()
    for i in range(10):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    part = {"root": str(tmp_path / "images"), "mode": "L"}
    data = [f"dataset={json.dumps({'name': 'ImageFolder', 'train': part | {'train': True}, 'valid': part | {'train': False}})}"]
    page = report(train_run(tmp_path / "few", *data, "train_cfg.max_steps=1", "train_cfg.batch_size=2"), "-n", "3")
    assert "needs at least 2 images for a standard error" in page.text


def test_of_classes_without_a_training_image_there_is_no_distance_to_compare_with(folder, tmp_path):
    """The first image of ten is for validation: all that the class "a" has."""
    for i in range(1300):
        (tmp_path / "images" / ("a" if i == 0 else "b")).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 5 + i % 90).save(tmp_path / "images" / ("a" if i == 0 else "b") / f"{i:04}.png")
    part = {"root": str(tmp_path / "images"), "mode": "L", "labels": "folders"}
    data = {"name": "ImageFolder", "train": part | {"train": True}, "valid": part | {"train": False}}
    more = [f"dataset={json.dumps(data)}", "time_aware_net.kwargs.n_classes=2", "train_cfg.max_steps=1"]
    page = report(train_run(tmp_path / "run", *more), "-n", "130", "--class", "a", "--timesteps", "1")
    assert "Of these classes there is no training image to compare with." in page.text


def test_of_clusters_without_labels_the_features_are_those_of_the_inception(folder, tmp_path, monkeypatch):
    asked = []

    def inception(device):
        asked.append(device)
        raise Mistake("not here")

    monkeypatch.setattr(evaluation.metrics, "inception_features", inception)
    for i in range(40):
        Image.effect_noise((8, 8), 5 + 2 * i).save(tmp_path / f"{i:02}.png")
    part = {"root": str(tmp_path), "mode": "L"}
    data = {"name": "ImageFolder", "clusters": 2, "train": part | {"train": True}, "valid": part | {"train": False}}
    more = [f"dataset={json.dumps(data)}", "time_aware_net.kwargs.n_classes=2", "train_cfg.max_steps=1"]
    page = report(train_run(tmp_path / "run", *more), "-n", "3", "--timesteps", "1")
    assert asked
    assert "In pixels only: --features classifier: ImageFolder has no labels to train one on" in page.text
    assert "; not here" in page.text


def test_an_animation_that_is_too_wide_for_a_gif_is_left_out_and_said(tmp_path, capsys):
    save_gif(tmp_path / "a.gif", [Image.new("L", (2**16, 2))] * 2)
    assert "a.gif: left out, since a GIF has at most 65535 pixels a side" in capsys.readouterr().out
    assert not (tmp_path / "a.gif").exists()


def test_the_line_of_the_step_is_in_the_chart_also_after_the_last_record():
    chart = line_chart("a", [Series("b", [1, 2], [3.0, 4.0], "c0")], "step", "loss", mark=5)
    assert chart.count('class="mark"') == 1


def test_guidance_has_no_likelihood_and_it_says_so(folder, tmp_path):
    checkpoint = train_run(tmp_path / "run", "train_cfg.max_steps=1", config="Digits_class")
    page = report(checkpoint, "-n", "3", "--guidance", "2", "--class", "1")
    assert "No bpd: the bound of guided samples says nothing of the network; measure it without guidance." in page.text
    assert "A row a class" not in page.text


@pytest.mark.parametrize("config", ["Digits_d3pm", "Digits_binary"])
def test_symbols(folder, tmp_path, config):
    page = report(train_run(tmp_path / "run", config=config), "-n", "3")
    assert {"Digits_d3pm": "17 levels cost 4.087", "Digits_binary": "2 levels cost 1"}[config] in page.text
    assert len([1 for tag, _ in page.seen if tag == "img"]) == 3 + 3 + 1 + 3


def test_the_defaults_of_a_report(folder, tmp_path):
    state = load("run/last.pth")
    save(tmp_path / "last.pth", state)
    assert sampling.main([str(tmp_path / "last.pth"), "--report", "--device", "cpu"]) == 0
    settings = json.loads((tmp_path / "last_gen/metrics.json").read_text())["settings"]
    names = ("n", "timesteps", "bpd_images", "bpd_timesteps")
    assert [settings[name] for name in names] == [160, None, 200, None]  # T is 20 here, and all of it is taken
    sampling.main([str(tmp_path / "last.pth"), "--device", "cpu", "--metrics", "bpd", "--bpd-images", "5"])
    settings = json.loads((tmp_path / "last_gen/metrics.json").read_text())["settings"]
    assert [settings[name] for name in names] == [16, None, 5, None]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bpd-timesteps", "500"], "--bpd-timesteps = 500: must lie in 1..19"),
        (["--classifier", "run/metrics.jsonl"], "cannot be read as a classifier"),
        (["--features", "inception"], "torch-fidelity"),
        (["--from", "run/last_gen/grid.png"], "--report is of samples: leave out --from"),
        (["-n", "0"], "-n = 0: must be at least 1"),
    ],
)
def test_a_mistake_is_refused_in_one_line_before_the_network_is_called(folder, monkeypatch, capsys, flags, words):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(GaussianDiffusion, "_net", lambda *_: pytest.fail("called"))
    before = Path("run/last_gen/report.html").stat().st_mtime_ns
    assert sampling.main(["run/last.pth", "--report", "--device", "cpu", *flags]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("test.py: ")
    assert "\n" not in message
    assert words in message
    assert Path("run/last_gen/report.html").stat().st_mtime_ns == before


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<iframe style="width: 375px; height: 800px; border: 0" srcdoc="%s"></iframe><pre>waiting</pre>
<script>
document.querySelector("iframe").addEventListener("load", async (event) => {
  const page = event.target.contentDocument, range = page.getElementById("scrub"), frame = page.getElementById("frame");
  const seen = [];
  for (range.value = 0; ; range.value++) {
    const loaded = new Promise((resolve) => { frame.onload = frame.onerror = resolve; });
    range.dispatchEvent(new Event("input"));
    await loaded;
    seen.push([frame.src, page.getElementById("time").textContent]);
    if (range.value === range.max) break;
  }
  const blank = [...page.images].filter((image) => !image.complete || !image.naturalWidth).length;
  const shown = [".scrub", ".stills"].map((name) => getComputedStyle(page.querySelector(name)).display);
  const width = page.documentElement.scrollWidth;
  document.querySelector("pre").textContent = JSON.stringify({ seen, blank, shown, width });
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
def test_in_a_browser_of_a_phones_width_the_slider_moves_the_picture_and_nothing_overflows(runs, tmp_path):
    _, page = runs
    (tmp_path / "probe.html").write_text(PROBE % escape(page.bytes.decode()))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    command.append((tmp_path / "probe.html").as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    found = json.loads(unescape(re.search(r"<pre>(.*)</pre>\s*<script>", done.stdout, re.DOTALL)[1]))
    assert [text for _, text in found["seen"]] == [f"t = {t}" for t in page.frames["times"]]
    assert [src.split(",")[1] for src, _ in found["seen"]] == page.frames["pictures"]
    assert (found["blank"], found["shown"], found["width"]) == (0, ["block", "none"], 375)
    assert "CONSOLE" not in done.stderr


# The bound by time


class Constant(torch.nn.Module):
    def forward(self, xt, t):
        return torch.full_like(xt, 0.3)


def test_the_terms_by_time_are_those_of_the_closed_form():
    """A network that says 0.3 for every x_0 has a KL term that no noise changes."""
    schedule = LinearSchedule(15, 0.01, 0.4)
    diffusion = GaussianDiffusion(schedule, Constant(), "beta", "reconstruction")
    x0 = torch.linspace(-1, 1, 6).view(3, 2)
    bound, t, length, kl = diffusion.bound_by_time(x0)
    alpha_bar, beta = schedule.alpha_bar, schedule.beta
    before = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    ratio = (1 - before) / (1 - alpha_bar)  # of sigma_bar_t^2 and beta_t
    mu_error = (before.sqrt() * beta / (1 - alpha_bar)).square()[:, None] * (x0.double() - 0.3).square().mean(1)
    expected = 0.5 * ((ratio - 1 - ratio.log())[:, None] + mu_error / beta[:, None])[1:]
    assert t.tolist() == [[time] * 3 for time in range(2, 16)]
    assert length.tolist() == [1] * 14
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(bound.kl.double(), expected.sum(0), rtol=1e-4, atol=0)
    _, t, length, kl = diffusion.bound_by_time(x0, timesteps=4)
    assert length.tolist() == [4, 3, 3, 4]
    assert (t >= torch.tensor([[2], [6], [9], [12]])).all()
    assert (t <= torch.tensor([[5], [8], [11], [15]])).all()
    torch.testing.assert_close(kl.double(), expected.gather(0, t - 2), rtol=1e-4, atol=1e-9)
    found, parts = bits_by_time(diffusion, [x0, x0[:1]], timesteps=4)
    assert [(part.first, part.last) for part in parts] == [
        (2, 5),
        (6, 8),
        (9, 11),
        (12, 15),
    ]  # edges 2, 5.5, 9, 12.5, 16, rounded to even
    total = sum((part.last - part.first + 1) * part.bits for part in parts)
    assert total == pytest.approx(found["kl"], rel=1e-6)
    for part in parts:  # a mean of four images, each at a time of its own
        rows = (expected[part.first - 2 : part.last - 1] / math.log(2)).tolist()
        draws = itertools.product(rows, repeat=4)
        means = [(a[0] + b[1] + c[2] + d[0]) / 4 for a, b, c, d in draws]
        assert min(abs(part.bits - mean) for mean in means) < 1e-5 * part.bits


def test_the_terms_of_symbols_add_up_to_their_bound():
    class Uniform(torch.nn.Module):
        def forward(self, xt, t):
            return torch.zeros(*xt.shape, 3)

    T = 10
    diffusion = DiscreteDiffusion(LinearSchedule(T, 0.05, 0.5), Uniform(), 3, "absorbing")
    x0 = torch.randint(0, 3, (4000, 2))
    bound, t, _, kl = diffusion.bound_by_time(x0, chunk_size=3)
    alpha_bar = torch.cat([torch.ones(1).double(), LinearSchedule(T, 0.05, 0.5).alpha_bar])
    expected = (alpha_bar[1:-1] - alpha_bar[2:]) * math.log(3)  # equation 30, with log p_hat = -log 3
    torch.testing.assert_close(kl.double().mean(1), expected, atol=0.02, rtol=0)
    assert torch.equal(t, torch.arange(2, T + 1)[:, None].expand(-1, 4000))
    torch.testing.assert_close(bound.kl, kl.sum(0))


# Nearest training images


class Flat(torch.nn.Module):
    """Features are the means of an image's halves."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def features(self, images):
        return images.unflatten(2, (2, -1)).mean((3, 4)).flatten(1)


def digits(*flips: dict) -> object:
    settings = ["dataset.train.pipeline=" + json.dumps(list(flips))]
    return build_dataset(load_config(str(ROOT / "configs/Digits_den.json"), settings), "train")


def test_the_nearest_image_is_one_as_the_network_sees_it():
    """By a to_float of one's own."""

    class Dim(Digits):
        def to_float(self, pixels):
            return super().to_float(pixels) / 2

    train = Dim()
    assert torch.equal(train.fixed_images([5, 70]), torch.stack([Digits()[5], Digits()[70]]) / 2)
    found = nearest_training_images(train.fixed_images([5, 70]), train, None)["pixels"]
    assert found.number.tolist() == [5, 70]
    assert found.distance.tolist() == [0, 0]


def test_the_nearest_image_is_that_of_brute_force():
    data, queries = digits(), torch.rand(40, 1, 8, 8) * 2.2 - 1.1
    pixels = np.stack([data.pixels(i).numpy() for i in range(len(data))]).astype(float)
    levels = to_uint8(queries).numpy().astype(float)
    found = nearest_training_images(queries, data, Flat(), batch_size=100)
    distance = np.sqrt(((levels[:, None] - pixels[None]) ** 2).mean((2, 3, 4)))
    assert np.array_equal(found["pixels"].number.numpy(), distance.argmin(1))
    assert np.allclose(found["pixels"].distance.numpy(), distance.min(1), rtol=1e-9)

    def halves(x):
        return np.concatenate([x[:, :, :4].mean((2, 3)), x[:, :, 4:].mean((2, 3))], 1) / 127.5 - 1

    distance = np.linalg.norm(halves(levels)[:, None] - halves(pixels)[None], axis=2)
    assert np.allclose(found["features"].distance.numpy(), distance.min(1), atol=1e-6)


def test_a_copy_is_seen_to_be_one_also_mirrored_and_in_spite_of_noise():
    data = digits({"name": "RandomHorizontalFlip"})
    valid = build_dataset(load_config(str(ROOT / "configs/Digits_den.json"), []), "valid")
    held_out = torch.stack([valid[i] for i in range(100)])
    original = torch.stack([data.pixels(i) for i in (3, 700, 1500)]).float() / 127.5 - 1
    copies = torch.stack([original[0], original[1].flip(-1), (original[2] + 0.02 * torch.randn(1, 8, 8)).clamp(-1, 1)])
    samples = torch.cat([copies, held_out[:5]])
    found = nearest_training_images(torch.cat([samples, held_out]), data, None)
    pixels = found["pixels"]
    assert pixels.number[:3].tolist() == [3, 700, 1500]
    assert pixels.view[:3].tolist() == [0, 1, 0]
    assert pixels.distance[:2].max() < 1e-4
    assert torch.equal(training_image(data, 700, 1), copies[1])
    seen = Copies(samples, found, data)
    assert seen.suspects[:3] == [0, 1, 2]
    assert seen.share["pixels"][:2].tolist() == [1, 1]
    text = "".join(seen.parts())
    assert re.search(r"class=alarm>.*3 samples are nearer in pixels than every validation image: 0, 1, 2\.", text)
    assert text.index("Sample 0<br>") < text.index("Sample 1<br>") < text.index("Sample 2<br>") < text.index("Sample 3<br>")


def test_nearer_than_counts_the_held_out_images_that_lie_farther():
    assert nearer_than(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 0.5, 0]


# Charts


def test_a_chart_draws_its_points_where_the_axes_say():
    chart = line_chart(
        "a & b", [Series("<x>", [1, 10, 100, 1000], [5, None, math.nan, 7]), Series("none", [1], [-1])], "t", "y", True, True
    )
    svg = ElementTree.fromstring(re.search(r"<svg viewBox.*?</svg>", chart)[0])
    assert svg.get("aria-label") == "a & b"
    assert "&lt;x&gt;" in chart
    assert "none" not in chart  # a negative value has no place on a logarithmic axis
    texts = {text.text: text for text in svg.iter("text")}
    path = next(path.get("d") for path in svg.iter("path") if path.get("class") == "c0")
    (left, low), (right, high) = ([float(number) for number in point.split()] for point in path[1:].split("L"))
    assert left == pytest.approx(float(texts["1"].get("x")), abs=0.1)
    assert right == pytest.approx(float(texts["1,000"].get("x")), abs=0.1)
    assert low - high > 150  # 5 below 7, over most of the height
    assert "no value to draw" in line_chart("empty", [Series("x", [1], [None])], "t", "y")


@pytest.mark.parametrize(
    ("values", "log", "names"),
    [
        ([0, 2550], False, ["0", "500", "1,000", "1,500", "2,000", "2,500"]),
        ([1, 1000], True, ["1", "10", "100", "1,000"]),
        ([1e-6, 1e-2], True, ["10⁻⁶", "10⁻⁵", "10⁻⁴", "0.001", "0.01"]),
        ([0.12, 0.19], True, ["0.12", "0.14", "0.16", "0.18"]),
        ([3, 60], True, ["5", "10", "20", "50"]),
        ([5, 5], False, ["4.6", "4.8", "5", "5.2", "5.4"]),
        ([1e-12, 1e12], True, ["10⁻¹²", "10⁻⁸", "10⁻⁴", "1", "10,000", "10⁸", "10¹²"]),
    ],
)
def test_ticks_are_round(values, log, names):
    ticks = Axis(values, (0, 100), log).ticks()
    assert [name for _, name in ticks] == names


def test_a_sample_is_called_by_its_number_among_all():
    data = build_dataset(load_config(str(ROOT / "configs/Digits_den.json"), []), "train")
    valid = build_dataset(load_config(str(ROOT / "configs/Digits_den.json"), []), "valid")
    held_out = torch.stack([valid[i] for i in range(20)])
    samples = torch.stack([data[5], valid[30]])
    found = nearest_training_images(torch.cat([samples, held_out]), data, None)
    text = "".join(Copies(samples, found, data, [7, 11]).parts())
    assert "every validation image: 7." in text
    assert text.index("Sample 7<br>") < text.index("Sample 11<br>")
    assert "Sample 0<br>" not in text


def test_a_copy_is_told_where_a_validation_image_is_one_too():
    config = load_config(str(ROOT / "configs/Digits_den.json"), [])
    data, valid = build_dataset(config, "train"), build_dataset(config, "valid")
    held_out = torch.stack([data[9], *(valid[i] for i in range(50))])
    samples = torch.stack([data[5], data[700], *(valid[i] for i in range(60, 90))])
    seen = Copies(samples, nearest_training_images(torch.cat([samples, held_out]), data, None), data)
    assert seen.suspects == [0, 1]
    assert "(1 of the validation images equal a training image" in "".join(seen.parts())


def test_exact_copies_are_at_no_distance():
    config = load_config(str(ROOT / "configs/Digits_den.json"), ['dataset.train.pipeline=[{"name": "CenterCrop", "size": 7}]'])
    data = build_dataset(config, "train")
    copies = torch.stack([data[i] for i in range(40)])
    assert nearest_training_images(copies, data, None)["pixels"].distance.max() == 0


def test_a_loss_below_zero_is_drawn(tmp_path):
    crop = ["dataset.train.pipeline=[]", "dataset.valid.pipeline=[]"]
    out = tmp_path / "a"
    assert train.main(tiny(out, "diffusion.reverse_variance=learnable", "schedule.kwargs.timesteps=1000", *crop)) == 0
    assert min(line["train_loss"] for line in metrics(out)) < 0  # its log sigma_t^2
    command = [str(out / "last.pth"), "--device", "cpu", "--timesteps", "2", "--bpd-images", "4", "--bpd-timesteps", "2"]
    assert sampling.main([*command, "-n", "4", "--report"]) == 0
    page = (out / "last_gen" / "report.html").read_text()
    assert "no value to draw" not in page


def test_a_picture_of_long_signals_is_one_that_a_gif_can_be(tmp_path):
    picture = grid(torch.zeros(16, 1, 2, 1024))
    save_gif(tmp_path / "a.gif", [picture, picture])
    assert picture.width == 4 * (1024 + 2) + 2
