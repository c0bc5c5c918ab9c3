"""The sum of singular values against torch.linalg."""

import pytest
import torch
from torch import nn

from vaescale.networks.layers import spectral
from vaescale.networks.spectral import SpectralSum


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 4), nn.GroupNorm(2, 4))


def exact(network: nn.Module) -> torch.Tensor:
    kernels = [layer.weight.flatten(1) for layer in network if not isinstance(layer, nn.GroupNorm)]
    return sum(torch.linalg.matrix_norm(kernel, 2) for kernel in kernels)


def test_value_and_gradient(network: nn.Module) -> None:
    own = SpectralSum(network)
    for _ in range(200):
        own()
    torch.testing.assert_close(own(), exact(network), rtol=1e-4, atol=0)
    own().backward()
    found = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    exact(network).backward()
    for got, parameter in zip(found, network.parameters(), strict=True):
        if parameter.grad is None:
            assert got is None
        else:
            torch.testing.assert_close(got, parameter.grad, rtol=1e-2, atol=1e-3)


def test_it_follows_weights_that_move(network: nn.Module) -> None:
    own = SpectralSum(network)
    for _ in range(100):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        value = own()
    torch.testing.assert_close(value, exact(network), rtol=0.02, atol=0)


def test_evaluation_moves_nothing_and_the_state_comes_back(network: nn.Module) -> None:
    own, other = SpectralSum(network), SpectralSum(network)
    other.load_state_dict(own.state_dict())
    before = {name: value.clone() for name, value in own.state_dict().items()}
    own.eval()()
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert torch.equal(own(), other.eval()())


def test_a_layer_that_is_normalized_already_is_left_out() -> None:
    assert SpectralSum(nn.Sequential(nn.Linear(3, 3), spectral(nn.Linear(3, 3)))).state_dict().keys() == {
        "left_0"
    }
