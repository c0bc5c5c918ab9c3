"""The code of latents under a Gaussian mixture in place of N(0, I). Its components come back, too: bits back twice.

    pop z with q(z|x);  push x with p(x|z);  pop k with p(k|z);  push z with p(z|k);  push k with w_k

The length of the last three is -log p(z|k) - log w_k + log p(k|z) = -log p(z), whichever component k is popped. The bins stay those of
N(0, 1). Under a component with a full covariance a latent has a Gaussian given those before it, at the middle of their bins, so that the
latents are coded one after the other. All numbers are made of the mixture's by single operations of float64, as in `arithmetic.py`:
the covariances are factored here as U D U^T, where U has ones on its diagonal.

Legend: B images, Z latents, K components. Bins and components are int64 [B, Z] and [B].
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vaescale.compression.arithmetic import Reals, exponential, logarithm
from vaescale.compression.bins import gaussian_code, latents
from vaescale.compression.masses import (
    BASE,
    Code,
    Coded,
    Integers,
    by_digits,
    coded,
    digits_of,
    from_digits,
    looked_up,
    values_received,
)
from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Mixture, diagonals

LEAST = 2.0**-1000  # of a weight, for its logarithm


class PriorCoded(NamedTuple):
    """What is pushed of latents: bins under their components, and the components' weights. bits: of each image, less those of the
    components, which come back, [B]."""

    bins: Coded
    components: Coded
    bits: Reals


class MixturePrior:
    """The codes of latents under a mixture. Raises UserError for covariances that cannot be factored."""

    def __init__(self, mixture: Mixture, latent_bits: int) -> None:
        """latent_bits: a latent has 2^latent_bits bins."""
        self.latent_bits = latent_bits
        self.components, self.latents = mixture.means.shape
        self.levels = BASE  # of a component: a power of 4
        while self.levels < self.components:
            self.levels *= BASE
        self._means: Reals = mixture.means.numpy()
        self._factors, self._variances = _factored(mixture)
        self._inverse = np.divide(1.0, np.sqrt(self._variances))
        weights = np.maximum(mixture.weights.numpy(), LEAST)
        self._shares = _below(weights[:, None], self.levels)
        log_volumes = _added(logarithm(self._variances).T) * 0.5
        self._log_weights = logarithm(weights) - log_volumes

    @property
    def component_bits(self) -> int:
        """About the most bits that a component takes off the stack."""
        return self.levels.bit_length() - 1

    def coded(self, bins: Integers, take: Callable[[Code], Coded]) -> PriorCoded:
        """The code of bins [B, Z]. take: pops the components."""
        number = len(bins)
        back = take(self.component_code(bins))
        components = from_digits(back.symbols)
        of_bins = self._bins_coded(components, bins)
        of_components = coded(self.weight_code(number), back.symbols)
        bits = of_bins.bits_of(number) + of_components.bits_of(number) - back.bits_of(number)
        return PriorCoded(of_bins, of_components, bits)

    def weight_code(self, number: int) -> Code:
        """The code of components under their weights."""
        return by_digits(looked_up(np.repeat(self._shares, number, axis=1)), number, self.levels)

    def component_code(self, bins: Integers) -> Code:
        """The code of components given bins [B, Z]."""
        joint = self._log_joint(latents(bins, None, self.latent_bits))
        joint -= joint.max(0)
        return by_digits(looked_up(_below(exponential(joint), self.levels)), len(bins), self.levels)

    def bins_code(self, components: Integers) -> Code:
        """The code of bins given components [B]: latent after latent, or all together where they are independent."""
        rows = self._rows(components)
        means, inverse = self._means[rows], self._inverse[rows]
        if self._factors is None:
            yield from gaussian_code(means.reshape(-1), inverse.reshape(-1), self.latent_bits)
            return
        means = means.copy()
        for latent in range(self.latents):
            code = gaussian_code(means[:, latent], inverse[:, latent], self.latent_bits)
            z = latents((yield from values_received(code)), None, self.latent_bits)
            self._condition(means, rows, latent, z)

    def bins_of(self, received: Coded) -> Integers:
        """The bins [B, Z] that `bins_code` was sent."""
        if self._factors is None:
            return from_digits(received.symbols).reshape(-1, self.latents)
        digits = len(received.symbols) // self.latents
        columns = [
            from_digits(received.symbols[digits * latent : digits * (latent + 1)])
            for latent in range(self.latents)
        ]
        return np.stack(columns, axis=1)

    def _bins_coded(self, components: Integers, bins: Integers) -> Coded:
        """`coded` of `bins_code`, with the tables of all latents at once, since all are known."""
        number, rows = len(bins), self._rows(components)
        if self._factors is None:
            return coded(self.bins_code(components), digits_of(bins.reshape(-1), 1 << self.latent_bits))
        means, z = self._means[rows].copy(), latents(bins, None, self.latent_bits)
        for latent in range(self.latents):
            self._condition(means, rows, latent, z[:, latent])
        code = gaussian_code(means.T.reshape(-1), self._inverse[rows].T.reshape(-1), self.latent_bits)
        together = coded(code, digits_of(bins.T.reshape(-1), 1 << self.latent_bits))
        parts = [slice(first, first + number) for first in range(0, self.latents * number, number)]
        return Coded(
            [symbols[part] for part in parts for symbols in together.symbols],
            [table[part] for part in parts for table in together.tables],
        )

    def _condition(self, means: Reals, rows: Integers, latent: int, z: Reals) -> None:
        """Move the means [B, Z] of the latents after one that is z [B]."""
        assert self._factors is not None
        factor = self._factors[latent]
        columns = factor[rows] if len(factor) > 1 else factor
        step = z - means[:, latent]
        means[:, latent + 1 :] += columns * step[:, None]

    def _log_joint(self, z: Reals) -> Reals:
        """log w_k + log p(z|k) less a constant, [K, B]."""
        joint = np.empty((self.components, len(z)))
        for component in range(self.components):
            deviation = (z - self._means[component]).T.copy()  # [Z, B]
            precision = np.divide(1.0, self._variances[component])
            total = np.zeros(len(z))
            for latent in range(self.latents):
                if self._factors is not None:
                    factor = self._factors[latent]
                    column = factor[component if len(factor) > 1 else 0]
                    deviation[latent + 1 :] -= column[:, None] * deviation[latent]
                total += deviation[latent] * deviation[latent] * precision[latent]
            joint[component] = self._log_weights[component] - total * 0.5
        return joint

    def _rows(self, components: Integers) -> Integers:
        """The rows of components; a digit beyond the last one, which has the least mass that can be coded, stands for the last."""
        return np.minimum(components, self.components - 1)


def _factored(mixture: Mixture) -> tuple[list[Reals] | None, Reals]:
    """The columns of U below its diagonal, a list of Z with [K, Z - 1 - i] each ([1, ...] if tied), and D [K, Z]; without U where the
    latents are independent."""
    shape = mixture.means.shape
    if mixture.kind not in ("full", "tied"):
        return None, np.ascontiguousarray(np.broadcast_to(diagonals(mixture).numpy(), shape))
    matrices = mixture.covariances.numpy().reshape(-1, shape[1], shape[1])
    columns = [np.empty((len(matrices), shape[1] - 1 - latent)) for latent in range(shape[1])]
    variances = np.empty((len(matrices), shape[1]))
    for number, matrix in enumerate(matrices):
        rest = matrix.copy()
        for latent in range(shape[1]):
            variance = rest[latent, latent]
            if not variance > 0:
                raise UserError(
                    "a covariance of the mixture is not positive definite; fit it with a larger --ridge"
                )
            column = rest[latent + 1 :, latent] / variance
            rest[latent + 1 :, latent + 1 :] -= column[:, None] * rest[latent, latent + 1 :]
            columns[latent][number], variances[number, latent] = column, variance
    return columns, np.ascontiguousarray(np.broadcast_to(variances, shape))


def _below(masses: Reals, levels: int) -> Reals:
    """The shares [levels + 1, B] of the masses [K, B] of components below each edge; those after the last component are 1."""
    below = np.zeros((levels + 1, masses.shape[1]))
    for component in range(levels):
        mass = masses[component] if component < len(masses) else 0.0
        np.add(below[component], mass, out=below[component + 1])
    shares: Reals = below / below[-1]
    return shares


def _added(rows: Reals) -> Reals:
    """The sum of rows [N, ...], one after the other."""
    total: Reals = np.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total
