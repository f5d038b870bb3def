"""Labels: from the data set to the network, and never to where a label was dropped."""

import itertools
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from children import PATIENCE
from PIL import Image
from runs import ROOT, tiny
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import config
import convert
import train
from beta_schedule import LinearSchedule
from config import TrainConfig, load_config
from dataset import ArrayDataset, ImageDataset, ImageFolder, check_dataset
from gaussian_diffusion import GaussianDiffusion
from guidance import hide
from mistakes import Mistake
from time_aware_module import TimeAwareMLP, TimeAwareUNet
from training import speed
from training.batches import Batches, draw_hidden
from training.checks import _check_labels, bad_numbers, check_fit
from training.optimizers import build_optimizer
from training.ranks import Ranks
from training.speed import loss_of_two

UNET = {"n_channels": 3, "base_channels": 16, "ch_mult": (1, 2), "num_res_blocks": 1}
X = {"unet": torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
X["mlp"] = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
T = torch.tensor([1, 2, 30, 400, 1000, 7])
LABEL = torch.tensor([2, 0, 3, 3, 0, 2])  # with 3 classes: twice no label, never 1
BOTH = pytest.mark.parametrize("kind", ["unet", "mlp"])


def build(kind: str, n_classes: int | None, moved: bool = True) -> nn.Module:
    """A small network; moved: without zeros where it starts from them, so that everything in it matters."""
    torch.manual_seed(3)
    net = TimeAwareUNet(**UNET, n_classes=n_classes) if kind == "unet" else TimeAwareMLP(5, n_classes=n_classes)
    if moved:
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return net


def table(net: nn.Module) -> nn.Parameter:
    """The vectors of the labels, [n_classes + 1, t_channels]."""
    return net.time_embedding.label.weight


# The network


def test_the_network_with_labels_is_that_of_diffusers():
    """Whose class embedding has a row for each of our labels, no label being one more."""
    diffusers = pytest.importorskip("diffusers")
    net = build("unet", 3)
    unet = diffusers.UNet2DModel(**convert.unet_options(UNET, 8) | {"num_class_embeds": 4})
    unet.load_state_dict(convert.weights_to_diffusers(net) | {"class_embedding.weight": table(net)})
    with torch.no_grad():
        for label, same in ((LABEL, LABEL), (None, torch.full((6,), 3))):
            expected = unet(X["unet"], T - 1, class_labels=same).sample
            torch.testing.assert_close(net(X["unet"], T, label), expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_a_label_acts_as_its_vector_added_to_the_embedding_of_time_alone(kind):
    """So the network without classes is the same, once the vector is in the last bias of its embedding of time."""
    net, plain = build(kind, 3), build(kind, None)
    weights = {name: value for name, value in net.state_dict().items() if name != "time_embedding.label.weight"}
    outs = []
    for k in range(4):
        bias = weights["time_embedding.mlp.2.bias"] + table(net)[k].detach()
        plain.load_state_dict(weights | {"time_embedding.mlp.2.bias": bias})
        outs.append(net(X[kind], T, torch.full((6,), k)))
        torch.testing.assert_close(outs[k], plain(X[kind], T), rtol=1e-4, atol=1e-5)
    assert torch.pdist(torch.stack(outs).flatten(1)).min() > 0.01
    mixed = net(X[kind], T, LABEL)
    for i, k in enumerate(LABEL.tolist()):  # whatever the labels of the others are
        torch.testing.assert_close(mixed[i], outs[k][i], rtol=1e-4, atol=1e-5)


@BOTH
def test_no_label_is_the_last_row(kind):
    net = build(kind, 3)
    assert torch.equal(net(X[kind], T), net(X[kind], T, torch.full((6,), 3)))
    assert torch.equal(net(X[kind], T), net(X[kind], T, label=None))


@BOTH
def test_a_new_network_with_classes_is_that_without(kind):
    """Also in the numbers drawn after it was built."""
    plain = build(kind, None, moved=False)
    drawn = torch.rand(3)
    net = build(kind, 3, moved=False)
    assert torch.equal(torch.rand(3), drawn)
    assert plain.state_dict().keys() == net.state_dict().keys() - {"time_embedding.label.weight"}
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    if kind == "unet":  # which says zero otherwise
        nn.init.ones_(plain.conv_out.weight), nn.init.ones_(net.conv_out.weight)
    assert torch.equal(net(X[kind], T, LABEL), plain(X[kind], T))


def test_without_classes_the_state_has_the_keys_of_older_checkpoints():
    layers = ["time_embedding.mlp.0", "time_embedding.mlp.2", "linear_in", "inner.0", "time.0", "outer.0", "linear_out"]
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert TimeAwareMLP(4, 16, 1, 8).state_dict().keys() == expected
    assert not any("label" in name for name, _ in build("unet", None).named_parameters())


@BOTH
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 4, 0]), r"^label = \[0, 1, 2, 3, 4, 0\]: every .* in 0\.\.3, where 3 is no label"),
        (torch.tensor([0, 1, -1, 3, 0, 0]), r"^label = .*in 0\.\.3"),
        (torch.tensor([0, 1]), r"^label: torch.int64 of shape \[2\]: must be a long tensor \[6\]"),
        (torch.zeros(6), r"^label: torch.float32 of shape"),
        (torch.zeros(6, 1).long(), r"^label: torch.int64 of shape \[6, 1\]"),
        (2, r"^label: 2: must be a long tensor"),
    ],
)
def test_labels_that_are_none_are_refused(kind, label, message):
    with pytest.raises(ValueError, match=message):
        build(kind, 3)(X[kind], T, label)


