"""What depends on the whole batch, MMD, DIP, free bits and the others: against brute force, and the same on one rank and two."""

import contextlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import on_ranks
from vaescale import comm, noise
from vaescale.config import OneOf
from vaescale.likelihoods.config import GaussianConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.networks.config import ConvConfig, LadderConfig, ResnetConfig
from vaescale.objectives.config import OBJECTIVES as KINDS
from vaescale.objectives.config import DipConfig, MmdConfig
from vaescale.objectives.dip import dip
from vaescale.objectives.mmd import SCALES, mmd

Z = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STREAM = noise.Stream(5, 2, torch.arange(7))


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd_is_the_double_sum(kernel) -> None:
    prior = noise.normal(STREAM, noise.MATCHED_PRIOR, (3,)).double()

    def k(a: Tensor, b: Tensor) -> float:
        distance = float((a - b).square().sum())
        bandwidths = [2 * 3 * scale for scale in SCALES]
        values = [c / (c + distance) if kernel == "imq" else np.exp(-distance / c) for c in bandwidths]
        return float(sum(values))

    expected = sum(
        (k(Z[i], Z[j]) + k(prior[i], prior[j])) / (7 * 6) for i in range(7) for j in range(7) if i != j
    ) - sum(2 * k(Z[i], prior[j]) / 49 for i in range(7) for j in range(7))
    assert float(mmd(Z, STREAM, MmdConfig(weight=1.0, kernel=kernel))) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_unbiased_and_sees_what_is_not_the_prior() -> None:
    config, generator = MmdConfig(weight=1.0), torch.Generator().manual_seed(1)
    same, moved = [], []
    for step in range(200):
        stream = noise.Stream(0, step, torch.arange(64))
        z = torch.randn(64, 2, generator=generator, dtype=torch.float64)
        same.append(float(mmd(z, stream, config)))
        moved.append(float(mmd(z + 1, stream, config)))
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)
    assert min(same) < 0 < min(moved)


@pytest.mark.parametrize("variant", ["i", "ii"])
def test_dip_is_the_covariance_s_distance(variant) -> None:
    log_sigma = 0.3 * Z.flip(0) - 1
    covariance = np.cov(Z.numpy().T, bias=True)
    if variant == "ii":
        covariance = covariance + np.diag(np.exp(2 * log_sigma.numpy()).mean(0))
    off = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    expected = 3 * off + 7 * ((np.diag(covariance) - 1) ** 2).sum()
    config = DipConfig(variant=variant, off_diagonal=3.0, diagonal=7.0)
    assert float(dip(Z, log_sigma, config)) == pytest.approx(expected, rel=1e-9)
    usual = DipConfig(variant=variant, off_diagonal=3.0)
    weight = 30 if variant == "i" else 3
    expected = 3 * off + weight * ((np.diag(covariance) - 1) ** 2).sum()
    assert float(dip(Z, log_sigma, usual)) == pytest.approx(expected, rel=1e-9)


def test_extra_terms_are_added_with_their_weights(make_terms) -> None:
    log_sigma, kl = torch.zeros_like(Z), torch.ones(7, 1).double()
    terms = make_terms(log_px=torch.zeros(7).double(), kl=kl, z=Z, mu=Z, log_sigma=log_sigma)
    config = {"beta": 0.5, "mmd": {"weight": 10}, "dip": {"variant": "i"}}
    objective = OneOf(KINDS, default="elbo").validate(config).implement(SimpleNamespace(group_places=(1,)))
    expected = 0.5 + 10 * mmd(Z, STREAM, MmdConfig(weight=10)) + dip(Z, log_sigma, DipConfig(variant="i"))
    loss, pieces = objective(terms, STREAM)
    torch.testing.assert_close(loss, expected)
    assert pieces.keys() == {"mmd", "dip"}
    torch.testing.assert_close(pieces["mmd"], mmd(Z, STREAM, MmdConfig(weight=10)))


