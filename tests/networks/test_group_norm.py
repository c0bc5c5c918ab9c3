"""GroupNorm with SiLU: torch's bits on a CPU, and the Triton kernels against torch's float64, in Triton's interpreter or on a GPU."""

import hashlib
import importlib.util
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu

from vaescale.networks.config import ConvConfig, ResnetConfig
from vaescale.networks.conv import ConvNetwork
from vaescale.networks.group_norm import GroupNorm, group_norm_silu, group_norm_silu_backward
from vaescale.networks.layers import normed
from vaescale.networks.resnet import ResnetNetwork

NHWC = torch.channels_last
NAMES = {
    "conv": "bd1c04258695ab94",
    "resnet": "3b0c9f740bf5d792",
}
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1 in the environment",
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [  # images, channels, groups, height, width, mean of the input
    (2, 32, 8, 5, 7, 0.0),
    (1, 48, 8, 9, 11, 100.0),
    (3, 64, 32, 1, 1, 0.0),
    (1, 128, 32, 33, 17, 100.0),
    (2, 512, 32, 3, 5, -3.0),
    (1, 32, 8, 131, 127, 100.0),  # several tiles in a chunk, and a part of one at the end
]
# The interpreter cuts bf16 and fp16 off where a GPU rounds to the nearest: one unit of the last place.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def maps(case: tuple[int, int, int, int, int, float], dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, dy, weight and bias."""
    images, channels, _, height, width, mean = case
    generator = torch.Generator().manual_seed(5)
    shape = (images, channels, height, width)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    x, dy = ((value).to(device, dtype).contiguous(memory_format=NHWC) for value in (x + mean, dy))
    return [x, dy, weight.to(device), bias.to(device)]


def reference(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, groups: int, with_silu: bool
) -> list[Tensor]:
    """y, dx, dweight and dbias of torch in float64."""
    leaves = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    y = group_norm(leaves[0], groups, leaves[1], leaves[2], 1e-5)
    y = silu(y) if with_silu else y
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The difference of each value is at most the tolerance times its size, and 2e-5 of the largest value."""
    difference = (found.detach().double() - expected).abs()
    bound = tolerance * expected.abs() + 2e-5 * expected.abs().max()
    assert bool((difference <= bound).all()), float((difference - bound).max())


def check_kernels(case: tuple, dtype: torch.dtype, with_silu: bool, device: str, rounding: float) -> None:
    x, dy, weight, bias = maps(case, dtype, device)
    y, mean, rstd = group_norm_silu(x, weight, bias, case[2], 1e-5, with_silu)
    gradients = group_norm_silu_backward(dy, x, weight, bias, mean, rstd, with_silu)
    for value in (y, gradients[0]):
        assert value.dtype == dtype
        assert value.is_contiguous(memory_format=NHWC)
    found = [y, *gradients]
    tolerances = [rounding, rounding, 1e-5, 1e-5]
    for value, expected, tolerance in zip(
        found, reference(x, dy, weight, bias, case[2], with_silu), tolerances, strict=True
    ):
        assert_near(value, expected, tolerance)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "with_silu"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
)
def test_interpreted_kernels_agree_with_float64(case, dtype: torch.dtype, with_silu: bool) -> None:
    check_kernels(case, dtype, with_silu, "cpu", TOLERANCE[dtype])


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_an_image_s_bits_do_not_depend_on_the_batch() -> None:
    x, dy, weight, bias = maps(CASES[0], torch.float32, "cpu")
    whole, mean, rstd = group_norm_silu(x, weight, bias, 8, 1e-5, True)
    dx, _, _ = group_norm_silu_backward(dy, x, weight, bias, mean, rstd, True)
    one, mean, rstd = group_norm_silu(x[1:], weight, bias, 8, 1e-5, True)
    dx_of_one, _, _ = group_norm_silu_backward(dy[1:], x[1:], weight, bias, mean, rstd, True)
    assert torch.equal(one, whole[1:])
    assert torch.equal(dx_of_one, dx[1:])


@interpreted
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_the_operation_is_registered_well() -> None:
    """torch's own checks: the schema, shapes without data, and the gradient under tracing."""
    x, _, weight, bias = maps(CASES[0], torch.float32, "cpu")
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    torch.library.opcheck(group_norm_silu, (*leaves, 8, 1e-5, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [torch.contiguous_format, NHWC])
def test_on_a_cpu_the_bits_are_torch_s(dtype: torch.dtype, order: torch.memory_format) -> None:
    torch.manual_seed(0)
    own, plain = GroupNorm(8, 32, with_silu=True).to(dtype), nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU())
    plain.to(dtype)
    found = []
    for layer in (own, plain):
        x = torch.linspace(-3, 5, 2 * 32 * 35, dtype=dtype).view(2, 32, 5, 7).contiguous(memory_format=order)
        y = layer(x.requires_grad_())
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_parameters_are_torch_s() -> None:
    own, plain = GroupNorm(8, 32, with_silu=True).state_dict(), nn.GroupNorm(8, 32).state_dict()
    assert list(own) == list(plain)
    assert all(torch.equal(own[name], plain[name]) for name in plain)


