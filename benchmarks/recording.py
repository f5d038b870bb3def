"""What it saves to record a training step as a CUDA graph (training/graph.py): milliseconds a step of our configs, both ways.

    python benchmarks/recording.py                              # on a GPU: a minute
    python benchmarks/recording.py --compile --configs CIFAR10_fast
    python benchmarks/recording.py --quick                      # anywhere, small, where nothing is recorded without CUDA

Each config's own network, batch and optimizer, on random images of its data's size that lie on the device. Timed in turns,
several steps in a row, the device waited for at the end of each turn only.
"""

import json
import statistics

import torch
from common import ROOT, interleaved, median_ratio, options, random_images, start, write

from config import load_config
from train import Trainer

CONFIGS = ("FashionMNIST_fast", "FashionMNIST_class", "Emoji_class", "CIFAR10_fast", "CIFAR10_den")
SIZES = {"Digits": 8, "FashionMNIST": 28}  # of a data set's images, by default 32
CLASSES = 10


def trainer(name: str, device: torch.device, batch_size: int | None, *settings: str) -> Trainer:
    """train.py's own trainer of a config, on one batch of random images."""
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    net, size = config["time_aware_net"]["kwargs"], SIZES.get(config["dataset"]["name"], 32)
    labelled, grey = "n_classes" in net, net["n_channels"] == 1
    count = max(CLASSES, batch_size or config["train_cfg"]["batch_size"])
    with random_images(count, size, grey, CLASSES) as root:
        images = json.dumps({"root": root, "mode": "L" if grey else "RGB", "labels": "folders" if labelled else None})
        settings += (
            "dataset.name=ImageFolder",
            f"dataset.train={images}",
            f"dataset.valid={images}",
            "train_cfg.num_workers=0",
        )
        settings += ("train_cfg.max_steps=null", "train_cfg.epochs=1000000", f"train_cfg.model_save_dirpath={root}/run")
        settings += (f"train_cfg.batch_size={batch_size}",) if batch_size else ()
        settings += ("dataset.clusters=null", f"time_aware_net.kwargs.n_classes={CLASSES}") if labelled else ()
        made = Trainer(load_config(ROOT / "configs" / f"{name}.json", settings), str(device))
        made.folder.close()
    return made


def row(args, name: str, device: torch.device) -> dict:
    """Milliseconds of a step of a config, launched and recorded, and the median of their quotients."""
    compiling, runs = f"train_cfg.compile={str(args.compile).lower()}", {}
    for way, recording in (("launched", "false"), ("recorded", "true"))[: 2 if device.type == "cuda" else 1]:
        runs[way] = trainer(name, device, args.batch_size, compiling, f"train_cfg.cuda_graph={recording}")
    batches = {way: next(run.train_data.epoch(0)) for way, run in runs.items()}
    steps = {way: lambda run=run, batch=batches[way]: run.train_step(*batch) for way, run in runs.items()}
    seconds = interleaved(steps, device, args.rounds, args.inner, warmup=6)
    cfg = next(iter(runs.values())).cfg
    found = {"config": name, "batch": cfg.batch_size, "precision": cfg.precision, "compiled": cfg.compile}
    found |= {f"{way}, ms": 1000 * statistics.median(each) for way, each in seconds.items()}
    return found | ({"times as fast": median_ratio(seconds["launched"], seconds["recorded"])} if len(seconds) == 2 else {})


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", help="names of files in configs")
    parser.add_argument("--compile", action="store_true", help="the network, too: minutes more")
    parser.add_argument("--inner", type=int, help="steps in one timing")
    args = parser.parse_args(argv)
    device = start(
        args,
        cpu={"configs": CONFIGS[:3], "rounds": 5, "inner": 2},
        cuda={"configs": CONFIGS, "rounds": 7, "inner": 10},
        quick={"configs": CONFIGS[:1], "batch_size": 4, "rounds": 3, "inner": 1},
    )
    write("recording", args, device, {"Training step": [row(args, name, device) for name in args.configs]})


if __name__ == "__main__":
    main()
