"""A model of sequences: latents at each step of time, and a bound on the frames after the first one. Denton & Fergus 2018, eq. 3.

    log p(x_2..T | x_1) >= sum_t E_q log p(x_t | x_1..t-1, z_2..t) - KL(q(z_t | x_1..t) || p(z_t | x_1..t-1)),    t = 2..T        nats

With context c, frames 2 to c are as much a part of the bound as the horizon's, as in the authors' code: the model predicts each frame
from those before it. What the context decides is from which frame the decoder has its maps, t - 1 but at most c, and where generation
begins. q and p see frames alone, not latents, so that one draw of all steps is exact.

Legend: B sequences, T frames, S = T - 1 predicted ones, K draws, Z latents of a step, P channels of the likelihood's parameters.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from vaescale import noise
from vaescale.errors import UserError
from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.likelihoods.sigma import wide
from vaescale.models.config import PosteriorConfig
from vaescale.models.posterior import Gaussian, Posterior, draw, kl
from vaescale.models.vae import VAE, Inferred
from vaescale.networks.config import SvgConfig

FRAME_BITS = 24  # a frame's noise is that of slot + (t << FRAME_BITS), of the likelihood's draws
MOST_FRAMES = 1 << 32 - FRAME_BITS


class Encoded(NamedTuple):
    """What the encoder makes of sequences. h [B, T, F]; maps: of the frames that are given, [B, c, W, ...] for each width; q and p of the
    steps 2..T, [B, Z, S] each; p is None for N(0, I).
    """

    h: Tensor
    maps: list[Tensor]
    q: Gaussian
    p: Gaussian | None


class SequenceModel(VAE):
    """x [B, T, C, H, W] -> q(z_t | x_1..t) -> z_t -> p(x_t | x_1..t-1, z_2..t). params are [B K, S, P, H, W]."""

    def __init__(
        self,
        network: SvgConfig,
        posterior: PosteriorConfig,
        likelihood: LikelihoodConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
    ) -> None:
        out = posterior.num_params(network.latent_dim)
        super().__init__(network, likelihood, encoder_out=out, image_size=image_size, channels=channels)
        if network.frames > MOST_FRAMES:
            raise UserError(
                f"network.context + network.horizon (={network.frames}) must be at most {MOST_FRAMES} frames"
            )
        self.context, self.frames = network.context, network.frames
        self.predicted_frames = self.frames - 1
        self._to_posterior: Posterior = posterior.implement(network.latent_dim)
        self._latents = network.latent_dim
        self.latent_shape = (self._latents, self.predicted_frames)
        self.latent_dim = math.prod(self.latent_shape)
        self.group_sizes, self.group_maps = (self.latent_dim,), ((self.predicted_frames,),)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of a sequence, (T, C, H, W)."""
        return (self.frames, *self.image_shape)

    @property
    def dimensions(self) -> int:
        """The number of values that the bound is of: those of all frames but the first."""
        return self.predicted_frames * math.prod(self.image_shape)

    def target(self, images: Tensor, stream: noise.Stream) -> Tensor:
        """The sequences [B, T, C, H, W] in [0, 1] of stored ones; the noise of a frame does not depend on how many follow it."""
        assert images.shape[1:] == self.example_shape, (tuple(images.shape), self.example_shape)
        return self._unit_target(images, stream)

    def encode(self, x: Tensor) -> Any:
        """The features of all frames, and q and p of all steps: one call each."""
        h, maps = self._features(x)
        raw, _ = self.network.posterior(h)
        p = None if self.network.prior is None else self.gaussian(self.network.prior(h[:, :-1])[0])
        return Encoded(h, [each[:, : self.context] for each in maps], self.gaussian(raw[:, 1:]), p)

    def infer(
        self,
        encoded: Encoded,
        stream: noise.Stream,
        draws: int,
        detached: bool,
        *,
        weighted: bool = True,
        measured: bool = True,
    ) -> Inferred:
        """Draw z_t = mu + sigma epsilon of all steps. Noise is drawn time by time, so that a longer horizon begins like a shorter one."""
        q, p, device = encoded.q, encoded.p, encoded.h.device.type
        steps = q.mu.shape[2]
        epsilon = self._noise(stream, noise.POSTERIOR, steps, draws).to(q.mu)
        with torch.autocast(device, enabled=False):
            z, latent_kl = draw(_repeated(q, draws), None if p is None else _repeated(p, draws), epsilon)
            latent_kl = latent_kl[::draws]
            log_ratio = latent_kl.new_zeros(len(latent_kl), 0)
            if weighted:
                held = Gaussian(*(each.detach() for each in q)) if detached else q
                prior = (
                    Gaussian(torch.zeros_like(z), torch.zeros_like(z)) if p is None else _repeated(p, draws)
                )
                difference = prior.log_density(z) - _repeated(held, draws).log_density(z)
                log_ratio = rearrange(difference.flatten(1).sum(1), "(b k) -> b k", k=draws)
        params = self._decoded(encoded, z)
        with torch.autocast(device, enabled=False):
            nothing = latent_kl.new_zeros(len(q.mu), 0)
            unit = (nothing, nothing)
            if measured:
                deviation = (q.mu if p is None else (q.mu - p.mu) * torch.exp(-p.log_sigma)).detach()
                unit = (deviation.mean(2), deviation.square().mean(2))
            return Inferred(
                params=params,
                kl=latent_kl.sum(1, keepdim=True),
                latent_kl=latent_kl,
                unit=unit,
                mu=q.mu.flatten(1),
                log_sigma=q.log_sigma.flatten(1),
                log_ratio=log_ratio,
                draws=z,
            )

    def log_px(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """log p(x_2..T | ...) [B K], summed over the predicted frames; each is an image to the likelihood and its sigma."""
        return self.frame_log_px(x, params, mask).sum(1)

    def frame_log_px(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """log p(x_t | ...) of each predicted frame, [B K, S]."""
        frames = params.shape[1]
        by_frame = self.likelihood.log_prob(*self.images_of(x, params), mask.repeat_interleave(frames))
        return by_frame.view(-1, frames)

    def images_of(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted frames [B S, C, H, W] and their parameters."""
        return x[:, 1:].flatten(0, 1), params.flatten(0, 1)

    def frame_kl(self, encoded: Any) -> Tensor:
        """KL(q(z_t | x_1..t) || p(z_t | x_1..t-1)) of each step, [B, S]."""
        return kl(encoded.q, encoded.p).sum(1)

    def means(self, params: Tensor) -> Tensor:
        """The means [B, S, C, H, W] of p(x_t | ...)."""
        return self.likelihood.mean(params.flatten(0, 1)).view(*params.shape[:2], *self.image_shape)

    def frame_draws(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draws [B, S, C, H, W] from p(x_t | ...), the first of which is of frame t = T - S + 1."""
        first = self.frames - params.shape[1]
        time = torch.arange(first, self.frames, device=stream.slots.device) << FRAME_BITS
        by_frame = stream._replace(slots=(stream.slots[:, None] + time).flatten())
        drawn = self.likelihood.sample(params.flatten(0, 1), by_frame)
        return drawn.view(*params.shape[:2], *self.image_shape)

    def decode_means(self, encoded: Encoded) -> Tensor:
        """The raw parameters [B, S, P, H, W] from the means of q, with the frames before each one given."""
        return self._decoded(encoded, encoded.q.mu)

    def generate(self, x: Tensor, stream: noise.Stream, *, frames: int | None = None) -> Tensor:
        """The raw parameters [B, frames, P, H, W] of what follows the context, by default the horizon.

        x: sequences of which only the first `context` frames are read. z_t is of q within the context and of the prior after it, and each
        frame's mean is what the next step sees, as in the paper. For use without a gradient.
        """
        horizon = self.frames - self.context if frames is None else frames
        return torch.stack([*self._generated(x[:, : self.context], stream, horizon)], dim=1)

    def _generated(self, x: Tensor, stream: noise.Stream, horizon: int) -> Iterator[Tensor]:
        network, context = self.network, self.context
        h, maps = self._features(x)
        maps = [each[:, -1:] for each in maps]
        of_prior = self._noise(stream, noise.PRIOR, context - 1 + horizon)[:, :, context - 1 :]
        state = prior_state = raw = None
        if context > 1:
            q = self.gaussian(network.posterior(h)[0][:, 1:])
            z = q.sample(self._noise(stream, noise.POSTERIOR, context - 1).to(q.mu))
            _, state = network.predicted(h[:, :-1], rearrange(z, "b z t -> b t z"), state)
        if network.prior is not None:
            raw, prior_state = network.prior(h)
        h = h[:, -1:]
        for step in range(horizon):
            z = of_prior[:, :, step : step + 1]
            if raw is not None:
                p = self.gaussian(raw[:, -1:])
                z = p.sample(z.to(p.mu))
            g, state = network.predicted(h, rearrange(z, "b z t -> b t z"), state)
            params = network.decoder(g, maps)[:, 0]
            yield params
            if step == horizon - 1:
                return
            features, _ = network.encoder(self.likelihood.mean(params).to(x))
            h = features[:, None]
            if network.prior is not None:
                raw, prior_state = network.prior(h, prior_state)

    def gaussian(self, raw: Tensor) -> Gaussian:
        """q or p from the raw parameters of an LSTM [B, S, 2 Z]: [B, Z, S]."""
        with torch.autocast(raw.device.type, enabled=False):
            q: Gaussian = self._to_posterior(wide(rearrange(raw, "b t z -> b z t")), None)
            return q

    def _features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features [B, T, F] and the maps [B, T, W, ...] of frames, by one call of the encoder."""
        h, maps = self.network.encoder(x.flatten(0, 1))
        shape = x.shape[:2]
        return h.view(*shape, -1), [each.view(*shape, *each.shape[1:]) for each in maps]

    def _decoded(self, encoded: Encoded, z: Tensor) -> Tensor:
        """The raw parameters [B K, S, P, H, W] from latents [B K, Z, S], the frames before each one given."""
        draws = len(z) // len(encoded.h)
        h = encoded.h[:, :-1]
        h = h.repeat_interleave(draws, 0) if draws > 1 else h
        g, _ = self.network.predicted(h, rearrange(z, "b z t -> b t z"))
        params: Tensor = self.network.decoder(g, encoded.maps)
        return params

    def _noise(self, stream: noise.Stream, purpose: int, steps: int, draws: int = 1) -> Tensor:
        """Standard normals [B K, Z, S]: one draw of a slot, time by time."""
        (values,) = noise.normals(stream, {purpose: steps * draws * self._latents})
        return rearrange(values, "b (t k z) -> (b k) z t", k=draws, z=self._latents)

    def _moments(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        frames = params.shape[1]
        moments = super()._moments(*self.images_of(x, params))
        error, variance = (each.view(-1, frames).sum(1) for each in moments)
        return error, variance


def _repeated(q: Gaussian, draws: int) -> Gaussian:
    """q of each of K draws: [B, ...] to [B K, ...]."""
    return q if draws == 1 else Gaussian(*(repeat(each, "b ... -> (b k) ...", k=draws) for each in q))
