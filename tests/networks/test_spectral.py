"""The sum of singular values against torch.linalg."""

import copy

import pytest
import torch
from torch import nn

from vaescale.networks.layers import spectral
from vaescale.networks.spectral import SpectralSum, kernel_matrix


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 4), nn.GroupNorm(2, 4))


def rows(layer: nn.Module) -> torch.Tensor:
    """The kernel as [out, rest], one output channel at a time."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return layer.weight.flatten(1)
    inputs, outputs = len(layer.weight) // layer.groups, layer.weight.shape[1]
    return torch.stack(
        [
            layer.weight[group * inputs : (group + 1) * inputs, output].flatten()
            for group in range(layer.groups)
            for output in range(outputs)
        ]
    )


def exact(network: nn.Module) -> torch.Tensor:
    kernels = [rows(layer) for layer in network if not isinstance(layer, nn.GroupNorm)]
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


LAYERS = {
    "linear": nn.Linear(7, 5),
    "convolution": nn.Conv2d(6, 4, 3),
    "grouped": nn.Conv2d(6, 4, 3, groups=2),
    "transposed": nn.ConvTranspose2d(6, 4, 3),
    "transposed, grouped": nn.ConvTranspose2d(6, 4, 3, groups=2),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_row_of_the_matrix_is_an_output_channel(kind: str) -> None:
    layer = LAYERS[kind]
    matrix = kernel_matrix(layer).detach()
    assert torch.equal(matrix, rows(layer).detach())
    own = SpectralSum(nn.Sequential(layer))
    assert len(own.left_0) == len(layer.bias)
    for _ in range(300):
        own()
    largest = torch.linalg.svdvals(matrix)[0]
    torch.testing.assert_close(own().detach(), largest, rtol=1e-4, atol=0)
    # The gradient of one output channel is in that channel's row, and nowhere else.
    images = torch.rand(1, *((7,) if kind == "linear" else (6, 5, 5))) + 0.1
    gradient = copy.deepcopy(layer)
    gradient.weight.data = torch.autograd.grad(layer(images)[:, 1].sum(), layer.weight)[0]
    assert kernel_matrix(gradient).any(1).tolist() == [row == 1 for row in range(len(matrix))]
