"""The compiled bottleneck of a ladder's blocks on a CPU against torch's operations in float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from vaescale.networks import bottleneck
from vaescale.networks.ladder import Convolutions
from vaescale.networks.stages import Block
from vaescale.system import native

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-2}

compiled = pytest.mark.skipif(
    not bottleneck.are_usable(), reason="needs a C++ compiler, GNU OpenMP and AVX-512"
)


class Case(NamedTuple):
    """Sizes of a map, of one beside it, and of the outputs that are a map of their own. added: whether x is added to the others."""

    images: int
    height: int
    width: int
    channels: int
    inner: int
    beside: int = 0
    apart: int = 0
    added: bool = True

    def layers(self) -> Convolutions:
        """The convolutions, with weights that keep the variance and biases that are seen."""
        torch.manual_seed(0)
        outputs = self.apart + self.channels * self.added
        body = Convolutions(self.channels + self.beside, self.inner, outputs, Block(self.height, self.width))
        for layer in body.layers:
            nn.init.normal_(layer.weight, std=1.5 * layer.weight[0].numel() ** -0.5)
            layer.bias = nn.Parameter(0.3 * torch.randn(layer.out_channels))
        return body

    def maps(self, dtype: torch.dtype) -> list[Tensor]:
        """x, and what is beside it: the same numbers in every precision."""
        torch.manual_seed(1)
        channels = [self.channels, self.beside] if self.beside else [self.channels]
        shapes = [(self.images, count, self.height, self.width) for count in channels]
        return [torch.randn(shape).bfloat16().to(dtype) for shape in shapes]

    def outputs(self, body: Convolutions, maps: list[Tensor]) -> list[Tensor]:
        """What the layers return, without maps that have no channels."""
        found = body.outputs(*maps, apart=self.apart, added=self.added)
        return [y for y, given in zip(found, (self.apart, self.added), strict=True) if given]


CASES = {
    "block": Case(3, 32, 32, channels=64, inner=16),
    "prior": Case(5, 5, 7, channels=20, inner=7, apart=9),
    "posterior": Case(2, 8, 8, channels=6, inner=48, beside=5, apart=10, added=False),
    "a vector": Case(33, 1, 1, channels=6, inner=5, apart=3),
    "a column": Case(2, 16, 2, channels=16, inner=13),
    "several images at once, and a rest": Case(37, 4, 4, channels=3, inner=1),
    "wider than a group of places": Case(1, 3, 1100, channels=2, inner=3),
    "more than a tile, and rests": Case(3, 9, 8, channels=37, inner=43, beside=2, apart=7),
}


def results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of the maps and of the weights."""
    body, maps = case.layers(), [x.requires_grad_() for x in case.maps(dtype)]
    if dtype == torch.float64:
        body = body.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = case.outputs(body, maps)
    torch.manual_seed(2)
    gradients = [torch.randn(y.shape).bfloat16().to(y.dtype) for y in outputs]
    wanted = [*maps, *body.parameters()]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, wanted, gradients)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The largest difference, relative to the largest value."""
    return [
        float((one.double() - other).abs().max() / other.abs().max())
        for one, other in zip(found, expected, strict=True)
    ]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_torch_s(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    assert bottleneck.take(case.maps(dtype)[0], case.layers().layers)
    expected, found = results(case, torch.float64), results(case, dtype)
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert max(errors(found, expected)) < TOLERANCE[dtype]
    if dtype == torch.bfloat16:
        with native.switched_off():
            of_torch = errors(results(case, dtype), expected)
        assert sum(errors(found, expected)) < 1.3 * sum(of_torch)


@compiled
def test_number_of_threads_and_other_images_change_no_bit() -> None:
    case = CASES["several images at once, and a rest"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(case, torch.bfloat16)
        torch.set_num_threads(3)
        three = results(case, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(one, three, strict=True))
    body, (x,) = case.layers(), case.maps(torch.bfloat16)
    with torch.no_grad():
        together, alone = (case._replace(images=len(maps)).outputs(body, [maps])[0] for maps in (x, x[20:21]))
    assert torch.equal(together[20:21], alone)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_of_large_values_and_of_nan(dtype: torch.dtype) -> None:
    # With weights of 1, and biases of 0, the layers are a GELU of a GELU of a GELU of a GELU.
    values = torch.tensor([-1e4, -30.0, -4.3, -4.2, -1.0, -1e-3, 0.0, 1e-3, 1.0, 4.2, 4.3, 30.0, 1e4]).to(
        dtype
    )
    body = Convolutions(1, 1, 1, Block(1, 1))
    for parameter in body.parameters():
        nn.init.constant_(parameter, float(parameter.dim() > 1))
    x = values.view(-1, 1, 1, 1).requires_grad_()
    y, _ = body.outputs(x, apart=1, added=False)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    expected = wide
    for _ in range(4):
        expected = gelu(expected)
    (of_wide,) = torch.autograd.grad(expected.sum(), wide)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance / 30)
    torch.testing.assert_close(gradient.double(), of_wide, rtol=2 * tolerance, atol=tolerance / 10)

    with torch.no_grad():
        broken = torch.cat([x, torch.full_like(x[:1], float("nan"))])
        y_of_broken, _ = body.outputs(broken, apart=1, added=False)
    assert y_of_broken[-1].isnan().all()
    assert torch.equal(y_of_broken[:-1], y)


@compiled
def test_autocast_chooses_the_precision_and_frozen_weights_have_no_gradient() -> None:
    case = CASES["posterior"]
    body, maps = case.layers(), case.maps(torch.float32)
    body.c2.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = case.outputs(body, maps)
    assert y.dtype == torch.bfloat16
    torch.autograd.backward(y.float().square().sum())
    assert body.c2.weight.grad is None
    assert body.c1.weight.grad is not None
    assert body.c1.weight.grad.dtype == torch.float32


@compiled
def test_maps_that_do_not_fit_are_refused_as_by_torch() -> None:
    case = CASES["posterior"]
    body, (x, seen) = case.layers(), case.maps(torch.float32)
    for given in ((x[:, :5], seen), (x, seen[:1]), (x, seen[:, :, :4]), (x, None)):
        with pytest.raises(RuntimeError):
            body.outputs(*given, apart=case.apart, added=False)


@compiled
def test_evaluation_keeps_nothing_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    case, kept = CASES["block"], []
    body, (x,) = case.layers(), case.maps(torch.float32)
    library = bottleneck._library()
    monkeypatch.setattr(library, "kept_size", lambda sizes: kept.append(sizes) or 1)
    with torch.no_grad():
        found = body.outputs(x, apart=0, added=True)[1]
    assert not kept
    monkeypatch.undo()
    torch.testing.assert_close(found, body.outputs(x, apart=0, added=True)[1].detach(), rtol=0, atol=0)


@compiled
def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["block"]
    body, (x,) = case.layers(), case.maps(torch.float32)
    assert bottleneck.take(x, body.layers)
    assert not bottleneck.take(x.double(), body.layers)
    assert not bottleneck.take(x.to("meta"), body.layers)
    assert not bottleneck.take(x[:0], body.layers)
    many = Convolutions(64, bottleneck.MOST_CHANNELS + 1, 64, Block(32, 32))
    assert not bottleneck.take(x, many.layers)
    monkeypatch.setattr(native, "multiplies_tiles", lambda: False)
    assert not bottleneck.take(x.bfloat16(), many.layers)
    monkeypatch.setattr(native, "multiplies_tiles", lambda: True)
    assert bottleneck.take(x.bfloat16(), many.layers) == bool(bottleneck._library().multiplies_tiles())
    with native.switched_off():
        assert not bottleneck.take(x, body.layers)
    body.c3.weight = nn.Parameter(torch.zeros(0))  # as DeepSpeed leaves what other processes hold
    assert not bottleneck.take(x, body.layers)
