"""Everything that a card has to show, in one command, and a page of it: `make gpu`.

    python benchmarks/gpu.py               # about an hour on a GPU
    python benchmarks/gpu.py --quick       # two minutes anywhere, on small networks and digits, to see that it runs

Each part is a command of its own, printed before it runs. A part that fails is said to have failed on the page, with the last
line of its error, and the others go on. Into benchmarks/results/gpu-DEVICE: JSON files, pictures, a log for each part, and
page.md, which can be pasted into a README.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import ROOT, device_name, versions

PROBE_STEPS = 60  # of a training whose speed is measured


class Part(NamedTuple):
    """A title, the lines of its page, and how it went."""

    title: str
    lines: list[str]
    failed: bool


def run(command: list[str], log: Path) -> tuple[bool, str]:
    """Run a command, its output into log: did it succeed, and what it printed on stdout."""
    print("$", shlex.join(command), flush=True)
    with open(log, "w", encoding="utf-8") as errors:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    with open(log, "a", encoding="utf-8") as file:
        file.write(done.stdout)
    return done.returncode == 0, done.stdout.strip()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text(encoding="utf-8", errors="replace")) if line.strip()]
    return lines[-1] if lines else "no output"


def shown(command: list[str]) -> str:
    """The command as a reader would type it."""
    words = [str(Path(word).relative_to(ROOT)) if word.startswith(str(ROOT)) else word for word in command[1:]]
    return shlex.join(["python", *words])


def script(title: str, command: list[str], folder: Path, fenced: bool = False) -> Part:
    """A part that is a script's printed tables."""
    log = folder / f"{title.split(',')[0].replace(' ', '_')}.log"
    good, output = run(command, log)
    if not good:
        return Part(title, [f"`{shown(command)}`", "", f"Failed: `{last_line(log)}`"], True)
    return Part(title, [f"`{shown(command)}`", "", f"```\n{output}\n```" if fenced else output], False)


def steps_within(seconds: float, config: str, folder: Path, settings: list[str]) -> int:
    """Training steps that fit, by the speed of a short run."""
    run_folder = folder / "probe"
    command = [sys.executable, "train.py", config, "--overwrite", "--set", *settings, f"train_cfg.max_steps={PROBE_STEPS}"]
    command += ["train_cfg.record_period=20", f"train_cfg.model_save_dirpath={run_folder}", "train_cfg.sample_period=0"]
    good, _ = run([*command, "train_cfg.valid_images=100"], folder / "probe.log")
    if not good:
        raise RuntimeError(last_line(folder / "probe.log"))
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    batch = json.loads((ROOT / config).read_text())["train_cfg"]["batch_size"]
    shutil.rmtree(run_folder)
    return max(PROBE_STEPS, int(seconds * lines[-1]["img_per_s"] / batch))


def training(name: str, config: str, seconds: float, folder: Path, settings: list[str]) -> Part:
    """A part that trains for so many seconds and samples: its validation loss, its speed and a picture."""
    title = f"{name}, {seconds / 60:g} minutes"
    try:
        steps = steps_within(seconds, config, folder, settings)
    except RuntimeError as error:
        return Part(title, [f"Failed: `{error}`"], True)
    models = ROOT / "models" / f"gpu_{name}"
    train = [sys.executable, "train.py", config, "--overwrite", "--set", *settings, f"train_cfg.max_steps={steps}"]
    sample = [sys.executable, "test.py", str(models / "last.pth"), "-n", "64", "--sampler", "dpm", "--timesteps", "25"]
    start = time.perf_counter()
    for command, log in (([*train, f"train_cfg.model_save_dirpath={models}"], "train"), (sample, "sample")):
        good, _ = run(command, folder / f"{name}_{log}.log")
        if not good:
            return Part(title, [f"`{shown(command)}`", "", f"Failed: `{last_line(folder / f'{name}_{log}.log')}`"], True)
    minutes = (time.perf_counter() - start) / 60
    shutil.copy(models / "last_gen" / "grid.png", folder / f"{name}.png")
    last = json.loads((models / "metrics.jsonl").read_text().splitlines()[-1])
    words = f"{steps} steps in {minutes:.1f} minutes with the sampling, {last['img_per_s']:.0f} images a second"
    lines = [f"`{shown(train)}`", "", f"{words}, validation loss {last['valid_loss']:.4g}.", "", f"![64 samples]({name}.png)"]
    return Part(title, lines, False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="minutes instead of an hour, on any machine")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not args.quick:
        sys.exit("benchmarks/gpu.py: there is no CUDA device here; --quick runs anywhere")
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder = ROOT / "benchmarks" / "results" / f"gpu-{slug}{'-quick' if args.quick else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    python, quick = sys.executable, ["--quick"] if args.quick else []
    parts = []
    tests = [python, "-m", "pytest", "-q", "tests/test_gpu.py"]
    parts.append(script("Tests", tests, folder, fenced=True))
    small = ["--iterations", "1", "--timesteps", "4", "--image-size", "8"] if args.quick else []
    parts.append(script("Settings", [python, "gaussian_diffusion.py", *small], folder, fenced=True))
    for name in ("limit", "peers", "epoch_end"):
        parts.append(script(name, [python, f"benchmarks/{name}.py", *quick, "--results", str(folder)], folder))
    if args.quick:
        tiny = ["schedule.kwargs.timesteps=25", "time_aware_net.kwargs.base_channels=16", "train_cfg.sample_period=0"]
        parts.append(training("Digits", "configs/Digits_den.json", 5, folder, tiny))
    else:
        parts.append(training("FashionMNIST", "configs/FashionMNIST_class.json", 600, folder, ["train_cfg.epochs=1000"]))
        parts.append(training("CIFAR10", "configs/CIFAR10_den.json", 600, folder, ["train_cfg.warmup_steps=500"]))
    installed = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    page = [
        f"# {device_name(device)}{', quick run' if args.quick else ''}",
        "",
        f"{time.strftime('%Y-%m-%d')}; {installed}.",
        "",
    ]
    for part in parts:
        page += [f"## {part.title}", "", *part.lines, ""]
    (folder / "page.md").write_text("\n".join(page), encoding="utf-8")
    failed = [part.title for part in parts if part.failed]
    print(f"{folder / 'page.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
