"""The norm of large gradients against float64."""

import pytest
import torch

from vaescale.training.gradient_norm import LARGE, total_norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_gradients_lose_no_digits(layout: torch.memory_format) -> None:
    """Equal values are the worst case of a sum in float32."""
    gradients = [
        torch.full((1024, 512, 2, 2), 0.3).contiguous(memory_format=layout),
        torch.full((2048, 2048), -0.1),
        torch.randn(7),
    ]
    assert gradients[0].numel() >= LARGE
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(total_norm(gradients).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_value_that_is_not_finite_shows(value: float) -> None:
    gradient = torch.zeros(512, 512)
    gradient[3, 5] = value
    assert not total_norm([gradient]).isfinite()


def test_no_gradients() -> None:
    assert total_norm([]) == 0
