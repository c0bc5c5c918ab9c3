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


@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_taken_where_they_pay(
    dtype: torch.dtype, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "multiplies_tiles", lambda: has_tiles)
    by_tiles = has_tiles and dtype == torch.bfloat16
    large, middle = (torch.empty(width, 512, 4, 4, dtype=dtype, device="meta") for width in (1024, 32))
    assert convolutions._are_products(512, large) == (by_tiles or dtype == torch.float32)
    assert not convolutions._are_products(4096, large), "the windows have four values for each weight"
    assert not convolutions._are_products(32, middle)
    assert convolutions._is_product(512, large)
    assert convolutions._is_product(32, middle) == by_tiles
    layer = Conv2d(512, 32, 4, stride=2, dtype=dtype, device="meta")
    assert convolutions._pays(layer) == by_tiles
    with torch.autocast("cpu", torch.bfloat16):
        assert convolutions._pays(layer) == has_tiles


def test_folds_of_bfloat16_are_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine values of one place: their sum is rounded once."""
    for name, value in (("MORE_WEIGHTS", 1), ("FEW_VALUES", 1000), ("_by_tiles", lambda _: True)):
        monkeypatch.setattr(convolutions, name, value)
    layer = ConvTranspose2d(1, 1, 3, padding=1, bias=False, dtype=torch.bfloat16)
    layer.to(memory_format=torch.channels_last)
    nn.init.ones_(layer.weight)
    x = torch.full((1, 1, 3, 3), 2.0**-9, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = 1
    y = layer(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    assert y[0, 0, 1, 1] == 1 + 2.0**-6, "8 / 512 are lost if they are added to 1 one by one"


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
