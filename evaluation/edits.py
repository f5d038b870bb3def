"""Editing as `test.py` offers it: from image files to samples that keep something of them. `editing.py` has the mathematics."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from dataset import from_uint8, rows_of
from editing import edit, inpaint, interpolate, posterior_sample
from gaussian_diffusion import GaussianDiffusion
from image_files import read_image
from mistakes import Mistake
from training.seeds import SAMPLING, mixed_seed

GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # luma of ITU-R BT.601, as Pillow's "L"


def _read(path: str, channels: int, background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """The image of a file, [1, C, H, W] in [-1, 1], its transparent pixels on the background."""
    if channels not in (1, 3):
        raise Mistake(f"{path}: this model draws {channels} channels, and a file has 1 or 3")
    return from_uint8(pil_to_tensor(read_image(path, "L" if channels == 1 else "RGB", background)))[None]


def _of_size(x: Tensor, shape: list[int], path: str) -> Tensor:
    if list(x.shape[2:]) != shape[1:]:
        raise Mistake(f"{path}: {x.shape[2]} x {x.shape[3]} pixels, where the model draws {shape[1]} x {shape[2]}; see H W")
    return x


class Edit:
    """What is to be edited, read and checked before the first network call.

    kind      one of run_folder.EDITS
    paths     of its image, of both images to interpolate between
    mask      of "inpaint": the file whose white pixels are known; black and transparent ones are not
    strength  of "from": the share of T that the image is noised to
    """

    def __init__(self, kind: str, paths: list[str], shape: list[int], mask: str | None = None, strength: float = 0.5):
        self.kind, self.shape, self.strength = kind, shape, strength
        if kind == "from" and not 0 <= strength <= 1:
            raise Mistake(f"--strength {strength}: must lie between 0 and 1")
        if kind == "colour" and shape[0] != 3:
            raise Mistake("--colour: this model draws grey images")
        self.given = [_read(path, 1 if kind == "colour" else shape[0]) for path in paths]
        if kind == "upscale":
            self.factor = self._factor(paths[0])
        else:
            self.given = [_of_size(x, shape, path) for x, path in zip(self.given, paths, strict=True)]
        if kind == "inpaint":
            self.known = (_of_size(_read(mask, 1, (0, 0, 0)), shape, mask) > 0).float()
            if self.known.all():
                raise Mistake(f"{mask}: every pixel is white, and so known: nothing is left to draw")

    def _factor(self, path: str) -> int:
        small = list(self.given[0].shape[2:])
        factor = self.shape[1] // small[0]
        if factor < 2 or [factor * size for size in small] != self.shape[1:]:
            allowed = f"must be the {self.shape[1]} x {self.shape[2]} of the model, divided by a whole number"
            raise Mistake(f"{path}: {small[0]} x {small[1]} pixels: {allowed}")
        return factor

    def picture(self) -> Tensor:
        """What was given, [b, C, H, W], to be shown before the samples."""
        x = torch.cat(self.given).expand(-1, self.shape[0], -1, -1)
        if self.kind == "upscale":
            return F.interpolate(x, scale_factor=self.factor)
        return torch.where(self.known > 0, x, 0) if self.kind == "inpaint" else x

    def samples(
        self, diffusion: GaussianDiffusion, n: int, batch_size: int, seed: int, condition: Mapping[str, Tensor], **options
    ) -> Tensor:
        """n of them, [n, C, H, W] on the CPU. options: timesteps, clip_x0 and, where it has one, sampler."""
        if self.kind == "interpolate":
            a, b = (x.to(diffusion.signal_scale.device) for x in self.given)
            return interpolate(diffusion, a, b, n, **options, condition=rows_of(condition, slice(1), a.device))[:, 0].cpu()
        return torch.cat(list(self._batches(diffusion, n, batch_size, seed, condition, options)))

    def _batches(self, diffusion, n: int, batch_size: int, seed: int, condition: Mapping, options: dict) -> Iterator[Tensor]:
        device = diffusion.signal_scale.device
        for first in range(0, n, batch_size):
            count = min(batch_size, n - first)
            given = self.given[0].to(device).expand(count, -1, -1, -1)
            generator = torch.Generator(device).manual_seed(mixed_seed(SAMPLING, seed, first))
            how = options | {"generator": generator, "condition": rows_of(condition, slice(first, first + count), device)}
            if self.kind == "inpaint":
                drawn = inpaint(diffusion, given, self.known.to(device), **how)
            elif self.kind == "from":
                drawn = edit(diffusion, given, self.strength, **how)
            else:
                drawn = posterior_sample(diffusion, given, self._operator(device), 0.0, (count, *self.shape), **how)
            yield drawn.cpu()

    def _operator(self, device: torch.device):
        """What the given image is of the one to be drawn: a linear function."""
        if self.kind == "upscale":
            return lambda x: F.avg_pool2d(x, self.factor)
        weights = GREY.to(device)
        return lambda x: (weights * x).sum(1, keepdim=True)
