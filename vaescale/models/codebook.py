"""A learned codebook: each vector of the encoder's map is replaced by the nearest of K vectors. Van den Oord et al. 2017 (VQ-VAE).

    loss = -log p(x|z) + |sg[e] - q|^2 + beta |e - sg[q]|^2                    eq. 3; sums over channels and places, in nats

`codebook: gradient` minimizes the second term. `codebook: ema` replaces it by averages over the steps of the number n_k and the sum
m_k of the vectors that code k replaces in the global batch: q_k = m_k / n_k (appendix A.1). The paper divides the terms by the
number of places; here they are sums, as log p(x|z) is one over the pixels.

One curve on any number of devices: numbers and sums are all-reduced in float64, and the vectors at which the codebook starts and
codes restart are those of the global batch with the smallest noise, a function of seed, step, slot and place. All is done at the
end of an optimizer step, and a step that moves no weights changes nothing.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from vaescale import comm, noise
from vaescale.likelihoods.sigma import WideState
from vaescale.models.config import QuantizedConfig
from vaescale.models.quantizer import GRADIENTS, Quantized, Quantizer, nearest

KMEANS_ROUNDS = 10
POINTS_PER_CODE, MOST_POINTS = 16, 1 << 14  # of k-means, unless there are more codes
MOST_RESTARTS = 1 << 10  # of codes at a time
UNUSABLE = 2.0  # above every noise
LEAST = 1e-20  # number of vectors below which a code keeps its place


class Codebook(WideState, Quantizer):
    """The codebook and its state, equal on all ranks, which checkpoints hold.

    vectors [K, Z]: a buffer that is averaged as the weights are, so that averaged encoder and codebook fit one another, or a
    parameter with `codebook: gradient`. counts float64 [K]: the average number of vectors in a step that each code replaces;
    sums float64 [K, Z]: their average sum; ready float64 []: 1 once k-means has started the codebook. Until then z is not
    quantized.
    """

    vectors: Tensor
    counts: Tensor
    sums: Tensor
    ready: Tensor

    def __init__(self, config: QuantizedConfig, latents: int) -> None:
        super().__init__(config, latents)
        self.config, self.num_codes = config, config.codes
        self.channel_nats = (math.log(config.codes) / latents,) * latents
        vectors = torch.zeros(config.codes, latents)
        if config.codebook == "ema":
            self.register_buffer("vectors", vectors)
            self.register_buffer("sums", torch.zeros(config.codes, latents, dtype=torch.float64))
            self.averaged_buffers = ("vectors",)
        else:
            self.vectors = nn.Parameter(vectors)
        self.register_buffer("counts", torch.zeros(config.codes, dtype=torch.float64))
        self.register_buffer("ready", torch.zeros((), dtype=torch.float64))
        self._pending: list[Callable[[], Tensor]] = []
        self._choices: list[tuple[Tensor, Tensor]] = []

    def forward(self, raw: Tensor) -> Quantized:
        """Replace the vectors of raw by the nearest of the codebook."""
        size = raw.shape[2:]
        points = rearrange(raw.detach(), "b z h w -> (b h w) z")
        codes = nearest(points, self.vectors.detach().to(raw)).view(-1, *size)
        replaced = self.vectors_of(codes).to(raw)
        z = GRADIENTS[self.config.gradient](raw, replaced.detach())
        cost = self.config.commitment * _squared_distance(raw, replaced.detach())
        if self.config.codebook == "gradient":
            cost = cost + _squared_distance(raw.detach(), replaced)
        is_ready = self.ready > 0
        return Quantized(raw, torch.where(is_ready, z, raw), codes, torch.where(is_ready, cost, 0.0))

    def vectors_of(self, codes: Tensor) -> Tensor:
        """The vectors of codes [B, h, w], [B, Z, h, w]."""
        return rearrange(nn.functional.embedding(codes, self.vectors), "b h w z -> b z h w")

    @torch.no_grad()
    def collect(self, quantized: Quantized, stream: noise.Stream, mask: Tensor) -> None:
        """Start the sum of numbers and vectors by code over the ranks; and keep vectors with their noise, where some are chosen."""
        points = rearrange(quantized.vectors.detach(), "b z h w -> b (h w) z").double()
        used = mask[:, None] & (points - points == 0).all(2)  # no NaN and no Inf
        points = torch.where(used[..., None], points, 0.0).flatten(0, 1)
        codes, used_points = quantized.codes.flatten(), used.flatten()
        numbers = _sums_by_code(codes, used_points.double(), self.num_codes)
        share = [numbers]
        if self.config.codebook == "ema":
            share.append(_sums_by_code(codes, points, self.num_codes).flatten())
        self._pending.append(comm.start_sum(torch.cat(share)))
        since = stream.step + 1 - self.config.start_step
        if since >= 0 and since % self.config.restart_every == 0:
            drawn = noise.uniform(stream, noise.CODES, (used.shape[1], 2)).double()
            order = (drawn[..., 0] + drawn[..., 1] * 2.0**-24).flatten()  # 48 bits, so that no two are equal
            self._choices.append((torch.where(used_points, order, UNUSABLE), points))

    @torch.no_grad()
    def end_step(self, skipped: Tensor) -> None:
        """Move numbers and sums; start the codebook or restart codes, where they are due."""
        pending, self._pending = self._pending, []
        choices, self._choices = self._choices, []
        if not pending:
            return
        total = torch.stack([wait() for wait in pending]).sum(0)
        moves = (skipped == 0) & (total - total == 0).all()
        numbers, sums = total[: self.num_codes], total[self.num_codes :].view(-1, self.vectors.shape[1])
        self._follow(numbers, sums, moves & (self.ready > 0))
        if not choices:
            return
        is_started = bool(self.ready > 0)
        points = _first_of_all_ranks(choices, MOST_RESTARTS if is_started else self._points_of_kmeans)
        if not len(points) or not bool(moves):
            return
        if is_started:
            self._restart(points)
        else:
            self._start(points, places=float(numbers.sum()))

    @property
    def _points_of_kmeans(self) -> int:
        return max(self.num_codes, min(POINTS_PER_CODE * self.num_codes, MOST_POINTS))

    def _follow(self, numbers: Tensor, sums: Tensor, follows: Tensor) -> None:
        rate = 1 - self.config.decay
        self.counts.copy_(torch.where(follows, self.counts.lerp(numbers, rate), self.counts))
        if self.config.codebook == "ema":
            self.sums.copy_(torch.where(follows, self.sums.lerp(sums, rate), self.sums))
            has_mean = (self.counts > LEAST)[:, None]
            means = (self.sums / self.counts.clamp_min(LEAST)[:, None]).to(self.vectors)
            self.vectors.copy_(torch.where(has_mean, means, self.vectors))

    def _start(self, points: Tensor, *, places: float) -> None:
        """k-means of points [P, Z], computed by one rank: others' processors may round differently."""
        centres, sizes = kmeans(points, self.num_codes)
        found = torch.cat([centres.flatten(), sizes * (places / len(points))])
        found = comm.all_reduce_sum(found if comm.is_main() else torch.zeros_like(found))
        counts = found[centres.numel() :]
        self._put(
            torch.ones_like(counts, dtype=torch.bool), found[: centres.numel()].view_as(centres), counts
        )
        self.ready.fill_(1.0)

    def _restart(self, points: Tensor) -> None:
        """Put the codes that are hardly used, in their order, at the points [P, Z] in theirs, each with the mean use."""
        mean_use = self.counts.mean()
        hardly = self.counts < self.config.restart_below * mean_use
        number = hardly.cumsum(0) - 1
        hardly = hardly & (number < len(points))
        vectors = points[number.clamp(0, len(points) - 1)]
        self._put(hardly, vectors, mean_use.expand_as(self.counts))

    def _put(self, which: Tensor, vectors: Tensor, counts: Tensor) -> None:
        """Give codes, a mask [K], vectors of [K, Z] and counts of [K]."""
        self.vectors.copy_(torch.where(which[:, None], vectors.to(self.vectors), self.vectors))
        self.counts.copy_(torch.where(which, counts, self.counts))
        if self.config.codebook == "ema":
            self.sums.copy_(torch.where(which[:, None], vectors * counts[:, None], self.sums))


