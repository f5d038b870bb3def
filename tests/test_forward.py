"""python beta_schedule.py and python dataset.py: the figure of schedules, and the picture of the data and its noising."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT
from sklearn.datasets import load_digits
from torch import nn

import beta_schedule
import dataset
from beta_schedule import LinearSchedule
from discrete_diffusion import DiscreteDiffusion
from evaluation import forward, pictures
from gaussian_diffusion import GaussianDiffusion

DIGITS = str(ROOT / "configs/Digits_den.json")
SYMBOLS = str(ROOT / "configs/Digits_d3pm.json")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def figures(monkeypatch) -> list:
    """The matplotlib figures that are drawn."""
    made, new_figure = [], forward.new_figure

    def keep(**options):
        made.append(new_figure(**options))
        return made[-1]

    monkeypatch.setattr(forward, "new_figure", keep)
    return made


def refused(script, argv: list[str], capsys) -> str:
    assert script.main(argv) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    return message


# Schedules


def test_every_schedule_is_drawn_with_the_values_of_its_formula(here, figures, capsys):
    assert beta_schedule.main([]) == 0
    assert "models/schedules.png" in capsys.readouterr().out
    assert Image.open(here / "models/schedules.png").size[0] > 1000
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["beta", "alpha_bar", "log snr"]
    curves = [{line.get_label(): line.get_xydata() for line in axes.get_lines()} for axes in panels]
    assert [len(lines) for lines in curves] == [7, 7, 7]
    beta = np.linspace(1e-4, 0.02, 1000)  # Ho et al. 2020
    alpha_bar = np.cumprod(1 - beta)
    for lines, expected in zip(curves, (beta, alpha_bar, np.log(alpha_bar / (1 - alpha_bar))), strict=True):
        time, drawn = lines["LinearSchedule"].T
        np.testing.assert_allclose(time, np.arange(1, 1001) / 1000, rtol=1e-6)
        np.testing.assert_allclose(drawn, expected, rtol=1e-9, atol=1e-9)


def test_configs_with_one_schedule_have_one_curve_with_all_their_names(here, figures):
    (here / "other.json").write_text((ROOT / "configs/Digits_den.json").read_text().replace("1000", "20"))
    assert beta_schedule.main([DIGITS, SYMBOLS, "other.json", "--output", "a/b.png"]) == 0
    assert (here / "a/b.png").exists()
    lines = figures[0].axes[1].get_lines()
    assert [line.get_label() for line in lines] == [
        "CosineSchedule(timesteps=1000, s=0.008): Digits_den, Digits_d3pm",
        "CosineSchedule(timesteps=20, s=0.008): other",
    ]
    assert [len(line.get_xydata()) for line in lines] == [1000, 20]
    shown = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert shown == [line.get_label() for line in lines]


# Noising


def process(kind: str, T: int = 40):
    schedule = LinearSchedule(T, 0.01, 0.1)
    if kind == "numbers":
        return GaussianDiffusion(schedule, nn.Identity())
    return DiscreteDiffusion(schedule, nn.Identity(), 17, "absorbing")


@pytest.mark.parametrize("noised", [forward.noised_by_steps, forward.noised_at_once])
def test_both_ways_of_noising_have_the_moments_of_equation_2(noised):
    x0, times = torch.full((1, 1, 128, 128), 0.5), [0, 1, 7, 40]
    alpha_bar = np.cumprod(1 - np.linspace(0.01, 0.1, 40))
    states = noised(process("numbers"), x0, times)
    assert torch.equal(states[0], x0)
    for t, xt in zip(times[1:], states[1:], strict=True):
        variance, error = 1 - alpha_bar[t - 1], 5 / 128  # five standard errors of 128^2 values
        assert xt.mean().item() == pytest.approx(0.5 * math.sqrt(alpha_bar[t - 1]), abs=error * math.sqrt(variance))
        assert xt.var().item() == pytest.approx(variance, rel=error * math.sqrt(2))


@pytest.mark.parametrize("noised", [forward.noised_by_steps, forward.noised_at_once])
def test_both_ways_of_noising_symbols_mask_as_many_as_equation_25_says(noised):
    gaps = process("symbols")
    x0, times = torch.full((1, 1, 128, 128), 3), [0, 1, 7, 40]
    alpha_bar = np.cumprod(1 - np.linspace(0.01, 0.1, 40))
    for t, xt in zip(times[1:], noised(gaps, x0, times)[1:], strict=True):
        share = 1 - alpha_bar[t - 1]
        assert (xt == 17).float().mean().item() == pytest.approx(share, abs=5 / 128 * math.sqrt(share * (1 - share)))
        assert ((xt == 17) | (xt == 3)).all()


def test_steps_go_on_from_one_another_and_draws_at_once_do_not():
    """Neighbouring states share their noise in the one way: their correlation is sqrt(alpha) there, and 0 at once."""
    x0, alpha = torch.zeros(1, 1, 128, 128), 1 - np.linspace(0.01, 0.1, 40)
    for noised, factor in ((forward.noised_by_steps, math.sqrt(alpha[39])), (forward.noised_at_once, 0)):
        _, before, after = noised(process("numbers"), x0, [0, 39, 40])
        bar = np.cumprod(alpha)
        expected = factor * math.sqrt((1 - bar[38]) / (1 - bar[39]))
        assert np.corrcoef(before.flatten(), after.flatten())[0, 1] == pytest.approx(expected, abs=5 / 128)


# python dataset.py


def test_the_data_are_described_by_their_figures(here, capsys):
    assert dataset.main([DIGITS]) == 0
    text = capsys.readouterr().out
    digits = load_digits()
    kept = np.arange(1797) % 10 != 0
    assert "Digits, train: 1617 images [1, 8, 8]" in text
    counts = np.bincount(digits.target[kept])
    assert "10 classes: " + ", ".join(f"{i}: {n}" for i, n in enumerate(counts)) in text
    low, high, mean, deviation = map(float, re.search(r"from (\S+) to (\S+), mean (\S+), .* deviation (\S+)", text).groups())
    pixels = digits.images[kept] / 8 - 1
    assert (low, high) == (-1, 1)
    assert mean == pytest.approx(pixels.mean(), abs=0.01)  # of 1000 of the images
    assert deviation == pytest.approx(pixels.std(), abs=0.01)
    assert "models/Digits_den_data.png: " in text


def cells(path, rows: int, columns: int) -> np.ndarray:
    """What a picture of rows of 8 x 8 images shows, [rows, columns, 8, 8] in 0..255, from its right lower corner."""
    page = np.asarray(Image.open(path).convert("L")).astype(int)
    page = page[len(page) - rows * 66 - 2 :, page.shape[1] - columns * 66 - 2 :]
    blocks = [[page[2 + 66 * r : 66 + 66 * r : 8, 2 + 66 * c : 66 + 66 * c : 8] for c in range(columns)] for r in range(rows)]
    return np.array(blocks)


def test_the_classes_of_a_config_with_clusters_are_shown(here, capsys):
    assert dataset.main([DIGITS, "--set", "dataset.clusters=4", "time_aware_net.kwargs.n_classes=4"]) == 0
    assert "Digits, train: 1617 images" in capsys.readouterr().out


def test_the_picture_shows_the_images_by_class_and_then_the_noise(here):
    assert dataset.main([DIGITS, "--split", "valid", "--output", "a.png"]) == 0
    digits = load_digits()
    images, labels = (digits.images[::10] * 255 / 16).round(), digits.target[::10]
    strips = cells("a.png", 2, 11)
    first = images[labels == 0][0]
    assert np.abs(strips[:, 0] - first).max() <= 1
    contrast = np.abs(strips - first).mean((2, 3))  # to the clean image
    assert (contrast[:, 0] < 1).all()
    assert (contrast[:, 1] < contrast[:, 10] / 2).all()
    page = Image.open("a.png")
    page.crop((0, 0, page.width, page.height - 2 * 66 - 2 - 32)).save("data.png")
    shown = cells("data.png", 10, 11)
    for c in range(10):
        expected = [*images[labels == c][:11], np.full((8, 8), 255)][:11]  # there are ten nines
        assert np.abs(shown[c] - expected).max() <= 1


def test_of_symbols_the_picture_shows_the_levels_and_the_mask(here, capsys):
    assert (
        dataset.main(
            [SYMBOLS, "--output", "a.png", "--set", "diffusion.n_levels=3", "--set", "time_aware_net.kwargs.n_levels=3"]
        )
        == 0
    )
    assert "the nearest of 3 levels" in capsys.readouterr().out
    strips = cells("a.png", 2, 11)
    assert set(np.unique(strips)) == {0, 128, 255}  # black, grey and white; the mask is grey, too
    assert (strips[:, 10] == 128).all()  # alpha_bar_T of the cosine schedule is 2e-9


def test_images_without_classes_are_spread_over_the_set_and_the_pipeline_is_seen(here, capsys):
    (here / "images").mkdir()
    for i in range(4):
        Image.new("L", (12, 10), 60 * i).save(here / f"images/{i}.png")
    part = '{"root": "images", "mode": "L", "pipeline": [{"name": "CenterCrop", "size": 8}]}'
    data = f'dataset={{"name": "ImageFolder", "train": {part}, "valid": {part}}}'
    assert dataset.main([DIGITS, "--output", "a.png", "--set", data]) == 0
    text = capsys.readouterr().out
    assert "4 images [1, 8, 8]" in text
    assert "no classes" in text
    page = Image.open("a.png")
    page.crop((0, 0, page.width, page.height - 2 * 66 - 2 - 32)).save("data.png")
    shown = cells("data.png", 1, 11)[0]
    assert [set(np.unique(image)) for image in shown] == [{0}, {60}, {120}, {180}] + [{255}] * 7  # white: no more images


# Refusals


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere.json"], "nowhere.json: No such file"),
        ([DIGITS, "--output", "figure.pdf"], "--output figure.pdf: must be a file that ends in .png"),
        ([DIGITS, "--output", "file/a.png"], "is not a folder"),
        ([DIGITS, "--output", ""], "--output : must be"),
    ],
)
@pytest.mark.parametrize("script", [beta_schedule, dataset])
def test_a_mistake_is_one_line_and_writes_nothing(script, argv, words, here, capsys):
    (here / "file").write_text("")
    assert words in refused(script, argv, capsys)
    assert [path.name for path in here.iterdir()] == ["file"]


def test_mistakes_of_the_data_are_one_line_too(here, capsys):
    assert "no dataset.test" in refused(dataset, [DIGITS, "--split", "test"], capsys)
    assert "CosineSchedule" in refused(dataset, [DIGITS, "--set", "schedule.name=CosinSchedule"], capsys)
    wrong = '{"name": "CenterCrop", "size": 0}'
    assert "pipeline.0.size = 0" in refused(dataset, [DIGITS, "--set", f"dataset.train.pipeline=[{wrong}]"], capsys)
    assert not any(here.iterdir())


def test_without_matplotlib_the_figure_says_so(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "needs matplotlib; pip install matplotlib" in refused(beta_schedule, [], capsys)
    assert not any(here.iterdir())
    assert dataset.main([DIGITS]) == 0


def test_labels_stand_before_their_rows():
    picture = Image.new("RGB", (100, 60), "grey")
    page = pictures.labelled(picture, ["one", ""], ["t = 0"], left=pictures.text_width(["one"]))
    ink = np.asarray(page.convert("L")) < 100
    margin = page.width - 100
    assert page.height == 60 + 2 * pictures.FONT_SIZE
    assert ink[32:62, :margin].any()  # beside the first row
    assert not ink[62:, :margin].any()
    assert ink[:32, margin:].any()  # above the columns
