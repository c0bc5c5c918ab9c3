"""Bits back with a VAE: images to bits on a stack, and from them. Townsend, Bird & Barber 2019 (BB-ANS); Townsend et al. 2020 (HiLLoC).

    pop z with q(z|x);  push x with p(x|z);  push z with p(z)            length: -log p(x|z) - log p(z) + log q(z|x), the negative ELBO

In a ladder the groups of z are popped from the top down, each with q(z_g | z_<g, x), and pushed from the bottom up with p(z_g | z_<g).
A Gaussian mixture may take the place of N(0, I): see `mixture_prior.py`. The bits that choose z are those of the images before, and decoding gives them back. All images of a batch choose z first, so that the
networks see them together.

The networks run in float64 on one thread, in batches of one of three shapes, the rest of which is padding; `rounding.py` makes
their outputs equal everywhere.

Legend: B images, G groups of latents (1 in a flat model), Z latents of a group, L of all, P parameters of an image. Levels are int64
[B, C, H, W].
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
from vaescale.compression.bins import latents, posterior_code, prior_code
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
from vaescale.compression.mixture_prior import MixturePrior
from vaescale.compression.pixels import pixel_code
from vaescale.compression.rounding import Phases, margin_of, on_grid, settle
from vaescale.conditions.config import ClassCondition, VectorCondition
from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Mixture
from vaescale.models.flat import FlatVAE
from vaescale.models.ladder import LadderVAE
from vaescale.models.posterior import Gaussian
from vaescale.models.vae import VAE, Encoded

LATENT_BITS: Final = 12
LADDER_BITS: Final = 10  # a ladder has many latents, whose bits a chunk begins with
BATCH, SMALL_SHARE = 64, 8  # images of the three shapes: BATCH, BATCH / SMALL_SHARE, and 1
MOST_PARAMETERS = 1 << 22  # of a batch
MOST_LATENTS = 1 << 20  # of a ladder's batch
Condition = NDArray[np.int64] | NDArray[np.float32]
"""Of images: classes [B], or vectors [B, V]."""
Posterior = Callable[[Encoded], Reals]
"""A function from what the encoder makes of x to the means and log sigmas of q(z_g | z_<g, x), [B, 2 Z]."""


class Grids(NamedTuple):
    """The phases of the grids of q(z_g | z_<g, x) [G, B], of p(x|z) [B], and of learned priors p(z_g | z_<g) [G, B], else 0."""

    posterior: Phases
    pixels: Phases
    prior: Phases


class Lengths(NamedTuple):
    """Bits of each image [B]: -log2 of the masses of x given z, of z under the prior, and of z under the posterior, which come back."""

    pixels: Reals
    prior: Reals
    back: Reals

    @property
    def total(self) -> Reals:
        """The net length."""
        return self.pixels + self.prior - self.back


class Outputs(NamedTuple):
    """The networks' outputs before rounding: means and log sigmas of q [B, 2 L], parameters of p(x|z) [B, P], means and log sigmas of
    learned priors [B, 2 L], or [B, 0]."""

    posterior: Reals
    pixels: Reals
    prior: Reals


class Codec:
    """The coder of one model's images. Raises UserError for a model that it cannot code with."""

    def __init__(self, model: VAE, *, latent_bits: int | None = None, mixture: Mixture | None = None) -> None:
        """model: stays as it is. latent_bits: even; a latent has 2^latent_bits bins; None: 2^12, in a ladder 2^10. mixture: the prior of a
        flat model without a condition, in place of N(0, I)."""
        refuse_model(model)
        if mixture is not None:
            refuse_mixture(model)
        self.pixels = pixel_code(model.likelihood)
        self.model = copy.deepcopy(model).to("cpu", torch.float64).eval()
        self.pixels.likelihood = self.model.likelihood
        self.classes = model.condition.classes if isinstance(model.condition, ClassCondition) else 0
        self.vector_size = model.condition.size if isinstance(model.condition, VectorCondition) else 0
        self.image_shape, self.group_sizes = model.image_shape, model.group_sizes
        self.latents, self.groups = sum(model.group_sizes), len(model.group_sizes)
        self.latent_bits = latent_bits or (LATENT_BITS if self.groups == 1 else LADDER_BITS)
        self.mixture = None if mixture is None else MixturePrior(mixture, self.latent_bits)
        self.learned_prior, self._parameters_shape = self._learn_shapes()
        parameters = int(np.prod(self._parameters_shape))
        most = MOST_LATENTS // self.latents if self.groups > 1 else BATCH
        self.batch = max(1, min(BATCH, MOST_PARAMETERS // parameters, most))
        self.small_batch = max(1, self.batch // SMALL_SHARE)
        self.shapes = (1, self.small_batch, self.batch)
        margin = margin_of(2 * max(self.group_sizes))
        self.margins = Margins(margin, margin_of(parameters), margin)

    @property
    def taken_bits(self) -> int:
        """About the most bits that an image takes off the stack."""
        of_component = 0 if self.mixture is None else self.mixture.component_bits
        return self.latents * self.latent_bits + of_component

    def encode(
        self, stack: Stack, levels: Integers, condition: Condition | None = None
    ) -> tuple[Grids, Lengths]:
        """Push images, at most `batch`. condition: of a model that has one. Returns what `decode` needs besides the stack."""
        image = self._infer(levels, condition, stack.pop)
        stack.push(image.x)
        if self.mixture is not None:
            prior = self.mixture.coded(self._bins(image), stack.pop)
            stack.push(prior.bins)
            stack.push(prior.components)
            return image.grids, self._lengths(image, prior.bits)
        for z in reversed(image.z):
            stack.push(self._prior(z))
        return image.grids, self._lengths(image)

    def decode(self, stack: Stack, grids: Grids, condition: Condition | None = None) -> Integers:
        """Pop the images of the last `encode`, and push what it popped."""
        number = len(grids.pixels)
        groups = list[tuple[Reals | None, Integers, Posterior]]()

        def choose(group: int, prior: Reals | None, posterior: Posterior) -> Reals:
            p = None if prior is None else on_grid(prior, grids.prior[group])
            if self.mixture is None:
                code = prior_code(number * self.group_sizes[group], self.latent_bits)
                bins = from_digits(stack.pop(code).symbols).reshape(number, -1)
            else:
                bins = _popped(self.mixture, stack, number)
            groups.append((p, bins.reshape(-1), posterior))
            return latents(bins, p, self.latent_bits)

        with one_thread(), torch.inference_mode():
            model = self._given(condition, number)
            features = self._descend(model, number, choose)
            levels = self.pixels.levels_of(stack.pop(self.pixels.decoding(features, grids.pixels)).symbols)
            encoded = model.encode(self._target(levels))
            for group in reversed(range(self.groups)):
                prior, bins, posterior = groups[group]
                q = on_grid(posterior(encoded), grids.posterior[group])
                code = posterior_code(q, prior, self.latent_bits)
                stack.push(coded(code, digits_of(bins, 1 << self.latent_bits)))
        return levels

    def lengths(self, levels: Integers, stream: noise.Stream, condition: Condition | None = None) -> Lengths:
        """The lengths of images, at most `batch`, with latents that a stream chooses in place of a stack; nothing is written."""
        rounds = iter(range(1 << 16))

        def choose(code: Code) -> Coded:
            return received(code, lambda table: _chosen_by(stream, next(rounds), table))

        image = self._infer(levels, condition, choose)
        prior = None if self.mixture is None else self.mixture.coded(self._bins(image), choose)
        return self._lengths(image, None if prior is None else prior.bits)

    def outputs(self, levels: Integers, bins: Integers, condition: Condition | None = None) -> Outputs:
        """What the networks compute of images whose latents are in these bins [B, L]."""
        number = len(levels)
        of_groups = np.split(bins, np.cumsum(self.group_sizes)[:-1], axis=1)
        priors, posteriors = list[Reals](), list[Reals]()
        with one_thread(), torch.inference_mode():
            model = self._given(condition, number)
            encoded = model.encode(self._target(levels))

            def choose(group: int, prior: Reals | None, posterior: Posterior) -> Reals:
                posteriors.append(posterior(encoded))
                if prior is None:
                    return latents(of_groups[group], None, self.latent_bits)
                priors.append(prior)
                return latents(of_groups[group], settle(prior, self.margins.prior).values, self.latent_bits)

            parameters = self._known(self._descend(model, number, choose), levels)
        none = np.zeros((number, 0))
        return Outputs(np.concatenate(posteriors, 1), parameters, np.concatenate([none, *priors], axis=1))

    def _infer(
        self, levels: Integers, condition: Condition | None, take: Callable[[Code], Coded]
    ) -> "_Inferred":
        """Code images with latents that `take` chooses by q(z|x)."""
        number = len(levels)
        z, phases_q, phases_p = list[Coded](), list[Phases](), list[Phases]()
        with one_thread(), torch.inference_mode():
            model = self._given(condition, number)
            encoded = model.encode(self._target(levels))

            def choose(group: int, prior: Reals | None, posterior: Posterior) -> Reals:  # noqa: ARG001
                p = None if prior is None else settle(prior, self.margins.prior)
                q = settle(posterior(encoded), self.margins.posterior)
                values = None if p is None else p.values
                z.append(take(posterior_code(q.values, values, self.latent_bits)))
                phases_q.append(q.phases)
                phases_p.append(np.zeros_like(q.phases) if p is None else p.phases)
                return latents(from_digits(z[-1].symbols).reshape(number, -1), values, self.latent_bits)

            p = settle(self._known(self._descend(model, number, choose), levels), self.margins.pixels)
        x = coded(self._pixel_code(p.values), self.pixels.symbols(levels))
        return _Inferred(x, z, Grids(np.stack(phases_q), p.phases, np.stack(phases_p)))

    def _descend(
        self,
        model: VAE,
        number: int,
        choose: Callable[[int, Reals | None, Posterior], Reals],
    ) -> Tensor:
        """`VAE.descend` of `number` images in the smallest shape that holds them, with outputs [B, ...] as numbers. Returns the pixels'
        features."""

        def of_tensors(
            group: int, prior: Gaussian | None, posterior: Callable[[Encoded], Gaussian]
        ) -> Tensor:
            p = None if prior is None else self._numbers(_joined(prior), number)
            z = choose(group, p, lambda encoded: self._numbers(_joined(posterior(encoded)), number))
            return self._padded(torch.from_numpy(z))

        params = model.descend(self._shape(number), of_tensors)
        return self.pixels.features(params)[:number]

    def _known(self, features: Tensor, levels: Integers) -> Reals:
        """The pixels' parameters [B, P] of known images."""
        return self._numbers(self.pixels.known(features, levels).flatten(1), len(levels))

    def _numbers(self, outputs: Tensor, number: int) -> Reals:
        """The outputs [S, ...] of the networks for the images, [B, ...]."""
        numbers: Reals = outputs[:number].numpy()
        return numbers

    def _target(self, levels: Integers) -> Tensor:
        """The networks' input, padded."""
        return self._padded(torch.from_numpy(levels) / (self.pixels.levels - 1.0))

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows [B, ...] in float64 with rows of zeros after them, in the smallest shape that holds them."""
        padded = torch.zeros(self._shape(len(rows)), *rows.shape[1:], dtype=torch.float64)
        padded[: len(rows)] = rows
        return padded

    def _shape(self, number: int) -> int:
        return next(size for size in self.shapes if size >= number)

    def _given(self, condition: Condition | None, number: int) -> VAE:
        """The model with the condition of the images, and with class 0 or a vector of zeros for padding."""
        if self.model.condition is None:
            return self.model
        assert condition is not None
        given = torch.from_numpy(condition)
        padded = given.new_zeros(self._shape(number), *given.shape[1:])
        padded[:number] = given
        return self.model.given(padded)

    def _learn_shapes(self) -> tuple[bool, torch.Size]:
        """Whether priors are learned, and the shape of an image's parameters."""
        learned = list[bool]()

        def choose(group: int, prior: Gaussian | None, posterior: object) -> Tensor:  # noqa: ARG001
            learned.append(prior is not None)
            return torch.zeros(1, self.group_sizes[group], dtype=torch.float64)

        with one_thread(), torch.inference_mode():
            model = self.model.given(self.model.any_condition(1))
            features = self.pixels.features(model.descend(1, choose))
            parameters = self.pixels.known(features, np.zeros((1, *self.image_shape), np.int64))
        return any(learned), parameters.shape[1:]

    def _pixel_code(self, p: Reals) -> Code:
        return self.pixels.code(p.reshape(-1, *self._parameters_shape))

    def _prior(self, z: Coded) -> Coded:
        """The code of a group's bins, which all have the same mass under the prior."""
        return coded(prior_code(len(z.symbols[0]), self.latent_bits), z.symbols)

    def _bins(self, image: "_Inferred") -> Integers:
        """The bins of a flat model's images, [B, L]."""
        return from_digits(image.z[0].symbols).reshape(len(image.grids.pixels), -1)

    def _lengths(self, image: "_Inferred", prior: Reals | None = None) -> Lengths:
        """prior: the bits [B] of the latents under a mixture."""
        number = len(image.grids.pixels)
        if prior is None:
            prior = np.full(number, float(self.latents * self.latent_bits))
        back: Reals = np.sum([one.bits_of(number) for one in image.z], axis=0)
        return Lengths(image.x.bits_of(number), prior, back)


class Margins(NamedTuple):
    """The margin of each of `Outputs`."""

    posterior: float
    pixels: float
    prior: float


class _Inferred(NamedTuple):
    """What is coded of images: pixels, the groups' latents under q, and grids."""

    x: Coded
    z: list[Coded]
    grids: Grids


def refuse_model(model: VAE) -> None:
    """Raise UserError for a model whose images have no code here."""
    if model.num_codes:
        raise UserError(
            "a run with codes (posterior.kind quantized or finite_scalar) cannot compress yet; choose a run with a Gaussian q(z|x)"
        )
    if not isinstance(model, FlatVAE | LadderVAE):
        raise UserError(
            "a run of sequences or of codes cannot compress yet; choose a run of single images with a Gaussian q(z|x)"
        )
    if not model.has_bound:
        raise UserError(
            "this objective trains no likelihood of images, so it gives no code; choose a run with a bound on log p(x)"
        )
    pixel_code(model.likelihood)


def refuse_mixture(model: VAE) -> None:
    """Raise UserError for a model whose prior no mixture replaces."""
    if model.condition is not None:
        raise UserError(
            f"--prior gmm is for runs without a condition, and this run has one of {model.condition.words}; leave it out"
        )
    if len(model.group_sizes) > 1:
        raise UserError(
            "--prior gmm is for runs with one group of latents, and this run is a ladder, which learns the priors of its groups; leave it out"
        )


def _popped(mixture: MixturePrior, stack: Stack, number: int) -> Integers:
    """Pop bins [B, Z] that `MixturePrior.coded` pushed, and push their components."""
    weights = stack.pop(mixture.weight_code(number))
    bins = mixture.bins_of(stack.pop(mixture.bins_code(from_digits(weights.symbols))))
    stack.push(coded(mixture.component_code(bins), weights.symbols))
    return bins


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch's inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _joined(gaussian: Gaussian) -> Tensor:
    """The means and log sigmas [S, 2 Z]."""
    mu, log_sigma = gaussian
    return torch.cat([mu.flatten(1), log_sigma.expand_as(mu).flatten(1)], dim=1)


def _chosen_by(stream: noise.Stream, number: int, table: Table) -> NDArray[np.int32]:
    """Symbols by inverse distribution functions, from the uniform numbers that the stream has for the table with this number."""
    latents_of_image = len(table) // len(stream.slots)
    u = noise.uniform(stream, noise.POSTERIOR + number, (latents_of_image,)).double()
    return chosen(table, (u * (1 << PRECISION)).long().flatten().numpy())
