"""Images of z: drawn from the prior or a mixture in its place, or chosen; decoded as a mean, as a draw, or in between.

A draw of x, x = E[x|z] + sigma epsilon, is what the model says that images are like; its mean is what people show. The noise
can be measured by a multiple of it that is the same everywhere: E[x|z] + alpha sigma(z).
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.errors import UserError
from vaescale.likelihoods.base import Likelihood
from vaescale.mixtures.gaussian import Mixture, sample
from vaescale.models.vae import VAE

DECODINGS = ("mean", "ancestral", "offset:ALPHA")


class Decoding(NamedTuple):
    """How to decode: `mean`, `ancestral`, or `offset` by `alpha` sigmas."""

    name: str
    alpha: float = 0.0

    @property
    def words(self) -> str:
        """The text that `parse_decoding` reads."""
        return f"offset:{self.alpha:g}" if self.name == "offset" else self.name


def parse_decoding(words: str) -> Decoding:
    """Parse `mean`, `ancestral` or `offset:ALPHA`. Raises UserError for anything else."""
    name, colon, number = words.partition(":")
    if words in ("mean", "ancestral"):
        return Decoding(words)
    try:
        alpha = float(number) if colon and name == "offset" else math.nan
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise UserError(f"--decode {words} is none of {', '.join(DECODINGS)}; try --decode offset:1")
    return Decoding("offset", alpha)


@torch.no_grad()
def from_latents(
    model: VAE, mixture: Mixture | None, stream: noise.Stream, temperature: float = 1.0
) -> Tensor:
    """The likelihood's raw parameters from draws of the model's prior, or of a mixture in its place, one per slot."""
    if mixture is None:
        return model.from_prior(stream, temperature)
    return model.decode(sample(mixture, stream, temperature), stream, temperature)


@torch.no_grad()
def prior_draws(model: VAE, stream: noise.Stream, scale: float = 1.0) -> Tensor:
    """Draws [B, Z] of the prior of a model's (top) latents, `scale` times as wide, one per slot of the stream."""
    prior = model.prior()
    epsilon = noise.normal(stream, noise.PRIOR, (model.latent_dim,)).to(prior.mu)
    return prior.mu.flatten() + scale * prior.log_sigma.exp().flatten() * epsilon


@torch.no_grad()
def image_of(likelihood: Likelihood, params: Tensor, decoding: Decoding, stream: noise.Stream) -> Tensor:
    """Images [B, C, H, W] in [0, 1], or beyond where noise is added. Raises UserError for an offset without a sigma."""
    if decoding.name == "ancestral":
        return likelihood.sample(params, stream)
    mean = likelihood.mean(params)
    if decoding.name == "mean":
        return mean
    return mean + decoding.alpha * deviation(likelihood, params).to(mean)


def deviation(likelihood: Likelihood, params: Tensor) -> Tensor:
    """The standard deviation of p(x|z), broadcastable to [B, C, H, W]. Raises UserError where there is none."""
    found = likelihood.deviation(params)
    if found is None:
        raise UserError("this likelihood has no sigma to offset by; take --decode mean or ancestral")
    return found


def refuse_misfit(mixture: Mixture, model: VAE, folder: Path) -> None:
    """Raise UserError when a run's mixture is neither of the model's latents nor of a ladder's first groups."""
    if mixture.means.shape[1] not in itertools.accumulate(model.group_sizes):
        raise UserError(
            f"the mixture in {folder} is of {mixture.means.shape[1]} latents, the model has {model.latent_dim}; fit it again "
            f"with `vaescale fit-gmm {folder}`"
        )


def line(one: Tensor, other: Tensor, steps: int) -> Tensor:
    """Points [steps, Z] of the straight line from one [Z] to the other, both ends among them."""
    return torch.lerp(one, other, torch.linspace(0, 1, steps, device=one.device, dtype=one.dtype)[:, None])


def quantiles(side: int) -> Tensor:
    """The centres of `side` equally probable parts of N(0, 1), float64, ascending."""
    shares = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return math.sqrt(2) * torch.erfinv(2 * shares - 1)


def plane(along: Tensor) -> Tensor:
    """Points [side^2, 2] row by row from the top left, at these values of both latents: Kingma & Welling 2014, figure 4."""
    return torch.stack(torch.meshgrid(along, along.flip(0), indexing="xy"), dim=-1).view(-1, 2).float()
