"""How often ranks speak for sigma's sake, and what they agree on when one of them has bad numbers or only padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import on_ranks
from vaescale import comm
from vaescale.config import OneOf
from vaescale.likelihoods.base import Likelihood
from vaescale.likelihoods.config import LIKELIHOODS

SHAPE = (1, 4, 4)
# Sums over ranks of a step with two micro-batches: forward and backward passes, end of the step.
CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "fixed": ({"sigma": 0.1}, 0),
    "shared": ({"sigma": "shared"}, 0),
    "predicted": ({"sigma": "predicted"}, 0),
    "batch": ({"sigma": "optimal"}, 2),
    "per pixel": ({"sigma": "optimal_per_pixel"}, 2),
    "kept gradient": ({"sigma": "optimal", "sigma_gradient": "keep"}, 4),
    "running": ({"sigma": "optimal", "sigma_source": "running"}, 2),
    "per image": ({"sigma": "optimal_per_image"}, 2),
    "handover": ({"sigma": "predicted", "handover": {"at_step": 3}}, 2),
}


def build(**keys: Any) -> Likelihood:
    config = OneOf(LIKELIHOODS).validate({"kind": "gaussian", **keys})
    return config.implement(image_shape=SHAPE).train()


def images(seed: int, likelihood: Likelihood, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *SHAPE, generator=generator)
    params = torch.randn(count, likelihood.num_params(1), *SHAPE[1:], generator=generator)
    return x, params.requires_grad_(), torch.ones(count, dtype=torch.bool)


@pytest.mark.parametrize("name", CALLS)
def test_a_step_sums_as_often_as_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    keys, expected = CALLS[name]
    calls = []
    real = comm.start_sum
    monkeypatch.setattr(comm, "start_sum", lambda values: calls.append(1) or real(values))
    likelihood = build(**keys)
    for seed in (0, 1):
        likelihood.log_prob(*images(seed, likelihood)).sum().backward()
    likelihood.end_step()
    assert len(calls) == expected
    likelihood.eval()
    likelihood.log_prob(*images(2, likelihood))
    likelihood.end_step()
    assert len(calls) == expected, "evaluation asks nobody"


def _one_has_nan(rank: int) -> None:
    for source in ("batch", "running"):
        likelihood = build(sigma="optimal", sigma_source=source)
        likelihood.log_prob(*images(rank, likelihood))
        likelihood.end_step()
        before = likelihood.state.running.clone()
        x, params, mask = images(rank, likelihood)
        if rank == 1:
            x[0, 0, 0, 0] = torch.nan
        likelihood.log_prob(x, params, mask)
        likelihood.end_step()
        assert torch.equal(likelihood.state.running, before), "left out on both"


def _one_has_padding(rank: int) -> None:
    """Rank 1 has one image and two of padding, then nothing but padding; sigma is that of the images alone."""
    for step, used in enumerate((1, 0)):
        shares = [images(number, build(sigma="optimal")) for number in (0, 1)]
        shares[1][2][used:] = False
        likelihood = build(sigma="optimal")
        value = likelihood.log_prob(*shares[rank])
        likelihood.end_step()
        errors = torch.cat([(x - torch.sigmoid(params))[mask] for x, params, mask in shares]).double()
        assert float(likelihood.sigma) == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-6), step
        assert torch.isfinite(value).all()


def _accumulated(rank: int) -> None:
    """Two micro-batches on two ranks: the state is that of all images at once, on one rank."""
    for mode in ("optimal", "optimal_per_image", "optimal_per_pixel", "optimal_per_channel"):
        for source in ("batch",) if mode == "optimal_per_image" else ("batch", "running"):
            likelihood = build(sigma=mode, sigma_source=source)
            parts = [images(seed, likelihood) for seed in range(4)]
            for number in (0, 1):
                likelihood.log_prob(*parts[2 * number + rank])
            likelihood.end_step()
            x, params, _ = (torch.cat([part[i] for part in parts]) for i in range(3))
            dims = {"optimal_per_pixel": (0,), "optimal_per_channel": (0, 2, 3)}.get(mode, (0, 1, 2, 3))
            sums = (x - torch.sigmoid(params)).double().square().sum(dims).flatten()
            number = torch.tensor([x.numel() / sums.numel()], dtype=torch.float64)
            expected = torch.cat([number, sums]).detach() / 100  # one step into a horizon of 100
            torch.testing.assert_close(likelihood.state.running, expected, rtol=1e-6, atol=0)


@torch.no_grad()
def _start(rank: int, ranks: int, work: Callable[[int], None]) -> list[Tensor]:
    work(rank)
    return []


@pytest.mark.distributed
@pytest.mark.parametrize("work", [_one_has_nan, _one_has_padding, _accumulated])
def test_on_two_ranks(tmp_path: Path, work: Callable[[int], None]) -> None:
    on_ranks(tmp_path, _start, work)
