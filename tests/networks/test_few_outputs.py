"""Compiled convolutions with few outputs against torch's in float64."""

import pytest
import torch
from torch import Tensor, nn

from vaescale.networks import few_outputs
from vaescale.networks.convolutions import Conv2d
from vaescale.system import native

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # bfloat16: a rounding of the result

compiled = pytest.mark.skipif(
    native.load(few_outputs.SOURCE) is None, reason="needs a C++ compiler, GNU OpenMP and AVX-512"
)


@pytest.fixture(autouse=True)
def _without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor multiplies tiles, torch's are faster."""
    monkeypatch.setattr(native, "multiplies_tiles", lambda: False)


def near(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Equal up to a share of the largest value."""
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    assert float((found.detach().double() - expected).abs().max() / expected.abs().max()) < tolerance


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("images", "channels", "outputs", "kernel", "padding", "size"),
    [
        (2, 32, 3, 3, 1, (9, 10)),
        (19, 64, 1, 3, 1, (5, 3)),
        (1, 32, 8, 5, 2, (6, 7)),
        (3, 96, 5, 4, 0, (4, 9)),
        (2, 32, 2, 7, 3, (2, 1)),
    ],
)
def test_values_and_gradients_are_torch_s(
    images: int,
    channels: int,
    outputs: int,
    kernel: int,
    padding: int,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    layer = Conv2d(channels, outputs, kernel, padding=padding)
    reference = nn.Conv2d(channels, outputs, kernel, padding=padding)
    with torch.no_grad():
        for own, other in zip(layer.parameters(), reference.parameters(), strict=True):
            own.copy_(own.to(dtype))
            other.copy_(own)
    reference = reference.double()
    x = torch.randn(images, channels, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    wide, x = x.double().requires_grad_(), x.requires_grad_()
    assert few_outputs.take(x, layer.weight.to(dtype), (1, 1), (padding, padding))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    expected = reference(wide)
    dy = torch.randn(expected.shape).to(dtype)
    torch.autograd.backward([y, expected], [dy, dy.double()])
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    for found, right in ((y, expected.detach()), (x.grad, wide.grad)):
        near(found, right, TOLERANCE[dtype])
    for own, other in zip(layer.parameters(), reference.parameters(), strict=True):
        near(own.grad, other.grad, TOLERANCE[dtype])


@compiled
def test_number_of_threads_changes_no_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(21, 32, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, before, found = torch.randn(3, 32, 3, 3).bfloat16(), torch.get_num_threads(), []
    dy = torch.randn(21, 3, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = few_outputs.convolve(x, weight, None, 1)
            found.append((y, few_outputs.weight_gradient(dy, x, weight, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@compiled
def test_what_is_left_to_torch() -> None:
    x, weight = torch.randn(2, 32, 6, 5), torch.randn(3, 32, 3, 3)
    settings = ((1, 1), (1, 1))
    assert few_outputs.take(x, weight, *settings)
    assert not few_outputs.take(x.double(), weight, *settings)
    assert not few_outputs.take(x, weight, (2, 2), (1, 1))
    assert not few_outputs.take(x, weight[:, :20], *settings)
    assert not few_outputs.take(x.bfloat16(), weight, *settings)
    assert not few_outputs.take(torch.randn(2, 64, 6, 5), weight, *settings)
    assert not few_outputs.take(x, weight[..., :2], *settings)
    assert not few_outputs.take(x, torch.randn(9, 32, 3, 3), *settings)


@compiled
def test_what_is_not_finite_stays_in_the_taps_that_see_it() -> None:
    """Beside the last output of an odd width there is no second place to multiply."""
    x = torch.ones(1, 32, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    x[..., 2] = torch.inf
    dy, weight = torch.ones(1, 2, 3, 1).bfloat16(), torch.ones(2, 32, 3, 3).bfloat16()
    dy = dy.contiguous(memory_format=torch.channels_last)
    gradient = few_outputs.weight_gradient(dy[:, :, :1], x, weight, 0)
    assert gradient[..., :2].eq(1).all()
    assert gradient[..., 2].isinf().all()