@BOTH
def test_a_network_without_classes_refuses_a_label(kind):
    with pytest.raises(ValueError, match=r"^label: this network has no classes"):
        build(kind, None)(X[kind], T, LABEL)


@BOTH
@pytest.mark.parametrize("n_classes", [0, -1, 2**16 + 1])
def test_a_number_of_classes_out_of_range_is_refused(kind, n_classes):
    with pytest.raises(ValueError, match=rf"^n_classes = {n_classes}: must lie in 1\.\.65536"):
        build(kind, n_classes)


@BOTH
def test_muon_leaves_the_vectors_of_the_labels_to_adam(kind):
    net = build(kind, 3)
    model = GaussianDiffusion(LinearSchedule(10), net)
    cfg = SimpleNamespace(optimizer="muon", lr=1e-3, muon_momentum=0.95)
    groups = {group["name"]: group["params"] for group in build_optimizer(cfg, model, torch.device("cpu")).param_groups}
    assert [any(p is table(net) for p in groups[name]) for name in ("network", "hidden")] == [True, False]


# What the network must not see


@BOTH
@pytest.mark.parametrize("label", [LABEL, None])
def test_only_the_rows_of_the_labels_given_get_a_gradient(kind, label):
    net = build(kind, 3)
    net(X[kind], T, label).square().sum().backward()
    moved = [bool(row.any()) for row in table(net).grad]
    assert moved == ([True, False, True, True] if label is not None else [False, False, False, True])


def drop_condition(condition, null, p):
    """As a step of training does."""
    return hide(condition, null, draw_hidden(condition, null, p))


def drop(labels, n_classes, p):
    return drop_condition({"label": labels}, {"label": n_classes}, p)["label"]


