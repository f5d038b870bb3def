"""Data sets: range, shape, split, and the image files that people have."""

import gzip
import os
import re
import struct
import traceback
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import dataset
import image_files
from dataset import (
    DEBIAN_FASHION_MNIST,
    ArrayDataset,
    CelebA_HQ_256,
    Digits,
    FashionMNIST,
    ImageDataset,
    ImageFolder,
    check_dataset,
    shared_images,
)
from image_files import read_image
from mistakes import Mistake, run_script


def test_digits_are_scikit_learns_split_nine_to_one():
    train, valid = Digits(train=True), Digits(train=False)
    images = load_digits().images / 8 - 1  # levels 0..16 to [-1, 1]
    assert (len(train), len(valid)) == (1617, 180)
    assert train.shape == valid[0].shape == (1, 8, 8)
    assert np.abs(valid[3][0].numpy() - images[30]).max() < 1.001 / 255  # rounded to 8 bits
    assert np.abs(train[0][0].numpy() - images[1]).max() < 1.001 / 255  # rounded to 8 bits
    assert torch.stack(list(train)).aminmax() == (-1, 1)


def test_iterating_ends_and_labels_stay_aside():
    valid = Digits(train=False)
    assert len(list(valid)) == len(valid) == len(valid.labels)
    assert valid.labels.tolist() == load_digits().target[::10].tolist()
    with pytest.raises(IndexError):
        valid[len(valid)]


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    train, valid = FashionMNIST(train=True), FashionMNIST(train=False)
    assert (len(train), len(valid)) == (60_000, 10_000)
    assert valid[0].shape == (1, 28, 28)
    assert torch.bincount(train.labels).tolist() == [6000] * 10  # Xiao et al. 2017


def test_fashion_mnist_is_read_from_idx_files(tmp_path, monkeypatch):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    header = b"".join(n.to_bytes(4, "big") for n in (2051, 2, 28, 28))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x02" + bytes([7, 3])))
    monkeypatch.setattr(dataset, "DEBIAN_FASHION_MNIST", tmp_path)
    images = FashionMNIST(train=False)
    assert images.labels.tolist() == [7, 3]
    assert torch.equal(images[1][0], torch.from_numpy(pixels[1].astype(np.float32)) / 127.5 - 1)


def test_files_that_are_not_there_and_not_to_be_downloaded_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "DEBIAN_FASHION_MNIST", tmp_path)
    for cls in (FashionMNIST, dataset.CIFAR10):
        with pytest.raises(ValueError, match=f"root = .*{tmp_path.name}.*: {cls.__name__} is not there"):
            cls(root=str(tmp_path), download=False)


@pytest.fixture
def folder(tmp_path):
    """Images of every common kind, all of one colour each, in nested folders and with odd names."""
    (tmp_path / "b" / "ünter grund").mkdir(parents=True)
    Image.new("L", (12, 10), 51).save(tmp_path / "a grey.png")
    Image.new("RGB", (12, 10), (255, 0, 51)).save(tmp_path / "b" / "COLOUR.PNG")
    Image.new("RGBA", (12, 10), (255, 0, 51, 255)).save(tmp_path / "b" / "ünter grund" / "alpha.Png")
    Image.new("RGB", (12, 10), (255, 0, 51)).quantize(4).save(tmp_path / "c palette.png")
    Image.fromarray(np.full((10, 12), 257 * 51, np.uint16)).save(tmp_path / "d 16 bit.png")
    Image.new("CMYK", (12, 10), (0, 255, 204, 0)).save(tmp_path / "e cmyk.tiff")
    Image.new("RGB", (12, 10), (255, 0, 51)).save(tmp_path / "f webp.webp", lossless=True)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


COLOUR, GREY = [1.0, -1.0, -0.6], [-0.6] * 3  # 255, 0 and 51 of 255


