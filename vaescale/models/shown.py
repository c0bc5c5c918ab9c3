"""What a model shows its discriminators: images and latents, and what it makes of both, with their gradients.

Notation: E(x) draws z from q(z|x), G(z) is the decoder's mean E[x|z], z_p a draw of the prior N(0, I), and sg stops gradients.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.models.config import Shows
from vaescale.networks.layers import has_batch_norms


class Shown(NamedTuple):
    """Images [B, C, H, W] in [0, 1] and latents [B, Z]; those that no discriminator needs are [B, 0].

    x: the target; reconstructed: G(E(x)); held: G(sg E(x)), the same values; generated: G(z_p). z: E(x); prior_z: z_p; recovered: the
    mean of q(z|G(z_p)).
    """

    x: Tensor
    reconstructed: Tensor
    held: Tensor
    generated: Tensor
    z: Tensor
    prior_z: Tensor
    recovered: Tensor

    def detached(self) -> "Shown":
        """The same values as constants."""
        return Shown(*(tensor.detach() for tensor in self))


def shown(
    model: Any, shows: Shows, x: Tensor, params: Tensor, draws: Tensor | None, stream: noise.Stream
) -> Shown:
    """What a VAE shows in one forward pass. params, draws: of `Inferred`, for one draw of z. Call it under the networks' autocast."""

    def decoded(z: Tensor) -> Tensor:
        raw = model.network.decode(z.view(len(z), *model.latent_shape))
        with torch.autocast(x.device.type, enabled=False):
            mean: Tensor = model.likelihood.mean(raw)
            return mean

    with torch.autocast(x.device.type, enabled=False):
        reconstructed: Tensor = model.likelihood.mean(params)
    nothing = reconstructed.new_zeros(len(x), 0)
    z = nothing if draws is None else draws.flatten(1)
    prior_z = recovered = nothing
    if shows.prior:
        prior_z = noise.normal(stream, noise.GENERATED, (model.latent_dim,)).to(z)
    if shows.held and shows.generated and not has_batch_norms(model.network):
        held, generated = decoded(torch.cat([z.detach(), prior_z])).chunk(2)
    else:  # one by one, so that each has its own statistics, and `held` those of `reconstructed`
        held = decoded(z.detach()) if shows.held else nothing
        generated = decoded(prior_z) if shows.generated else nothing
    if shows.recovered:
        recovered = model.posterior(generated).mu.flatten(1)
    return Shown(x, reconstructed, held, generated, z, prior_z, recovered)
