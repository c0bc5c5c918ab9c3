"""A VAE whose latents are one code at each place of a map, under a uniform prior: VQ-VAE and FSQ; see `quantizer.py`."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vaescale import noise
from vaescale.errors import UserError
from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.likelihoods.sigma import wide
from vaescale.models.config import PosteriorConfig
from vaescale.models.quantizer import Quantized, Quantizer
from vaescale.models.vae import VAE, Inferred, unit_moments
from vaescale.networks.config import NetworkConfig


class QuantizedVAE(VAE):
    """Encoder, codes, decoder. z is [B, Z, h, w], the vectors of the codes."""

    def __init__(
        self,
        network: NetworkConfig,
        posterior: PosteriorConfig,
        likelihood: LikelihoodConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
    ) -> None:
        super().__init__(
            network,
            likelihood,
            encoder_out=posterior.num_params(network.latent_dim),
            image_size=image_size,
            channels=channels,
        )
        self.quantizer: Quantizer = posterior.implement(network.latent_dim)
        self.num_codes = self.quantizer.num_codes
        self.latent_shape = self.network.latent_shape
        self.latent_dim = math.prod(self.latent_shape)
        self.group_sizes, self.group_maps = (self.latent_dim,), (self.latent_shape[1:],)

    @property
    def code_nats(self) -> float:
        """The length of an image's codes under the uniform prior: N ln K nats."""
        return math.prod(self.latent_shape[1:]) * math.log(self.num_codes)

    def encode(self, x: Tensor) -> Quantized:
        """The codes of x, with their vectors."""
        raw = wide(self.network.encode(x))
        with torch.autocast(x.device.type, enabled=False):
            quantized: Quantized = self.quantizer(raw)
            return quantized

    def infer(
        self,
        encoded: Quantized,
        stream: noise.Stream,  # noqa: ARG002
        draws: int,
        detached: bool,  # noqa: ARG002
        *,
        weighted: bool = True,
        measured: bool = True,
    ) -> Inferred:
        """Decode the codes' vectors: nothing is drawn. The KL is the same for every image, divided evenly over the channels of a codebook."""
        if draws != 1 or weighted:
            raise UserError(_NO_DENSITY.format("importance sampling draws from q(z|x)"))
        vectors, z, codes, cost = encoded
        with torch.autocast(z.device.type, enabled=False):
            places = math.prod(self.latent_shape[1:])
            nats = vectors.new_tensor([places * one for one in self.quantizer.channel_nats])
            latent_kl = nats.expand(len(vectors), -1)
            nothing = vectors.new_zeros(len(vectors), 0)
            return Inferred(
                params=self.network.decode(z),
                kl=vectors.new_full((len(vectors), 1), self.code_nats),
                latent_kl=latent_kl,
                unit=unit_moments(z) if measured else (nothing, nothing),
                mu=nothing,
                log_sigma=nothing,
                log_ratio=nothing,
                draws=z,
                codes=codes.flatten(1),
                code_cost=cost,
            )

    def collect(self, encoded: Any, stream: noise.Stream, mask: Tensor) -> None:
        """Let the quantizer keep what its end of the step reads."""
        self.quantizer.collect(encoded, stream, mask)

    def end_step(self, skipped: Tensor) -> None:
        """Update the states of the likelihood and of the quantizer."""
        super().end_step(skipped)
        self.quantizer.end_step(skipped)

    def joint_means(self, x: Tensor, groups: int) -> Tensor:  # noqa: ARG002
        """The codes' vectors, flat."""
        return self.encode(x).z.flatten(1)

    def decode(
        self,
        z: Tensor,
        stream: noise.Stream | None = None,  # noqa: ARG002
        temperature: float = 1.0,  # noqa: ARG002
    ) -> Tensor:
        """The raw parameters from vectors [B, Z h w], flat."""
        params: Tensor = self.network.decode(z.reshape(z.shape[0], *self.latent_shape))
        return params

    def decode_codes(self, codes: Tensor) -> Tensor:
        """The raw parameters from codes int64 [B, N]. For use without a gradient."""
        height = self.latent_shape[1]
        return self.decode(self.quantizer.vectors_of(rearrange(codes, "b (h w) -> b h w", h=height)))

    def decode_means(self, encoded: Quantized) -> Tensor:
        """The raw parameters from the codes."""
        params: Tensor = self.network.decode(encoded.z)
        return params

    def from_prior(self, stream: noise.Stream, temperature: float = 1.0) -> Tensor:  # noqa: ARG002
        """The raw parameters from uniform codes, which have no temperature."""
        uniform = noise.uniform(stream, noise.PRIOR, (math.prod(self.latent_shape[1:]),))
        codes = (uniform.double() * self.num_codes).long()
        return self.decode_codes(codes)


_NO_DENSITY = "{}, which codes do not have (posterior.kind quantized or finite_scalar); leave it out"