def test_a_pair_keeps_two_places_in_a_sequence() -> None:
    x = torch.linspace(-3, 5, 288).view(2, 16, 3, 3)
    for kind, activation in (("group", "silu"), ("group", "relu"), ("none", "silu")):
        pair = normed(kind, 16, activation, places=9)
        assert len(pair) == 2
        plain = nn.GroupNorm(8, 16) if kind == "group" else nn.Identity()
        expected = {"silu": silu, "relu": torch.relu}[activation](plain(x))
        assert torch.equal(nn.Sequential(*pair)(x), expected)
        assert not list(pair[1].parameters())


@pytest.mark.parametrize("name", NAMES)
def test_names_in_checkpoints_are_those_of_earlier_versions(name: str) -> None:
    network = {
        "conv": lambda: ConvNetwork(
            ConvConfig(latent_dim=4, widths=(8, 16)), image_size=(16, 16), **CHANNELS
        ),
        "resnet": lambda: ResnetNetwork(
            ResnetConfig(latent_dim=4, width=32, multipliers=(1, 2), blocks=1),
            image_size=(16, 16),
            **CHANNELS,
        ),
    }[name]()
    listed = "\n".join(f"{key} {list(value.shape)}" for key, value in network.state_dict().items())
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == NAMES[name]


CHANNELS = {"channels": 3, "encoder_out": 8, "out_channels": 3}


def gpu_layer(width: int = 64) -> GroupNorm:
    layer = GroupNorm(8, width, with_silu=True)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, width))
        layer.bias.copy_(torch.linspace(-1, 1, width))
    return layer.cuda()


def gradients(layer: nn.Module, x: Tensor, dy: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *parameters], dy)]


class TestOnAGpu:
    """The same on CUDA, where rounding is to the nearest."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("case", [*CASES, (2, 1024, 32, 16, 16, 1.0), (16, 128, 32, 64, 64, 100.0)])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("with_silu", [True, False])
    def test_kernels_agree_with_float64(self, case, dtype: torch.dtype, with_silu: bool) -> None:
        rounding = 1e-5 if dtype == torch.float32 else 0.51 * TOLERANCE[dtype]
        check_kernels(case, dtype, with_silu, "cuda", rounding)

    def test_the_layer_uses_the_kernels_and_keeps_dtype_and_order(self) -> None:
        layer = gpu_layer()
        x, dy, *_ = maps((2, 64, 8, 9, 7, 3.0), torch.bfloat16, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x.requires_grad_())
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=NHWC)
        assert "group_norm_silu" in type(y.grad_fn).__name__
        (dx,) = torch.autograd.grad(y, [x], dy)
        assert dx.dtype == torch.bfloat16
        assert dx.is_contiguous(memory_format=NHWC)

    def test_other_inputs_take_torch_s_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = gpu_layer()
        x, *_ = maps((2, 64, 8, 9, 7, 3.0), torch.float32, "cuda")
        expected = silu(group_norm(x, 8, layer.weight, layer.bias))
        assert torch.equal(
            layer(x.contiguous()), silu(group_norm(x.contiguous(), 8, layer.weight, layer.bias))
        )
        assert layer.double()(x.double()).dtype == torch.float64
        monkeypatch.setattr(GroupNorm, "fused", False)
        assert torch.equal(layer.float()(x), expected)

    def test_two_runs_are_equal_bit_for_bit(self) -> None:
        layer = gpu_layer()
        x, dy, *_ = maps((4, 64, 8, 65, 63, 3.0), torch.bfloat16, "cuda")
        first = gradients(layer, x, dy, list(layer.parameters()))
        for _ in range(3):
            again = gradients(layer, x, dy, list(layer.parameters()))
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's imports, in torch 2.11
    def test_compiled(self) -> None:
        layer = gpu_layer()
        x, dy, *_ = maps((2, 64, 8, 9, 7, 3.0), torch.bfloat16, "cuda")
        expected = gradients(layer, x, dy, list(layer.parameters()))
        found = gradients(torch.compile(layer, fullgraph=True), x, dy, list(layer.parameters()))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()

    def test_in_a_cuda_graph(self) -> None:
        layer, plain = gpu_layer(), gpu_layer()
        x, dy, *_ = maps((2, 64, 8, 9, 7, 3.0), torch.bfloat16, "cuda")
        sample = torch.zeros_like(x).requires_grad_()
        graphed = torch.cuda.make_graphed_callables(layer, (sample,))
        expected = gradients(plain, x, dy, list(plain.parameters()))
        leaf = x.detach().requires_grad_()
        y = graphed(leaf)
        y.backward(dy)
        for one, other in zip([y, leaf.grad, layer.weight.grad, layer.bias.grad], expected, strict=True):
            assert torch.equal(one, other)
