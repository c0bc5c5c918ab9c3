"""The layers: batch normalization over the global batch against torch's own, and shapes that double and halve."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.ranks import on_ranks
from vaescale import comm
from vaescale.networks.layers import GlobalBatchNorm, conv, deconv, norm, normed, recomputed, spectral


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_global_batch_norm_is_torch_s_on_one_rank(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    own, reference = GlobalBatchNorm(4), nn.BatchNorm2d(4) if len(shape) == 4 else nn.BatchNorm1d(4)
    for _ in range(3):
        x = (3 + 2 * torch.randn(shape)).requires_grad_()
        y = x.detach().clone().requires_grad_()
        weights = torch.randn(shape)
        got, expected = own(x), reference(y)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        (got * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.running_mean, reference.running_mean)
    torch.testing.assert_close(own.running_variance, reference.running_var)
    own.eval(), reference.eval()
    x = torch.randn(shape)
    torch.testing.assert_close(own(x), reference(x), rtol=1e-5, atol=1e-5)


def test_large_means_do_not_cancel() -> None:
    own = GlobalBatchNorm(1)
    x = 1e4 + torch.randn(1000, 1)
    torch.testing.assert_close(own(x).std(), torch.tensor(1.0), rtol=1e-2, atol=0)


def test_nan_does_not_stay_in_the_running_averages() -> None:
    own = GlobalBatchNorm(2)
    own(torch.tensor([[1.0, float("nan")], [3.0, 4.0]]))
    assert torch.isfinite(own.running_mean).all()
    assert float(own.running_mean[0]) == pytest.approx(0.2)


def normalized(rank: int, ranks: int) -> list[torch.Tensor]:
    """Of a rank's share of six rows: the output, its gradient, and the running averages."""
    rows = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    torch.manual_seed(0)
    own, x = GlobalBatchNorm(4).double(), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    weights = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    comm.at_step(0)
    share = x[rows].requires_grad_()
    out = own(share)
    (out * weights[rows]).sum().backward()
    return [out.detach(), share.grad, own.running_mean, own.running_variance]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_normalize_as_one(tmp_path: Path) -> None:
    found, whole = on_ranks(tmp_path, normalized), normalized(0, 1)
    for number in (0, 1):
        torch.testing.assert_close(torch.cat([one[number] for one in found]), whole[number])
    for one in found:
        torch.testing.assert_close(one[2], whole[2])
        torch.testing.assert_close(one[3], whole[3])


@pytest.mark.parametrize("kernel", [4, 5, 6])
def test_convolutions_halve_and_double(kernel: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert deconv(3, 5, kernel)(x).shape == (2, 5, 16, 16)
    if kernel < 6:
        assert conv(3, 5, kernel, stride=2)(x).shape == (2, 5, 4, 4)
    assert conv(3, 5, 3)(x).shape == (2, 5, 8, 8)
    assert deconv(3, 5, 5, stride=1)(x).shape == (2, 5, 8, 8)


def test_a_spectral_layer_has_norm_one() -> None:
    torch.manual_seed(0)
    layer = spectral(conv(3, 5, 4, stride=2)).train()
    with torch.no_grad():
        for _ in range(200):
            layer(torch.randn(1, 3, 8, 8))
    assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, rel=1e-3)


def test_norms() -> None:
    assert isinstance(norm("none", 8, places=16), nn.Identity)
    assert isinstance(norm("batch", 8, places=16), GlobalBatchNorm)
    assert norm("group", 12, places=16).num_groups == 4


@pytest.mark.parametrize(
    ("width", "most", "side", "groups"),
    [
        (64, 8, 4, 8),
        (64, 8, 2, 8),
        (64, 8, 1, 4),
        (16, 8, 2, 4),
        (16, 8, 1, 1),
        (512, 32, 1, 32),
        (24, 8, 1, 1),
    ],
)
def test_a_group_has_at_least_16_values(width: int, most: int, side: int, groups: int) -> None:
    layer, activation = normed("group", width, "silu", places=side * side, groups=most)
    assert layer.num_groups == groups
    assert width // groups * side**2 >= 16
    assert layer.with_silu
    assert isinstance(activation, nn.Identity)


def test_fewer_values_are_not_normalized() -> None:
    """A norm of one group of 8 values keeps their shape only, and of 1 or 2 values nothing."""
    assert isinstance(norm("group", 8, places=1), nn.Identity)
    layers = nn.Sequential(*normed("group", 8, "silu", places=1))
    x = torch.randn(3, 8)
    torch.testing.assert_close(layers(x), nn.functional.silu(x))
    x = torch.randn(3, 16, 2, 2)
    leaky = nn.Sequential(*normed("group", 16, "leaky_relu", places=4))
    assert isinstance(leaky[1], nn.Identity), "the norm computes it"
    torch.testing.assert_close(leaky(x), nn.functional.leaky_relu(nn.functional.group_norm(x, 4), 0.2))
    x = torch.randn(3, 8)
    relu = nn.Sequential(*normed("group", 3, "relu", places=4))
    torch.testing.assert_close(relu(x[:, :3]), x[:, :3].relu())


def test_recomputing_gives_the_same_gradient() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
    torch.tanh(layer(x)).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    recomputed(lambda value: torch.tanh(layer(value)), x).sum().backward()
    assert torch.equal(x.grad, expected)
