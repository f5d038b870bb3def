"""The parts of the benchmarks that decide what is compared: what they print of it is not tested."""

import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, metrics, tiny
from torch import nn

sys.path.append(str(ROOT / "benchmarks"))
import arenas
import classes
import common
import discrete
import emoji
import epoch_end
import gpu
import race
from race_pictures import over_seeds

import checkpoint
import train
from beta_schedule import LinearSchedule
from config import load_config, network_without_memory
from dataset import ImageFolder
from evaluation import features
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake

CPU = torch.device("cpu")


def test_the_network_of_the_comparisons_is_that_of_ho_et_al(tmp_path):
    config = common.config("cifar10", 4, str(tmp_path))
    assert sum(p.numel() for p in network_without_memory(config).parameters()) == 35_746_307  # 35.7 million, appendix B


@pytest.mark.parametrize(("sampler", "calls", "steps"), [("ddpm", 25, 25), ("heun", 25, 13), ("heun", 10, 5), ("dpm", 999, 40)])
def test_every_sampler_gets_the_same_number_of_network_calls(sampler, calls, steps):
    diffusion = GaussianDiffusion(LinearSchedule(40), nn.Identity())  # heun: two calls a step, but one in the last
    assert common.steps_within(diffusion, sampler, calls) == steps


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_a_side_runs_in_the_precision_in_which_its_own_step_is_faster(faster, monkeypatch, clock):
    monkeypatch.setattr("training.speed.has_bfloat16", lambda device: True)
    net = nn.Linear(1, 1)

    def loss():
        slow = torch.is_autocast_enabled("cpu") != (faster == "bf16")
        clock.now += 0.05 if slow else 0.01
        return net(torch.ones(1)).float().sum()

    assert common.choose_precision(loss, net, CPU) == faster
    assert all(p.grad is None for p in net.parameters())


def test_an_option_of_one_side_is_refused_for_the_other(monkeypatch, capsys):
    """Its row would be called lr=0.01, and have the learning rate of the config."""
    monkeypatch.setattr(race, "compete", lambda *args: pytest.fail("it trains"))
    with pytest.raises(SystemExit):
        race.main(["--racers", "ddp", "ours", "--lr", "1e-2", "--no-flips", "1"])
    assert "--lr, --no-flips: of the peers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        race.main(["--racers", "ours", "ddp-tuned", "--interval", "0", "700"])
    assert "--interval: of ours and plain" in capsys.readouterr().err


def test_an_interval_of_guidance_is_refused_before_hours_of_training(monkeypatch, capsys):
    monkeypatch.setattr(race, "compete", lambda *args: pytest.fail("it trains"))
    with pytest.raises(SystemExit):
        race.main(["--racers", "ours", "--interval", "700", "0"])
    assert "--interval: must be two times, the lower one first" in capsys.readouterr().err


def test_no_plain_recipe_is_made_up(capsys):
    with pytest.raises(SystemExit):
        race.main(["--racers", "plain", "--data", "digits", "emoji"])
    assert "no plain config for emoji; give one with --plain\n" in capsys.readouterr().err


def test_a_race_on_data_of_ones_own_is_by_its_config(tmp_path, capsys):
    ours, other = tmp_path / "mine.json", tmp_path / "other.json"
    ours.write_text((ROOT / "configs" / "Emoji_class.json").read_text())
    other.write_text(ours.read_text().replace("emoji/train", "others/train"))
    arena = arenas.Arena(str(ours), "nowhere", classes=True)
    assert (arena.config, arena.stem, arena.roots) == (ours, "race_mine_classes", [])
    assert arena.data_of(arena.config) == ("ImageFolder", "data/emoji/train", "data/emoji/valid")
    for flags, words in [
        (["--data", str(ours), "--racers", "plain"], "mine.json; give one with --plain"),
        (["--data", str(ours), "--racers", "plain", "--plain", str(other)], "other.json: is of other data than"),
        (["--data", "mine"], "--data mine: must be of FashionMNIST, emoji, CIFAR10, digits, or a config"),
    ]:
        with pytest.raises(SystemExit):
            race.main(flags)
        assert words in capsys.readouterr().err


def test_data_of_ones_own_without_labels_are_refused(monkeypatch):
    monkeypatch.setattr(arenas, "_images", lambda arena, split: (torch.zeros(3, 1, 8, 8), None, 0.0))
    with pytest.raises(Mistake, match=r"--data mine\.json: its training images have no labels"):
        arenas.Arena("mine.json", "nowhere").classifier(CPU)


