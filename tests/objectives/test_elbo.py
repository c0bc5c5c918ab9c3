"""The objective against hand-computed values."""

import pytest
import torch

from vaescale.models.vae import Terms
from vaescale.objectives.elbo import elbo_loss

TERMS = Terms(
    log_px=torch.tensor([-10.0, -20.0]),
    kl=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    squared_error=torch.zeros(2),
    variance=torch.zeros(2),
    mu=torch.zeros(2, 1),
)


@pytest.mark.parametrize(("beta", "loss"), [(1.0, 20.0), (0.0, 15.0), (2.0, 25.0)])
def test_groups_are_summed_and_images_averaged(beta: float, loss: float) -> None:
    assert float(elbo_loss(TERMS, beta=beta)) == loss
