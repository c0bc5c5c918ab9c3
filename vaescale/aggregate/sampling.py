"""Images from latents, which are drawn from the prior, a mixture or a model of latents; decoded as a mean, as a draw, or as an offset.

A draw x = E[x|z] + sigma epsilon is a sample of the model; the mean E[x|z] is usually shown as its sample. The offset
E[x|z] + alpha sigma(z) shows the size of the noise by the same multiple of sigma at every pixel.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.aggregate import code_prior, second_stage
from vaescale.aggregate.class_choice import ClassChoice
from vaescale.aggregate.second_stage import SecondStage
from vaescale.aggregate.vector_choice import VectorChoice
from vaescale.errors import UserError
from vaescale.likelihoods.base import Likelihood
from vaescale.mixtures.by_class import ClassMixtures
from vaescale.mixtures.gaussian import Mixture, sample
from vaescale.models.quantized import QuantizedVAE
from vaescale.models.vae import VAE
from vaescale.networks.code_transformer import CodeTransformer

Prior = Mixture | ClassMixtures | SecondStage | CodeTransformer | None
"""Where latents come from: a mixture, one for each class, a model of latents, an autoregressive prior over codes, or None for the model's own prior."""

DECODINGS = ("mean", "ancestral", "offset:ALPHA")


class Decoding(NamedTuple):
    """A way to decode: `mean`, `ancestral`, or `offset` by `alpha` sigmas."""

    name: str
    alpha: float = 0.0

    @property
    def text(self) -> str:
        """The form that `parse_decoding` reads."""
        return f"offset:{self.alpha:g}" if self.name == "offset" else self.name


def parse_decoding(text: str) -> Decoding:
    """Parse `mean`, `ancestral` or `offset:ALPHA`. Raises UserError for anything else."""
    name, colon, number = text.partition(":")
    if text in ("mean", "ancestral"):
        return Decoding(text)
    try:
        alpha = float(number) if colon and name == "offset" else math.nan
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise UserError(
            f"--decode must be one of {', '.join(DECODINGS)} (got {text!r}); try --decode offset:1"
        )
    return Decoding("offset", alpha)


@torch.no_grad()
def from_latents(
    model: VAE,
    prior: Prior,
    stream: noise.Stream,
    temperature: float = 1.0,
    *,
    choice: ClassChoice | VectorChoice | None = None,
) -> Tensor:
    """The likelihood's raw parameters from draws of a prior, one per slot. choice: their classes or vectors, for a conditional model or
    mixtures of classes.
    """
    y = None if choice is None else choice.of(stream)
    model = model if y is None else model.given(y)
    if isinstance(prior, ClassMixtures):
        assert y is not None
        return model.decode(prior.draws(y, stream, temperature), stream, temperature)
    if prior is None:
        return model.from_prior(stream, temperature)
    if isinstance(prior, CodeTransformer):
        assert isinstance(model, QuantizedVAE)
        return model.decode_codes(code_prior.draw(prior, stream, temperature))
    if isinstance(prior, Mixture):
        z = sample(prior, stream, temperature)
    else:
        z = second_stage.draws(prior, stream, temperature)
    return model.decode(z, stream, temperature)


@torch.no_grad()
def prior_draws(model: VAE, stream: noise.Stream, scale: float = 1.0) -> Tensor:
    """Draws [B, Z] from the prior of a model's (top) latents, `scale` times as wide, one per slot of the stream."""
    prior = model.prior()
    epsilon = noise.normal(stream, noise.PRIOR, (model.latent_dim,)).to(prior.mu)
    mu, log_sigma = (
        parameter.reshape(-1, model.latent_dim) for parameter in prior
    )  # one, or one for each condition
    return mu + scale * log_sigma.exp() * epsilon


@torch.no_grad()
def image_of(likelihood: Likelihood, params: Tensor, decoding: Decoding, stream: noise.Stream) -> Tensor:
    """Images [B, C, H, W] of a decoding; added noise may exceed [0, 1]. Raises UserError for an offset without a sigma."""
    if decoding.name == "ancestral":
        return likelihood.sample(params, stream)
    mean = likelihood.mean(params)
    if decoding.name == "mean":
        return mean
    return mean + decoding.alpha * deviation(likelihood, params).to(mean)


def deviation(likelihood: Likelihood, params: Tensor) -> Tensor:
    """The standard deviation of p(x|z), broadcastable to [B, C, H, W]. Raises UserError for a likelihood without one."""
    sigma = likelihood.deviation(params)
    if sigma is None:
        raise UserError(
            "--decode offset needs a sigma, which this likelihood does not have; take --decode mean or ancestral"
        )
    return sigma


def refuse_misfit(mixture: Mixture | ClassMixtures, model: VAE, folder: Path) -> None:
    """Raise UserError when the size of a mixture is not that of the model's latents or of a ladder's first groups."""
    size = mixture.size if isinstance(mixture, ClassMixtures) else mixture.means.shape[1]
    if size not in itertools.accumulate(model.group_sizes):
        raise UserError(
            f"the mixture in {folder} has {size} latents, the model has {model.latent_dim}; fit it again "
            f"with `vaescale fit-gmm {folder}`"
        )


def line(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Points [steps, Z] of the straight line between two points [Z], both ends included."""
    return torch.lerp(
        first, last, torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype)[:, None]
    )


def quantiles(side: int) -> Tensor:
    """The centres of `side` equally probable parts of N(0, 1), float64, ascending."""
    shares = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return math.sqrt(2) * torch.erfinv(2 * shares - 1)


def plane(along: Tensor) -> Tensor:
    """Points [side^2, 2] row by row from the top left, at these values of both latents: Kingma & Welling 2014, figure 4."""
    return torch.stack(torch.meshgrid(along, along.flip(0), indexing="xy"), dim=-1).view(-1, 2).float()
