"""The report of a model: one HTML file that needs no other file, no network and no script, though with one it can be scrubbed.

`Report` is made before anything is sampled, and says what of bpd and fd there is to measure; `write` puts the page together.
What cannot be known, without the data or without metrics.jsonl, is left out, and the page says why.
"""

import json
import math
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import network_without_memory
from dataset import ImageDataset, evenly, evenly_with_repeats, shared_images
from evaluation import page
from evaluation.charts import Series, line_chart
from evaluation.metrics import METRICS, Evaluation, build_extractor, frechet
from evaluation.nearest import Copies, nearest_training_images
from evaluation.sampling import Drawn
from mistakes import Mistake, as_mistake
from training.meter import BINS
from training.run_folder import read_records
from training.speed import device_name

VALUES = {"samples": 400_000, "strips": 400_000, "trajectory": 1_400_000}  # in a picture at most, of about a byte each
TRAJECTORY_IMAGES = 36
COMPARED = 500  # samples, and held-out images, whose nearest training images are searched, at most


@dataclass
class Sampled:
    """What was drawn, and how."""

    drawn: Drawn
    labels: Tensor | None  # [n]
    columns: int | None  # of a picture with a row a class
    times: list[int]  # that the sampler visits, descending, and 0
    calls: int  # of the network, for a sample
    seconds: float
    how: str  # in words