def test_a_folder_of_mixed_files_as_rgb(folder):
    images = ImageFolder(str(folder))
    means = {os.path.basename(path): images[i].mean((1, 2)).tolist() for i, path in enumerate(images.paths)}
    assert images.paths == sorted(images.paths)
    assert images.shape == (3, 10, 12)
    expected = {"a grey.png": GREY, "COLOUR.PNG": COLOUR, "alpha.Png": COLOUR, "c palette.png": COLOUR, "d 16 bit.png": GREY}
    expected |= {"e cmyk.tiff": COLOUR, "f webp.webp": COLOUR}
    assert means.keys() == expected.keys()
    for name, mean in means.items():
        assert mean == pytest.approx(expected[name], abs=0.02), name


# Transparency, held against alpha * colour + (1 - alpha) * background in numpy


BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "#204060": (32, 64, 96)}
GREY_RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def composited(colour: np.ndarray, alpha: np.ndarray, background: str) -> np.ndarray:
    """Levels 0..255 [H, W, 3] of colours [H, W, 3] and alpha [H, W], both 0..255."""
    share = alpha[..., None] / 255
    return share * colour + (1 - share) * np.array(BACKGROUNDS[background])


def png(depth: int, colour_type: int, rows: list[bytes], width: int, transparent: bytes) -> bytes:
    """A PNG as its specification says; rows are packed, transparent is the content of tRNS."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", transparent) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def transparent_file(kind: str, path) -> tuple[np.ndarray, np.ndarray]:
    """Write an image with transparency; its colours [H, W, 3] and its alpha [H, W]."""
    rng = np.random.default_rng(0)
    colour, alpha = rng.integers(0, 256, (16, 16, 3), np.uint8), rng.integers(0, 256, (16, 16), np.uint8)
    if kind == "RGBA":
        Image.fromarray(np.dstack([colour, alpha])).save(path)
    elif kind == "LA":
        colour = np.repeat(GREY_RAMP[..., None], 3, 2)
        Image.fromarray(np.dstack([GREY_RAMP, alpha]), "LA").save(path)
    elif kind.startswith("P"):
        palette, table = rng.integers(0, 256, (256, 3), np.uint8), rng.integers(0, 256, 256, np.uint8)
        if kind == "P, one index":
            table = np.where(np.arange(256) == 7, 0, 255).astype(np.uint8)
        image = Image.fromarray(GREY_RAMP, "P")
        image.putpalette(palette.tobytes())
        image.save(path, transparency=7 if kind == "P, one index" else table.tobytes())
        colour, alpha = palette[GREY_RAMP], table[GREY_RAMP]
        with Image.open(path) as stored:
            assert isinstance(stored.info["transparency"], int if kind == "P, one index" else bytes)
    else:
        colour, alpha = keyed_file(kind, path, rng)
    return colour, alpha


def keyed_file(kind: str, path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A PNG of which the colour of the first pixel is transparent."""
    depth = int(kind.split()[-1])
    channels = 3 if kind.startswith("RGB") else 1
    levels = rng.integers(0, 2**depth, (16, 16, channels))
    levels[0, 0] = max(1, 2**depth - 2)
    if depth < 8:
        packed = [np.packbits(np.unpackbits(row.astype(np.uint8), axis=1)[:, -depth:]).tobytes() for row in levels]
    else:
        packed = [row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in levels]
    path.write_bytes(png(depth, 2 if channels == 3 else 0, packed, 16, levels[0, 0].astype(">u2").tobytes()))
    alpha = np.where((levels == levels[0, 0]).all(-1), 0, 255)
    return np.broadcast_to(levels * (255 / (2**depth - 1)), (16, 16, 3)), alpha


