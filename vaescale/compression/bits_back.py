"""Bits back with a flat VAE: images to bits on a stack, and from them. Townsend, Bird & Barber 2019 (BB-ANS).

    pop z with q(z|x);  push x with p(x|z);  push z with p(z)            length: -log p(x|z) - log p(z) + log q(z|x), the negative ELBO

The bits that choose z are those of the images before, and decoding gives them back. All images of a batch choose z first, so that the
networks see them together.

The networks run in float64 on one thread, in batches of one of two shapes, the rest of which is padding; `rounding.py` makes
their outputs equal everywhere.

Legend: B images, Z latents of an image, P parameters of an image. Levels are int64 [B, C, H, W].
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale import noise
from vaescale.compression.ans import Stack
from vaescale.compression.arithmetic import Reals
from vaescale.compression.bins import centre, posterior_code, prior_code
from vaescale.compression.masses import (
    PRECISION,
    Code,
    Coded,
    Integers,
    Table,
    chosen,
    coded,
    digits_of,
    from_digits,
    received,
)
from vaescale.compression.pixels import pixel_code
from vaescale.compression.rounding import Phases, Settled, margin_of, on_grid, settle
from vaescale.errors import UserError
from vaescale.models.flat import FlatVAE
from vaescale.models.vae import VAE

LATENT_BITS: Final = 12
BATCH, SMALL_SHARE = 64, 8  # images of the two shapes: BATCH, and BATCH / SMALL_SHARE
MOST_PARAMETERS = 1 << 22  # of a batch


class Grids(NamedTuple):
    """The phases [B] of the grids of q(z|x) and of p(x|z)."""

    posterior: Phases
    pixels: Phases


class Lengths(NamedTuple):
    """Bits of each image [B]: -log2 of the masses of x given z, of z under the prior, and of z under the posterior, which come back."""

    pixels: Reals
    prior: Reals
    back: Reals

    @property
    def total(self) -> Reals:
        """The net length."""
        return self.pixels + self.prior - self.back


class Codec:
    """The coder of one model's images. Raises UserError for a model that it cannot code with."""

    def __init__(self, model: VAE, *, latent_bits: int = LATENT_BITS) -> None:
        """model: stays as it is. latent_bits: even; a latent has 2^latent_bits bins."""
        refuse_model(model)
        self.pixels = pixel_code(model.likelihood)
        self.model = copy.deepcopy(model).to("cpu", torch.float64).eval()
        self.pixels.likelihood = self.model.likelihood
        self.latent_bits = latent_bits
        self.image_shape, self.latents = model.image_shape, model.latent_dim
        self._parameters_shape = self._pixel_parameters(
            torch.zeros(1, self.latents, dtype=torch.float64)
        ).shape[1:]
        parameters = int(np.prod(self._parameters_shape))
        self.batch = max(1, min(BATCH, MOST_PARAMETERS // parameters))
        self.shapes = (max(1, self.batch // SMALL_SHARE), self.batch)
        self.margins = (margin_of(2 * self.latents), margin_of(parameters))

    def encode(self, stack: Stack, levels: Integers) -> tuple[Grids, Lengths]:
        """Push images, at most `batch`. Returns what `decode` needs besides the stack."""
        q = self._settled_posterior(levels)
        z = stack.pop(self._posterior_code(q.values))
        bins = from_digits(z.symbols)
        p = self._settled_pixels(bins)
        x = coded(self._pixel_code(p.values), self.pixels.symbols(levels))
        stack.push(x)
        prior = self._prior(bins)
        stack.push(prior)
        return Grids(q.phases, p.phases), self._lengths(x, prior, z)

    def decode(self, stack: Stack, grids: Grids) -> Integers:
        """Pop the images of the last `encode`, and push what it popped."""
        number = len(grids.pixels)
        bins = from_digits(stack.pop(prior_code(number * self.latents, self.latent_bits)).symbols)
        p = on_grid(self.pixel_outputs(bins.reshape(number, -1)), grids.pixels)
        levels = self.pixels.levels_of(stack.pop(self._pixel_code(p)).symbols)
        q = on_grid(self.posterior_outputs(levels), grids.posterior)
        stack.push(coded(self._posterior_code(q), digits_of(bins, 1 << self.latent_bits)))
        return levels

    def lengths(self, levels: Integers, stream: noise.Stream) -> Lengths:
        """The lengths of images, at most `batch`, with latents that a stream chooses in place of a stack; nothing is written."""
        q = self._settled_posterior(levels)
        z = received(self._posterior_code(q.values), _uniform_choice(stream, self.latents))
        bins = from_digits(z.symbols)
        p = self._settled_pixels(bins)
        x = coded(self._pixel_code(p.values), self.pixels.symbols(levels))
        return self._lengths(x, self._prior(bins), z)

    def posterior_outputs(self, levels: Integers) -> Reals:
        """The mean and log sigma of q(z|x), [B, 2 Z]."""

        def outputs(x: Tensor) -> Tensor:
            return torch.cat([*self.model.joint_posterior(x)], dim=1)

        return self._run(outputs, torch.from_numpy(levels) / (self.pixels.levels - 1.0))

    def pixel_outputs(self, bins: Integers) -> Reals:
        """The parameters of p(x|z) for the latents of bins [B, Z], [B, P]."""
        z = torch.from_numpy(centre(bins, self.latent_bits))
        return self._run(lambda rows: self._pixel_parameters(rows).flatten(1), z)

    def _pixel_parameters(self, z: Tensor) -> Tensor:
        return self.pixels.parameters(self.model.decode(z, _NOWHERE))

    def _run(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Reals:
        """The outputs for rows [B, ...], float64, in the smaller shape that holds them."""
        shape = next(size for size in self.shapes if size >= len(rows))
        padded = torch.zeros(shape, *rows.shape[1:], dtype=torch.float64)
        padded[: len(rows)] = rows
        with one_thread(), torch.inference_mode():
            outputs: Reals = function(padded)[: len(rows)].numpy()
        return outputs

    def _settled_posterior(self, levels: Integers) -> Settled:
        return settle(self.posterior_outputs(levels), self.margins[0])

    def _settled_pixels(self, bins: Integers) -> Settled:
        return settle(self.pixel_outputs(bins.reshape(-1, self.latents)), self.margins[1])

    def _posterior_code(self, q: Reals) -> Code:
        mu, log_sigma = (half.reshape(-1) for half in np.split(q, 2, axis=1))
        return posterior_code(mu, log_sigma, self.latent_bits)

    def _pixel_code(self, p: Reals) -> Code:
        return self.pixels.code(p.reshape(-1, *self._parameters_shape))

    def _prior(self, bins: Integers) -> Coded:
        return coded(prior_code(len(bins), self.latent_bits), digits_of(bins, 1 << self.latent_bits))

    def _lengths(self, x: Coded, prior: Coded, z: Coded) -> Lengths:
        images = len(z.symbols[0]) // self.latents
        return Lengths(
            *(np.sum([bits.reshape(images, -1).sum(1) for bits in one.bits], axis=0) for one in (x, prior, z))
        )


def refuse_model(model: VAE) -> None:
    """Raise UserError for a model whose images have no code here."""
    if model.num_codes or not isinstance(model, FlatVAE):
        kind = (
            "codes (posterior.kind quantized or finite_scalar)"
            if model.num_codes
            else "groups of latents (a ladder)"
        )
        raise UserError(
            f"a run with {kind} cannot compress yet; choose a run with one latent vector or map and a Gaussian q(z|x)"
        )
    if model.condition is not None:
        raise UserError("a run with a condition cannot compress yet; choose a run without")
    if not model.has_bound:
        raise UserError(
            "this objective trains no likelihood of images, so it gives no code; choose a run with a bound on log p(x)"
        )
    pixel_code(model.likelihood)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch's inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _uniform_choice(stream: noise.Stream, latents: int) -> Callable[[Table], NDArray[np.int32]]:
    """Symbols of the latents of the stream's slots by inverse distribution functions, with new numbers for each table."""
    rounds = iter(range(1 << 16))

    def take(table: Table) -> NDArray[np.int32]:
        u = noise.uniform(stream, noise.POSTERIOR + next(rounds), (latents,)).double()
        return chosen(table, (u * (1 << PRECISION)).long().flatten().numpy())

    return take


_NOWHERE = noise.Stream(0, 0, torch.zeros(0, dtype=torch.int64))
