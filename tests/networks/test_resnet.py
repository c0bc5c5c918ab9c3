"""The AutoencoderKL family: its published sizes, and refusals."""

import pytest
import torch

from vaescale.errors import UserError
from vaescale.networks.config import ResnetConfig
from vaescale.networks.resnet import Attention, ResnetNetwork


def build(*, size: int = 16, **keys) -> ResnetNetwork:
    config = ResnetConfig(**{"latent_dim": 4, "width": 32, "multipliers": (1, 2), "blocks": 1, **keys})
    return ResnetNetwork(
        config, image_size=size, channels=3, encoder_out=2 * config.latent_dim, out_channels=3
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
    layer = Attention(32)
    x = torch.randn(2, 32, 3, 3)
    with torch.no_grad():
        normed = layer.norm(x)
        flat = [part(normed).flatten(2).transpose(1, 2) for part in (layer.query, layer.key, layer.value)]
        weights = torch.softmax(flat[0] @ flat[1].transpose(1, 2) / 32**0.5, dim=2)
        expected = x + layer.out((weights @ flat[2]).transpose(1, 2).view(2, 32, 3, 3))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "fits"), [(15, "use 14 or 16"), (1, "use 2")])
def test_an_indivisible_size_names_those_that_fit(size: int, fits: str) -> None:
    with pytest.raises(UserError, match=f"={size}\\) cannot be halved 1 times.*{fits}, or fewer multipliers"):
        build(size=size)


def test_attention_at_no_map_is_refused() -> None:
    with pytest.raises(UserError, match=r"network.attention_at has 5, but the maps are of sizes \[16, 8\]"):
        build(attention_at=(5,))
