"""The compiled functions of normalization on a CPU against torch's in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, leaky_relu, relu, silu

from vaescale.networks import normalization
from vaescale.networks.batch_norm import GlobalBatchNorm
from vaescale.networks.group_norm import GroupNorm
from vaescale.system import native

ACTS = {None: lambda h: h, "silu": silu, "relu": relu, "leaky_relu": lambda h: leaky_relu(h, 0.2)}
# Images, channels, height, width: fewer rows than a span, channels that do not divide it, more channels than a span.
SHAPES = [(3, 32, 32, 32), (2, 24, 15, 13), (2, 1040, 2, 3), (1, 8, 64, 64), (1, 32, 96, 96)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}

compiled = pytest.mark.skipif(not normalization.are_usable(), reason="needs a C++ compiler and GNU OpenMP")


def last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A map of a dtype, dense as [B, H, W, C]."""
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def assert_near(found: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    """Equal up to a rounding of the largest value."""
    assert found is not None
    assert expected is not None
    scale = expected.abs().max()
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", [None, "silu", "leaky_relu"])
def test_group_norm_is_torch_s(
    dtype: torch.dtype, shape: tuple[int, int, int, int], act: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalization, "FEWEST_VALUES", 1)
    torch.manual_seed(0)
    layer = GroupNorm(8, shape[1])
    layer.activation = act
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x, dy = last(1 + 3 * torch.randn(shape), dtype).requires_grad_(), last(torch.randn(shape), dtype)
    y = layer(x)
    assert type(y.grad_fn).__name__ == "_GroupNormBackward"
    y.backward(dy)
    wide = x.detach().double().requires_grad_()
    weights = [parameter.detach().double().requires_grad_() for parameter in layer.parameters()]
    expected = ACTS[act](group_norm(wide, 8, *weights))
    expected.backward(dy.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    for found, reference in (
        (y.detach(), expected.detach()),
        (x.grad, wide.grad),
        (layer.weight.grad, weights[0].grad),
        (layer.bias.grad, weights[1].grad),
    ):
        assert_near(found, reference, dtype)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=compiled), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [None, "silu", "relu", "leaky_relu"])
def test_batch_norm_is_torch_s(
    dtype: torch.dtype, act: str | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalization, "FEWEST_VALUES", 1 if fused else 10**9)
    torch.manual_seed(0)
    shape = (5, 12, 9, 7)
    own, reference = GlobalBatchNorm(12), nn.BatchNorm2d(12).double()
    own.activation = act
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(reference, name).copy_(getattr(own, name).normal_())
    x, dy = last(1 + 3 * torch.randn(shape), dtype).requires_grad_(), last(torch.randn(shape), dtype)
    wide = x.detach().double().requires_grad_()
    y, expected = own(x), ACTS[act](reference(wide))
    y.backward(dy), expected.backward(dy.double())
    assert y.dtype == dtype
    for found, right in ((y.detach(), expected.detach()), (x.grad, wide.grad)):
        assert_near(found, right, dtype)
    for found, right in zip(own.parameters(), reference.parameters(), strict=True):
        assert_near(found.grad, right.grad, dtype)
    assert_near(own.running_mean, reference.running_mean, torch.float32)
    assert_near(own.running_variance, reference.running_var, torch.float32)
    own.eval(), reference.eval()
    with torch.no_grad():
        assert_near(own(x), ACTS[act](reference(wide)), dtype)
    assert_near(
        own(x).detach(), ACTS[act](reference(wide)).detach(), dtype
    )  # of a frozen layer, with a gradient


@compiled
def test_sums_depend_neither_on_threads_nor_on_the_other_images() -> None:
    torch.manual_seed(0)
    layer, threads = GroupNorm(8, 32, with_silu=True), torch.get_num_threads()

    def results(x: Tensor) -> list[Tensor]:
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    x = last(torch.randn(4, 32, 32, 32), torch.bfloat16)
    whole = results(x)
    try:
        torch.set_num_threads(1)
        alone, first = results(x), results(last(x[:1], torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    for one, other, image in zip(whole, alone, first, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[:1], image)


@compiled
def test_a_large_mean_does_not_cancel_and_nan_stays() -> None:
    x = last(1000 + torch.randn(2, 16, 32, 32), torch.float32)
    layer = GroupNorm(4, 16)
    expected = group_norm(x.double(), 4)
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=2e-3)
    x[0, 0, 3, 3] = torch.nan
    x[1, 5, 1, 1] = torch.inf
    y = layer(x)
    assert y[0, :4].isnan().all()
    assert y[0, 4:].isfinite().all()
    assert not y[1, 4:8].isfinite().all()
    assert torch.equal(torch.isnan(layer(x)), torch.isnan(group_norm(x, 4)))


def test_small_or_other_maps_are_torch_s() -> None:
    large = torch.zeros(2, 32, 32, 32).contiguous(memory_format=torch.channels_last)
    assert normalization.take(large) == normalization.are_usable()
    assert not normalization.take(large.contiguous())
    assert not normalization.take(large.double())
    assert not normalization.take(large[:, :, :4, :4].contiguous(memory_format=torch.channels_last))
    assert not normalization.take(large.to("meta"))


def test_the_switch_and_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = normalization.SOURCE
    monkeypatch.setenv(native.SWITCH, "0")
    assert native._loaded.__wrapped__(source) is None
    monkeypatch.delenv(native.SWITCH)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native._loaded.__wrapped__(source) is None
    assert "there is no C++ compiler" in capsys.readouterr().err


@compiled
def test_a_source_that_does_not_compile(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "wrong.cpp"
    source.write_text("int f( {")
    assert native._loaded.__wrapped__(source) is None
    assert "cannot compile wrong.cpp (" in capsys.readouterr().err
    source.write_text('extern "C" int seven() { return 7; }')
    library = native._loaded.__wrapped__(source)
    assert library is not None
    assert library.seven() == 7
    kept = list((tmp_path / "vaescale" / "native").iterdir())
    assert len(kept) == 1
    stamp = kept[0].stat().st_mtime_ns
    assert native._loaded.__wrapped__(source) is not None
    assert kept[0].stat().st_mtime_ns == stamp, "it was compiled again"


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_of_small_and_large_values_and_of_nan(dtype: torch.dtype) -> None:
    values = [0.0, 1e-3, 0.1, 0.7, 1.0, 2.5, 5.0, 20.0, 80.0, 90.0, 1e4, 1e30, float("inf")]
    x = torch.tensor([*values, *(-value for value in values[1:-1]), float("nan")]).to(dtype)
    x = x.view(1, 1, -1, 1).expand(1, 16, -1, 1).contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(1, 16), torch.zeros(1, 16)
    y = normalization.affine(x, one, zero, "silu").double()
    wide = x.double().requires_grad_()
    expected = silu(wide)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(y, expected.detach(), rtol=tolerance, atol=1e-30, equal_nan=True)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    found = normalization.input_gradient(
        torch.ones_like(x), x, *(one, zero, zero, zero, zero), "silu"
    ).double()
    finite = x.isfinite()
    torch.testing.assert_close(found[finite], slope[finite], rtol=tolerance, atol=tolerance / 30)
    assert found[x.isnan()].isnan().all()