@BOTH
def test_a_dropped_label_leaves_no_trace(kind):
    """Neither in the output nor in a gradient, whatever it was."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    results = []
    for shift in range(3):
        torch.manual_seed(4)
        dropped = drop(labels, 3, 0.5) == 3
        torch.manual_seed(4)
        seen = drop(torch.where(dropped, (labels + shift) % 3, labels), 3, 0.5)
        net = build(kind, 3)
        out = net(X[kind], T, seen)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in net.parameters())])
        kept = labels[~dropped].unique().tolist()
        assert 0 < len(kept) < 3
        assert [bool(row.any()) for row in table(net).grad] == [k in kept for k in range(3)] + [True]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_labels_are_dropped_each_by_its_own_coin():
    labels = torch.arange(10).repeat(2000)
    before = labels.clone()
    seen = drop(labels, 10, 0.1)
    assert torch.equal(labels, before)
    assert seen.dtype == torch.long
    dropped = seen == 10
    assert torch.equal(seen[~dropped], labels[~dropped])
    assert dropped.sum().item() == pytest.approx(2000, abs=5 * (20_000 * 0.1 * 0.9) ** 0.5)
    a_class = torch.stack([dropped[labels == k].sum() for k in range(10)])
    assert (a_class - 200).abs().max() < 5 * (2000 * 0.1 * 0.9) ** 0.5
    together = (dropped[1:] & dropped[:-1]).sum().item()  # of two neighbours
    assert together == pytest.approx(200, abs=5 * 200**0.5)


def test_the_coins_come_from_the_global_generator():
    labels = torch.zeros(1000, dtype=torch.long)
    torch.manual_seed(5)
    first, second = drop(labels, 1, 0.5), drop(labels, 1, 0.5)
    torch.manual_seed(5)
    assert torch.equal(drop(labels, 1, 0.5), first)
    assert not torch.equal(first, second)
    assert torch.equal(drop(labels, 1, 0), labels)
    assert drop(labels, 1, 1).unique().tolist() == [1]


def test_what_a_network_can_do_without_is_hidden_by_the_coin_of_the_label():
    """Whole rows, of what null names alone; rows of any shape and kind."""
    told = {"text": torch.ones(2000, 2, 3), "label": torch.arange(2000) % 5, "size": torch.ones(2000), "kept": torch.ones(2000)}
    null = {"text": torch.tensor([2.0, 3.0, 4.0]), "size": math.nan, "label": 5, "other": 0}
    torch.manual_seed(3)
    seen = drop_condition(told, null, 0.3)
    hidden = seen["label"] == 5
    assert hidden.sum().item() == pytest.approx(600, abs=5 * (2000 * 0.3 * 0.7) ** 0.5)
    assert list(seen) == list(told)
    assert torch.equal(seen["size"].isnan(), hidden)
    assert torch.equal(seen["text"][hidden], null["text"].expand(int(hidden.sum()), 2, 3))
    assert all(torch.equal(seen[name][~hidden], told[name][~hidden]) for name in told)
    assert torch.equal(seen["kept"], told["kept"])
    assert all(seen[name].dtype == told[name].dtype for name in told)
    torch.manual_seed(3)
    assert torch.equal(drop(told["label"], 5, 0.3), seen["label"])
    state = torch.get_rng_state()
    assert drop_condition({"kept": told["kept"]}, null, 0.3)["kept"] is told["kept"]
    assert torch.equal(torch.get_rng_state(), state)  # no coin was drawn


def test_the_network_learns_each_class_and_without_a_label_their_mean():
    """x_t is noise. What the label tells is the target; who does not see it can only say the targets' mean."""
    targets, shares = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -3.0]]), torch.tensor([0.5, 0.3, 0.2])
    net = TimeAwareMLP(2, 32, 1, 16, n_classes=3)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 400)
    for _ in range(400):
        label = torch.multinomial(shares, 256, replacement=True)
        out = net(torch.randn(256, 2), torch.randint(1, 100, (256,)), drop(label, 3, 0.3))
        loss = (out - targets[label]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for label, expected in [*enumerate(targets), (3, shares @ targets)]:
            out = net(torch.randn(500, 2), torch.randint(1, 100, (500,)), torch.full((500,), label)).mean(0)
            torch.testing.assert_close(out, expected, rtol=0, atol=0.1)


# Batches


class Numbered(ArrayDataset):
    """Image i is of level i, and its label is i^2 mod 7."""

    def __init__(self, count: int, pipeline=()):
        self.opened = 0
        levels = np.arange(count, dtype=np.uint8)
        super().__init__(np.broadcast_to(levels[:, None, None], (count, 4, 4)), levels.astype(int) ** 2 % 7, pipeline)

    def image(self, i: int) -> Image.Image:
        self.opened += 1
        return super().image(i)


class Told(Numbered):
    """The same, and the network is told i/2 and -i of each."""

    def __init__(self, count: int, pipeline=()):
        super().__init__(count, pipeline)
        i = torch.arange(count)
        self.conditions = {"far": torch.stack([i / 2, -i.float()], 1)}


def batches(
    count: int = 50, rank: int = 0, world: int = 1, pipeline=(), shuffle: bool = True, max_images=None, **cfg
) -> Batches:
    ranks = Ranks("cpu", alone=True)
    ranks.rank, ranks.world = rank, world
    cfg = TrainConfig(epochs=1, lr=1e-3, model_save_dirpath="run", **{"batch_size": 12, "num_workers": 0} | cfg)
    return Batches(Told(count, pipeline), cfg, ranks, shuffle, max_images, n_classes=7)


def numbers(batch) -> list[int]:
    """The numbers of a batch's images, whose labels are seen to be theirs."""
    pixels, condition = batch
    found = pixels.amax((1, 2, 3)).long()
    assert condition.keys() == {"label", "far"}
    assert torch.equal(condition["far"], torch.stack([found / 2, -found.float()], 1))
    assert condition["label"].dtype == torch.long
    assert torch.equal(condition["label"], found**2 % 7)
    return found.tolist()


WAYS = {
    "cached": {},
    "in order": {"shuffle": False},
    "some": {"max_images": 31},
    "decoded as needed": {"cache_gb": 0.0},
    "by a worker": {"cache_gb": 0.0, "num_workers": 1},
    "random crops": {"pipeline": [v2.RandomCrop(4, padding=1)], "num_workers": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_label_follows_its_image(way):
    data = batches(**WAYS[way])
    first, again = ([numbers(batch) for batch in data.epoch(epoch)] for epoch in (0, 1))
    count = WAYS[way].get("max_images", 50)
    for order in (first, again):
        seen = list(itertools.chain(*order))
        assert len(set(seen)) == len(seen) == count
    assert (first == again) == (way == "in order")
    assert [numbers(batch) for batch in data.epoch(1, first=2)] == again[2:]


@pytest.mark.parametrize("way", ["cached", "decoded as needed", "by a worker"])
@pytest.mark.parametrize("world", [2, 3])
def test_on_several_ranks_too_and_together_they_have_the_batches_of_one(way, world):
    whole = [numbers(batch) for batch in batches(count=48, **WAYS[way]).epoch(3)]
    parts = [[numbers(batch) for batch in batches(48, rank, world, **WAYS[way]).epoch(3)] for rank in range(world)]
    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert [len(share) for share in shares] == [12 // world] * world
        assert sorted(itertools.chain(*shares)) == sorted(batch)


def test_labels_are_had_without_opening_an_image():
    for cfg in ({"pipeline": [v2.Resize(4)]}, {"cache_gb": 0.0}):  # of the cache, and of what is decoded as needed
        data = batches(**cfg)
        data.images.opened = 0
        assert sum(len(numbers(batch)) for batch in data.epoch(0)) == 50
        assert data.images.opened == (0 if data.cache is not None else 50)


@pytest.mark.parametrize("shuffle", [True, False])
def test_of_some_images_the_cache_has_no_others_and_the_batches_are_the_same(shuffle):
    needed = batches(max_images=31, shuffle=shuffle, cache_gb=0.0)
    kept = batches(max_images=31, shuffle=shuffle, cache_gb=40 * 16 / 1e9)  # has room for 40 images of the 50
    assert (needed.cache, kept.cache.shape) == (None, (31, 1, 4, 4))
    for epoch, first in ((0, 0), (3, 1)):
        assert [numbers(batch) for batch in kept.epoch(epoch, first)] == [
            numbers(batch) for batch in needed.epoch(epoch, first)
        ]


def test_of_some_images_no_others_are_decoded():
    assert batches(max_images=31, pipeline=[v2.Resize(4)]).images.opened == 31  # the shape, and the time, were asked of copies


def test_python_ends_at_once_where_worker_processes_were_left(tmp_path):
    """As in a script that looks at a few batches. At the end Python sends them a signal, after which they would live on."""
    argv = tiny(tmp_path / "run", "train_cfg.cache_gb=0")
    script = "\n".join(
        [
            "from train import Trainer, load_config",
            "from training import batches",
            f"batches.GRACE = {10 * PATIENCE}",
            f"trainer = Trainer(load_config({argv[0]!r}, {argv[4:]!r}), 'cpu')",
            "next(trainer.train_data.epoch(0))",
            "print(trainer.train_data.loader.num_workers)",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "2\n"


@pytest.mark.parametrize(("seconds", "workers"), [(0.03, 0), (0.05, 2)])
def test_worker_processes_decode_what_takes_longer_than_to_start_them(seconds, workers, clock, monkeypatch):
    class Slow(Numbered):
        def image(self, i):
            clock.now += seconds if i else 0  # the first lies in memory
            return super().image(i)

    class Loader(DataLoader):
        def __init__(self, *args, num_workers, **more):
            started.append(num_workers)
            super().__init__(*args, **more)

    started = []
    monkeypatch.setattr("training.batches.DataLoader", Loader)
    cfg = TrainConfig(epochs=1, batch_size=12, lr=1e-3, model_save_dirpath="run", num_workers=2)
    images = Slow(50)
    Batches(images, cfg, Ranks("cpu", alone=True), shuffle=True)
    assert started == [workers]
    assert images.opened == 50  # copies were timed


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0] * 50, r"dataset.train: labels must be a long tensor \[50\]"),
        (np.zeros(50, int), r"must be a long tensor \[50\]"),
        (torch.zeros(50), r"must be a long tensor \[50\]"),
        (torch.zeros(50, 10).long(), r"must be a long tensor \[50\]"),
    ],
)
def test_labels_of_another_kind_are_refused_by_name(labels, words):
    images = Numbered(50)
    images.labels = labels
    with pytest.raises(Mistake, match=words):
        check_dataset(images, "dataset.train")


def test_labels_of_other_classes_are_refused():
    images = Numbered(50)
    images.labels = torch.arange(50) % 4 - 1
    with pytest.raises(Mistake, match=r"n_classes = 4: dataset\.train has labels from -1 to 2"):
        _check_labels(4, {"train": images})


class Trembling(Numbered):
    def image(self, i):
        return super().image(i).point(lambda _: int(torch.randint(256, ())))


class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, xt, t):
        return self.scale * xt


def trained(diffusion, label_dropout=0.1, n_classes=None):
    """What check_fit asks of a Trainer; n_classes is its config's."""
    known = getattr(diffusion.time_aware_net, "n_classes", None)
    return SimpleNamespace(
        model=diffusion,
        n_classes=known,
        config={"time_aware_net": {"kwargs": {"n_classes": n_classes}}},
        cfg=SimpleNamespace(label_dropout=label_dropout),
        folder=SimpleNamespace(path=Path("models/elsewhere")),
    )


def test_what_is_wrong_with_data_or_network_is_said_before_the_first_step(tmp_path, caplog):
    logging.getLogger("train").propagate = True
    diffusion = GaussianDiffusion(LinearSchedule(1000), Same())
    check_fit(trained(diffusion), {"train": Numbered(9), "valid": Numbered(8)})
    assert caplog.text == ""
    check_fit(trained(diffusion), {"train": Trembling(9), "valid": Numbered(8)})
    assert "dataset.train: image 0 of Trembling changes from call to call" in caplog.text
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    check_fit(trained(diffusion), {"train": ImageFolder(str(tmp_path), "L"), "valid": ImageFolder(str(tmp_path), "L")})
    assert "dataset.valid: 1 of its 1 images are in dataset.train, so that training sees them" in caplog.text
    check_fit(trained(diffusion), {"train": Numbered(9), "valid": Numbered(8, [v2.CenterCrop(2)])})
    assert "dataset.valid: its images have the shape [1, 2, 2], and those to train on [1, 4, 4]" in caplog.text
    with pytest.raises(Mistake, match="has lazy layers"):
        check_fit(
            trained(GaussianDiffusion(LinearSchedule(10), nn.LazyConv2d(1, 1))), {"train": Numbered(9), "valid": Numbered(8)}
        )


def test_the_network_is_tried_with_a_label_before_the_first_step():
    net = Same()
    net.n_classes = 7
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        check_fit(trained(GaussianDiffusion(LinearSchedule(10), net)), {"train": Numbered(9), "valid": Numbered(9)})


def test_a_network_that_takes_classes_and_does_not_say_so_is_refused():
    """It would be trained without a label."""
    diffusion, images = GaussianDiffusion(LinearSchedule(1000), Same()), {"train": Numbered(9), "valid": Numbered(9)}
    with pytest.raises(Mistake, match=r"^time_aware_net: takes n_classes and does not keep it as self\.n_classes"):
        check_fit(trained(diffusion, n_classes=7), images)
    check_fit(trained(diffusion, n_classes=None), images)


def test_a_network_that_takes_labels_and_gets_none_is_told(caplog):
    class Labelled(Same):
        def forward(self, xt, t, label=None):
            return super().forward(xt, t)

    logging.getLogger("train").propagate = True
    run = trained(GaussianDiffusion(LinearSchedule(1000), Labelled()))
    check_fit(run, {"train": Numbered(9), "valid": Numbered(9)})
    assert "takes a label, and gets none, since it has no attribute n_classes" in caplog.text


class Shifting(nn.Module):
    """A network of seven classes, with so many rows for them."""

    n_classes = 7

    def __init__(self, rows: int):
        super().__init__()
        self.shift = nn.Embedding(rows, 1)

    def forward(self, xt, t, label=None):
        return xt + self.shift(label)[:, :, None, None]


def test_an_embedding_without_a_row_for_no_label_is_refused_where_labels_are_dropped():
    images = {"train": Numbered(9), "valid": Numbered(9)}
    small, large = (GaussianDiffusion(LinearSchedule(1000), Shifting(rows)) for rows in (7, 8))
    with pytest.raises(Mistake, match=r"fails at label = 7, n_classes, .* set train_cfg\.label_dropout to 0$"):
        check_fit(trained(small, label_dropout=0.1), images)
    check_fit(trained(small, label_dropout=0), images)
    check_fit(trained(large, label_dropout=0.1), images)


def test_the_loss_by_which_ranks_try_a_model_hides_what_a_step_hides():
    """So that a learned null row takes part, and a network without room for no label, where none is hidden, is not asked."""

    class Untold(Shifting):
        def __init__(self, rows):
            super().__init__(rows)
            self.null = nn.Parameter(torch.zeros(1))
            self.null_condition = {"text": self.null}

        def forward(self, xt, t, label=None, text=None):
            return super().forward(xt, t, label) + text[:, :, None, None]

    model = GaussianDiffusion(LinearSchedule(10), Untold(7))
    example = {"label": torch.zeros(2, dtype=torch.long), "text": torch.ones(2, 1)}
    run = SimpleNamespace(shape=(1, 4, 4), device=torch.device("cpu"), model=model, train_data=SimpleNamespace())
    run.train_data.example, run.cfg = lambda count: example, SimpleNamespace(label_dropout=0, precision="fp32", chunk_size=None)
    loss_of_two(run, model).backward()
    assert model.time_aware_net.null.grad.item() == 0
    run.cfg.label_dropout = 0.1
    with pytest.raises(IndexError):
        loss_of_two(run, model)
    run.model = model = GaussianDiffusion(LinearSchedule(10), Untold(8))
    loss_of_two(run, model).backward()
    assert model.time_aware_net.null.grad.item() != 0


class WritesX(nn.Module):
    def forward(self, xt, t):
        xt += 0.1
        return xt


class WritesWhatItScales(nn.Module):
    def forward(self, xt, t):
        return xt.mul_(2)  # which leaves 0 at 0


class WritesBeyond(nn.Module):
    def forward(self, xt, t):
        return xt.clamp_(-1, 1)  # which data are in


class WritesT(nn.Module):
    def forward(self, xt, t):
        t -= 1
        return xt * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("net", [WritesX, WritesWhatItScales, WritesBeyond, WritesT])
def test_a_network_that_writes_into_what_it_is_given_is_refused(net):
    diffusion = GaussianDiffusion(LinearSchedule(1000), net())
    with pytest.raises(Mistake, match=r"it writes into xt or t, which it may only read"):
        check_fit(trained(diffusion), {"train": Numbered(9), "valid": Numbered(9)})


def test_a_network_without_classes_has_batches_without_labels():
    for cfg in ({}, {"cache_gb": 0.0}):
        data = batches(**cfg)
        data = Batches(data.images, data.cfg, data.ranks, True)
        assert [list(condition) for _, condition in data.epoch(0)] == [["far"]] * 5


def test_fewer_labels_than_images_are_refused():
    data = batches()
    data.images.labels = data.images.labels[:-1]
    with pytest.raises(Mistake, match=r"^Told has 49 rows of label for 50 images"):
        Batches(data.images, data.cfg, data.ranks, True, n_classes=7)


# Configs


@pytest.mark.parametrize(
    "names", [("Digits_class", "Digits_den"), ("FashionMNIST_class", "FashionMNIST_fast"), ("CIFAR10_class", "CIFAR10_den")]
)
def test_a_config_with_classes_is_one_without_but_for_them(names):
    config, plain = (load_config(f"configs/{name}.json") for name in names)
    assert config["time_aware_net"]["kwargs"].pop("n_classes") == 10
    assert plain["time_aware_net"]["kwargs"].pop("n_classes") == plain["dataset"].pop("clusters")  # None, or those it finds
    assert config["dataset"].pop("clusters") is None
    assert config["train_cfg"].pop("label_dropout") == 0.1
    for settings in (config, plain):
        settings["train_cfg"] = {**settings["train_cfg"], "model_save_dirpath": "", "label_dropout": 0.1}
    assert config == plain


@pytest.mark.parametrize("share", ["1", "-0.1", "true", '"0.1"'])
def test_a_share_of_dropped_labels_out_of_range_is_refused(share):
    with pytest.raises(Mistake, match=r"^train_cfg\.label_dropout = .*: must be a number of at least 0 and below 1"):
        load_config("configs/Digits_class.json", [f"train_cfg.label_dropout={share}"])


def test_a_data_set_that_was_not_set_up_is_named():
    class Forgetful(ImageDataset):
        def __init__(self):
            self.files = ["a"]

        def __len__(self):
            return 1

    with pytest.raises(Mistake, match=r"dataset\.train: Forgetful\.__init__ must end with super\(\)\.__init__\(pipeline\)"):
        check_dataset(Forgetful(), "dataset.train")


class AsksForLabels(nn.Module):
    """A network that cannot be called without labels, with buffers that each call changes."""

    n_classes = 10

    def __init__(self):
        super().__init__()
        self.norm, self.shift = nn.BatchNorm2d(1), nn.Embedding(11, 1)

    def forward(self, xt, t, label):
        return self.norm(xt) + self.shift(label)[:, :, None, None]


def test_a_network_that_asks_for_labels_is_probed_with_some_and_keeps_its_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(train, "build_diffusion", lambda config: GaussianDiffusion(LinearSchedule(20), AsksForLabels()))
    argv = tiny(tmp_path / "run", "train_cfg.precision=auto", "train_cfg.max_steps=1")
    trainer = train.Trainer(config.load_config(argv[0], argv[argv.index("--set") + 1 :]), "cpu")
    net = trainer.model.time_aware_net
    assert net.norm.num_batches_tracked == 0
    assert torch.equal(net.norm.running_mean, torch.zeros(1))
    trainer.run()
    assert net.norm.num_batches_tracked == trainer.ema.time_aware_net.norm.num_batches_tracked == 1
    trainer.x0, trainer.norm, trainer.condition = torch.zeros(6, 1, 4, 4), torch.tensor(1.0), trainer.train_data.example(6)
    assert "gradient norm 1" in str(bad_numbers(trainer))
