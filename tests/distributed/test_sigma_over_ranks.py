"""The same global batch on 1, 2 and 4 gloo ranks, in equal and unequal shares: the same sigma, loss and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import on_ranks
from vaescale import comm, noise
from vaescale.config import OneOf
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.networks.config import ConvConfig

IMAGES, STEPS = 12, 3
SHARES = {"2 even": [6, 6], "2 uneven": [5, 7], "4 even": [3, 3, 3, 3], "4 uneven": [1, 5, 2, 4]}
MODES: dict[str, dict[str, Any]] = {
    **{
        sigma: {"sigma": sigma}
        for sigma in ("shared", "optimal", "optimal_per_image", "optimal_per_pixel", "optimal_per_channel")
    },
    "fixed": {"sigma": 0.3},
    "predicted": {"sigma": "predicted"},
    "running": {"sigma": "optimal", "sigma_source": "running"},
    "running per pixel": {"sigma": "optimal_per_pixel", "sigma_source": "running"},
    "kept gradient": {"sigma": "optimal", "sigma_gradient": "keep"},
    "kept gradient per channel": {"sigma": "optimal_per_channel", "sigma_gradient": "keep"},
    # The steps of the test are stage one, half of the ramp, stage two.
    "handover": {"sigma": "predicted", "handover": {"at_step": 1, "ramp_steps": 2}, "sigma_gradient": "keep"},
    "laplace": {"kind": "laplace", "sigma": "optimal"},
    "laplace, running": {"kind": "laplace", "sigma": "optimal", "sigma_source": "running"},
}
Results = dict[str, dict[str, Tensor]]


def run_modes(rank: int, ranks: int, shares: list[int], dtype: torch.dtype) -> Results:
    """A few steps of each mode on this rank's share. Gradients, loss and state after each step, by mode."""
    first = sum(shares[:rank])
    mine = torch.arange(first, first + shares[rank])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 2, 8, 8), generator=generator, dtype=torch.uint8)[mine]
    results: Results = {}
    for name, keys in MODES.items():
        likelihood = OneOf(LIKELIHOODS).validate({"kind": "gaussian", **keys})
        torch.manual_seed(1)
        network = ConvConfig(latent_dim=3, widths=(8,))
        model = build_vae(network, DiagonalConfig(), likelihood, image_size=8, channels=2).to(dtype).train()
        wrapped = model if len(shares) == 1 else DistributedDataParallel(model)
        found = {}
        for step in range(STEPS):
            comm.at_step(step)
            model.zero_grad()
            terms = wrapped(images, noise.Stream(0, step, mine), torch.ones(len(mine), dtype=torch.bool))
            # DDP takes the mean over ranks: with this factor it is the mean over images, however they are shared.
            loss = (terms.kl.sum(1) - terms.log_px).sum() * len(shares) / IMAGES
            loss.backward()
            model.likelihood.end_step()
            found[f"loss {step}"] = comm.all_reduce_sum(loss[None].detach()) / len(shares)
            gradients = [p.grad.flatten().clone() for p in model.parameters()]
            found[f"gradient {step}"] = torch.cat(gradients)
            found |= {f"{n} {step}": b.clone() for n, b in model.named_buffers()}
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-5 * parameter.grad
        results[name] = found
    return results


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shares", SHARES)
def test_the_number_of_ranks_changes_nothing(tmp_path: Path, shares: str, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    alone = run_modes(0, 1, [IMAGES], dtype)
    ranks = len(SHARES[shares])
    for found in on_ranks(tmp_path, run_modes, SHARES[shares], dtype, ranks=ranks):
        for mode, expected in alone.items():
            assert found[mode].keys() == expected.keys()
            for name, value in expected.items():
                finite = torch.isfinite(value)  # a handover that has not begun is at infinity
                assert torch.equal(found[mode][name][~finite], value[~finite])
                error = (found[mode][name] - value)[finite].norm() / value[finite].norm().clamp_min(1e-30)
                assert float(error) < tolerance, (mode, name, error)


def test_the_modes_differ() -> None:
    """Or the comparison above would prove little."""
    alone = run_modes(0, 1, [IMAGES], torch.float64)
    same = ({"optimal", "kept gradient"}, {"optimal_per_channel", "kept gradient per channel"})
    names = list(MODES)
    for first, second in ((a, b) for a in names for b in names if a < b):
        equal = abs(float(alone[first]["loss 2"] - alone[second]["loss 2"])) < 1e-9
        assert equal == ({first, second} in same), (first, second)
