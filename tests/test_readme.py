"""The pages for people: their Python runs as printed, and the files, links and tests that they name exist."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT

import dataset
import test as sampling
import train
from beta_schedule import CosineSchedule
from checkpoint import load_diffusion
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareMLP

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/TRIED.md", "tests/README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in FENCED.findall(README) if language == "python"]
RUN, TUNED, DECODED = (
    next(code for code in PYTHON if words in code) for words in ("Trainer(config).run()", "train_cfg.init", "my_digits.png")
)
# What a page names and a run, a reader or another package has
ELSEWHERE = re.compile(
    r"(models|my|data)/|my_|train_unconditional\.py|image_\w+\.py|metrics\.json|.*samples\.npz|.*\bNAME\b|"
    r"(epoch_N|first|\d+|strips|grid|image|mask|other|small|grey)\.png"
)


SHORT = ["train_cfg.epochs=2", "train_cfg.lr=0.004", "train_cfg.sample_period=0", "time_aware_net.kwargs.base_channels=8"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: the configs and nothing else."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_code(code: str) -> dict:
    """Its names, once it has run."""
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_run_of_the_readme_and_the_one_that_starts_from_it_go_as_printed(folder, capsys):
    run_code(RUN)
    bits, distance = (ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert 0 < bits["total"] < 100
    assert 0 < distance["distance"] < 1000
    assert (bits["images"], distance["samples"], distance["real"]) == (180, 150, 180)
    run_from, _ = load_diffusion("models/try/last.pth")
    names = run_code(TUNED)
    tuned, before = names["trainer"].model.time_aware_net.state_dict(), run_from.time_aware_net.state_dict()
    assert {name.split(".")[0] for name in tuned if not torch.equal(tuned[name], before[name])} == {"conv_out"}


@pytest.mark.parametrize("code", [code for code in PYTHON if code not in (RUN, TUNED, DECODED)], ids=range(len(PYTHON) - 3))
def test_the_python_of_the_readme_runs_as_printed(code, folder):
    run_code(code)


def test_a_model_of_ones_own_loop_is_sampled_as_printed(folder):
    run_code(next(code for code in PYTHON if "own.pth" in code))
    assert sampling.main(["own.pth", "-n", "2", "--timesteps", "2", "--device", "cpu"]) == 0
    assert Path("own_gen/grid.png").exists()


def test_the_network_of_ones_own_trains_and_samples_as_printed(folder, monkeypatch):
    code = next(code for code in PYTHON if "class MyNet" in code)
    commands = next(code for _, code in FENCED.findall(README) if "my_net.MyNet" in code and code.startswith("python train.py"))
    (folder / "my_net.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        for command in commands.replace("\\\n", " ").splitlines():
            python, script, *argv = shlex.split(command)
            assert (python, {"train.py": train, "test.py": sampling}[script].main(argv)) == ("python", 0)
        net = sys.modules["my_net"].MyNet(1)
    finally:
        sys.modules.pop("my_net", None)
    saved = torch.load("models/my_net/last.pth", weights_only=True)
    assert saved["config"]["time_aware_net"] == {"name": "my_net.MyNet", "kwargs": {"n_channels": 1, "width": 32}}
    assert {name.removeprefix("time_aware_net.") for name in saved["model"] if "net." in name} == set(net.state_dict())
    assert Path("models/my_net/last_gen/grid.png").exists()


def test_a_folder_of_ones_own_images_goes_as_printed(folder, capsys):
    """Photographs' sizes and shapes, more of them than clusters; the run is shortened, and nothing else."""
    images = Path("data/my_images")
    images.mkdir(parents=True)
    for i in range(45):
        Image.effect_noise((40 + 3 * i, 90 - i), 60).save(images / f"{i:02}.jpg")
    commands = next(code for _, code in FENCED.findall(README) if "dataset.py configs/MyImages.json" in code)
    more = {
        "train.py": ["--set", "train_cfg.max_steps=2", "train_cfg.batch_size=8", "train_cfg.sample_period=0"],
        "test.py": ["-n", "8", "--timesteps", "2"],
    }
    for command in commands.splitlines():
        python, script, *argv = shlex.split(command, comments=True)
        main = {"dataset.py": dataset.main, "train.py": train.main, "test.py": sampling.main}[script]
        assert (python, main([*argv, *more.get(script, [])])) == ("python", 0), capsys.readouterr().err
    saved = torch.load("models/MyImages/last.pth", weights_only=True)
    assert (saved["step"], saved["shape"], sum(saved["class_counts"])) == (2, [3, 64, 64], 40)
    assert Image.open("models/MyImages/last_gen/grid.png").width > 3 * 64


