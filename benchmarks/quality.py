"""Bound and Fréchet distance: of each prediction, of each reverse variance, of each sampler by its number of steps.

    python benchmarks/quality.py predictions models/FashionMNIST_{den,rec,direct,velocity}/last.pth
    python benchmarks/quality.py variances models/FashionMNIST_{den,den_learnable}/last.pth
    python benchmarks/quality.py steps models/FashionMNIST_rec/last.pth        # also draws samples/quality.png

Prints a table and adds its rows to those in benchmarks/results/quality-DEVICE.json. The bound is in bits per dimension on
images of the valid split, at --bound-timesteps of the T timesteps (unbiased); its draws are the same for every row. The Fréchet
distance is of -n samples to the whole valid split, in the features of a classifier of the training split; compare it at equal
-n only. In the table steps every sampler gets the same number of network calls, heun half as many steps. Equal for all rows:
--precision, and torch's switches that go with it.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator

import torch
from common import ROOT, steps_within
from torch import Tensor

from checkpoint import load_diffusion
from config import build_dataset, build_diffusion
from dataset import ImageDataset
from evaluation.features import cached_classifier
from evaluation.metrics import frechet_distance, image_statistics
from evaluation.pictures import new_figure
from gaussian_diffusion import GaussianDiffusion
from samplers import SAMPLERS
from training import speed

VARIANCES = ("beta", "sigma_bar_square", "learnable", "fitted")
CALLS = (10, 20, 50, 100, 1000)


class Bench:
    """The data, the classifier and the settings that every row of a table shares."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        speed.set_flags(args.precision)
        _, state = load_diffusion(args.checkpoints[0])
        self.shape = state["shape"]
        self.train, valid = build_dataset(state["config"], "train"), build_dataset(state["config"], "valid")
        name = state["config"]["dataset"]["name"]
        images = torch.stack([self.train.pixels(i) for i in range(len(self.train))])
        path = ROOT / "models" / f"classifier_{name}.pth"
        self.classifier = cached_classifier(path, images, self.train.labels, name, device=self.device)
        self.real = image_statistics(self._batches(valid, len(valid)), self.classifier)
        self.valid = list(self._batches(valid, args.bound_images))

    def _batches(self, images: ImageDataset, count: int) -> list[Tensor]:
        chosen = torch.linspace(0, len(images) - 1, count).long().split(self.args.batch_size)
        return [images.to_float(torch.stack([images.pixels(i) for i in batch.tolist()])).to(self.device) for batch in chosen]

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def load(self, path: str) -> GaussianDiffusion:
        return load_diffusion(path)[0].to(self.device)

    def distance(self, diffusion: GaussianDiffusion, sampler: str, steps: int) -> float:
        """Fréchet distance of -n samples; the same x_T for every row."""

        def batches() -> Iterator[Tensor]:
            for i in range(0, self.args.n, self.args.batch_size):
                shape = (min(self.args.batch_size, self.args.n - i), *self.shape)
                with speed.autocast(self.device, self.args.precision):  # and not the classifier
                    x0 = diffusion.sample(shape, sampler, steps, clip_x0=True, generator=self._generator(i))
                yield x0

        return frechet_distance(image_statistics(batches(), self.classifier), self.real)

    def bits(self, diffusion: GaussianDiffusion) -> tuple[float, float]:
        """Bits per dimension and their standard error; the same draws for every row."""
        with speed.autocast(self.device, self.args.precision):
            totals = [
                diffusion.variational_bound(x0, True, self.args.bound_timesteps, generator=self._generator(i)).total
                for i, x0 in enumerate(self.valid)
            ]
        bits = torch.cat(totals) / math.log(2)
        return bits.mean().item(), bits.std().item() / len(bits) ** 0.5

    def fit(self, diffusion: GaussianDiffusion) -> None:
        with speed.autocast(self.device, self.args.precision):
            diffusion.fit_reverse_variance(self._batches(self.train, self.args.fit_images), generator=self._generator(1))

    def real_distance(self) -> float:
        """Of -n training images instead of samples: about what a perfect model would get, where images are many."""
        return frechet_distance(image_statistics(self._batches(self.train, self.args.n), self.classifier), self.real)


