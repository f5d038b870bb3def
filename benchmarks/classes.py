"""Do guided samples belong to the class that was asked for, and at what cost in distance?

    python benchmarks/classes.py models/FashionMNIST_class/last.pth                       # minutes
    python benchmarks/classes.py models/FashionMNIST_class/last.pth --weights 1 2 -n 1000

For each weight of classifier-free guidance, -n samples, as many of each class, are classed by a classifier of the data that the
training has not seen, and their Fréchet distance to the valid images is taken in its features. The row "without" draws without
a class; its distance is that of the network as an unconditional one.
"""

import argparse
import json
from pathlib import Path

import torch
from common import ROOT, device_name, result_path, show, versions

from checkpoint import load_diffusion
from config import build_dataset
from evaluation.features import cached_classifier, from_uint8, to_uint8
from evaluation.metrics import frechet
from evaluation.sampling import labels_by_row, sample
from guidance import ClassifierFreeGuidance


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("-n", type=int, default=500)
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--sampler", default="dpm")
    parser.add_argument("--timesteps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=100)
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
    labels, _ = labels_by_row(net.n_classes, args.n, max_rows=net.n_classes)
    how = {"sampler": args.sampler, "timesteps": args.timesteps, "batch_size": args.batch_size}
    rows = []
    for weight in ("without", *args.weights):
        asked = None if weight == "without" else labels
        diffusion.time_aware_net = net if asked is None else ClassifierFreeGuidance(net, weight)
        samples = sample(diffusion, args.n, state["shape"], labels=asked, **how)
        found = classifier(from_uint8(to_uint8(samples))).argmax(1)
        distance = frechet(samples.split(500), (from_uint8(x) for x in images["valid"].split(500)), classifier)["distance"]
        share = None if asked is None else 100 * (found == labels).float().mean().item()
        rows.append({"weight": weight, "classed as asked, %": share, "Fréchet distance": distance})
    right = (classifier(from_uint8(images["valid"])).argmax(1) == data["valid"].labels).float().mean().item()
    show(f"{args.n} samples by {args.timesteps} steps of {args.sampler}; {100 * right:.1f} % of the valid images", rows)
    device = torch.device(args.device)
    result = {"device": device_name(device), "versions": versions(), "settings": vars(args), "valid": right, "rows": rows}
    out = result_path("classes", device, quick=False)
    Path(out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{out}")


if __name__ == "__main__":
    main()
