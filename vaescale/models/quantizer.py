"""Codes in place of a Gaussian draw: the contract of a quantizer, the nearest code, and two gradients through the choice of it.

q(z|x) puts all its mass on one of K codes at each place of a latent map, and the prior is uniform over codes, so that

    KL(q || p) = N ln K                                             nats, over N places; van den Oord et al. 2017, section 3.1

is a constant, and -log p(x|z) + N ln K is the length of a code for x: the codes first, then x given them.

Legend: B images, Z channels, N = h w places, K codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaescale import noise
from vaescale.models.config import Codes

LEAST_LENGTH = 1e-6  # of a vector that is scaled to its code's length
MOST_DISTANCES = 1 << 24  # that are in memory at once


class Quantized(NamedTuple):
    """What a quantizer makes of an encoder's maps. vectors [B, Z, h, w]: as the encoder returned them; z [B, Z, h, w]: those of
    the codes; codes int64 [B, h, w]; cost [B]: nats that the quantizer adds to the loss, [B, 0] without any.
    """

    vectors: Tensor
    z: Tensor
    codes: Tensor
    cost: Tensor


class Quantizer(nn.Module):
    """The contract of a quantizer. Override `forward` and `vectors_of`, and set `num_codes` and `channel_nats`."""

    num_codes: int
    """K."""

    channel_nats: tuple[float, ...]
    """The nats of each channel at a place under the uniform prior, whose sum is ln K."""

    def __init__(self, config: Codes, latents: int) -> None:  # noqa: ARG002
        """latents: Z."""
        super().__init__()

    def forward(self, raw: Tensor) -> Quantized:
        """Replace raw [B, Z, h, w], float32 or float64, by codes."""
        raise NotImplementedError

    def vectors_of(self, codes: Tensor) -> Tensor:
        """The vectors of codes int64 [B, h, w], [B, Z, h, w]."""
        raise NotImplementedError

    def collect(self, quantized: Quantized, stream: noise.Stream, mask: Tensor) -> None:
        """Keep of a forward pass in training what `end_step` reads. mask bool [B]: false for padding."""

    def end_step(self, skipped: Tensor) -> None:
        """Update the state once per optimizer step, on every rank. skipped []: 1 where the step moves no weights, else 0."""


@torch.no_grad()
def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest vector of a codebook [K, Z] to each point [P, Z], int64 [P]; the first one where several are."""
    squares = codebook.square().sum(1)
    size = max(1, MOST_DISTANCES // len(codebook))
    parts = [squares.addmm(part, codebook.T, alpha=-2).argmin(1) for part in torch.split(points, size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def straight_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """The codes' vectors, whose gradient is the encoder's as it is. Bengio et al. 2013; van den Oord et al. 2017, section 3.2."""
    if not vectors.requires_grad:
        return codes
    return vectors + (codes - vectors).detach()


def rotated(vectors: Tensor, codes: Tensor) -> Tensor:
    """The codes' vectors q, as the encoder's vectors e rotated and scaled by a constant matrix. Fifty et al. 2024, section 4.

        q = |q| / |e| R e,    R = I - 2 r r^T + 2 (q / |q|) (e / |e|)^T,    r = the unit vector along e / |e| + q / |q|

    vectors, codes: [B, Z, ...]. The gradient for e is |q| / |e| R^T times that of q, which keeps its angle to the vector.
    """
    if not vectors.requires_grad:
        return codes
    with torch.no_grad():
        length, length_of_code = (each.norm(dim=1, keepdim=True) for each in (vectors, codes))
        unit, unit_of_code = (nn.functional.normalize(each, dim=1) for each in (vectors, codes))
        between = nn.functional.normalize(unit + unit_of_code, dim=1)
        scale = torch.where(length > LEAST_LENGTH, length_of_code / length, 1.0)
    along, across = ((axis * vectors).sum(1, keepdim=True) for axis in (unit, between))
    turned: Tensor = scale * (vectors - 2 * between * across + 2 * unit_of_code * along)
    return turned + (codes - turned).detach()


GRADIENTS = {"straight_through": straight_through, "rotation": rotated}