OBJECTIVES = {
    "mmd": {"beta": 0.0, "mmd": {"weight": 50}},
    "mmd, rbf": {"mmd": {"weight": 50, "kernel": "rbf"}},
    "dip i": {"dip": {"variant": "i"}},
    "dip ii": {"dip": {"variant": "ii"}},
    "free bits": {"free_bits": {"nats": 1.6}},
    "free bits per group": {"free_bits": {"nats": 7.0, "per": "group"}},
    "capacity above": {"capacity": {"nats": 1e-3, "steps": 1}},
    "capacity below": {"capacity": {"nats": 100, "steps": 1}},
    "iwae": {"kind": "iwae", "samples": 3},
    "dreg": {"kind": "iwae", "samples": 3, "gradient": "doubly_reparameterized"},
    "balanced ladder": {"balancing": "always"},
    "batch norm and dip": {"dip": {"variant": "ii", "off_diagonal": 3}},
    "spectral ladder": {"spectral": 0.5},
    "free ladder": {"free_bits": {"nats": 0.8, "per": "group"}},
    "equivariant map": {"equivariance": {"weight": 0.7, "anisotropic": True}},
}


def everyone_s_results(rank: int, ranks: int) -> dict[str, list[Tensor]]:
    return {f"{name} {parts}": results(name, rank, ranks, parts) for name in OBJECTIVES for parts in (1, 2)}


def results(name: str, rank: int, ranks: int, parts: int = 1) -> list[Tensor]:
    """Loss and gradients over 8 images, in so many micro-batches that the ranks share."""
    torch.manual_seed(0)
    network = (
        LadderConfig(latent_dim=2, width=8) if "ladder" in name else ConvConfig(latent_dim=4, widths=(8,))
    )
    if "map" in name:
        network = ResnetConfig(latent_dim=2, width=4, multipliers=(1, 2), blocks=1)
    if "batch norm" in name:
        network = network.model_copy(update={"norm": "batch"})
    likelihood = GaussianConfig(sigma="optimal" if "iwae" not in name else 0.3)
    section = OneOf(KINDS, default="elbo").validate(OBJECTIVES[name])
    model = build_vae(
        network,
        DiagonalConfig(),
        likelihood,
        image_size=8,
        channels=1,
        spectral=section.reads_spectrum,
        equivariance=section.transforms,
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    objective = section.implement(model)
    images = torch.randint(
        0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    comm.at_step(2)
    loss = torch.zeros((), dtype=torch.float64)
    for number, part in enumerate(torch.arange(8).chunk(parts), start=1):
        slots = part[rank * len(part) // ranks : (rank + 1) * len(part) // ranks]
        stream, mask = noise.Stream(0, 2, slots), torch.ones(len(slots), dtype=torch.bool)
        waits = number == parts or ranks == 1
        with contextlib.nullcontext() if waits else wrapped.no_sync():
            terms = wrapped(
                images[slots], stream, mask, objective.importance_samples, objective.doubly_reparameterized
            )
            own = objective(terms, stream)[0] / parts
            own.backward()
        loss += own.detach()
    mean_loss = comm.all_reduce_sum(loss[None]) / ranks
    return [mean_loss, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    """With one micro-batch and with two, whose gradients are exchanged once."""
    alone = everyone_s_results(0, 1)
    for found in on_ranks(tmp_path, everyone_s_results):
        for name, expected in alone.items():
            for got, value in zip(found[name], expected, strict=True):
                torch.testing.assert_close(got.double(), value.double(), rtol=1e-6, atol=1e-8, msg=name)


def test_the_objectives_differ() -> None:
    """Or the comparison above would prove little."""
    losses = {name: float(results(name, 0, 1)[0]) for name in OBJECTIVES if name != "dreg"}
    values = sorted(losses.values())
    assert min(b - a for a, b in itertools.pairwise(values)) > 1e-6, losses
