"""Image files: those below a folder, and each as the pixels that a data set has, upright and of 8 bits, on a background.

Pillow opens them; here is what it leaves open: EXIF orientation, 16 bits, transparency. What a file lacks is a Mistake.
"""

import os
import warnings
from collections import Counter
from collections.abc import Mapping

import numpy as np
from PIL import ExifTags, Image, ImageColor
from torchvision.datasets.folder import IMG_EXTENSIONS

from mistakes import Mistake

OTHER_IMAGES = (".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg")  # which are not read


def image_paths(root: str) -> tuple[list[str], Counter[str]]:
    """Every image file below root with an extension that torchvision knows, in either case, sorted; how many have others."""
    if not os.path.isdir(root):
        raise Mistake(f"root = {root!r}: no such folder")
    paths, others, seen = [], Counter(), set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            extension = os.path.splitext(name.lower())[1]
            if extension in IMG_EXTENSIONS and not name.startswith("."):
                paths.append(os.path.join(folder, name))
            elif not name.startswith("."):
                others[extension or "no extension"] += 1
    return sorted(paths), others


def not_read(extensions: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count} of {name}" for name, count in Counter(extensions).most_common(5))
    return f"{counts}; only {', '.join(IMG_EXTENSIONS)} are read"


def class_folder(path: str, root: str) -> str:
    """The first folder on the way from root to an image; Mistake if there is none."""
    name, *rest = path.removeprefix(root).lstrip(os.sep).split(os.sep)  # pathlib takes a minute for a million
    if not rest:
        raise Mistake(f'labels = "folders": {path} lies in no folder below root = {root!r}, and so has no class')
    return name


def _refuse_folder(error: OSError) -> None:
    raise Mistake(f"{error.filename}: cannot be read ({error.strerror})") from error


def colour_of(name: str) -> tuple[int, int, int]:
    """Red, green and blue, 0..255, of a colour's name or of "#rrggbb"."""
    try:
        red, green, blue = ImageColor.getrgb(name)
    except ValueError as error:  # also of four values, "#rrggbbaa"
        raise Mistake(f'background = {name!r}: must be the name of a colour, such as "black", or "#rrggbb"') from error
    return red, green, blue


def read_image(path: str, mode: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The image of a file as ImageFolder has it: its first frame, upright, on the background, in the mode "RGB" or "L"."""
    return _composited(_read_image(path), background).convert(mode)


def _read_image(path: str) -> Image.Image:
    """The first frame of a file, upright, with 8 bits a channel; Mistake names a file that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open(path, "rb") as file, Image.open(file) as image:  # of a path, Pillow maps some turned TIFFs wrongly
                _scale_transparent_colour(image)
                image.load()
                _check_levels(image)
                image = _upright(image)
                image = image.convert("RGB") if image.mode == "LAB" else image  # the only mode that Pillow makes of it
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises whatever a broken file leads to
        raise Mistake(f"{path}: cannot be read as an image ({error})") from error
    if image.mode == "F":
        raise Mistake(f"{path}: cannot be read as an image (floating-point pixels have no known range)")
    return _with_8_bits(image) if image.mode.startswith("I") else image


def _check_levels(image: Image.Image) -> None:
    """ValueError if a TIFF is grey of more than 8 bits and not of 16, from 0, black, to 65535: Pillow gives its levels raw."""
    if image.format != "TIFF" or not image.mode.startswith("I"):
        return
    bits, meaning = (image.tag_v2.get(getattr(ExifTags.Base, tag)) for tag in ("BitsPerSample", "PhotometricInterpretation"))
    low, high = image.getextrema()
    plain = bits == (16,) and image.mode != "I"  # which is signed
    if not (plain or (bits == (32,) and low >= 0 and high <= 65535)) or meaning != 1:
        raise ValueError("of a grey TIFF of more than 8 bits, levels must be 0, black, to 65535, white")


# What turns an image upright, by its EXIF orientation
FLIP_X, FLIP_Y, ROTATE_90, ROTATE_180, ROTATE_270, TRANSPOSE, TRANSVERSE = Image.Transpose
TURNS = {2: FLIP_X, 3: ROTATE_180, 4: FLIP_Y, 5: TRANSPOSE, 6: ROTATE_270, 7: TRANSVERSE, 8: ROTATE_90}


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say. ImageOps.exif_transpose writes them all anew, and fails on an odd one of them."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of broken EXIF data; the pixels are there
        orientation = None
    turn = TURNS.get(orientation)
    return image.copy() if turn is None else image.transpose(turn)


def _scale_transparent_colour(image: Image.Image) -> None:
    """Give a PNG's one transparent colour in the 8 bits of the pixels; Pillow leaves it in the bits of the file."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None or not image.tile:
        return
    rawmode = image.tile[0][3]
    if rawmode == "1":
        image.info["transparency"] = 255 if colour else 0
    elif rawmode in ("L;2", "L;4"):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[rawmode]
    elif rawmode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _with_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, which convert() would clip, with its one transparent level if it has one."""
    levels = np.asarray(image)
    grey = Image.fromarray((levels / 257).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _composited(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image on a background, alpha * image + (1 - alpha) * background, where it has transparent pixels, else as it is."""
    if not image.has_transparency_data:
        return image
    straight = image.convert("LA") if image.mode == "La" else image  # from where Pillow knows the way to RGBA
    return Image.alpha_composite(Image.new("RGBA", image.size, background), straight.convert("RGBA"))


def is_readable(path: str) -> bool:
    try:
        _read_image(path)
    except Mistake as error:
        warnings.warn(f"left out: {error}", stacklevel=2)
        return False
    return True