class Report:
    """What `test.py --report` writes.

    evaluation  the model to measure; its samples come later
    metrics     those that were asked for; of bpd and fd, what can be measured is added
    checkpoint  its path
    state       what is in it
    command     that makes the report
    """

    def __init__(self, evaluation: Evaluation, metrics: dict, checkpoint: Path, state: dict, command: str):
        self.evaluation, self.metrics, self.checkpoint = evaluation, metrics, checkpoint
        self.state, self.command = state, command
        self.missing: dict[str, str] = {}  # why something is not in the report
        self.data: dict[str, ImageDataset] = {}
        try:
            self.data = {split: evaluation.dataset(split) for split in ("train", "valid")}
        except Mistake as mistake:
            self.missing["data"] = f"the data cannot be loaded ({mistake})"
        for name in ("bpd", "fd"):
            if name not in metrics:
                self._try(name)
        self.extractor = self._extractor() if self.data and evaluation.ranks.rank == 0 else None

    def _try(self, name: str) -> None:
        """Add a metric, or note why it cannot be measured. A flag of bpd's that is out of range is a Mistake as ever."""
        try:
            self.metrics[name] = METRICS[name](self.evaluation)
        except Mistake as mistake:
            if name == "bpd" and self.data and not self.evaluation.guided and len(self.data["valid"]) > 1:
                raise
            self.missing[name] = self.missing.get("data", str(mistake).removeprefix(f"--metrics {name}: "))

    def _extractor(self) -> nn.Module | None:
        """That of fd, or the one that fd would have, or without labels Inception, if it is there."""
        e = self.evaluation
        if "fd" in self.metrics:
            return self.metrics["fd"].extractor
        reasons = []
        for features in dict.fromkeys((e.features, "inception")):
            try:
                with as_mistake():
                    return build_extractor(replace(e, features=features))
            except Mistake as mistake:
                if e.classifier or e.features == "inception":  # asked for
                    raise
                reasons.append(str(mistake))
        self.missing["features"] = "; ".join(reasons)
        return None

    def write(self, path: Path, sampled: Sampled, results: dict[str, dict]) -> None:
        """The page, from the samples and from what the metrics found of them."""
        self.sampled, self.results, self.records = sampled, results, self._records()
        dataset = self.state["config"]["dataset"]["name"]
        title = f"{dataset}: {self.checkpoint.absolute().parent.name}/{self.checkpoint.name}"
        body = [self._summary(title), self._samples(), self._trajectory(), self._curves(), self._quality(), self._bits()]
        page.write_page(path, title, [*body, self._nearest(), self._cost(), self._reproduce()])
        print(f"{path}: open it in a browser")

    def _records(self) -> list[dict]:
        """The records of metrics.jsonl beside the checkpoint."""
        records = []
        try:
            records = read_records(self.checkpoint.with_name("metrics.jsonl"))
        except OSError as error:
            self.missing["records"] = f"{error.filename}: {error.strerror}"
        if not records:
            self.missing.setdefault("records", "the metrics.jsonl beside the checkpoint holds no record")
        return records

    # Sections

    def _summary(self, title: str) -> str:
        state, results = self.state, self.results
        epochs = "" if state.get("epoch") is None else f", {state['epoch']} epochs"  # older snapshots do not say
        rows = [("Network", f"{_size(state['config']):,}", "parameters")]
        if "step" in state:  # which one's own loop may not say
            rows.insert(0, ("Trained for", f"{state['step']:,}", f"steps{epochs}"))
        if bpd := results.get("bpd"):
            error = f"± {bpd['standard_error']:.4f} bits per dimension, on {bpd['images']} validation images"
            error += f", given their {bpd['given']}" if "given" in bpd else ""
            rows.append(("Likelihood bound", f"{bpd['total']:.4f}", error))
        if fd := results.get("fd"):
            rows.append(("Fréchet distance", f"{fd['distance']:.4f}", f"of {fd['samples']} samples (no unit)"))
        seconds = self.sampled.seconds / len(self.sampled.drawn.samples)
        rows.append(("A sample takes", f"{seconds:.3g} s", self.sampled.how))
        made = f"Written on {time.strftime('%Y-%m-%d')} on {device_name(self.evaluation.ranks.device)}."
        return page.header(title, made) + page.tiles(rows)

    def _samples(self) -> str:
        made = self.sampled.drawn.animation[:, -1]
        images, columns = _few(made, VALUES["samples"] // _values(made), self.sampled.columns)
        what = f"{len(images)} samples by {self.sampled.how}, seed {self.evaluation.seed}."
        figures = [page.figure(page.picture(images, columns), f"A grid of {len(images)} samples", what)]
        if self.data:
            real = self._real_images(len(images), columns)
            caption = f"{len(real)} real images of the validation set, {self._seen()}."
            figures.append(page.figure(page.picture(real, columns), f"A grid of {len(real)} real images", caption))
        texts = [f"No real image is shown: {self.missing['data']}."] if "data" in self.missing else []
        if columns:
            rows = len(images) // columns
            names = self.state.get("class_names") or range(rows)
            texts.append(f"A row a class: {', '.join(map(str, names[:rows]))}.")
        return page.section("Samples beside real images", *map(page.p, texts), page.columns_of_two(*figures))

    def _seen(self) -> str:
        shared, of = shared_images(self.data["train"], self.data["valid"]), len(self.data["valid"])
        return f"of which {shared} of {of} are among those to train on" if shared else "which training never saw"

    def _real_images(self, count: int, columns: int | None) -> Tensor:
        """Of the validation set, evenly spread; of a picture with a row a class, as many of each class; where the samples have
        the conditions of images, those.
        """
        valid = self.data["valid"]
        numbers = evenly(count, len(valid))
        if valid.conditions:
            numbers = evenly_with_repeats(len(self.sampled.drawn.samples), len(valid))[:count].tolist()
        if columns and valid.labels is not None:
            of_class = [(valid.labels == label).nonzero().flatten().tolist() for label in range(count // columns)]
            numbers = [each[i % len(each)] for each in of_class if each for i in range(columns)]
        return valid.fixed_images(numbers)

    def _trajectory(self) -> str:
        frames, times, columns = self.sampled.drawn.animation, self.sampled.times, self.sampled.columns
        at, values = evenly(frames.shape[1], len(times)), _values(frames)
        few = evenly(max(3, VALUES["trajectory"] // values), len(at))  # fewer frames of large images
        images, columns = _few(frames, min(TRAJECTORY_IMAGES, VALUES["trajectory"] // (values * len(few))), columns)
        text = f"{len(images)} samples as they come out of the noise, from t = {times[0]} to t = 0."
        if columns and columns**2 < len(images):  # lie it down
            images, columns = images.unflatten(0, (-1, columns)).transpose(0, 1).flatten(0, 1), len(images) // columns
            text += " A column a class."
        pictures = {times[at[i]]: page.picture(images[:, i], columns) for i in few}
        return page.section("From noise to image", page.columns_of_two(page.scrubber(pictures, text), self._strips()))

    def _strips(self) -> str:
        strips = self.sampled.drawn.strips[:: self.sampled.columns or 1]  # of a row a class, the first one
        rows = strips[: max(1, min(10, VALUES["strips"] // (_values(strips) * strips.shape[1])))]
        times = ", ".join(str(self.sampled.times[i]) for i in evenly(strips.shape[1], len(self.sampled.times)))
        caption = f"A row a sample, from x_T on the left to x_0 on the right: t = {times}."
        made = page.picture(rows.flatten(0, 1), strips.shape[1])
        return page.figure(made, f"{len(rows)} samples, each at {strips.shape[1]} times", caption)

    def _curves(self) -> str:
        if not self.records:
            return page.section("Training", page.p(f"There are no curves: {self.missing['records']}."))
        steps, step = [record["step"] for record in self.records], self.state.get("step")
        mark = step if step != steps[-1] else None

        def of(name: str) -> list:
            return [record.get(name) for record in self.records]

        lines = [Series("training, mean since the record before", steps, of("train_loss"), "c0")]
        lines.append(Series("validation, averaged weights", steps, of("valid_loss"), "c1", points=True))
        diffusion = self.state["config"]["diffusion"]
        mode = diffusion.get("loss_mode") or diffusion.get("name")  # of one's own
        charts = [line_chart(f"Loss “{mode}” per dimension, of metrics.jsonl.", lines, "step", "loss", log_y=None, mark=mark)]
        charts += [self._loss_by_time(steps, of("loss_by_t"), mark), self._during("fd", mark), self._during("bpd", mark)]
        text = page.p(f"The dashed line is step {step}, at which this checkpoint was saved.") if mark else ""
        return page.section("Training", text, page.columns_of_two(*charts))

    def _loss_by_time(self, steps: list[int], losses: list[list | None], mark: int | None) -> str:
        if not any(losses):
            return ""
        T = self.evaluation.diffusion.T
        edges = [-(-b * T // BINS) for b in range(BINS + 1)]  # bin b holds t with b <= (t - 1) BINS / T < b + 1
        losses = [row or [None] * BINS for row in losses]
        names = [f"t = {first + 1}..{last}" for first, last in pairwise(edges)]
        lines = [Series(name, steps, [row[b] for row in losses], f"n{b}") for b, name in enumerate(names)]
        what = "Training loss by noise level: the mean over each eighth of the times, from little noise (blue) to much (red)."
        return line_chart(what, lines, "step", "loss", log_y=None, mark=mark)

    def _during(self, metric: str, mark: int | None) -> str:
        """The chart of a metric that was measured during training, if it was."""
        found = {r["step"]: r["metrics"][metric] for r in self.records if (r.get("metrics") or {}).get(metric)}
        if not found:
            return ""
        key, count, words = {
            "fd": ("distance", "samples", "Fréchet distance to the validation images"),
            "bpd": ("total", "images", "Likelihood bound"),
        }[metric]
        what = f"{words}, measured during the training, at the last time on {list(found.values())[-1].get(count)} {count}."
        line = Series(words, list(found), [value[key] for value in found.values()], "c1", points=True)
        return line_chart(what, [line], "step", "bits per dimension" if metric == "bpd" else "distance", mark=mark)

    def _quality(self) -> str:
        texts = [self._likelihood(self.results["bpd"])] if "bpd" in self.results else [f"No bpd: {self.missing['bpd']}."]
        texts += self._distance(self.results["fd"]) if "fd" in self.results else [f"No fd: {self.missing['fd']}."]
        texts += [self.metrics[name].describe(found) for name, found in self.results.items() if name not in ("bpd", "fd")]
        return page.section("Quality", *map(page.p, texts))

    def _likelihood(self, bpd: dict[str, Any]) -> str:
        levels = self.evaluation.diffusion.n_levels or 256
        given = f" whose {bpd['given']} is given" if "given" in bpd else ""
        return (
            f"Likelihood: an image{given} costs at most {bpd['total']:.4f} ± {bpd['standard_error']:.4f} bits per dimension "
            f"(mean and standard error of {bpd['images']} validation images; a dimension is one value of an image). The fewer, "
            f"the better; written down as they are, {levels} levels cost {math.log2(levels):.4g}."
        )

    def _distance(self, fd: dict[str, Any]) -> list[str]:
        text = (
            f"Fréchet distance: {fd['distance']:.4f} (without a unit; the smaller, the better) between {fd['samples']} samples "
            f"and {fd['real']} validation images, in the features of the {fd['features']}."
        )
        unlike = "Distances of another number of samples or in other features do not compare."
        return [text, f"{self._floor(fd['samples'])} {unlike}"]

    def _floor(self, samples: int) -> str:
        """What the distance is of as many training images, of the same classes: a scale, and no bound, as a classifier was
        trained on most of them and not on samples.
        """
        train, valid, size = self.data["train"], self.data["valid"], self.evaluation.batch_size
        if train.shape != valid.shape:
            return "Training images have another size, and cannot be taken for comparison."
        numbers, of = evenly(samples, len(train)), ""
        if self.sampled.labels is not None and train.labels is not None:
            asked = self.sampled.labels.bincount().tolist()
            of_class = [(train.labels == label).nonzero().flatten() for label in range(len(asked))]
            numbers = [int(each[i]) for each, count in zip(of_class, asked, strict=True) for i in evenly(count, len(each))]
            of = ", as many of each class,"
        if not numbers:
            return "Of these classes there is no training image to compare with."

        real = (train.fixed_images(part.tolist()) for part in torch.tensor(numbers).split(size))
        try:
            floor = frechet(real, self.metrics["fd"].real, self.extractor)
        except ValueError as error:
            return f"Of training images it cannot be taken for comparison: {error}."
        return f"For comparison: {len(numbers)} real training images{of} are {floor['distance']:.4f} from the same images."

    def _bits(self) -> str:
        title = "Where the bits are"
        if "bpd" not in self.results:
            return page.section(title, page.p(f"Not measured: {self.missing['bpd']}."))
        found, parts, T = self.results["bpd"], self.metrics["bpd"].by_time, self.evaluation.diffusion.T
        rows = [
            ("prior", found["prior"], f"what x_T, at t = {T}, still says of x_0"),
            ("KL terms", found["kl"], f"the steps from t = {T} down to 1, estimated from {len(parts)} of the {T - 1}"),
            ("reconstruction", found["reconstruction"], "from x_1 to the exact levels of x_0"),
            ("total", found["total"], f"± {found['standard_error']:.4f}, standard error over {found['images']} images"),
        ]
        rows = [(name, f"{bits:.4f}", words) for name, bits, words in rows]
        text = "The parts of the bound on the likelihood (README, equation 6): means over the validation images."
        both = [page.table(("part", "bits per dimension", "what it is"), rows), self._term_charts()]
        return page.section(title, page.p(text), *both)

    def _term_charts(self) -> str:
        parts = self.metrics["bpd"].by_time
        middles, bits = [(part.first * part.last) ** 0.5 for part in parts], [part.bits for part in parts]
        line = Series("KL term of the step from t to t - 1", middles, bits)
        what = "What each step costs. Each part of the times has one term, at its middle."
        charts = [line_chart(what, [line], "t", "bits per dimension", log_x=True, log_y=True)]
        sums = torch.tensor([(part.last - part.first + 1) * part.bits for part in parts]).cumsum(0)
        if parts and sums[-1] > 0:
            line = Series("KL terms of the steps 2..t", [part.last for part in parts], (100 * sums / sums[-1]).tolist())
            what = "What the steps up to t cost together, as a share of all KL terms."
            charts.append(line_chart(what, [line], "t", "% of the KL terms", log_x=True))
        return page.columns_of_two(*charts)

    def _nearest(self) -> str:
        title, samples = "Does it copy?", self.sampled.drawn.samples
        if not self.data:
            return page.section(title, page.p(f"Unknown: {self.missing['data']}."))
        train, valid = self.data["train"], self.data["valid"]
        if not samples.shape[1:] == train.shape == valid.shape:
            return page.section(title, page.p("Unknown: samples, training images and validation images are not of one size."))
        numbers = evenly(COMPARED, len(samples))
        samples = samples[numbers]
        held_out = valid.fixed_images(evenly(COMPARED, len(valid)))
        size = self.evaluation.batch_size
        found = nearest_training_images(torch.cat([samples, held_out]), train, self.extractor, size)
        text = f"For each of {len(samples)} samples, the nearest of all {len(train):,} training images was searched, and for"
        text += f" each of {len(held_out)} validation images, {self._seen()}. Copies would lie nearer than unseen ones."
        why = f"Features: the {self.extractor.name}." if self.extractor else f"In pixels only: {self.missing['features']}."
        random = "The random transforms of the training images were drawn once." if train.is_random else ""
        return page.section(title, page.p(text, why, random), *Copies(samples, found, train, numbers).parts())

    def _cost(self) -> str:
        sampled, device = self.sampled, self.evaluation.ranks.device
        n, batch = len(sampled.drawn.samples), self.evaluation.batch_size
        rows = []
        if speeds := [r["img_per_s"] for r in self.records if r.get("img_per_s")]:
            how = "median of the records in metrics.jsonl, on the machine that trained"
            rows.append(("training", f"{statistics.median(speeds):,.1f} images/s", how))
        rows.append(("sampling", f"{sampled.seconds:.1f} s", f"{n} samples by {sampled.how}, on {device_name(device)}"))
        how = f"the same, for each; {sampled.calls} network calls, {min(n, batch)} samples at a time"
        rows.append(("a sample", f"{sampled.seconds / n:.3g} s", how))
        rows.append(("memory", *_peak_memory(device)))
        config = self.state["config"]
        rows.append(("network", f"{_size(config):,}", f"parameters of {config['time_aware_net']['name']}"))
        size = self.checkpoint.stat().st_size / 2**20
        rows.append(("checkpoint", f"{size:,.1f} MiB", "size of the file: weights, average and what resuming needs"))
        return page.section("Speed, memory, size", page.table(("what", "how much", "how it was measured"), rows))

    def _reproduce(self) -> str:
        text = (
            "Save the config below as config.json. The first command trains the model, the second one writes this report of it."
        )
        versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, seed {self.evaluation.seed}."
        config = page.details("The resolved config", json.dumps(self.state["config"], indent=4))
        commands = page.pre(f"python train.py config.json\n{self.command}")
        return page.section("How to reproduce it", page.p(text, versions), commands, config)


def _size(config: dict) -> int:
    """The parameters of a config's network, without what a guided one is wrapped in."""
    return sum(parameter.numel() for parameter in network_without_memory(config).parameters())


def _few(images: Tensor, most: int, columns: int | None) -> tuple[Tensor, int | None]:
    """At most so many, and at least one, of images [N, ...]; with rows of `columns`, the first of each row; and the columns."""
    if columns is None:
        return images[: max(1, most)], None
    rows = images.unflatten(0, (-1, columns))
    columns = max(1, min(columns, most // len(rows)))
    return rows[: max(1, most), :columns].flatten(0, 1), columns


def _values(images: Tensor) -> int:
    """Of one of images [..., C, H, W], as it is shown."""
    return page.shrunk(images.flatten(0, -4)[:1], page.MOST_SIDE).numel()


def _peak_memory(device: torch.device) -> tuple[str, str]:
    """How much, and of what."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB", "most that PyTorch held on the card until now"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in what the system counts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**20:,.0f} MiB", "most that the process of this report held until now, with Python and PyTorch in it"
