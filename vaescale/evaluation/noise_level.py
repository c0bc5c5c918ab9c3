"""Estimate of the noise of images by a mask whose response is 0 on planes and on edges along the axes.

    sigma = sqrt(pi / 2) / (6 (W - 2) (H - 2)) sum |I * N|,     N = [1 -2 1; -2 4 -2; 1 -2 1]        Immerkaer 1996, eq. 6

For white noise sigma is the standard deviation. Fine texture counts as noise too, so compare only images of one kind.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

LEAST_SIZE = 3
MASK = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))


def noise_level(images: Tensor) -> Tensor:
    """The estimated standard deviation [B] of the noise of images [B, C, H, W], at least 3x3, averaged over channels."""
    channels = images.shape[1]
    mask = torch.tensor(MASK, device=images.device, dtype=images.dtype).expand(channels, 1, 3, 3)
    answer = conv2d(images, mask, groups=channels).abs().flatten(1).mean(1)
    return math.sqrt(math.pi / 2) / 6 * answer
