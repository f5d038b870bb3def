"""Everything that a card has to show, in one command, and a page of it: `make gpu`.

    python benchmarks/gpu.py               # about an hour on a GPU
    python benchmarks/gpu.py --quick       # two minutes anywhere, on small networks and digits, to see that it runs

Each part is a command of its own, printed before it runs. A part that fails is said to have failed on the page, with the last
line of its error, and the others go on; what needs a card is left out without one. Into benchmarks/results/gpu-DEVICE: JSON
files, pictures, a log for each part, and page.md, which can be pasted into a README.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from common import ROOT, device_name, result_path, versions

PROBE_STEPS = 60  # of a training whose speed is measured


class Part(NamedTuple):
    """A title, the lines of its page, and how it went."""

    title: str
    lines: list[str]
    failed: bool


def run(command: list[str], log: Path) -> tuple[bool, str]:
    """Run a command, its output into log, errors last: did it succeed, and what it printed on stdout."""
    print("$", shlex.join(command), flush=True)
    with open(log, "w", encoding="utf-8") as errors:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    errors = log.read_text(encoding="utf-8", errors="replace")
    log.write_text(f"{done.stdout}\n{errors}", encoding="utf-8")
    return done.returncode == 0, done.stdout.strip()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text(encoding="utf-8", errors="replace")) if line.strip()]
    return lines[-1] if lines else "no output"


def shown(command: list[str]) -> str:
    """The command as a reader would type it."""
    return shlex.join(["python", *command[1:]]).replace(f"{ROOT}/", "")


def script(title: str, command: list[str], folder: Path, fenced: bool = False) -> Part:
    """A part that is a script's printed tables."""
    log = folder / f"{title.split(',')[0].replace(' ', '_')}.log"
    good, output = run(command, log)
    if not good:
        return Part(title, [f"`{shown(command)}`", "", f"Failed: `{last_line(log)}`"], True)
    output = output.replace(f"{ROOT}/", "")  # where this machine has it
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
    title = f"{name}, " + (f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds")
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
    found = {"command": shown(train), "steps": steps, "minutes": minutes, **last}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    words = f"{steps} steps in {minutes:.1f} minutes with the sampling, {last['img_per_s']:.0f} images a second"
    lines = [f"`{shown(train)}`", "", f"{words}, validation loss {last['valid_loss']:.4g}.", "", f"![64 samples]({name}.png)"]
    return Part(title, lines, False)


def parts(device: torch.device, quick: bool, folder: Path) -> Iterator[Part]:
    """Run all, one after the other."""
    python, flags = sys.executable, ["--quick"] if quick else []
    tests = [python, "-m", "pytest", "-q", "tests/test_gpu.py"]
    if device.type == "cuda":
        yield script("Tests", tests, folder, fenced=True)
    else:
        yield Part("Tests", [f"`{shown(tests)}`", "", "Left out: they need a CUDA device."], False)
    small = ["--iterations", "1", "--timesteps", "4", "--image-size", "8"] if quick else []
    yield script("Settings", [python, "gaussian_diffusion.py", *small], folder, fenced=True)
    for name in ("recording", "limit", "peers", "epoch_end"):
        yield script(name, [python, f"benchmarks/{name}.py", *flags, "--results", str(folder)], folder)
    if quick:
        tiny = ["schedule.kwargs.timesteps=25", "time_aware_net.kwargs.base_channels=16", "train_cfg.sample_period=0"]
        yield training("Digits", "configs/Digits_den.json", 5, folder, tiny)
    else:
        launched = ["train_cfg.compile=false"]  # to compile would take a tenth of the time
        yield training("FashionMNIST", "configs/FashionMNIST_class.json", 600, folder, [*launched, "train_cfg.epochs=1000"])
        yield training("CIFAR10", "configs/CIFAR10_fast.json", 600, folder, [*launched, "train_cfg.warmup_steps=500"])


def page(device: torch.device, quick: bool, made: list[Part]) -> str:
    """All parts in Markdown."""
    installed = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    lines = [f"# {device_name(device)}{', quick run' if quick else ''}", "", f"{time.strftime('%Y-%m-%d')}; {installed}.", ""]
    for part in made:
        lines += [f"## {part.title}", "", *part.lines, ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="minutes instead of an hour, on any machine")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not args.quick:
        sys.exit("benchmarks/gpu.py: there is no CUDA device here; --quick runs anywhere")
    folder = result_path("gpu", device, args.quick).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for part in parts(device, args.quick, folder):
        made.append(part)
        (folder / "page.md").write_text(page(device, args.quick, made), encoding="utf-8")  # of what there is, whatever comes
    failed = [part.title for part in made if part.failed]
    print(f"{folder / 'page.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