def test_a_peers_batches_are_as_large_as_asked():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    arena = SimpleNamespace(images=lambda split: (images, torch.arange(10)))
    batches = race._batches(SimpleNamespace(arena=arena, batch=4), CPU)
    epoch = [next(batches) for _ in range(3)]
    assert [len(x0) for x0, _ in epoch] == [4, 4, 2]
    assert torch.cat([labels for _, labels in epoch]).sort().values.tolist() == list(range(10))


def test_a_race_ends_at_each_budget(monkeypatch, clock):
    """On a CPU, where a look at the clock costs nothing, at most one step late, and not at the next fiftieth."""
    monkeypatch.setattr(race, "_batches", lambda args, device: iter(lambda: (torch.zeros(16), None), None))
    monkeypatch.setattr(race, "_labels", lambda arena, n, device: None)
    monkeypatch.setattr(race, "_first_images", lambda args, device: torch.zeros(16))
    net = nn.Linear(16, 1)

    rates = []

    def step(x0, labels, rate):
        rates.append(rate)
        clock.now += 0.75

    args = SimpleNamespace(budget=[15, 7], name="test", calls=1, batch=16, arena=SimpleNamespace(seconds=0.0), falls=0)
    first, second = race._race(args, CPU, net, "fp32", lambda x0, labels: net(x0).sum(), step, None)
    assert (first.budget, first.seconds, first.steps) == (7, 7.5, 10)
    assert (second.budget, second.seconds, second.steps) == (15, 15, 20)
    assert set(rates) == {1.0}

    args.falls, args.budget = 1, [7]
    rates.clear()
    list(race._race(args, CPU, net, "fp32", lambda x0, labels: net(x0).sum(), step, None))
    assert rates == pytest.approx([1 - 0.75 * i / 7 for i in range(10)])

    args.falls, args.arena.seconds = 0, 4.5  # of clusters, which the budget pays for
    (late,) = race._race(args, CPU, net, "fp32", lambda x0, labels: net(x0).sum(), step, None)
    assert (late.seconds, late.steps) == (7.5, 4)


def test_ours_ends_with_its_budget_and_its_rate_falls_with_the_clock(tmp_path, clock):
    """A step takes 1 s, and from the 31st on 2 s, as on a machine that others come to use."""
    more = (
        "train_cfg.epochs=100000",
        "train_cfg.batch_size=64",
        "train_cfg.warmup_steps=0",
        "train_cfg.record_period=1",
        "train_cfg.sample_period=0",
    )
    config, racing = load_config("configs/Digits_den.json", tiny(tmp_path / "run", *more)[4:]), race.Clock(CPU)
    racing.total = 20.0  # of clusters
    run = race._Timed(config, "cpu", racing, 100.0)
    step = run.train_step

    def timed_step(*batch):
        clock.now += 1 if run.step < 30 else 2
        step(*batch)

    run.train_step = timed_step
    racing.start()
    run.run()
    assert racing.stop() == pytest.approx(20 + 30 + 2 * 25)  # a hundredth is left for the last validation
    lines = metrics(tmp_path / "run")
    assert lines[-1]["step"] == run.step == checkpoint.load(tmp_path / "run" / "last.pth")["step"] == 55
    for line in lines[5:]:
        passed = max(line["step"], 2 * line["step"] - 30)
        assert line["lr"] == pytest.approx(2e-3 * (1 - passed / 79), abs=2e-3 * 0.03)


def test_the_clock_ends_a_run_whatever_its_config_says(monkeypatch, tmp_path):
    class Begun(Exception): ...

    def begun(config, *_):
        raise Begun(config["train_cfg"]["max_steps"])

    monkeypatch.setattr(race, "_Timed", begun)
    config = tmp_path / "mine.json"
    config.write_text((ROOT / "configs" / "Digits_den.json").read_text().replace('"epochs"', '"max_steps": 8, "epochs"'))
    arena = SimpleNamespace(seconds=0.0, stem="race", settings=[])
    with pytest.raises(Begun) as found:
        next(
            race._of_config(config, SimpleNamespace(arena=arena, budget=[10.0], name="ours", seed=0, set=[], device="cpu"), CPU)
        )
    assert found.value.args == (None,)


def test_a_budget_that_the_clusters_use_up_is_refused(tmp_path):
    arena = SimpleNamespace(seconds=12.0, stem="race", settings=[])
    args = SimpleNamespace(arena=arena, budget=[10.0], name="ours", seed=0, set=[])
    with pytest.raises(SystemExit, match="ours: to find the clusters took 12 s of 10"):
        next(race._of_config(tmp_path, args, CPU))


