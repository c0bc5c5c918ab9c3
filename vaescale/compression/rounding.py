"""Rounding of a network's outputs to a grid, so that encoder and decoder agree although their last bits differ.

Two machines compute outputs that differ by some 1e-14. Rounding to multiples of 2^-16 makes them equal unless a value is that near
to the middle between two multiples, which happens about once in 10^9 values and ruins all images after it. So the encoder shifts
the grid of an image by a multiple of 2^-24, its phase, until no value of the image is within a margin of a middle, and the phase is
stored. The decoder then rounds to the same multiples wherever its outputs differ by less than the margin.

Legend: B images, P values of each.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.compression.arithmetic import Reals
from vaescale.errors import UserError

GRID = 2.0**-16
PHASES = 256
MOST_MARGIN_BITS, LEAST_MARGIN_BITS = 36, 44
Phases = NDArray[np.uint8]


class Settled(NamedTuple):
    """Values on the grid [B, P], and the phases of the images [B]."""

    values: Reals
    phases: Phases


def margin_of(values: int) -> float:
    """The margin for images of so many values: 2^-36, or less where one of 16 grids would not do for most images."""
    bits = math.ceil(math.log2(16 * values)) + round(-math.log2(GRID))
    return 2.0 ** -min(LEAST_MARGIN_BITS, max(MOST_MARGIN_BITS, bits))


def settle(values: Reals, margin: float) -> Settled:
    """Round values [B, P] to each image's first grid on which none is within the margin of a middle.

    Raises UserError for values that are not finite, and where no grid serves.
    """
    if not np.isfinite(values).all():
        raise UserError("the model's outputs for an image are not finite; choose other weights")
    phases = np.zeros(len(values), np.uint8)
    waiting = np.arange(len(values))
    for phase in range(PHASES):
        phases[waiting] = phase
        shifted = values[waiting] / GRID - phase / PHASES
        distance = np.abs(shifted - np.floor(shifted) - 0.5).min(1, initial=1.0)
        waiting = waiting[distance < margin / GRID]
        if not len(waiting):
            return Settled(on_grid(values, phases), phases)
    raise UserError(
        f"an image has no grid on which its {values.shape[1]} values are {margin:.1e} away from every middle; compress smaller images"
    )


def on_grid(values: Reals, phases: Phases) -> Reals:
    """Round values [B, P] to the grids of these phases."""
    shift = phases[:, None].astype(np.float64) / PHASES
    scaled = np.rint(values / GRID - shift)
    scaled += shift
    scaled *= GRID
    return scaled
