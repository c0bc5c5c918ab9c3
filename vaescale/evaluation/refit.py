"""Sigma fitted anew: the maximum-likelihood sigma of the training images under the present weights, in place of the running average.

The running sigma is an average over the last steps of training. In a short run, or for averaged weights, it is not that of the
weights that are evaluated. A fit to the training images uses no image that is held out.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.errors import DataError, UserError
from vaescale.evaluation.likelihood import observed, sigma_of_images
from vaescale.likelihoods.base import LocationScale
from vaescale.likelihoods.config import OPTIMAL, LikelihoodConfig
from vaescale.models.vae import VAE

PER_IMAGE = "optimal_per_image"


class Refitted(NamedTuple):
    """A fit of sigma: the number of images, sigma before and after, and the nats per image between them on these images."""

    images: int
    before: float
    after: float
    gap_nats: float

    @property
    def protocol(self) -> str:
        """The meaning of sigma, for results."""
        return (
            f"maximum-likelihood value of {self.images} training images with the evaluated weights, one draw of z each, not flipped; "
            f"in place of the running average from training ({self.before:.6g})"
        )


def can_refit(config: LikelihoodConfig) -> bool:
    """Whether a likelihood has a running sigma that evaluation uses."""
    sigma = getattr(config, "sigma", None)
    return sigma in OPTIMAL and sigma != PER_IMAGE


def refuse_refit(config: LikelihoodConfig) -> None:
    """Raise UserError where evaluation uses no running sigma."""
    if not can_refit(config):
        sigma = getattr(config, "sigma", None)
        what = f"likelihood.sigma (={sigma})" if sigma is not None else f"likelihood.kind (={config.kind})"
        raise UserError(
            f"--refit-sigma replaces a running sigma, and {what} has none; it is for optimal, optimal_per_channel and "
            "optimal_per_pixel"
        )


@torch.no_grad()
def refit_sigma(
    model: VAE,
    batches: Iterable[Batch],
    *,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Refitted:
    """Fit sigma to images, and let the model use it. All ranks call it, each with its batches.

    Each image has one draw from q(z|x), which depends on seed and image number. The sums are float64 over all ranks. progress: called
    with the number of this rank's images that are done. Raises DataError when no image can be used.
    """
    likelihood, device = model.likelihood, next(model.parameters()).device
    assert isinstance(likelihood, LocationScale)
    assert likelihood.sigma is not None
    was_training, done = model.training, 0
    model.eval()
    sums = torch.zeros_like(likelihood.state.running)
    for batch in batches:
        images, slots, mask = batch.images.to(device), batch.slots.to(device), batch.mask.to(device)
        with observed(likelihood) as of_batch:
            condition = model.condition_of(batch.labels, batch.vectors)
            model(images, noise.Stream(seed, 0, slots), mask, condition=condition)
            sums += of_batch()
        progress(done := done + len(slots))
    sums = comm.all_reduce_sum(sums)
    model.train(was_training)
    if not sums[0]:
        raise comm.known_to_all(
            DataError("no training image can be used; `vaescale verify-shards DIR --deep` names the faults")
        )
    before, of_images = float(likelihood.sigma), sigma_of_images(model, sums)
    likelihood.state.refit(sums)
    images_used = round(float(sums[0]) * sums[1:].numel() / model.dimensions)
    return Refitted(images_used, before, of_images["data_sigma"], of_images["sigma_gap_nats"])
