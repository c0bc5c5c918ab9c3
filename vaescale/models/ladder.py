"""A hierarchical VAE: q(z|x) = prod q(z_g | z_<g, x), p(z) = prod p(z_g | z_<g), both sampled top-down. Child 2021.

    KL(q(z|x) || p(z)) = sum_g E[KL(q(z_g | z_<g, x) || p(z_g | z_<g))]                        Sonderby et al. 2016, eq. 11

Legend: a group's z, mu and sigma are [B K, Z, R, R].
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor

from vaescale import noise
from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.likelihoods.sigma import wide
from vaescale.models.config import PosteriorConfig
from vaescale.models.posterior import Gaussian, Posterior, bounded, draw
from vaescale.models.vae import VAE, Choose, Inferred, unit_moments
from vaescale.networks.config import NetworkConfig
from vaescale.networks.ladder import Group, LadderNetwork
from vaescale.networks.layers import recomputed


class GroupTerms(NamedTuple):
    """Terms of one group: the updated map, and terms as in models.vae.Inferred, [B K, Z] by channel; the last is [B K]."""

    feature_map: Tensor
    latent_kl: Tensor
    unit: tuple[Tensor, Tensor] | None
    log_ratio: Tensor | None


class LadderVAE(VAE):
    """A ladder VAE: groups of latents at every resolution."""

    network: LadderNetwork

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
        self._to_posterior: Posterior = posterior.implement(network.latent_dim)
        self._bounds_priors = getattr(posterior, "bounded", True)
        self.group_maps = tuple((group.block.resolution, group.block.width) for group in self._groups)
        top = self._groups[0].block
        self.latent_shape = (network.latent_dim, top.resolution, top.width)
        self.latent_dim = math.prod(self.latent_shape)
        self.group_sizes = tuple(network.latent_dim * places for places in self.group_places)

    @property
    def _groups(self) -> list[Group]:
        return cast("list[Group]", list(self.network.groups))

    def encode(self, x: Tensor) -> dict[int, Tensor]:
        """The encoder's maps, by resolution."""
        embedding = self.embedded(x.shape[0])
        seen: dict[int, Tensor] = (
            self.network.bottom_up(x) if embedding is None else self.network.bottom_up(x, embedding)
        )
        return seen

    def infer(
        self,
        encoded: dict[int, Tensor],
        stream: noise.Stream,
        draws: int,
        detached: bool,
        *,
        weighted: bool = True,
        measured: bool = True,
    ) -> Inferred:
        """Draw z top-down through the groups; each KL is in closed form, given the draws above it."""
        assert not detached, "refused in the recipe"
        seen, images = encoded, len(encoded[self._groups[0].block.resolution])
        if draws > 1:
            seen = {size: feature_map.repeat_interleave(draws, 0) for size, feature_map in seen.items()}
        rows = images * draws
        maps, terms, embedding = self.network.start(rows), [], self.embedded(rows)
        for number, (group, epsilon) in enumerate(
            zip(self._groups, self._epsilons(stream, draws), strict=False)
        ):
            like = seen[group.block.resolution]
            feature_map = self._enter(number, maps, like=like, embedding=embedding)
            arguments = (group, feature_map, seen[group.block.resolution], epsilon, weighted, measured)
            if self.network.checkpointing:
                done = recomputed(self._infer_group, *arguments)
            else:
                done = self._infer_group(*arguments)
            maps[group.block.resolution] = done.feature_map
            terms.append(done)
        params = self.network.finish(maps)

        def mean_over_draws(parts: Iterable[Tensor]) -> Tensor:
            whole = torch.cat(list(parts), dim=1)
            return whole if draws == 1 else rearrange(whole, "(b k) l -> b k l", k=draws).mean(1)

        latent_kl = mean_over_draws(term.latent_kl for term in terms)
        nothing = latent_kl.new_zeros(images, 0)
        units = list(zip(*(term.unit for term in terms if term.unit is not None), strict=True))
        ratios = [term.log_ratio for term in terms if term.log_ratio is not None]
        return Inferred(
            params=params,
            kl=rearrange(latent_kl, "b (g z) -> b g z", g=len(terms)).sum(2),
            latent_kl=latent_kl,
            unit=(mean_over_draws(units[0]), mean_over_draws(units[1])) if measured else (nothing, nothing),
            mu=nothing,
            log_sigma=nothing,
            log_ratio=rearrange(torch.stack(ratios).sum(0), "(b k) -> b k", k=draws) if weighted else nothing,
            draws=None,
        )

    def posterior(self, x: Tensor) -> Gaussian:
        """The posterior q(z_1|x) of the top group."""
        seen = self.encode(x)
        feature_map, prior = self._top(len(x), like=x)
        top = self._groups[0]
        return self._posterior(top, feature_map, seen[top.block.resolution], prior)

    def prior(self) -> Gaussian:
        """The prior of the top group, which is learned and the same for every draw, or for every draw with the same condition."""
        conditions = self.num_given
        _, prior = self._top(conditions or 1, like=next(self.parameters()))
        return prior if conditions else Gaussian(prior.mu[0], prior.log_sigma[0])

    def joint_draws(self, x: Tensor, stream: noise.Stream, draws: int, groups: int) -> Tensor:
        """Draws of the first groups, each given the draws above it."""
        needed = {group.block.resolution for group in self._groups[:groups]}
        maps = self.encode(x)
        seen = {size: maps[size].repeat_interleave(draws, 0) for size in needed}
        draws_of_groups: list[Tensor] = []

        def from_posterior(group: Group, number: int, feature_map: Tensor, prior: Gaussian) -> Tensor:
            q = self._posterior(group, feature_map, seen[group.block.resolution], prior)
            epsilon = noise.normal(stream, noise.POSTERIOR + number, (draws, *q.mu.shape[1:]))
            z = q.sample(epsilon.flatten(0, 1).to(q.mu))
            draws_of_groups.append(z.flatten(1))
            return z

        self._top_down(len(x) * draws, from_posterior, like=x, groups=groups)
        return torch.cat(draws_of_groups, dim=1).view(len(x), draws, -1)

    def joint_means(self, x: Tensor, groups: int) -> Tensor:
        """The posterior means that `decode_means` decodes."""
        return torch.cat([q.mu.flatten(1) for q in self._along_means(self.encode(x), groups)[1]], dim=1)

    def joint_posterior(self, x: Tensor) -> Gaussian:
        """The posteriors of all groups along the means that `decode_means` decodes."""
        posteriors = self._along_means(self.encode(x), None)[1]
        flat = ([tensor.flatten(1) for tensor in q] for q in posteriors)
        return Gaussian(*(torch.cat(tensors, dim=1) for tensors in zip(*flat, strict=True)))

    def prior_log_density(self, z: Tensor) -> Tensor:
        """The log density log p(z_1) + log p(z_2 | z_1) + ... of the first groups, whose latents are z."""
        given = self._by_group(z)
        densities: list[Tensor] = []

        def measure(group: Group, number: int, feature_map: Tensor, prior: Gaussian) -> Tensor:  # noqa: ARG001
            z_of_group = given[number].to(prior.mu)
            densities.append(prior.log_density(z_of_group).flatten(1).sum(1))
            return z_of_group

        self._top_down(len(z), measure, like=next(self.parameters()), groups=len(given))
        return torch.stack(densities).sum(0)

    def decode(self, z: Tensor, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
        """The raw parameters from latents of the first groups; the other groups are drawn from their priors."""
        return self.network.finish(self._drawn(z.shape[0], stream, temperature, given=self._by_group(z)))

    def decode_means(self, encoded: dict[int, Tensor]) -> Tensor:
        """The raw parameters from the mean of each group's posterior, given the means above it."""
        return self.network.finish(self._along_means(encoded, None)[0])

    def descend(self, rows: int, choose: Choose) -> Tensor:
        """The raw parameters from the latents that `choose` returns for each group, given those above it."""

        def take(group: Group, number: int, feature_map: Tensor, prior: Gaussian) -> Tensor:
            def posterior(seen: dict[int, Tensor]) -> Gaussian:
                return self._posterior(group, feature_map, seen[group.block.resolution], prior)

            return choose(number, prior, posterior).view(prior.mu.shape)

        return self.network.finish(self._top_down(rows, take, like=next(self.parameters())))

    def from_prior(self, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
        """The raw parameters from draws of every group's prior, given the draws above it."""
        return self.network.finish(self._drawn(len(stream.slots), stream, temperature, given=[]))

    def _drawn(
        self, rows: int, stream: noise.Stream, temperature: float, *, given: list[Tensor]
    ) -> dict[int, Tensor]:
        def from_prior(group: Group, number: int, feature_map: Tensor, prior: Gaussian) -> Tensor:  # noqa: ARG001
            if number < len(given):
                return given[number].to(prior.mu)
            shape = tuple(prior.mu.shape[1:])
            return prior.sample(temperature * noise.normal(stream, noise.PRIOR + number, shape).to(prior.mu))

        return self._top_down(rows, from_prior, like=next(self.parameters()))

    def _along_means(
        self, seen: dict[int, Tensor], groups: int | None
    ) -> tuple[dict[int, Tensor], list[Gaussian]]:
        """The maps after the first groups, or all, with latents at the posterior means; and these posteriors."""
        rows = seen[self._groups[0].block.resolution].shape[0]
        posteriors: list[Gaussian] = []

        def mean(group: Group, number: int, feature_map: Tensor, prior: Gaussian) -> Tensor:  # noqa: ARG001
            posteriors.append(self._posterior(group, feature_map, seen[group.block.resolution], prior))
            return posteriors[-1].mu

        return self._top_down(rows, mean, like=next(self.parameters()), groups=groups), posteriors

    def _top(self, rows: int, *, like: Tensor) -> tuple[Tensor, Gaussian]:
        """The input map of the top group, and its prior."""
        top, embedding = self._groups[0], self.embedded(rows)
        maps = self.network.start(rows)
        feature_map = self._enter(0, maps, like=like.new_zeros(rows), embedding=embedding)
        raw_prior, _ = top.prior(feature_map)
        return feature_map, self._prior(raw_prior)

    def _enter(
        self, number: int, maps: dict[int, Tensor], *, like: Tensor, embedding: Tensor | None
    ) -> Tensor:
        """The input map of a group, with the shift of the condition if there is one."""
        feature_map = self.network.enter(self._groups[number].block, maps, like=like)
        return feature_map if embedding is None else self.network.shifted(number, feature_map, embedding)

    def _infer_group(
        self,
        group: Group,
        feature_map: Tensor,
        seen: Tensor,
        epsilon: Callable[[], Tensor],
        weighted: bool,
        measured: bool,
    ) -> GroupTerms:
        raw_prior, onwards = group.prior(feature_map)
        prior = self._prior(raw_prior)
        q = self._posterior(group, feature_map, seen, prior)
        with torch.autocast(feature_map.device.type, enabled=False):
            z, latent_kl = draw(q, prior, epsilon().reshape(q.mu.shape).to(q.mu))
            log_ratio = (prior.log_density(z) - q.log_density(z)).sum((1, 2, 3)) if weighted else None
            unit = unit_moments((q.mu - prior.mu) * torch.exp(-prior.log_sigma)) if measured else None
        return GroupTerms(group.with_latents(onwards, z), latent_kl, unit, log_ratio)

    def _epsilons(self, stream: noise.Stream, draws: int) -> Iterator[Callable[[], Tensor]]:
        """For each group, a function that returns its noise [B, K Z R R].

        Groups are drawn together, or each anew at every call where intermediate values are recomputed and not kept.
        """
        numbers = {noise.POSTERIOR + number: draws * size for number, size in enumerate(self.group_sizes)}
        if self.network.checkpointing:
            yield from (partial(noise.normal, stream, purpose, (size,)) for purpose, size in numbers.items())
        else:
            yield from (lambda rows=rows: rows for rows in noise.normals(stream, numbers))

    def _posterior(self, group: Group, feature_map: Tensor, seen: Tensor, prior: Gaussian) -> Gaussian:
        raw = wide(group.posterior(feature_map, seen))
        with torch.autocast(feature_map.device.type, enabled=False):
            q: Gaussian = self._to_posterior(raw, prior)
            return q

    def _prior(self, raw: Tensor) -> Gaussian:
        mu, log_sigma = wide(raw).chunk(2, dim=1)
        return Gaussian(mu, bounded(log_sigma) if self._bounds_priors else log_sigma)

    def _by_group(self, z: Tensor) -> list[Tensor]:
        """Split z [B, Z] of the first groups into one map for each group."""
        sums = list(itertools.accumulate(self.group_sizes))
        assert z.shape[1] in sums, f"{z.shape[1]} latents do not fill the first groups: {self.group_sizes}"
        parts = torch.split(z, list(self.group_sizes[: sums.index(z.shape[1]) + 1]), dim=1)
        return [
            latents_of_group.view(z.shape[0], -1, group.block.resolution, group.block.width)
            for group, latents_of_group in zip(self._groups, parts, strict=False)
        ]

    def _top_down(
        self,
        rows: int,
        take: Callable[[Group, int, Tensor, Gaussian], Tensor],
        *,
        like: Tensor,
        groups: int | None = None,
    ) -> dict[int, Tensor]:
        """The maps after all groups, or after the first `groups`, each with the latents that `take` returns."""
        maps, embedding = self.network.start(rows), self.embedded(rows)
        like = like.new_zeros(rows)
        for number, group in enumerate(self._groups[:groups]):
            feature_map = self._enter(number, maps, like=like, embedding=embedding)
            raw_prior, onwards = group.prior(feature_map)
            z = take(group, number, feature_map, self._prior(raw_prior))
            maps[group.block.resolution] = group.with_latents(onwards, z)
        return maps
