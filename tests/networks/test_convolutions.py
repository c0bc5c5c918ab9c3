"""Convolutions whose gradients are computed by products of matrices, against torch's in float64."""

import pytest
import torch
from torch import nn

from vaescale.networks import convolutions
from vaescale.networks.convolutions import Conv2d, ConvTranspose2d
from vaescale.system import native


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2), (5, 2), (5, 1), (3, 2)])
@pytest.mark.parametrize("outputs", [3, 12])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("products", ["of weights", "of weights, with tiles", "all"])
def test_values_and_gradients_are_torch_s(
    kernel: int,
    stride: int,
    outputs: int,
    transposed: bool,
    biased: bool,
    products: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "multiplies_tiles", lambda: "tiles" in products)
    monkeypatch.setattr(convolutions, "_by_tiles", lambda _: "tiles" in products)
    monkeypatch.setattr(convolutions, "MANY_VALUES", 1)
    monkeypatch.setattr(convolutions, "MANY_WEIGHTS", 1)
    monkeypatch.setattr(convolutions, "MANY_BY_TILES", 1)
    monkeypatch.setattr(convolutions, "MORE_VALUES", 1000)
    if products == "all":
        monkeypatch.setattr(convolutions, "MORE_WEIGHTS", 1)
        monkeypatch.setattr(convolutions, "FEW_VALUES", 1000)
    torch.manual_seed(0)
    settings = {"stride": stride, "padding": (kernel - 1) // 2, "bias": biased}
    if transposed and stride == 2:
        odd = kernel % 2
        settings |= {"padding": (kernel - stride + odd) // 2, "output_padding": odd}
    kinds = (ConvTranspose2d, nn.ConvTranspose2d) if transposed else (Conv2d, nn.Conv2d)
    own, reference = (kind(10, outputs, kernel, **settings).double() for kind in kinds)
    own.load_state_dict(reference.state_dict())
    x = torch.randn(2, 10, 8, 10, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    y, expected = own(inputs[0]), reference(inputs[1])
    assert type(y.grad_fn).__name__ == ("_TransposedBackward" if transposed else "_ConvolutionBackward")
    dy = torch.randn_like(expected)
    y.backward(dy), expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for found, right in zip(own.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, right.grad)


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "MANY_WEIGHTS", 1)
    monkeypatch.setattr(convolutions, "MANY_BY_TILES", 1)
    layer = Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(frozen != "input")
    layer.weight.requires_grad_(frozen != "weight")
    layer(x).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (layer.weight.grad is None) == (frozen == "weight")


def test_autocast_computes_in_its_precision() -> None:
    layer = ConvTranspose2d(16, 8, 4, stride=2, padding=1)
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_a_map_in_another_order_takes_that_of_the_weights() -> None:
    """A decoder's first map comes from a vector, with its channels outside; the layer's own gradients are for maps with channels inside."""
    layer = ConvTranspose2d(10, 6, 4, stride=2, padding=1).to(memory_format=torch.channels_last)
    y = layer(torch.randn(2, 10, 4, 4))
    assert type(y.grad_fn).__name__ == "_TransposedBackward"
    assert y.is_contiguous(memory_format=torch.channels_last)
