"""The scale of a float16 loss: halved when the gradient overflows, doubled after 2,000 finite steps.

The constants are those of torch.amp.GradScaler (Micikevicius et al. 2018, section 3.2).
"""

from typing import NamedTuple

from torch import Tensor

FIRST_SCALE, LARGEST_SCALE, GROWTH_STEPS = 2.0**16, 2.0**24, 2000


class LossScale(NamedTuple):
    """A loss scale. value: the factor of the loss; finite_steps: finite steps in a row since its last change. Both float64 []."""

    value: Tensor
    finite_steps: Tensor

    def explains(self, *, loss_is_finite: Tensor, norm_is_finite: Tensor) -> Tensor:
        """Whether a gradient overflowed because of the scale, bool []: the loss is finite, and the scale can still fall."""
        return loss_is_finite & ~norm_is_finite & (self.value > 1)
