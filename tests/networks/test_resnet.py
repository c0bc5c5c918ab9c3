"""The AutoencoderKL family: its published sizes, its attention, what it computes under autocast, and refusals."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from vaescale.errors import UserError
from vaescale.networks.attention import attend, explicit_attention
from vaescale.networks.config import ResnetConfig
from vaescale.networks.resnet import Attention, Norms, ResnetNetwork

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def build(*, size: int = 16, **keys) -> ResnetNetwork:
    config = ResnetConfig(**{"latent_dim": 4, "width": 32, "multipliers": (1, 2), "blocks": 1, **keys})
    return ResnetNetwork(
        config, image_size=(size, size), channels=3, encoder_out=2 * config.latent_dim, out_channels=3
    )


@pytest.mark.parametrize(
    ("keys", "parameters", "factor"),
    [
        (
            {"latent_dim": 4, "multipliers": (1, 2, 4, 4)},
            83_653_863,
            8,
        ),  # the autoencoder of Stable Diffusion 1
        ({"latent_dim": 3, "multipliers": (1, 2, 4)}, None, 4),
        ({"latent_dim": 16, "multipliers": (1, 1, 2, 2, 4), "attention_at": (16,)}, None, 16),
    ],
)
def test_the_published_sizes(keys, parameters: int | None, factor: int) -> None:
    with torch.device("meta"):
        network = build(size=256, **{"width": 128, "blocks": 2, **keys})
    assert network.latent_shape == (keys["latent_dim"], 256 // factor, 256 // factor)
    if parameters:
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_attention_is_the_softmax_s() -> None:
    torch.manual_seed(0)
    layer = Attention(32, Norms(None, 1e-5), size=(3, 3))
    x = torch.randn(2, 32, 3, 3)
    with torch.no_grad():
        normed = layer.norm(x)
        flat = [part(normed).flatten(2).transpose(1, 2) for part in (layer.query, layer.key, layer.value)]
        weights = torch.softmax(flat[0] @ flat[1].transpose(1, 2) / 32**0.5, dim=2)
        expected = x + layer.out((weights @ flat[2]).transpose(1, 2).view(2, 32, 3, 3))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_explicit_attention_is_torch_s(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 40, 512).to(device, dtype).requires_grad_() for _ in range(3)]
    weights = torch.randn(2, 40, 512).to(device, dtype)
    with torch.autocast(device, dtype):
        mixed = [explicit_attention(*leaves), attend(*leaves)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = scaled_dot_product_attention(*exact)
    gradients = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for found in mixed:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
        for one, other in zip(torch.autograd.grad((found * weights).sum(), leaves), gradients, strict=True):
            assert float((one.double() - other).norm()) < 1e-2 * float(other.norm())


# torch's own tracer makes an instance of the autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_explicit_attention_is_traced_whole(device: str) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 40, 64).to(device, torch.bfloat16).requires_grad_() for _ in range(3)]
    found = []
    for function in (
        explicit_attention,
        torch.compile(explicit_attention, backend="aot_eager", fullgraph=True),
    ):
        mixed = function(*leaves)
        found.append([mixed, *torch.autograd.grad(mixed.float().square().sum(), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_no_wide_map_leaves_bf16_or_channels_last(device: str) -> None:
    """Each exception would be converted by the convolution after it: one or two passes more over the map."""
    network = build().to(device).to(memory_format=torch.channels_last)
    seen, strange = set(), []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        for name, value in (("input", inputs[0]), ("output", y)):
            if value.dim() == 4 and value.shape[1] >= 32:
                seen.add(type(module).__name__)
                if value.dtype != torch.bfloat16 or not value.is_contiguous(
                    memory_format=torch.channels_last
                ):
                    strange.append((module, name, value.dtype, value.stride()))

    for module in network.modules():
        if module is not network:
            module.register_forward_hook(look)
    with torch.autocast(device, torch.bfloat16):
        network.decode(network.encode(torch.rand(2, 3, 16, 16, device=device))[:, :4].float())
    assert not strange
    assert {"GroupNorm", "Conv2d", "Residual", "Attention", "Halve", "Double"} <= seen


@pytest.mark.parametrize(("size", "fits"), [(15, "use 14 or 16"), (1, "use 2")])
def test_an_indivisible_size_names_those_that_fit(size: int, fits: str) -> None:
    with pytest.raises(UserError, match=f"={size}\\) cannot be halved 1 times.*{fits}, or fewer multipliers"):
        build(size=size)


def test_attention_at_no_map_is_refused() -> None:
    with pytest.raises(UserError, match=r"network.attention_at has 5, but the maps are of sizes \[16, 8\]"):
        build(attention_at=(5,))
