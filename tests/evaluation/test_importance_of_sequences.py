"""The importance-weighted bound of sequences against the integral over their latents, and which noise each draw has."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vaescale import noise
from vaescale.config import OneOf
from vaescale.data.batch import Batch
from vaescale.evaluation.importance import ImportanceBound
from vaescale.evaluation.likelihood import Bound
from vaescale.evaluation.measures import measure
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.sequence_model import Encoded, SequenceModel
from vaescale.models.vae import rows_of
from vaescale.networks.config import NETWORKS

FRAMES, SIDE, SEQUENCES = 3, 4, 5
SECTION = {"kind": "svg", "context": 1, "horizon": 2, "latent_dim": 1, "features": 8, "hidden": 6}
NODES = 60  # of the integral along each latent


@pytest.fixture(scope="module")
def model() -> SequenceModel:
    """Two steps of one latent, which moves the means by about sigma."""
    torch.manual_seed(0)
    built = build_vae(
        OneOf(NETWORKS).validate({**SECTION, "widths": [4], "norm": "none"}),
        DiagonalConfig(),
        OneOf(LIKELIHOODS).validate({"kind": "gaussian", "sigma": 0.15}),
        image_size=(SIDE, SIDE),
        channels=1,
    )
    assert isinstance(built, SequenceModel)
    with torch.no_grad():
        built.network.predictor.embed.weight[:, -1] += 3.0
        built.network.predictor.out.weight *= 6.0
        built.network.decoder.first.weight *= 3.0
    return built.eval()


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(60, 200, (SEQUENCES, FRAMES, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def bound(model: SequenceModel, samples: int, *, batch: int = SEQUENCES) -> dict[str, float]:
    batches = [
        Batch(part, torch.full((len(part),), -1), numbers, mask_of(part))
        for part, numbers in zip(images().split(batch), torch.arange(SEQUENCES).split(batch), strict=True)
    ]
    return measure(model, batches, [Bound(model), ImportanceBound(model, samples=samples)], seed=3)


@torch.no_grad()
def exact(model: SequenceModel) -> float:
    """The mean of log p(x_2..3 | x_1), by Gauss-Hermite quadrature of the two latents under their prior."""
    x = model.target(images(), noise.Stream(3, 0, torch.arange(SEQUENCES)))
    encoded: Encoded = model.encode(x)
    assert encoded.p is not None
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(NODES))
    weights = weights / math.sqrt(2 * math.pi)
    grid = torch.cartesian_prod(nodes, nodes).float()[:, None]  # [N, Z, S]
    logs = torch.cartesian_prod(weights.log(), weights.log()).sum(1)
    total = 0.0
    for row in torch.arange(SEQUENCES).split(1):
        one = rows_of(encoded, row)
        z = one.p.mu + one.p.log_sigma.exp() * grid
        params = model._decoded(one, z)
        log_px = model.log_px(x[row].expand(len(z), -1, -1, -1, -1), params, mask_of(z)).double()
        total += float(torch.logsumexp(log_px + logs, 0))
    return total / SEQUENCES


def mask_of(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


def test_it_falls_to_the_integral_over_the_latents(model: SequenceModel) -> None:
    one, ten, many = (bound(model, samples)["neg_iwae_nats"] for samples in (1, 10, 500))
    assert one - 0.1 > ten > many - 0.01
    assert many == pytest.approx(-exact(model), abs=0.03)


@torch.no_grad()
def test_it_is_that_of_each_sequence_alone_whatever_the_batch(model: SequenceModel) -> None:
    """Draw k of a sequence is the one that the ELBO has of step k of the stream."""
    bounds = []
    for slot, sequence in enumerate(images()):
        stream = noise.Stream(3, 0, torch.tensor([slot]))
        x = model.target(sequence[None], stream)
        weights = []
        for draw in range(6):
            inferred = model.infer(model.encode(x), stream._replace(step=draw), 1, False)
            weights.append(model.terms(x, inferred, mask_of(x)).log_weights.double())
        bounds.append(torch.cat(weights).logsumexp(0) - math.log(6))
    expected = -float(torch.stack(bounds).mean())
    for batch in (SEQUENCES, 2):
        assert bound(model, 6, batch=batch)["neg_iwae_nats"] == pytest.approx(expected, abs=1e-4)
    one = bound(model, 1)
    assert one["neg_iwae_nats"] == one["importance_neg_elbo_nats"]
    assert one["iwae_bits_per_dim"] == pytest.approx(
        one["neg_iwae_nats"] / (2 * SIDE * SIDE * math.log(2)) + 8
    )
    assert bound(model, 300)["importance_neg_elbo_nats"] == pytest.approx(one["neg_elbo_nats"], abs=0.3)
