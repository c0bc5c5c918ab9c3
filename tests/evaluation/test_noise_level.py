"""The noise of images without knowing what is below it."""

import pytest
import torch

from vaescale.evaluation.noise_level import noise_level


@pytest.mark.parametrize("sigma", [0.02, 0.2])
def test_white_noise_on_planes_and_edges_is_found(sigma: float) -> None:
    across, down = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="xy")
    smooth = torch.stack([across, 0.3 * down + 0.5 * across, (across > 0.5).float()])
    still = smooth.expand(8, 3, 64, 64).double()
    epsilon = torch.randn(still.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(noise_level(still), torch.zeros(8).double(), rtol=0, atol=1e-7)
    assert noise_level(still + sigma * epsilon).tolist() == pytest.approx([sigma] * 8, rel=0.03)


def test_each_image_by_itself() -> None:
    images = torch.rand(5, 1, 9, 7, generator=torch.Generator().manual_seed(1))
    together = noise_level(images)
    assert together.shape == (5,)
    torch.testing.assert_close(together, torch.cat([noise_level(one[None]) for one in images]))