KINDS = ["RGBA", "LA", "P, one index", "P, a table", "L key 1", "L key 2", "L key 4", "L key 8", "L key 16", "RGB key 8"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("kind", [*KINDS, "RGB key 16"])
def test_transparent_pixels_show_the_background(kind, background, tmp_path):
    colour, alpha = transparent_file(kind, tmp_path / "a.png")
    assert alpha.min() < 30 < 220 < alpha.max()
    image = ImageFolder(str(tmp_path), background=background)[0]
    expected = composited(colour, alpha, background)
    assert np.abs((image.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() <= 1  # a level of 255
    luma = expected @ [0.299, 0.587, 0.114]
    grey = ImageFolder(str(tmp_path), "L", background=background)[0][0].numpy()
    assert np.abs((grey + 1) * 127.5 - luma).max() <= 1.5


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_modes_that_no_png_holds_are_composited_too(mode):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 4), np.uint8), "RGBA")
    if mode == "PA":
        image = Image.fromarray(np.dstack([GREY_RAMP, np.asarray(image)[..., 3]]), "PA")
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        straight = np.asarray(image.convert("RGBA"), float)
    else:
        straight = np.asarray(image.convert("LA").convert("RGBA") if mode == "La" else image, float)
        image = image.convert("LA").convert("La") if mode == "La" else image.convert("RGBa")
    found = np.asarray(image_files._composited(image, BACKGROUNDS["#204060"]).convert("RGB"), float)
    assert np.abs(found - composited(straight[..., :3], straight[..., 3], "#204060")).max() <= 2  # rounded twice


def test_the_background_is_white_unless_said_otherwise(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert ImageFolder(str(tmp_path))[0].unique().tolist() == [1]


@pytest.mark.parametrize("background", ["", "nocolour", "#12", "#10203040", "0"])
def test_a_background_that_is_no_colour_is_refused_before_the_folder_is_read(background):
    with pytest.raises(Mistake, match=r"^background = .*: must be the name of a colour"):
        ImageFolder("nowhere", background=background)


def test_a_folder_as_grey_by_the_luma_of_rec_601(folder):
    images = ImageFolder(str(folder), mode="L")
    luma = 0.299 * 255 + 0.114 * 51
    assert images.shape == (1, 10, 12)
    colour = next(i for i, path in enumerate(images.paths) if path.endswith("COLOUR.PNG"))
    assert images[colour].mean().item() == pytest.approx(luma / 127.5 - 1, abs=0.01)


def test_a_folder_is_split_without_overlap(tmp_path):
    for i in range(25):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")
    parts = [ImageFolder(str(tmp_path), "L", train=train).paths for train in (True, False, None)]
    assert [len(part) for part in parts] == [22, 3, 25]
    assert sorted(parts[0] + parts[1]) == parts[2]


def test_the_first_frame_of_an_animation_and_exif_orientation(tmp_path):
    frames = [Image.new("L", (8, 6), level) for level in (0, 255)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    turned = Image.new("L", (6, 8), 255)
    turned.save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    images = ImageFolder(str(tmp_path), "L")
    assert images[0].mean() == -1
    assert images[1].shape == (1, 6, 8)  # stored 8 x 6, meant to be turned by 90 degrees


def exif(orientation: int, odd: bytes = b"") -> bytes:
    """EXIF data of one orientation, and of another entry of 12 bytes if it is given."""
    entries = [struct.pack("<HHIHH", 274, 3, 1, orientation, 0), *([odd] if odd else [])]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


@pytest.mark.parametrize("odd", [b"", struct.pack("<HHI", 282, 2, 3) + b"72\0\0"], ids=["plain", "a resolution that is text"])
def test_an_image_is_turned_as_its_exif_data_say_also_beside_odd_ones(odd, tmp_path):
    """Orientations of the EXIF standard 2.32, section 4.6.4 A: where the stored first row and the first column belong."""
    stored = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    upright = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.T, np.rot90(stored, -1)]
    upright += [stored[::-1, ::-1].T, np.rot90(stored)]
    for orientation, expected in enumerate(upright, 1):
        Image.fromarray(stored).save(tmp_path / "a.png", exif=exif(orientation, odd))
        assert np.array_equal(read_image(str(tmp_path / "a.png"), "L"), expected), orientation


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_plain_tiff_is_turned_as_a_png_of_the_same_pixels_is(orientation, mode, tmp_path):
    """Pillow gives these, mapped from the file, another size than their pixels have."""
    levels = np.arange(12 * len(mode), dtype=np.uint8).reshape(3, 4, -1) * 5
    image = Image.fromarray(levels.squeeze(), mode) if mode != "L" else Image.fromarray(levels[:, :, 0])
    image.save(tmp_path / "a.tiff", tiffinfo={274: orientation})
    plain = image.convert("RGB") if mode == "CMYK" else image
    plain.save(tmp_path / "a.png", exif=exif(orientation))
    of_tiff, of_png = (np.asarray(read_image(str(tmp_path / name), "RGB")) for name in ("a.tiff", "a.png"))
    assert np.array_equal(of_tiff, of_png)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_colours_of_another_space_are_converted(mode, tmp_path):
    Image.new("LAB", (8, 8), (255, 128, 128)).save(tmp_path / "a.tiff")
    assert np.asarray(read_image(str(tmp_path / "a.tiff"), mode)).min() > 250  # L* = 100 is white


@pytest.mark.parametrize(
    ("level", "dtype", "tags"),
    [(70000, np.int32, {}), (-1, np.int32, {}), (7, np.uint16, {262: 0}), (7, np.uint16, {339: 2})],
    ids=["beyond 16 bits", "negative", "white is zero", "signed"],
)
def test_deep_grey_whose_levels_are_not_those_of_16_bits_is_refused(level, dtype, tags, tmp_path):
    Image.fromarray(np.full((4, 4), level, dtype)).save(tmp_path / "a.tiff", tiffinfo=tags)
    with pytest.raises(Mistake, match=r"a\.tiff: cannot be read as an image \(of a grey TIFF of more than 8 bits"):
        read_image(str(tmp_path / "a.tiff"), "L")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_deep_grey_of_16_bits_is_scaled(dtype, tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 7, dtype)).save(tmp_path / "a.tiff")
    assert np.asarray(read_image(str(tmp_path / "a.tiff"), "L")).tolist() == [[7] * 4] * 4