def predictions(bench: Bench) -> dict[str, dict]:
    rows = {}
    for path in bench.args.checkpoints:
        diffusion = bench.load(path)
        bits, error = bench.bits(diffusion)
        row = {"bits": bits, "standard_error": error}
        for sampler, steps in (("ddpm", 100), ("dpm", 20)):
            row[f"{sampler} {steps}"] = bench.distance(diffusion, sampler, steps)
        bench.fit(diffusion)
        row["bits, fitted variance"], _ = bench.bits(diffusion)
        rows[diffusion.prediction] = row
        print_row(diffusion.prediction, row)
    return rows


def variances(bench: Bench) -> dict[str, dict]:
    (fixed, state), learned = load_diffusion(bench.args.checkpoints[0]), bench.load(bench.args.checkpoints[1])
    rows = {}
    for name in bench.args.variances:
        diffusion = learned
        if name != "learnable":
            settings = state["config"]["diffusion"] | {"reverse_variance": "beta" if name == "fitted" else name}
            diffusion = build_diffusion(state["config"] | {"diffusion": settings}, fixed.time_aware_net).to(bench.device)
        if name == "fitted":
            bench.fit(diffusion)
        bits, error = bench.bits(diffusion)
        rows[name] = {"bits": bits, "standard_error": error}
        rows[name] |= {f"ddpm {steps}": bench.distance(diffusion, "ddpm", steps) for steps in (20, 100)}
        print_row(name, rows[name])
    return rows


def steps(bench: Bench) -> dict[str, dict]:
    diffusion = bench.load(bench.args.checkpoints[0])
    rows = {"real images": {"-": bench.real_distance()}}
    print_row("real images", rows["real images"])
    for sampler in bench.args.samplers:
        counts = {str(calls): steps_within(diffusion, sampler, calls) for calls in bench.args.calls}
        rows[sampler] = {calls: bench.distance(diffusion, sampler, count) for calls, count in counts.items()}
        print_row(sampler, rows[sampler])
    return rows


def print_row(name: str, row: dict[str, float]) -> None:
    print(f"{name:>18}  " + "  ".join(f"{key}: {value:.3f}" for key, value in row.items()), flush=True)


def plot(rows: dict[str, dict], n: int) -> None:
    figure = new_figure(figsize=(6, 4))
    axes = figure.subplots()
    for sampler in SAMPLERS:
        counts = [int(count) for count in rows.get(sampler, {})]
        axes.semilogx(counts, rows.get(sampler, {}).values(), "o-", label=sampler)
    axes.axhline(rows["real images"]["-"], color="grey", linestyle=":", label="real images")
    axes.set_ylim(0)
    axes.set(xlabel="network calls a sample", ylabel=f"Fréchet distance of {n} samples", xticks=CALLS, xticklabels=CALLS)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(ROOT / "samples" / "quality.png", dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["predictions", "variances", "steps"])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("-n", type=int, default=1000, help="samples")
    parser.add_argument("--bound-images", type=int, default=256)
    parser.add_argument("--bound-timesteps", type=int, help="by default all T")
    parser.add_argument("--fit-images", type=int, default=128, help="training images, each at all T timesteps")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--variances", nargs="+", default=VARIANCES, choices=VARIANCES, help="rows of the table variances")
    parser.add_argument("--samplers", nargs="+", default=[*SAMPLERS], choices=SAMPLERS, help="rows of the table steps")
    parser.add_argument("--calls", nargs="+", type=int, default=CALLS, help="its columns: network calls a sample")
    parser.add_argument("--precision", default="fp32", choices=speed.PRECISIONS, help="of the network")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    bench = Bench(args)
    rows = {"predictions": predictions, "variances": variances, "steps": steps}[args.table](bench)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"cpu-{platform.machine()}"
    path = ROOT / "benchmarks" / "results" / f"quality-{device.replace(' ', '-')}.json"
    path.parent.mkdir(exist_ok=True)
    tables = json.loads(path.read_text()) if path.exists() else {}
    made = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "seconds": round(time.perf_counter() - start)}
    rows = tables.get(args.table, {}).get("rows", {}) | rows
    tables[args.table] = {"rows": rows, "settings": vars(args), **made}
    if args.table == "steps":
        plot(rows, args.n)
    path.write_text(json.dumps(tables, indent=4) + "\n")


if __name__ == "__main__":
    main()
