"""The losses of the two players against their formulas, and LeCam's means over two ranks."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ranks import on_ranks
from vaescale.adversaries import losses

LOGITS = torch.tensor([[-2.0, 0.5], [0.3, 3.0]], dtype=torch.float64)


def log_sigmoid(u: Tensor) -> Tensor:
    return torch.log(1 / (1 + torch.exp(-u)))


def test_each_loss_is_its_formula() -> None:
    u = LOGITS
    expected = {
        "hinge": ((1 - u).clamp_min(0), (1 + u).clamp_min(0), -u),
        "non_saturating": (-log_sigmoid(u), -log_sigmoid(-u), -log_sigmoid(u)),
        "vanilla": (-log_sigmoid(u), -log_sigmoid(-u), log_sigmoid(-u)),
    }
    for loss, values in expected.items():
        got = (losses.on_data(loss, u), losses.on_fakes(loss, u), losses.fooling(loss, u))
        for one, other in zip(got, values, strict=True):
            assert float(one) == pytest.approx(float(other.mean()), rel=1e-12), loss


def test_vanilla_is_a_zero_sum_game_and_the_others_are_not() -> None:
    for loss, is_zero_sum in {"vanilla": True, "non_saturating": False, "hinge": False}.items():
        total = losses.on_fakes(loss, LOGITS) + losses.fooling(loss, LOGITS)
        assert (abs(float(total)) < 1e-12) == is_zero_sum


def lecam_of(rank: int, ranks: int) -> Tensor:
    """The value, the running means after it, and the gradient of the ranks' mean loss for this rank's logits."""
    generator = torch.Generator().manual_seed(1)
    accepted, refused = (
        torch.randn(4, 2, generator=generator, dtype=torch.float64).chunk(ranks)[rank].requires_grad_()
        for _ in range(2)
    )
    running = torch.tensor([0.7, -0.6], dtype=torch.float64)
    value = losses.lecam(accepted, refused, running)
    (value / ranks).backward()
    return torch.cat([value.detach()[None], running, accepted.grad.flatten(), refused.grad.flatten()])


def test_lecam_is_of_the_global_batch(tmp_path: Path) -> None:
    whole = lecam_of(0, 1)
    generator = torch.Generator().manual_seed(1)
    real, fake = (float(torch.randn(4, 2, generator=generator, dtype=torch.float64).mean()) for _ in range(2))
    expected = max(real + 0.6, 0) ** 2 + max(0.7 - fake, 0) ** 2
    assert float(whole[0]) == pytest.approx(expected, rel=1e-12)
    assert whole[1:3].tolist() == pytest.approx([0.7 + (real - 0.7) / 1000, -0.6 + (fake + 0.6) / 1000])
    assert not math.isclose(float(whole[3]), 0)
    parts = on_ranks(tmp_path / "two", lecam_of)
    for part in parts:
        torch.testing.assert_close(part[:3], whole[:3])
    halves = [torch.cat([part[3:].chunk(2)[of] for part in parts]) for of in range(2)]
    torch.testing.assert_close(torch.cat(halves), whole[3:])
