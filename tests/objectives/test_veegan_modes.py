"""VEEGAN on the mixtures of its paper: Gaussians on a ring and on a grid in the plane. Srivastava et al. 2017, section 4.1.

The objective and the discriminators' loss are the package's; the networks are perceptrons of vectors [B, 2] in place of images.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vaescale import noise
from vaescale.adversaries.config import PairPlayerConfig
from vaescale.models.shown import Shown
from vaescale.objectives.config import VeeganConfig
from vaescale.objectives.veegan import Veegan

SIGMA, STEPS, BATCH, LATENTS = 0.02, 300, 128, 2
ANGLES = torch.arange(8) * math.pi / 4
LINE = torch.linspace(0.2, 0.8, 5)
CENTRES = {
    "ring": 0.5 + 0.25 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1),
    "grid": torch.cartesian_prod(LINE, LINE),
}


class Critic(nn.Module):
    """Logits of pairs (z, x) of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron(LATENTS + 2, 1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(torch.cat([z, x], 1))
        return logits


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    hidden = 128
    layers = (nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("ring", 8), ("grid", 23)])
def test_veegan_has_the_modes_of_mixtures(name: str, least: int) -> None:
    """A sample within three standard deviations of a mode has it; the share of such samples is at least a quarter."""
    centres = CENTRES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = trained(centres)(torch.randn(2500, LATENTS))
    distances, nearest = torch.cdist(samples, centres).min(1)
    within = distances < 3 * SIGMA
    share = within.float().mean()
    assert len(nearest[within].unique()) >= least
    assert share > 0.25, f"{share:.2f} of the samples are within three standard deviations of a mode"


def trained(centres: Tensor) -> Any:
    """The decoder, trained without gradients outside."""
    decode, encode = perceptron(LATENTS, 2), perceptron(2, LATENTS)
    shape: Any = SimpleNamespace(
        image_shape=(2, 2, 2), latent_dim=LATENTS, parameters=lambda: decode.parameters()
    )
    objective = Veegan(VeeganConfig(discriminator=PairPlayerConfig(widths=(2,), hidden=2)), shape)
    objective.discriminators.critics["pair"] = Critic()
    players = [
        torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.9))
        for parameters in (
            [*decode.parameters(), *encode.parameters()],
            objective.discriminators.parameters(),
        )
    ]
    nothing = torch.zeros(BATCH, 0)
    for step in range(STEPS):
        stream = noise.Stream(0, step, torch.arange(BATCH))
        x = centres[torch.randint(len(centres), (BATCH,))] + SIGMA * torch.randn(BATCH, 2)
        prior_z = torch.randn(BATCH, LATENTS)
        generated, z = decode(prior_z), encode(x) + 0.1 * torch.randn(BATCH, LATENTS)
        shown = Shown(x, nothing, nothing, generated, z, prior_z, recovered=encode(generated))
        terms: Any = SimpleNamespace(shown=shown)
        loss, _ = objective(terms, stream)
        judged = objective.discriminators(shown.detached(), stream, 0)
        for player, loss_of_player in zip(players, (loss, judged.loss), strict=True):
            player.zero_grad()
            loss_of_player.backward()
        for player in players:
            player.step()
    return decode.requires_grad_(False)