def test_the_table_over_seeds_has_mean_and_spread():
    row = {"racer": "a", "budget": 1, "n": 2, "calls": 3, "steps": 4, "seconds": 1.0}
    rows = [row | {"seed": i, "distance": d} for i, d in enumerate((3.0, 1.0, 5.0))] + [
        row | {"n": 9, "seed": 0, "distance": 7.0}
    ]
    first, second = over_seeds(rows)
    assert (first["distance"], first["least"], first["largest"], first["seeds"]) == (3, 1, 5, 3)
    assert (second["n"], second["distance"], second["seeds"]) == (9, 7, 1)
    (mixed,) = over_seeds([rows[0] | {"nearest": 0.3}, rows[1]])  # an older row was measured less
    assert mixed["steps"] == 4
    assert "nearest" not in mixed


def test_the_shares_of_an_epochs_end_are_counted_as_the_config_says():
    """An epoch of 600 s, saved every 5 minutes: two last.pth with two best.pth at the most, of which one is there."""
    cfg = SimpleNamespace(save_minutes=5, save_period=100, sample_period=10)
    parts = {"validation": 12.0, "picture": 30.0, "copy of the state": 0.5, "steps slowed down by writing": 1.0}
    rows = epoch_end.table(SimpleNamespace(cfg=cfg), 600.0, parts)
    assert [row["ms an epoch"] for row in rows] == pytest.approx([12e3, 3e3, 1.5e3, 3.01e3, 19.51e3])
    assert rows[-1]["% of an epoch"] == pytest.approx(100 * 19.51 / 600)


def test_a_table_has_a_column_for_every_key():
    lines = common.markdown([{"a": 1, "b": 2.5}, {"a": 10, "c": "x"}]).splitlines()
    assert lines == ["| a  | b   | c |", "|----|-----|---|", "| 1  | 2.5 |   |", "| 10 |     | x |"]


def test_a_part_that_fails_is_on_the_page_with_its_last_line_and_the_others_too(tmp_path):
    bad = "import sys; print('before'); sys.exit('no such card\\n')"
    made = [
        gpu.script("bad", [sys.executable, "-c", bad], tmp_path),
        gpu.script("good", [sys.executable, "-c", "print('| a |')"], tmp_path),
    ]
    assert [part.failed for part in made] == [True, False]
    text = gpu.page(CPU, True, made)
    assert "Failed: `no such card`" in text
    assert "| a |" in text
    assert str(ROOT) not in text
    assert text.startswith(f"# {common.device_name(CPU)}, quick run")


def test_a_training_that_cannot_start_says_why(tmp_path):
    part = gpu.training("nothing", "configs/no_such_config.json", 5, tmp_path, [])
    assert part.failed
    assert "no_such_config.json" in part.lines[-1]


def test_results_of_a_quick_run_have_a_file_of_their_own(tmp_path):
    args = SimpleNamespace(quick=True, results=str(tmp_path), threads=1)
    common.write("limit", args, CPU, {"A table": [{"a": 1.0}]})
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-quick.json")
    result = json.loads(path.read_text())
    assert result["tables"] == {"A table": [{"a": 1.0}]}
    assert result["device"] == common.device_name(CPU)


@pytest.mark.slow
def test_symbols_are_compared_and_drawn(tmp_path):
    few = ["--only", "gaussian-numbers", "absorbing", "--pictures", str(tmp_path), "--results", str(tmp_path)]
    discrete.main(["--quick", *few])
    (result,) = tmp_path.glob("discrete-*-quick.json")
    rows = json.loads(result.read_text())["tables"]["Digits, 17 levels"]
    assert [row["setting"] for row in rows] == ["gaussian-numbers", "absorbing"]
    assert all(1 < row["bits per dimension"] < 17 for row in rows)  # log2(17) is 4.1; after a second of training
    assert {path.name for path in tmp_path.glob("*.png")} == {"discrete.png", "discrete_trajectories.png"}


# The emoji


