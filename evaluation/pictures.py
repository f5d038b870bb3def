"""Pictures of images in [-1, 1]: grids, strips and animations, small images enlarged without smoothing."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from files import whole_file
from mistakes import Mistake

LEAST_SIDE, MOST_SIDE = 64, 512  # pixels: smaller images are enlarged in a picture, but to no more (a GIF has a limit)
FONT_SIZE = 16  # pixels
MOST_GIF = 2**16 - 1  # pixels a side, of which the format has two bytes


def _levels(images: Tensor) -> Tensor:
    """uint8 of images [B, C, H, W]: grey ones, or of more channels the first three."""
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    return (images.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def plain(image: Tensor) -> Image.Image:
    """An image [C, H, W], pixel for pixel."""
    return to_pil_image(_levels(image[None])[0])


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images [B, C, H, W], C = 1 or 3 (of more, the first three), side by side; by default about as many columns as rows."""
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    pixels = _levels(images)
    scale = max(1, min(math.ceil(LEAST_SIDE / min(images.shape[2:])), MOST_SIDE // max(images.shape[2:])))
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Image.fromarray(make_grid(pixels, columns, padding=2, pad_value=255).permute(1, 2, 0).numpy())


def text_width(texts: Sequence[str]) -> int:
    """Pixels of the longest of the texts."""
    font = ImageFont.load_default(FONT_SIZE)
    return math.ceil(max(font.getlength(text) for text in texts))


def labelled(picture: Image.Image, rows: Sequence[str], columns: Sequence[str] = (), left: int = 0) -> Image.Image:
    """A grid with a text before each of its rows, right-aligned in `left` pixels, and one above each of its columns."""
    font, top = ImageFont.load_default(FONT_SIZE), 2 * FONT_SIZE if columns else 0
    page = Image.new("RGB", (left + FONT_SIZE + picture.width, top + picture.height), "white")
    page.paste(picture, (page.width - picture.width, top))
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(rows):
        draw.text((left + FONT_SIZE // 2, top + picture.height * (i + 0.5) / len(rows)), text, "black", font, "rm")
    for i, text in enumerate(columns):
        draw.text((page.width - picture.width * (1 - (i + 0.5) / len(columns)), top / 2), text, "black", font, "mm")
    return page


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """One below the other, on white."""
    page = Image.new("RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page


def new_figure(**options: Any) -> Any:
    """A matplotlib Figure, which needs no display; Mistake without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Mistake(f"this figure needs matplotlib; pip install matplotlib ({error})") from error
    return Figure(layout="constrained", **options)


def png_path(text: str) -> Path:
    """The path of a PNG to be written, whose folder need not be there yet; Mistake if it can be none."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise Mistake(f"--output {text}: must be a file that ends in .png")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        raise Mistake(f"--output {text}: {there} is not a folder")
    return path


def save_png(path: str | Path, picture: Image.Image) -> None:
    with whole_file(path) as file:
        picture.save(file, "PNG")


def save_gif(path: str | Path, pictures: Sequence[Image.Image]) -> None:
    """The pictures in turn for four seconds, then the last one for two, over and over."""
    if max(pictures[0].size) > MOST_GIF:
        print(f"{path}: left out, since a GIF has at most {MOST_GIF} pixels a side; fewer --pictures make a smaller one")
        return
    milliseconds = [max(20, round(4000 / len(pictures)))] * (len(pictures) - 1) + [2000]
    with whole_file(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
