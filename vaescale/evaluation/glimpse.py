"""Pictures of what a model makes of images: reconstructions, errors, the decoder's sigma; during training also samples of the prior."""

import torch
from torch import Tensor

from vaescale import noise
from vaescale.evaluation.futures import LEVEL, strips
from vaescale.models.sequence_model import SequenceModel
from vaescale.models.vae import VAE

SEQUENCES = 3  # of which frames are shown


@torch.no_grad()
def glimpse(model: VAE, images: Tensor, condition: Tensor | None, *, seed: int) -> list[tuple[str, Tensor]]:
    """Named rows of pictures [B, C, H, W] in [0, 1]: originals, decoded means, sigma and means of samples, of a conditional model
    with the images' condition.

    The row of sigma(z), divided by its maximum, exists where sigma differs between pixels. images: uint8 [B, C, H, W]. All ranks
    call it with the same images. Of a model of sequences: the rows of `futures.strips` for the first
    ones, in which sigma is divided by its maximum.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    if isinstance(model, SequenceModel):
        first = images[:SEQUENCES]
        drawn = strips(model, first, torch.arange(len(first)), seed=seed)
        model.train(was_training)
        rows = [row for rows in drawn.rows for row in rows]
        levels = [frames.nan_to_num(0) for name, frames in rows if name == LEVEL]
        largest = max((float(frames.max()) for frames in levels), default=1.0)
        return [
            (f"{name}, 0 to {largest:.2g}", frames.nan_to_num(0) / max(largest, 1e-12))
            if name == LEVEL
            else (name, frames)
            for name, frames in rows
        ]
    given = model.given(condition)
    stream = noise.Stream(seed, 0, torch.arange(len(images), device=device))
    x = model.target(images.to(device), stream)
    params = given.reconstruct(x)
    means = model.likelihood.mean(params)
    rows = [("original", x), ("decoded", means)]
    deviation = model.likelihood.deviation(params)
    if deviation is not None and deviation.numel() > 1:
        sigma = deviation.expand_as(means)
        rows.append((f"sigma to {float(sigma.amax()):.2g}", sigma / sigma.amax().clamp_min(1e-12)))
    rows.append(("samples", model.likelihood.mean(given.from_prior(stream))))
    model.train(was_training)
    return [(name, row.float().clamp(0, 1).cpu()) for name, row in rows]


@torch.no_grad()
def error_maps(
    model: VAE, images: Tensor, slots: Tensor, *, condition: Tensor | None = None, seed: int
) -> list[tuple[str, Tensor]]:
    """Named rows of pictures [B, C, H, W] or [B, 1, H, W]: originals, decoded means, errors, and the noise level if values differ in it.

    Errors and noise levels are divided by their maximum, which the name says. images: uint8 [B, C, H, W]; slots: int64 [B], which with the
    seed decide the noise of a binarized or dequantized image; condition: of the images, for a conditional model.
    """
    device = next(model.parameters()).device
    originals = model.target(images.to(device), noise.Stream(seed, 0, slots.to(device)))
    given = model.given(condition)
    params = given.reconstruct(originals)
    means = model.likelihood.mean(params).float()
    rows = [("original", originals), ("decoded", means), _scaled("|error|", (originals - means).abs())]
    if (level := model.likelihood.noise_map(params)) is not None:
        rows.append(_scaled(level[0], level[1].float()))
    return [(name, pictures.float().cpu()) for name, pictures in rows]


def _scaled(name: str, values: Tensor) -> tuple[str, Tensor]:
    """A label, and the values in grey with the largest one white."""
    largest = float(values.max())
    return f"{name}, 0 to {largest:.2g}", values.mean(1, keepdim=True) / max(largest, 1e-12)