def emoji_package(vendor: str) -> dict[str, bytes]:
    """What a package emoji-datasource-VENDOR holds: 40 emoji of one colour, three that are left out, and one in two sexes."""

    def entry(code: str, category: str, **more) -> dict:
        return {
            "unified": code,
            "image": f"{code.lower()}.png",
            "category": category,
            "subcategory": "",
            f"has_img_{vendor}": True,
            **more,
        }

    entries = [entry(f"1F3{i:02}", "Food & Drink" if i % 3 else "Objects") for i in range(40)]
    entries += [entry(f"{who}-200D-1F692", "Objects") for who in ("1F468", "1F469")]
    entries += [entry("1F1E6-1F1E8", "Flags"), entry("1F3FB", "Component"), entry("1F999", "Objects", obsoleted_by="1F998")]
    files = {
        "package.json": json.dumps({"name": f"emoji-datasource-{vendor}"}).encode(),
        "emoji.json": json.dumps(entries).encode(),
    }
    for i, each in enumerate(entries):
        image = Image.new("RGBA", (64, 64), (200, i, 0, 0))  # transparent
        image.paste((200, i, 0, 255), (0, 0, 32, 64))
        image.save(png := io.BytesIO(), "PNG")
        files[f"img/{vendor}/64/{each['image']}"] = png.getvalue()
    return files


@pytest.fixture
def packages(tmp_path) -> list[Path]:
    """One as the file that npm fetches, one as the folder that it unpacks to."""
    with tarfile.open(tmp_path / "twitter.tgz", "w:gz") as archive:
        for name, content in emoji_package("twitter").items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for name, content in emoji_package("apple").items():
        path = tmp_path / "apple" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [tmp_path / "twitter.tgz", tmp_path / "apple"]


def test_the_emoji_are_small_on_white_with_the_variants_of_one_on_one_side(packages, tmp_path):
    folder = tmp_path / "data" / "emoji"
    assert emoji.main(["--folder", str(folder), "--packages", *map(str, packages)]) == 0
    data = {split: ImageFolder(str(folder / split), labels="folders") for split in ("train", "valid")}
    assert [len(data["train"]), len(data["valid"])] == [76, 8]  # 41 groups, of which every tenth is held out
    assert data["train"].class_names == data["valid"].class_names == ["food_drink", "objects"]
    sides = {}
    for path in folder.rglob("*.png"):
        sides.setdefault(path.stem.split("_")[0].split("-")[-1], set()).add(path.parts[-3])
    assert set(map(len, sides.values())) == {1}
    assert "1F692" in sides
    assert not {"1F1E8", "1F3FB", "1F999"} & sides.keys()
    image = Image.open(folder / "train" / "objects" / "1F300_apple.png")
    assert (image.size, image.mode, image.getpixel((5, 5)), image.getpixel((25, 5))) == (
        (32, 32),
        "RGB",
        (200, 0, 0),
        (255,) * 3,
    )
    assert (folder / "LICENCES.txt").read_text().splitlines() == [
        f"{name}: {emoji.LICENCES[name]}" for name in ("twitter", "apple")
    ]


def test_what_is_no_package_of_emoji_is_refused_and_nothing_is_written(packages, tmp_path, capsys):
    (tmp_path / "wrong.tgz").write_bytes(b"no archive")
    (tmp_path / "there").mkdir()
    before = set(tmp_path.rglob("*"))
    new = ["--folder", str(tmp_path / "new")]
    for argv in ([*new, "--packages", str(tmp_path / "wrong.tgz")], [*new, "--packages", str(tmp_path / "there")]):
        assert emoji.main(argv) == 2
        assert "package" in capsys.readouterr().err
    assert emoji.main(["--folder", str(tmp_path / "there"), "--packages", str(packages[0])]) == 2
    assert "is there already" in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


# The race on more than one data set


def test_copies_have_no_distance_to_the_training_images_and_others_have_it_in_root_mean_square(monkeypatch):
    train = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    arena = SimpleNamespace(images=lambda split: (train, None))
    measure = arenas.Measure.__new__(arenas.Measure)
    measure.arena = arena
    assert measure.nearest(train[:7]) == pytest.approx(0, abs=1e-3)
    one = train[:1].float().clamp(max=245)
    near = np.sqrt((((one + 10 - train.float()) / 127.5).flatten(1) ** 2).mean(1).numpy()).min()
    assert measure.nearest((one + 10).byte()) == pytest.approx(near, rel=1e-3)