def test_the_same_images_by_a_link_are_seen_to_be_the_same(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    parts = [ImageFolder(str(tmp_path / name), "L") for name in ("data", "link")]
    assert shared_images(*parts) == shared_images(*reversed(parts)) == 3


def test_items_that_are_no_images_are_refused():
    images = OneImage(Image.new("L", (8, 8)))
    images.shape = (1, 64)
    with pytest.raises(Mistake, match=r"dataset.train: its items have the shape \[1, 64\]: must be images"):
        check_dataset(images, "dataset.train")


def test_links_are_followed_and_a_loop_of_links_ends(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "one.png")
    (tmp_path / "data" / "deep" / "loop").symlink_to(tmp_path / "data")
    assert len(ImageFolder(str(tmp_path / "data"), "L")) == 1


# of a pixel format that there is none of, at which Pillow raises NotImplementedError
UNKNOWN_DDS = b"DDS " + struct.pack("<7I44x2I4s5I20x", 124, 7, 4, 4, 0, 0, 0, 32, 4, b"none", *[0] * 5)


def _break(folder, name):
    path = folder / name
    {
        "empty.png": lambda: path.write_bytes(b""),
        "text.jpg": lambda: path.write_text("not an image"),
        "cut.jpg": lambda: (Image.effect_noise((64, 64), 50).save(path), path.write_bytes(path.read_bytes()[:800])),
        "gone.png": lambda: path.symlink_to(folder / "nowhere.png"),
        "bomb.png": lambda: Image.new("1", (10_000, 9_000)).save(path),
        "float.tiff": lambda: Image.new("F", (12, 10)).save(path),
        "unknown.png": lambda: path.write_bytes(UNKNOWN_DDS),
    }[name]()


@pytest.mark.parametrize("name", ["empty.png", "text.jpg", "cut.jpg", "gone.png", "bomb.png", "float.tiff", "unknown.png"])
def test_an_unreadable_image_is_named_or_skipped_on_request(folder, name):
    _break(folder, name)
    images = ImageFolder(str(folder))
    with pytest.raises(ValueError, match=f"{name}: cannot be read as an image"):
        list(images)
    with pytest.warns(UserWarning, match=name):
        readable = ImageFolder(str(folder), skip_unreadable=True)
    assert len(readable) == len(images) - 1 == len(list(readable))


def test_images_of_two_sizes_are_refused_with_the_way_out(folder):
    Image.new("RGB", (9, 9)).save(folder / "z.png")
    with pytest.raises(ValueError, match=r"z\.png: \[3, 9, 9\] where the first image has \[3, 10, 12\].*Resize"):
        list(ImageFolder(str(folder)))
    assert len(torch.stack(list(ImageFolder(str(folder), pipeline=[v2.Resize((8, 8))])))) == 8


@pytest.mark.parametrize("cls", [ImageFolder, CelebA_HQ_256])
def test_a_folder_that_is_missing_or_holds_no_image_is_refused(cls, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*no such folder"):
        cls(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds no image$"):
        cls(str(tmp_path))
    for name in ("a.GIF", "a.gif", "notes", ".hidden"):
        (tmp_path / name).touch()
    there = r"there are 2 of \.gif, 1 of no extension; only \.jpg, .* are read"
    with pytest.warns(UserWarning, match=r"left out 2 of \.gif"), pytest.raises(ValueError, match=there):
        cls(str(tmp_path), train=True)


def test_images_of_kinds_that_are_not_read_are_left_out_with_a_word(folder):
    (folder / "moving.gif").touch()
    (folder / "captions.txt").touch()
    with pytest.warns(UserWarning, match=r"left out 1 of \.gif; only \.jpg, ") as said:
        assert len(ImageFolder(str(folder))) == 7
    assert len(said) == 1


class OneImage(ImageDataset):
    def __init__(self, image):
        self.one = image
        super().__init__()

    def __len__(self):
        return 1

    def image(self, i):
        return self.one


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8), np.uint8), "image 0 of OneImage: is a ndarray, where image(i) must give a PIL image"),
        *((Image.new(mode, (8, 8)), f"image 0 of OneImage: has the mode '{mode}'") for mode in ("1", "P", "F", "I", "I;16")),
    ],
)
def test_what_is_no_image_of_8_bits_is_refused(image, words):
    with pytest.raises(Mistake, match=re.escape(words)):
        OneImage(image)


