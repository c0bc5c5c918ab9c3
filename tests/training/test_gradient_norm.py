"""The norm of large gradients against float64."""

import pytest
import torch
from torch import Tensor

from vaescale.training.gradient_norm import LARGE, PIECE, total_norm

LARGE_ONES = {
    "contiguous": torch.full((1024, 512, 2, 2), 0.3),
    "channels_last": torch.full((1024, 512, 2, 2), 0.3).contiguous(memory_format=torch.channels_last),
    "vector": torch.full((LARGE + PIECE - 1,), 0.3),
    "long rows": torch.full((8, LARGE // 4), 0.3),
    "a part": torch.full((2100, 1030), 0.3)[7:, :1024],
    "a part of memory": torch.cat([torch.full((5, 1024), 100.0), torch.full((2048, 1024), 0.3)])[5:],
}


@pytest.mark.parametrize("name", LARGE_ONES)
def test_large_gradients_lose_no_digits(name: str) -> None:
    """Equal values are the worst case of a sum in float32."""
    gradients = [LARGE_ONES[name], torch.linspace(-9, 9, 7)]
    assert gradients[0].numel() >= LARGE
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(total_norm(gradients).double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("size", [PIECE, LARGE + 1])
def test_a_value_that_is_not_finite_shows(value: float, size: int) -> None:
    gradient = torch.zeros(size)
    gradient[-1] = value
    assert not total_norm([gradient]).isfinite()


def test_no_gradients_and_other_kinds() -> None:
    assert total_norm([]) == 0
    half: Tensor = total_norm([torch.ones(LARGE, dtype=torch.bfloat16)])
    assert half.dtype == torch.bfloat16
    assert half == 1024
