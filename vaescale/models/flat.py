"""A VAE with one latent vector or one latent map, and the prior N(0, I). Kingma & Welling 2014."""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor

from vaescale import noise
from vaescale.conditions.config import ConditionConfig
from vaescale.conditions.embedding import ConditionPrior
from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.likelihoods.sigma import wide
from vaescale.models.config import PosteriorConfig
from vaescale.models.posterior import Gaussian, Posterior, bounded, draw, kl
from vaescale.models.vae import VAE, Choose, Inferred, unit_moments
from vaescale.networks.config import NetworkConfig


class FlatVAE(VAE):
    """A flat VAE: encoder, z, decoder. z is [B, Z], or [B, Z, H, W] for a network with a latent map."""

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
        self.class_prior: ConditionPrior | None = None
        self._to_posterior: Posterior = posterior.implement(network.latent_dim)
        self.latent_shape = self.network.latent_shape
        self.latent_dim = math.prod(self.latent_shape)
        self.group_sizes, self.group_maps = (self.latent_dim,), (self.latent_shape[1:],)

    def encode(self, x: Tensor) -> Gaussian:
        """The posterior q(z|x)."""
        return self.posterior(x)

    def infer(
        self,
        encoded: Gaussian,
        stream: noise.Stream,
        draws: int,
        detached: bool,
        *,
        weighted: bool = True,
        measured: bool = True,
    ) -> Inferred:
        """Draw z = mu + sigma epsilon. The KL is in closed form and the same for every draw."""
        q, device = encoded, encoded.mu.device.type
        (epsilon,) = noise.normals(stream, {noise.POSTERIOR: draws * self.latent_dim})
        with torch.autocast(device, enabled=False):
            p = self._class_prior(q.mu.shape[0])
            if draws == 1:
                repeated = q
                z, latent_kl = draw(q, p, epsilon.reshape(q.mu.shape).to(q.mu))
            else:
                repeated = Gaussian(*(repeat(tensor, "b ... -> (b k) ...", k=draws) for tensor in q))
                z = repeated.sample(epsilon.reshape(repeated.mu.shape).to(q.mu))
                latent_kl = kl(q, p).flatten(2).sum(2) if q.mu.ndim > 2 else kl(q, p)  # [B, L]
        params = self._decoded(z)
        with torch.autocast(device, enabled=False):
            nothing = latent_kl.new_zeros(len(q.mu), 0)
            return Inferred(
                params=params,
                kl=latent_kl.sum(1, keepdim=True),
                latent_kl=latent_kl,
                unit=unit_moments(q.mu if p is None else (q.mu - p.mu) * torch.exp(-p.log_sigma))
                if measured
                else (nothing, nothing),
                mu=q.mu.flatten(1),
                log_sigma=q.log_sigma.flatten(1),
                log_ratio=_log_ratio(
                    repeated, self._class_prior(z.shape[0]), z, draws=draws, detached=detached
                )
                if weighted
                else nothing,
                draws=z,
            )

    def posterior(self, x: Tensor) -> Gaussian:
        """The posterior q(z|x) of all latents."""
        embedding = self.embedded(x.shape[0])
        raw = wide(self.network.encode(x) if embedding is None else self.network.encode(x, embedding))
        with torch.autocast(x.device.type, enabled=False):
            q: Gaussian = self._to_posterior(raw, None)
            return q

    def joint_means(self, x: Tensor, groups: int) -> Tensor:  # noqa: ARG002
        """The posterior means, as a flat model has a single group."""
        return self.posterior(x).mu.flatten(1)

    def joint_posterior(self, x: Tensor) -> Gaussian:
        """The posterior of all latents, flat."""
        return Gaussian(*(tensor.flatten(1) for tensor in self.posterior(x)))

    def prior(self) -> Gaussian:
        """The standard normal prior, or p(z|y) of every condition given."""
        p = self._class_prior(self.num_given)
        if p is not None:
            return p
        zeros = next(self.parameters()).new_zeros(self.latent_shape)
        return Gaussian(zeros, zeros)

    def decode(
        self,
        z: Tensor,
        stream: noise.Stream | None = None,  # noqa: ARG002
        temperature: float = 1.0,  # noqa: ARG002
    ) -> Tensor:
        """The raw parameters from all latents."""
        return self._decoded(z.reshape(z.shape[0], *self.latent_shape))

    def decode_means(self, encoded: Gaussian) -> Tensor:
        """The raw parameters from the posterior's mean."""
        return self._decoded(encoded.mu)

    def descend(self, rows: int, choose: Choose) -> Tensor:
        """The raw parameters from the latents that `choose` returns for the only group."""
        return self.decode(choose(0, self._class_prior(rows), lambda encoded: encoded))

    def from_prior(self, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
        """The raw parameters from draws of N(0, temperature^2), or of p(z|y) with its standard deviations times `temperature`."""
        z = temperature * noise.normal(stream, noise.PRIOR, (self.latent_dim,))
        p = self._class_prior(z.shape[0])
        return self.decode(z if p is None else p.sample(z.view(p.mu.shape).to(p.mu)))

    def add_condition(self, condition: ConditionConfig) -> None:
        """Condition the network and, if the section says so, the prior."""
        super().add_condition(condition)
        if condition.prior:
            self.class_prior = ConditionPrior(condition, self.latent_shape)

    def _class_prior(self, rows: int) -> Gaussian | None:
        """p(z|y) of B K rows, of the first row of each condition where they are repeated; None for a standard normal prior."""
        if self.class_prior is None:
            return None
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            mu, log_sigma = self.class_prior(self.given_rows(rows))
            return Gaussian(mu, bounded(log_sigma))

    def _decoded(self, z: Tensor) -> Tensor:
        """The raw parameters from latents [B, *latent_shape]."""
        embedding = self.embedded(z.shape[0])
        params: Tensor = self.network.decode(z) if embedding is None else self.network.decode(z, embedding)
        return params


def _log_ratio(q: Gaussian, p: Gaussian | None, z: Tensor, *, draws: int, detached: bool) -> Tensor:
    """log p(z) - log q(z|x) of draws [B K, ...], [B, K]. p: None is N(0, I). detached: holds q's parameters constant."""
    q = Gaussian(*(tensor.detach() for tensor in q)) if detached else q
    p = Gaussian(torch.zeros_like(z), torch.zeros_like(z)) if p is None else p
    log_ratio = (p.log_density(z) - q.log_density(z)).flatten(1).sum(1)
    return rearrange(log_ratio, "(b k) -> b k", k=draws)
