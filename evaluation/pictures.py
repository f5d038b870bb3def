"""Pictures of images in [-1, 1]: grids, strips and animations, small images enlarged without smoothing."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from files import whole_file

LEAST_SIDE = 64  # pixels, of an image in a picture


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images [B, C, H, W], C = 1 or 3 (of more, the first three), side by side; by default about as many columns as rows."""
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    pixels = (images.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    scale = max(1, math.ceil(LEAST_SIDE / min(images.shape[2:])))
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Image.fromarray(make_grid(pixels, columns, padding=2, pad_value=255).permute(1, 2, 0).numpy())


def save_png(path: str | Path, picture: Image.Image) -> None:
    with whole_file(path) as file:
        picture.save(file, "PNG")


def save_gif(path: str | Path, pictures: Sequence[Image.Image], seconds: float = 4) -> None:
    """The pictures in turn, then the last one for two seconds, over and over."""
    milliseconds = [max(20, round(1000 * seconds / len(pictures)))] * (len(pictures) - 1) + [2000]
    with whole_file(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
