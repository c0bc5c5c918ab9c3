"""Equivariance of the decoder to scaling and rotation of the latent map. Kouzelis et al. 2025 (EQ-VAE), eq. 5.

    -log p(Tx|Tz),    z ~ q(z|x)                              nats, summed over the values of Tx, which has fewer than x

T scales by bilinear interpolation and then turns by multiples of 90 degrees, the image and the map alike. As in the authors' code
(github.com/zelaki/eqvae) there is one T for a step, z is the draw that the ELBO uses, and the gradient reaches encoder and decoder.
There, a coin decides for each step between this term and the plain reconstruction; here, it is added to the ELBO, so that the bound
stays what it is and sigma is fitted to it alone: -log p(Tx|Tz) takes the sigma of log p(x|z) as a constant (a predicted sigma is
predicted from Tz), and its errors are not collected.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vaescale import noise
from vaescale.models.config import EquivarianceConfig


class Transformation(NamedTuple):
    """Scaling of a map to height x width, then `turns` quarter turns."""

    height: int
    width: int
    turns: int

    def __call__(self, maps: Tensor, factor: int = 1) -> Tensor:
        """Transform [B, C, H, W]. factor: of an image, how many times its sides are those of the latent map."""
        size = (factor * self.height, factor * self.width)
        if size != maps.shape[2:]:
            maps = interpolate(maps, size=size, mode="bilinear", align_corners=False)
        return torch.rot90(maps, self.turns, (2, 3))


def drawn(config: EquivarianceConfig, size: tuple[int, int], stream: noise.Stream) -> Transformation:
    """The transformation of a step for maps of this height and width: a function of the stream's seed and step only."""
    rows, columns = config.sides(*size), config.sides(*size[::-1])
    of_step = noise.Stream(stream.seed, stream.step, torch.zeros(1, dtype=torch.int64))
    of_height, of_width, of_turns = noise.uniform(of_step, noise.EQUIVARIANCE, (3,))[0].tolist()
    height = rows[int(of_height * len(rows))]
    width = columns[int(of_width * len(columns))] if config.anisotropic else height * size[1] // size[0]
    return Transformation(height, width, config.turns[int(of_turns * len(config.turns))])