class Changing(OneImage):
    is_random = True


class SetBefore(OneImage):
    def __init__(self, image):
        self.is_random = True
        super().__init__(image)


@pytest.mark.parametrize(("cls", "is_random"), [(OneImage, False), (Changing, True), (SetBefore, True)])
def test_a_data_set_of_ones_own_that_says_it_is_random_stays_so(cls, is_random):
    images = cls(Image.new("L", (4, 4)))
    assert images.is_random is is_random
    assert ImageDataset.is_random is False


class Emptied(OneImage):
    def __len__(self):
        return 0

    def image(self, i):
        raise IndexError(i)


def test_a_data_set_without_an_image_is_refused_by_name():
    with pytest.raises(Mistake, match=r"^Emptied: has no image$"):
        Emptied(None)
    with pytest.raises(Mistake, match=r"^ArrayDataset: has no image$"):
        ArrayDataset(np.zeros((0, 4, 4), np.uint8), [])


@pytest.mark.parametrize("names", [list(np.unique(["dog", "cat"])), np.unique(["dog", "cat"]), "cat", [0, 1]])
def test_names_of_classes_that_no_checkpoint_holds_are_refused_where_the_data_are_built(names):
    images = ArrayDataset(np.zeros((2, 4, 4), np.uint8), [0, 1])
    check_dataset(images, "dataset.train")
    images.class_names = ["cat", "dog"]
    check_dataset(images, "dataset.train")
    images.class_names = names
    with pytest.raises(Mistake, match=r"^dataset\.train: class_names must be a list of plain str, or None$"):
        check_dataset(images, "dataset.train")


