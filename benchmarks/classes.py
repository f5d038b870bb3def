"""Do guided samples belong to the class that was asked for, and at what cost in distance?

    python benchmarks/classes.py models/FashionMNIST_class/last.pth                       # an hour of one core
    python benchmarks/classes.py models/FashionMNIST_class/last.pth --weights 1 2 -n 500 --classify 0

Guidance: for each weight of the classifier-free one, -n samples, as many of each class, are classed by a classifier of the data
that the training has not seen. Their Fréchet distance to the valid images is taken in its features: of all classes together,
and of each class by itself (mean and largest), if there are enough samples of one. The row "without" draws without a class: its
distance is that of the network as an unconditional one; in the place of a class stand as many of its samples.

The bound as a classifier: the share of --classify valid images that it puts into their class, against the network calls, which
the number of rounds limits, for both weightings (classify.py).
"""

import argparse
import json
from typing import get_args

import torch
from common import ROOT, device_name, result_path, show, versions
from torch import Tensor

from checkpoint import load_diffusion
from classify import Weighting
from config import build_dataset
from dataset import ImageDataset, from_uint8, to_uint8
from evaluation.features import cached_classifier
from evaluation.metrics import frechet
from evaluation.sampling import condition_by_row, sample
from gaussian_diffusion import GaussianDiffusion
from guidance import ClassifierFreeGuidance


def classified(diffusion: GaussianDiffusion, images: ImageDataset, count: int) -> list[dict]:
    """A row for each weighting and number of rounds."""
    numbers = [(2 * i + 1) * len(images) // (2 * count) for i in range(count)]  # not those that the weighting was chosen on
    x0 = torch.stack([images[i] for i in numbers]).to(diffusion.signal_scale.device)
    rows = []
    for weighting in reversed(get_args(Weighting)):
        for rounds in (1, 4, 16):
            how = {"rounds": rounds, "generator": torch.Generator(x0.device).manual_seed(0), "return_calls": True}
            label, calls = diffusion.classify(x0, diffusion.time_aware_net.n_classes, weighting, **how)
            right = (label.cpu() == images.labels[numbers]).double()
            row = {"weighting": weighting, "rounds": rounds, "network calls an image": calls.double().mean().item()}
            rows.append(row | {"right, %": 100 * right.mean().item(), "+-": 100 * right.std().item() / count**0.5})
            print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("-n", type=int, default=1500)
    parser.add_argument("--weights", type=float, nargs="*", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--sampler", default="dpm")
    parser.add_argument("--timesteps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--classify", type=int, default=100, help="valid images that the bound classes")
    parser.add_argument("--classifier-seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    diffusion, state = load_diffusion(args.checkpoint)
    diffusion.to(args.device)
    net, config = diffusion.time_aware_net, state["config"]
    name = config["dataset"]["name"]
    data = {split: build_dataset(config, split) for split in ("train", "valid")}
    images = {split: torch.stack([data[split].pixels(i) for i in range(len(data[split]))]) for split in data}
    path = ROOT / "models" / f"classifier_{name}_{args.classifier_seed}.pth"
    path.parent.mkdir(exist_ok=True)
    classifier = cached_classifier(path, images["train"], data["train"].labels, name, seed=args.classifier_seed)
    condition, _ = condition_by_row(net.n_classes, args.n, max_rows=net.n_classes)
    labels = condition["label"]
    how = {"sampler": args.sampler, "timesteps": args.timesteps, "batch_size": args.batch_size}
    rows = []

    def distance(samples: Tensor, real: Tensor) -> float:
        return frechet(samples.split(500), (from_uint8(x) for x in real.split(500)), classifier)["distance"]

    for weight in ("without", *args.weights):
        asked = {} if weight == "without" else condition
        diffusion.time_aware_net = ClassifierFreeGuidance(net, weight) if asked else net
        samples = sample(diffusion, args.n, state["shape"], condition=asked, **how)
        row = {"weight": weight, "classed as asked, %": None, "Fréchet distance": distance(samples, images["valid"])}
        pairs = [(samples[labels == c], images["valid"][data["valid"].labels == c]) for c in labels.unique()]
        if not asked:
            pairs = [(samples[: args.n // net.n_classes], images["valid"])]
        else:
            found = classifier(from_uint8(to_uint8(samples))).argmax(1)
            row["classed as asked, %"] = 100 * (found == labels).float().mean().item()
        if min(len(made) for made, _ in pairs) > classifier.n_features:
            each = [distance(made, real) for made, real in pairs]
            row |= {"of a class, mean": sum(each) / len(each), "largest": max(each)}
        rows.append(row)
        print(row, flush=True)
    diffusion.time_aware_net = net
    right = (classifier(from_uint8(images["valid"])).argmax(1) == data["valid"].labels).float().mean().item()
    calls = classified(diffusion, data["valid"], args.classify) if args.classify else []
    show(f"{args.n} samples by {args.timesteps} steps of {args.sampler}; {100 * right:.1f} % of the valid images", rows)
    show(f"The bound as a classifier of {args.classify} valid images", calls)
    device = torch.device(args.device)
    result = {"device": device_name(device), "versions": versions(), "settings": vars(args), "valid": right, "rows": rows}
    result["classify"] = calls
    out = result_path("classes", device, quick=False)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{out}")


if __name__ == "__main__":
    main()