@pytest.mark.parametrize(("count", "n"), [(6000, 1000), (6000, 200), (600, 1000)])
def test_the_scale_is_of_images_that_the_features_were_not_trained_on(count, n, tmp_path, monkeypatch):
    """Unless those are fewer than a distance needs."""
    train, labels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8), torch.arange(count) % 2
    seen, measured = [], []
    untrained = features.SmallClassifier(1, 2, "untrained")
    monkeypatch.setattr(features, "train_classifier", lambda images, *args, **how: seen.append(images) or untrained)
    monkeypatch.setattr(arenas, "frechet_distance", lambda images, real: measured.append((images, real)) or 1.0)
    monkeypatch.setattr(arenas.Measure, "_statistics", lambda self, images: images)
    arena = SimpleNamespace(
        images=lambda split: (train, labels),
        classifier=lambda device: features.cached_classifier(tmp_path / "c.pth", train, labels, "numbers"),
    )
    measure = arenas.Measure(arena, CPU)
    ends = measure.of_data(n)
    assert next(iter(ends)) == f"{min(600, n)} training images"
    chosen = measured[0][0]
    common = set(map(bytes, seen[0].flatten(1).numpy())) & set(map(bytes, chosen.flatten(1).numpy()))
    assert len(common) == (0 if count == 6000 else 540)
    measure.to_unseen(train[:3])
    assert torch.equal(measured[-1][1][: len(chosen)], chosen)


@pytest.mark.parametrize(
    ("best", "asked"), [(1.25, [1.25, 1.5]), (3, [1.25, 1.5, 2, 3, 4]), (14, [1.25, 1.5, 2, 3, 4, 6, 8, 12])]
)
def test_a_run_is_guided_by_the_weight_before_its_samples_get_worse(best, asked):
    weights, measure = [], SimpleNamespace(to_unseen=lambda samples: abs(samples.float().mean().item() / 12.75 - best))

    def sample(n: int, weight: float) -> torch.Tensor:
        weights.append(weight)
        return torch.full((n, 1, 1, 1), weight / 10 - 1)  # as uint8 12.75 times the weight

    args = SimpleNamespace(seed=0, n=100)
    assert race._chosen_guidance(args, SimpleNamespace(sample=sample), measure) == asked[-2 if best < 12 else -1]
    assert weights == asked


@pytest.mark.slow
def test_the_quick_race_shows_what_the_fast_recipe_gains(tmp_path, monkeypatch):
    monkeypatch.setattr(arenas, "MODELS", tmp_path)
    monkeypatch.setattr(race, "result_path", lambda name, device, quick: tmp_path / "rows.json")
    race.main(["--quick", "--data", "digits", "--racers", "ours", "plain", "--calls", "10", "--threads", "1"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["racer"] for row in rows] == ["ours", "plain"]
    assert rows[0]["parameters"] != rows[1]["parameters"]
    assert rows[0]["distance"] < rows[1]["distance"]


@pytest.mark.slow
@pytest.mark.parametrize("labels", [["--clusters", "3"], ["--classes"]], ids=["clusters", "classes"])
def test_the_quick_race_runs_on_a_folder_of_emoji(labels, tmp_path, monkeypatch):
    for split, count in (("train", 200), ("valid", 140)):  # more than the classifier has features
        for i in range(count):
            path = tmp_path / "emoji" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    monkeypatch.setattr(arenas, "MODELS", tmp_path)
    monkeypatch.setattr(race, "result_path", lambda name, device, quick: tmp_path / "rows.json")
    small = [*labels, "--name", "test", "--calls", "2", "--threads", "1", "--set", "time_aware_net.kwargs.base_channels=8"]
    small += ["--interval", "0", "700"]
    race.main(["--quick", "--data", "emoji", "--root", str(tmp_path), "--racers", "ours", *small])
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["racer"], row["n"], row["budget"]) == ("test", 200, 10.0)
    assert row["distance"] > 0
    assert 0.1 < row["nearest"] < 2  # of noise to noise


@pytest.mark.slow
def test_samples_without_and_with_their_class_are_compared(tmp_path, monkeypatch):
    whole = ("dataset.train.pipeline=[]", "dataset.valid.pipeline=[]", "time_aware_net.kwargs.n_classes=10")
    assert train.main(tiny(tmp_path / "a", *whole, "train_cfg.max_steps=1", "train_cfg.sample_period=0")) == 0
    monkeypatch.setattr(classes, "ROOT", tmp_path)
    monkeypatch.setattr(classes, "result_path", lambda *_, **__: tmp_path / "found.json")
    few = ["-n", "140", "--weights", "1", "--timesteps", "2", "--classify", "0", "--device", "cpu"]
    classes.main([str(tmp_path / "a" / "last.pth"), *few])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["weight"] for row in rows] == ["without", 1.0]
    assert [row["classed as asked, %"] is None for row in rows] == [True, False]