def test_fixed_pixels_are_always_the_same():
    images = Digits(pipeline=[v2.RandomCrop(4)])
    found = []
    for seed in range(9):
        torch.manual_seed(seed)
        found.append(images.fixed_pixels(1))
    assert all(torch.equal(pixels, found[0]) for pixels in found)
    state = torch.get_rng_state()
    images.fixed_pixels(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({images.pixels(1).numpy().tobytes() for _ in range(9)}) > 1


def test_flips_are_fair_and_one_coin_an_image():
    half = np.zeros((400, 4, 6), np.uint8)
    half[:, :, 3:] = 255
    images = dataset.ArrayDataset(half, np.zeros(400), [v2.RandomHorizontalFlip(0.5), v2.RandomVerticalFlip(0)])
    batch = images.to_float(torch.stack([images.pixels(i) for i in range(400)]))
    flipped = batch[:, 0, 0, 0] == 1
    assert torch.equal(batch[flipped].flip(-1), batch[~flipped][:1].expand(int(flipped.sum()), -1, -1, -1))
    assert 150 < flipped.sum() < 250  # 5 standard deviations
    assert not images.is_random
    assert dataset.ArrayDataset(half, np.zeros(400), [v2.RandomCrop(4)]).is_random


def test_the_pipeline_comes_before_the_scaling():
    images = dataset.ArrayDataset(np.full((1, 4, 4), 255, np.uint8), [0], [v2.Pad(2)])
    assert images[0].shape == (1, 8, 8)
    assert images[0].unique().tolist() == [-1, 1]


# What is a mistake, and what a bug


class Own:
    """A transform of a user's own, with a bug."""

    def __call__(self, image):
        raise ValueError("mine")


def test_a_bug_in_ones_own_transform_passes_and_a_bad_argument_of_torchvisions_is_a_mistake():
    pixels = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"^mine$") as bug:
        dataset.ArrayDataset(pixels, [0, 0], [Own()])
    assert not isinstance(bug.value, Mistake)
    assert traceback.extract_tb(bug.value.__traceback__)[-1].line == 'raise ValueError("mine")'
    with pytest.raises(Mistake, match=r"^pipeline\.0 cannot transform image 0 of ArrayDataset") as mistake:
        dataset.ArrayDataset(pixels, [0, 0], [v2.RandomCrop(9)])
    assert isinstance(mistake.value.__cause__, ValueError)


def test_ones_own_transform_may_be_random_and_must_give_an_image():
    pixels = np.zeros((2, 4, 4), np.uint8)
    assert dataset.ArrayDataset(pixels, [0, 0], [lambda image: image.rotate(90)]).is_random
    with pytest.raises(Mistake, match=r"pipeline\.0 gives a Tensor"):
        dataset.ArrayDataset(pixels, [0, 0], [v2.functional.pil_to_tensor])


@pytest.mark.parametrize("name", ["b.png", "b\nc.png"])
def test_a_mistake_in_a_worker_process_is_one_line(name, tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / name).write_text("not an image")
    loader = DataLoader(ImageFolder(str(tmp_path)), num_workers=1)
    assert run_script("train.py", lambda: len(list(loader))) == 2
    line = capsys.readouterr().err.strip()
    assert line.split(": ", 1)[1].startswith(f"{tmp_path}/{name}: cannot be read as an image".replace("\n", " "))
    assert "\n" not in line


