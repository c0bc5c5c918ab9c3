"""A model of the codes of another run, without latents: an autoregressive p(codes) in the place of p(x|z), for the same trainer.

    log_px = log p(codes) = sum_i log p(code_i | codes before i),    kl = 0         nats, over N places

so that neg_elbo_nats is the length of an image's codes, and bits_per_dim that of one code. Van den Oord et al. 2017, section 3.3.

Legend: B images, N = h w places, K codes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vaescale import noise
from vaescale.errors import UserError
from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.likelihoods.sigma import wide
from vaescale.models.vae import VAE, Inferred, Terms
from vaescale.networks.code_transformer import nats_from_logits
from vaescale.networks.config import NetworkConfig


class CodeModel(VAE):
    """The network's p(codes). x is the codes themselves, int64 [B, 1, h, w]."""

    def __init__(
        self,
        network: NetworkConfig,
        likelihood: LikelihoodConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
    ) -> None:
        """image_size: h and w; channels: K."""
        super().__init__(network, likelihood, encoder_out=0, image_size=image_size, channels=channels)
        self.image_shape = (1, *image_size)
        self.latent_shape, self.latent_dim = (0,), 0
        self.group_sizes, self.group_maps = (0,), ((),)

    def target(self, images: Tensor, stream: noise.Stream) -> Tensor:  # noqa: ARG002
        """The codes int64 of a batch."""
        return images.long()

    def encode(self, x: Tensor) -> Any:
        """The codes, flat [B, N]: nothing is encoded."""
        return x.flatten(1)

    def infer(
        self,
        encoded: Any,
        stream: noise.Stream,
        draws: int,
        detached: bool,  # noqa: ARG002
        *,
        weighted: bool = True,
        measured: bool = True,  # noqa: ARG002
    ) -> Inferred:
        """The logits [B, N, K] of each code given those before it, as params, and no latents."""
        if draws != 1 or weighted:
            raise UserError(
                "a model of codes has no latents to draw (data.holds codes); set objective.kind=elbo"
            )
        logits = self.network(encoded[:, :-1], stream)
        nothing = torch.zeros(len(encoded), 0, device=encoded.device)
        return Inferred(
            params=logits,
            kl=nothing.new_zeros(len(encoded), 1),
            latent_kl=nothing,
            unit=(nothing, nothing),
            mu=nothing,
            log_sigma=nothing,
            log_ratio=nothing,
            draws=None,
        )

    def terms(
        self,
        x: Tensor,
        inferred: Inferred,
        mask: Tensor,  # noqa: ARG002
        doubly_reparameterized: bool = False,  # noqa: ARG002
        *,
        measured: bool = True,
    ) -> Terms:
        """The Terms of codes. squared_error is that of the one-hot codes: sum over places of |onehot - p|^2 (Brier 1950)."""
        with torch.autocast(x.device.type, enabled=False):
            codes, nothing = x.flatten(1), inferred.mu
            nats = nats_from_logits(inferred.params, codes)
            error = _brier(inferred.params.detach(), codes) if measured else nothing
            return Terms(
                log_px=-nats,
                kl=inferred.kl,
                latent_kl=inferred.latent_kl,
                squared_error=error,
                variance=torch.full_like(nats, math.nan, requires_grad=False) if measured else nothing,
                unit_mean=nothing,
                unit_square=nothing,
                mu=nothing,
                log_sigma=nothing,
                z=nothing,
                log_weights=nothing,
                spectral=nothing,
                transformed_log_px=nothing,
                codes=nothing,
                code_cost=nothing,
            )


@torch.no_grad()
def _brier(logits: Tensor, codes: Tensor) -> Tensor:
    """Sum over places of sum_k (1[code = k] - p_k)^2, [B]."""
    share = torch.softmax(wide(logits), dim=2)
    chosen = share.gather(2, codes[..., None]).squeeze(2)
    return (1 - 2 * chosen + share.square().sum(2)).sum(1)
