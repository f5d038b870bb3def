"""What can be known to be wrong before the first step."""

import logging

import torch

from config import TrainConfig
from dataset import ImageDataset
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


def _check_labels(n_classes: int | None, images: dict[str, ImageDataset]) -> None:
    """Mistake if a network of n_classes is to be trained on labels that are not there, or not its."""
    if n_classes is None:
        return
    for split, data in images.items():
        if data.labels is None:
            raise Mistake(f"time_aware_net.kwargs.n_classes = {n_classes}: dataset.{split} has no labels")
        if not 0 <= int(data.labels.min()) <= int(data.labels.max()) < n_classes:
            raise Mistake(
                f"time_aware_net.kwargs.n_classes = {n_classes}: dataset.{split} has labels up to {int(data.labels.max())}"
            )
    names = {split: data.class_names for split, data in images.items()}
    if names["train"] != names["valid"]:
        raise Mistake(f"dataset.valid: has the classes {names['valid']}, and dataset.train {names['train']}")


def check_fit(model: GaussianDiffusion, images: dict[str, ImageDataset]) -> None:
    """Try the network on one image of each data set; warn of a prior that is not pure noise."""
    _check_labels(getattr(model.time_aware_net, "n_classes", None), images)
    for split, data in images.items():
        with torch.no_grad(), as_mistake(f"time_aware_net: does not take the images of dataset.{split}: "):
            model.eval().predict(torch.zeros(1, *data.shape), 1)
    model.train()
    alpha_bar = model.signal_scale[-1].item() ** 2
    if alpha_bar > 0.01:
        log.warning(
            f"alpha_bar_T = {alpha_bar:.3g} is above 0.01: x_T keeps some of the image, and samples that start from N(0, I) "
            "start wrong; use more timesteps or larger betas"
        )