def test_celeba_is_the_whole_folder_unless_split(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
    assert [len(CelebA_HQ_256(f"{tmp_path}/", train)) for train in (None, True, False)] == [20, 18, 2]
    assert len(CelebA_HQ_256(f"{tmp_path}/")) == 20
    assert CelebA_HQ_256(str(tmp_path)).shape == (3, 256, 256)


# Labels


def test_the_classes_have_the_names_of_their_makers(monkeypatch, tmp_path):
    assert Digits().class_names == [str(digit) for digit in load_digits().target_names]
    monkeypatch.setattr(dataset.torchvision_datasets, "CIFAR10", CIFAR10OfTwo)
    assert dataset.CIFAR10().class_names == ["cat", "dog"]
    assert dataset.CIFAR10().labels.tolist() == [1, 0, 1]


class CIFAR10OfTwo:
    """What torchvision's data set gives."""

    def __init__(self, *args, **kwargs):
        self.data, self.targets, self.classes = np.zeros((3, 32, 32, 3), np.uint8), [1, 0, 1], ["cat", "dog"]


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnists_ten_names():
    names = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle boot"  # Xiao et al. 2017, table 2
    assert " ".join(FashionMNIST(train=False).class_names) == names


def folders_of_classes(root, counts: dict[str, int]) -> None:
    """Grey images, all of a class of one level, 20 k for the k-th name; every second one lies a folder deeper."""
    for k, name in enumerate(sorted(counts)):
        (root / name / "deep er").mkdir(parents=True)
        for i in range(counts[name]):
            Image.new("L", (4, 4), 20 * k).save(root / name / ("deep er" if i % 2 else "") / f"{i:02}.png")


def levels(images: ImageFolder) -> list[int]:
    return [int(images.pixels(i).float().mean()) for i in range(len(images))]


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_first_folder_is_the_class_and_keeps_its_name(tmp_path, slash):
    folders_of_classes(tmp_path, {"zebra": 3, "Ähre": 2, "an owl": 4, "10": 1, "9": 2})
    (tmp_path / ".hidden" / "no class").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    images = ImageFolder(f"{tmp_path}{slash}", "L", labels="folders")
    assert images.class_names == ["10", "9", "an owl", "zebra", "Ähre"]
    assert images.labels.dtype == torch.long
    assert [20 * label for label in images.labels.tolist()] == levels(images)
    assert torch.bincount(images.labels).tolist() == [1, 2, 4, 3, 2]
    assert (ImageFolder(str(tmp_path)).labels, ImageFolder(str(tmp_path)).class_names) == (None, None)


def test_both_parts_of_a_split_number_the_classes_alike(tmp_path):
    folders_of_classes(tmp_path, {"a": 1, "b": 5, "c": 15})  # the only image of a is the first, for validation
    train, valid = (ImageFolder(str(tmp_path), "L", train, labels="folders") for train in (True, False))
    assert train.class_names == valid.class_names == ["a", "b", "c"]
    assert 0 not in train.labels
    for images in (train, valid):
        assert [20 * label for label in images.labels.tolist()] == levels(images)


def test_labels_stay_with_their_images_where_unreadable_ones_are_left_out(tmp_path):
    folders_of_classes(tmp_path, {"a": 2, "b": 2, "c": 2})
    (tmp_path / "a" / "00.png").write_text("no image")
    (tmp_path / "b" / "00.png").write_text("no image")
    with pytest.warns(UserWarning, match="left out"):
        images = ImageFolder(str(tmp_path), "L", skip_unreadable=True, labels="folders")
    assert images.labels.tolist() == [0, 1, 2, 2]
    assert levels(images) == [0, 20, 40, 40]


@pytest.mark.parametrize("names", [["one.png"], ["a/one.png", "two.png"]])
def test_an_image_without_a_folder_of_its_class_is_named(tmp_path, names):
    (tmp_path / "a").mkdir()
    for name in names:
        Image.new("L", (4, 4)).save(tmp_path / name)
    with pytest.raises(Mistake, match=rf"^labels = \"folders\": .*/{names[-1]} lies in no folder below root = .* no class$"):
        ImageFolder(str(tmp_path), labels="folders")


def test_labels_of_another_kind_are_refused(tmp_path):
    with pytest.raises(Mistake, match=r"^labels = 'files': must be \"folders\""):
        ImageFolder(str(tmp_path), labels="files")


def test_pixels_that_are_neither_bytes_nor_single_floats_are_refused():
    class Doubles(ImageDataset):
        def __len__(self):
            return 3

        def pixels(self, i):
            return torch.full((1, 8, 8), -0.5, dtype=torch.float64)

    with pytest.raises(Mistake, match=r"Doubles: pixels\(0\) is torch\.float64: must be a tensor of uint8, .* or of float32"):
        Doubles()


def test_a_file_that_is_opened_with_the_first_image_is_not_shared_by_workers():
    class Opens(ImageDataset):
        file = None

        def __len__(self):
            return 3

        def image(self, i):
            self.file = "open"
            return Image.new("L", (8, 8))

    assert Opens().file is None
