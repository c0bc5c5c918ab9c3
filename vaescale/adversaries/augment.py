"""DiffAugment: what a discriminator sees is transformed at random, data and fakes alike, and gradients pass through.

Zhao, Liu, Lin, Zhu & Han 2020, section 3. Each image of each set is transformed on its own: colour adds a brightness in [-1/2, 1/2) and
multiplies the distance from the grey value by a saturation in [0, 2) and that from the mean by a contrast in [1/2, 3/2); translation
moves by up to an eighth of the sides and fills with 0; cutout sets a square of half the sides to 0. Images are in [-1, 1], so 0 is grey.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vaescale import noise
from vaescale.adversaries.config import Augmentation

NUMBERS = 7  # of an image: three of colour, two shifts, two corners


def augmented(images: Tensor, kinds: Sequence[Augmentation], stream: noise.Stream, number: int) -> Tensor:
    """Transform images [B, C, H, W] in [-1, 1], one slot of the stream each. number: of the set within the step."""
    if not kinds:
        return images
    u = noise.uniform(stream, noise.AUGMENT + number, (NUMBERS,)).to(images)
    if "colour" in kinds:
        images = _coloured(images, *u[:, :3].T)
    if "translation" in kinds:
        images = _moved(images, u[:, 3:5])
    if "cutout" in kinds:
        images = _cut(images, u[:, 5:7])
    return images


def _coloured(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    brightness, saturation, contrast = (
        value.view(-1, 1, 1, 1) for value in (brightness, saturation, contrast)
    )
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _moved(images: Tensor, u: Tensor) -> Tensor:
    """Shift each image by whole pixels. u [B, 2] in [0, 1)."""
    for dim, size in ((2, images.shape[2]), (3, images.shape[3])):
        most = (size + 4) // 8
        shift = (u[:, dim - 2] * (2 * most + 1)).long() - most
        source = torch.arange(size, device=images.device) - shift[:, None]  # [B, size]
        inside = (source >= 0) & (source < size)
        shape = [len(images), 1, 1, 1]
        shape[dim] = size
        index = source.clamp(0, size - 1).view(shape).expand_as(images)
        images = images.gather(dim, index) * inside.view(shape).to(images)
    return images


def _cut(images: Tensor, u: Tensor) -> Tensor:
    """Set a square of each image to 0; a part of it may be outside. u [B, 2] in [0, 1)."""
    kept = torch.zeros(len(images), 1, 1, 1, dtype=torch.bool, device=images.device)
    for dim, size in ((2, images.shape[2]), (3, images.shape[3])):
        side = (size + 1) // 2
        first = (u[:, dim - 2] * (size + 1 - side % 2)).long() - side // 2
        places = torch.arange(size, device=images.device) - first[:, None]  # [B, size]
        shape = [len(images), 1, 1, 1]
        shape[dim] = size
        kept = kept | ((places < 0) | (places >= side)).view(shape)
    return images * kept.to(images)