def test_the_sampler_of_ones_own_is_ddim():
    mine = run_code(next(code for code in PYTHON if "def my_ddim" in code))["my_ddim"]
    diffusion = GaussianDiffusion(CosineSchedule(60), TimeAwareMLP(2))
    x_T = torch.randn(50, 2)
    expected = diffusion.sample((50, 2), "ddim", 7, x_T=x_T)
    torch.testing.assert_close(diffusion.sample((50, 2), mine, 7, x_T=x_T), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [[], ["time_aware_net.kwargs.n_classes=2"]], ids=["without classes", "with classes"])
def test_the_data_set_of_ones_own_trains_as_printed(more, folder, monkeypatch):
    code = next(code for code in PYTHON if "class Squares" in code)
    section = re.search(r'`"dataset": (\{"name": "my_data\.Squares".*\})`', README)[1]
    (folder / "my_data.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = [f"dataset={section}", "train_cfg.max_steps=2", "train_cfg.sample_period=0", "schedule.kwargs.timesteps=20"]
    try:
        assert train.main(["configs/Digits_den.json", "--device", "cpu", "--set", *small, *more]) == 0
        image = sys.modules["my_data"].Squares(6)[1]
    finally:
        sys.modules.pop("my_data", None)
    assert (image == image.max()).sum() == 6**2
    saved = torch.load("models/Digits_den/last.pth", weights_only=True)
    assert (saved["step"], saved["shape"], saved["class_names"]) == (2, [1, 8, 8], ["dark", "bright"])
    assert saved["class_counts"] == ([30, 30] if more else None)


def test_the_loss_of_ones_own_trains_as_printed_and_is_the_simple_one_with_its_weight(folder, monkeypatch):
    code = next(code for code in PYTHON if "class P2" in code)
    section = re.search(r'`"diffusion": (\{"name": "my_loss\.P2".*\})`', README)[1]
    (folder / "my_loss.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = [f"diffusion={section}", "train_cfg.max_steps=2", "train_cfg.sample_period=0", "schedule.kwargs.timesteps=20"]
    try:
        assert train.main(["configs/Digits_den.json", "--device", "cpu", "--set", *small]) == 0
        assert sampling.main(["models/Digits_den/last.pth", "-n", "2", "--device", "cpu"]) == 0
        assert train.main(["configs/Digits_den.json", "--set", "diffusion.name=my_loss.P2", "diffusion.gama=1"]) == 2
        model, state = load_diffusion("models/Digits_den/last.pth")
    finally:
        sys.modules.pop("my_loss", None)
    assert state["config"]["diffusion"] == {"name": "my_loss.P2", "gamma": 0.5}
    plain = GaussianDiffusion(CosineSchedule(20), model.time_aware_net)
    x0, t, noise = torch.rand(20, 1, 8, 8), torch.arange(1, 21), torch.randn(20, 1, 8, 8)
    weight = (1 + CosineSchedule(20).snr) ** -0.5
    with torch.no_grad():
        torch.testing.assert_close(model.loss(x0, t, noise), weight.float() * plain.loss(x0, t, noise))


def test_digits_are_drawn_from_small_ones_as_printed(folder, monkeypatch):
    """The commands but for the report, and a shorter run; the means of a sample come near to those that it was told."""
    code = next(code for code in PYTHON if "class SmallDigits" in code)
    commands = next(
        code for _, code in FENCED.findall(README) if "my_sr.Enlarging" in code and code.startswith("python train.py")
    )
    (folder / "my_sr.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        for command in commands.replace("\\\n", " ").replace(" --report", "").splitlines():
            python, script, *argv = shlex.split(command)
            argv += SHORT if script == "train.py" else []
            assert (python, {"train.py": train, "test.py": sampling}[script].main(argv)) == ("python", 0)
    finally:
        sys.modules.pop("my_sr", None)
    with np.load("models/sr/last_gen/samples.npz") as arrays:
        means, told = arrays["samples"].reshape(36, 4, 2, 4, 2).mean((2, 4)), arrays["condition_small"][:, 0]
    error, of_others = ((((means - small) ** 2).mean() ** 0.5).item() for small in (told, told[::-1]))
    assert error < of_others / 2


def test_digits_are_drawn_as_codes_as_printed(folder, monkeypatch):
    """The commands, and a shorter run; most codes lie nearest to the mean code of the digit that they should be."""
    section = README[README.index("## Floats instead of images") : README.index("## Symbols instead of numbers")]
    *files, commands = (code for _, code in FENCED.findall(section))
    for name, text in zip(("my_codes.py", "my_codes.json", "my_digits.py"), files, strict=True):
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    scripts = {
        "train.py": lambda argv: train.main([*argv, "--set", "train_cfg.epochs=20", "train_cfg.lr=0.002"]),
        "test.py": sampling.main,
    }
    try:
        for command in commands.splitlines():
            python, script, *argv = shlex.split(command)
            assert (python, scripts[script](argv) if script in scripts else runpy.run_path(script) and 0) == ("python", 0)
    finally:
        sys.modules.pop("my_codes", None)
    codes, digits = np.load("my_codes.npy"), np.load("my_labels.npy")
    means = np.stack([codes[digits == digit].mean(0) for digit in range(10)])
    with np.load("models/codes/last_gen/samples.npz") as arrays:
        nearest = ((arrays["samples"][:, None] - means) ** 2).sum(2).argmin(1)
        assert (nearest == arrays["labels"]).mean() > 0.8
    assert Image.open("my_digits.png").width > 14 * 8 * 4


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    """Each link and each path, from the page's folder or the root; a file's bare name from any folder of ours."""
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, link
    named = re.findall(r"(?<![\w/.*{<-])((?:[\w.-]+/)*[\w-]+\.(?:py|json|md|txt|toml|png))(?![\w.:(])", text)
    folders = [
        (ROOT / page).parent,
        *(ROOT / name for name in ("", "configs", "training", "evaluation", "tests", "benchmarks")),
    ]
    for path in [path for path in named if not ELSEWHERE.match(path)]:
        assert any((folder / path).exists() for folder in folders), path


def test_every_test_that_shows_a_promise_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "tests/README.md").read_text())
    assert len(named) > 30
    trees = {file: ast.parse((ROOT / "tests" / file).read_text()) for file, _ in named}
    tests = {(file, node.name) for file, tree in trees.items() for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(named) <= tests


def test_the_python_that_is_promised_is_the_linters():
    settings = (ROOT / "pyproject.toml").read_text()
    least = re.search(r'requires-python = ">=([\d.]+)"', settings)[1]
    assert f"Python {least} or newer" in README
    assert f'target-version = "py{least.replace(".", "")}"' in settings


def test_each_file_imports_only_files_above_it_in_the_list_of_the_house():
    listed = re.findall(r"^\| (`[^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text().split("## To add one")[0], re.MULTILINE)
    place = {name: i for i, row in enumerate(listed) for name in re.findall(r"`(\w+)(?:\.py|/)`", row)}
    files = [path for folder in (".", "training", "evaluation") for path in (ROOT / folder).glob("*.py")]
    seen = set()
    for path in files:
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if name not in place:  # a reader's own file
            continue
        for node in ast.parse(path.read_text()).body:  # not what main imports
            for module in (
                [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in getattr(node, "names", [])]
            ):
                top = module.split(".")[0]
                assert top == name or place.get(top, -1) < place[name], f"{path} imports {module}"
                seen |= {top} & place.keys()
    assert {"samplers", "files", "evaluation", "training"} <= seen
