"""What can be known to be wrong before the first step."""

import logging

import torch

from config import TrainConfig
from dataset import ImageDataset
from discrete_diffusion import to_symbols
from gaussian_diffusion import GaussianDiffusion
from mistakes import Mistake, as_mistake
from training.ranks import Ranks

log = logging.getLogger("train")


def check_batch(cfg: TrainConfig, ranks: Ranks) -> None:
    """Mistake if a batch cannot be shared out evenly between the ranks and the parts of grad_accum."""
    parts = ranks.world * cfg.grad_accum
    if cfg.batch_size % parts:
        raise Mistake(
            f"train_cfg.batch_size = {cfg.batch_size}: must be a multiple of {parts}, {ranks.world} ranks times "
            f"grad_accum = {cfg.grad_accum}"
        )


def check_fit(model: GaussianDiffusion, images: dict[str, ImageDataset]) -> None:
    """Try the network on one image of each data set; warn of a prior that is not pure noise."""
    for split, data in images.items():
        with torch.no_grad(), as_mistake(f"time_aware_net: does not take the images of dataset.{split}: "):
            model.eval().predict(to_symbols(torch.zeros(1, *data.shape), model.n_levels), 1)
    model.train()
    if model.n_levels:  # what is left of x_0 at T is part of p(x_T)
        return
    alpha_bar = model.signal_scale[-1].item() ** 2
    if alpha_bar > 0.01:
        log.warning(
            f"alpha_bar_T = {alpha_bar:.3g} is above 0.01: x_T keeps some of the image, and samples that start from N(0, I) "
            "start wrong; use more timesteps or larger betas"
        )