def kmeans(points: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Centres [K, Z] and the numbers [K] of their points, from the first K points on, in KMEANS_ROUNDS rounds. Lloyd 1982.

    points: float64 [P, Z]; fewer than K are repeated. A centre without points stays.
    """
    centres = points[torch.arange(codes, device=points.device) % len(points)]
    ones = points.new_ones(len(points))
    for _ in range(KMEANS_ROUNDS):
        nearest_ones = nearest(points, centres)
        sizes = _sums_by_code(nearest_ones, ones, codes)
        sums = _sums_by_code(nearest_ones, points, codes)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres, _sums_by_code(nearest(points, centres), ones, codes)


def _sums_by_code(codes: Tensor, values: Tensor, number: int) -> Tensor:
    """The sums over the points of each code: of values [P, ...] to [K, ...].

    `index_put_` adds in the points' order on a GPU too, where the order of `index_add_` changes from run to run.
    """
    sums = values.new_zeros(number, *values.shape[1:])
    return sums.index_put_((codes,), values, accumulate=True)


def _first_of_all_ranks(choices: list[tuple[Tensor, Tensor]], most: int) -> Tensor:
    """The points of the global batch with the smallest noise, at most `most`, in its order, float64 [P, Z]. All ranks call it.

    choices: noise [P] and points [P, Z] of this rank's micro-batches. Two sums: of the noise, then of the points themselves.
    """
    order, points = (torch.cat(parts) for parts in zip(*choices, strict=True))
    first = order.argsort()[:most]
    order, points = order[first], points[first]
    own = torch.cat([order, order.new_full((most - len(order),), UNUSABLE)])
    by_rank = own.new_zeros(comm.world_size(), most)
    by_rank[comm.rank()] = own
    everyone = comm.all_reduce_sum(by_rank.flatten()).sort().values[:most]
    number = int((everyone < 1).sum())
    if number == 0:
        return points[:0]
    at = torch.searchsorted(everyone[:number], order)
    chosen = (order <= everyone[number - 1]) & (order < 1)
    placed = points.new_zeros(number, points.shape[1])
    placed[at[chosen]] = points[chosen]
    return comm.all_reduce_sum(placed.flatten()).view_as(placed)


def _squared_distance(vectors: Tensor, codes: Tensor) -> Tensor:
    return (vectors - codes).square().flatten(1).sum(1)
