"""Images that are no squares: a network with its kernels transposed maps transposed images to transposed parameters, so that no layer
takes a height for a width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from vaescale import noise
from vaescale.adversaries.config import ImagePlayerConfig
from vaescale.adversaries.networks import ImageCritic
from vaescale.config import OneOf
from vaescale.errors import UserError
from vaescale.likelihoods.config import GaussianConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.vae import VAE
from vaescale.networks.config import NETWORKS
from vaescale.networks.stages import suggested

WIDE, HIGH = (8, 24), (24, 8)
RESNET = {"kind": "resnet", "latent_dim": 2, "width": 16, "multipliers": [1, 2], "blocks": 1}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of WIDE, and what HIGH has otherwise
    "conv": ({"kind": "conv", "latent_dim": 3, "widths": [8, 12]}, {}),
    "conv, latent map": ({"kind": "conv", "latent_dim": 3, "widths": [8, 12], "latent_map": True}, {}),
    "resnet": ({**RESNET, "attention_at": [4]}, {"attention_at": [12]}),
    "ladder": ({"kind": "ladder", "latent_dim": 2, "width": 8}, {}),
    "linear": ({"kind": "linear", "latent_dim": 3}, {}),
}


def build(section: dict[str, Any], size: tuple[int, int]) -> VAE:
    torch.manual_seed(0)
    config = OneOf(NETWORKS).validate(section)
    likelihood = GaussianConfig(sigma=0.3, mean="identity")
    model = build_vae(config, DiagonalConfig(), likelihood, image_size=size, channels=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def transposed(value: Tensor, like: Tensor, small: tuple[int, int]) -> Tensor:
    """A parameter for transposed images. small: the map of HIGH, where a vector meets it, or the image itself."""
    if value.ndim == 4:
        return value.transpose(2, 3)
    places = small[0] * small[1]
    if value.ndim == 2 and value.shape[1] % places == 0 and value.shape[1] > places:  # into a vector
        return value.view(len(value), -1, *small[::-1]).transpose(2, 3).reshape(like.shape)
    if len(value) % places == 0 and len(value) > places:  # out of one
        return value.view(-1, *small[::-1], *value.shape[1:]).transpose(1, 2).reshape(like.shape)
    return value


@pytest.mark.parametrize("name", CASES)
def test_transposed_images_have_transposed_parameters(name: str) -> None:
    section, otherwise = CASES[name]
    wide, high = build(section, WIDE), build({**section, **otherwise}, HIGH)
    small = {"conv": (6, 2), "linear": HIGH}.get(name, HIGH)
    others = dict(high.network.named_parameters())
    with torch.no_grad():
        for key, mine in wide.network.named_parameters():
            part, _, last = key.rpartition(".")
            theirs = others[f"biases.{3 * int(last)}" if part == "biases" else key]  # named by height
            theirs.copy_(transposed(mine, theirs, small))
    x = torch.rand(2, 2, *WIDE, dtype=torch.float64)
    if name == "ladder":
        maps, turned = wide.network.bottom_up(x), high.network.bottom_up(x.transpose(2, 3))
        assert [tuple(each.shape[2:]) for each in maps.values()] == [(8, 24), (4, 12), (1, 3)]
        for mine, theirs in zip(maps.values(), turned.values(), strict=True):
            torch.testing.assert_close(theirs, mine.transpose(2, 3))
        zeros = torch.zeros(2, wide.latent_dim, dtype=torch.float64)
        tops = [
            model.decode(zeros[:, : model.latent_dim], noise.Stream(0, 0, torch.arange(2)), 0.0)
            for model in (wide, high)
        ]
        torch.testing.assert_close(tops[1], tops[0].transpose(2, 3))
        return
    mine, theirs = wide.network.encode(x), high.network.encode(x.transpose(2, 3))
    torch.testing.assert_close(theirs, mine.transpose(2, 3) if mine.ndim == 4 else mine)
    z = wide.posterior(x).mu
    decoded = high.network.decode(z.transpose(2, 3) if z.ndim == 4 else z)
    assert decoded.shape == (2, 2, *HIGH)
    torch.testing.assert_close(decoded, wide.network.decode(z).transpose(2, 3))


@pytest.mark.parametrize("network", ["dcgan", "patch"])
def test_discriminators_too(network: str) -> None:
    config = ImagePlayerConfig(network=network, widths=(8,), norm="group")  # type: ignore[arg-type]
    wide, high = ImageCritic(config, (2, *WIDE)).double(), ImageCritic(config, (2, *HIGH)).double()
    with torch.no_grad():
        for mine, theirs in zip(wide.parameters(), high.parameters(), strict=True):
            theirs.copy_(transposed(mine, theirs, (12, 4)))
    x = torch.rand(2, 2, *WIDE, dtype=torch.float64)
    torch.testing.assert_close(high(x.transpose(2, 3)).sort().values, wide(x).sort().values)


@pytest.mark.parametrize("size", [(48, 96), (218, 178), (12, 8), (5, 7), (1, 4), (64, 64)])
def test_a_ladder_is_suggested_for_any_shape(size: tuple[int, int]) -> None:
    section = NETWORKS["ladder"].model_validate({"kind": "ladder", "latent_dim": 1, "width": 4})
    with torch.device("meta"):
        model = build_vae(section, DiagonalConfig(), GaussianConfig(sigma=0.3), image_size=size, channels=1)
    down, up = suggested(size)
    assert model.network.groups[-1].block.resolution == size[0]
    assert model.group_maps[-1] == size
    assert model.group_places[-1] == size[0] * size[1]
    assert len(up) < 30
    assert down[-1] == up[0]


def test_what_does_not_divide_names_the_nearest_shapes() -> None:
    conv = NETWORKS["conv"].model_validate({"kind": "conv", "latent_dim": 2, "widths": [4, 4, 4]})
    with pytest.raises(
        UserError,
        match=r"data.image_size \(=\[218, 178\]\) cannot be halved 3 times .*; use \[216, 176\] or \[224, 184\]",
    ):
        build_vae(conv, DiagonalConfig(), GaussianConfig(), image_size=(218, 178), channels=3)
    ladder = NETWORKS["ladder"].model_validate({"kind": "ladder", "latent_dim": 1, "encoder": "12d3,4"})
    with pytest.raises(UserError, match=r"'12d3' does not pool 12x8; pool it by 2 or 4"):
        build_vae(ladder, DiagonalConfig(), GaussianConfig(), image_size=(12, 8), channels=3)


def test_a_frame_that_is_black_changes_nothing_inside() -> None:
    """A linear network on squares, and on the same squares within a wider black frame: equal gradients inside, none in the frame."""
    section = {"kind": "linear", "latent_dim": 3}
    square, framed = build(section, (6, 6)), build(section, (8, 12))
    inside = torch.zeros(2, 8, 12, dtype=torch.bool)
    inside[:, 1:7, 4:10] = True
    flat = inside.flatten()
    with torch.no_grad():
        for layer in ("encoder", "decoder"):
            mine, theirs = getattr(square.network, layer), getattr(framed.network, layer)
            for parameter in theirs.parameters():
                parameter.zero_()
            if layer == "encoder":
                theirs.weight[:, flat], theirs.bias[:] = mine.weight, mine.bias
            else:
                theirs.weight[flat], theirs.bias[flat] = mine.weight, mine.bias
        framed.network.log_sigma.copy_(square.network.log_sigma)
    images = torch.randint(0, 256, (5, 2, 6, 6), dtype=torch.uint8)
    wide = torch.zeros(5, 2, 8, 12, dtype=torch.uint8)
    wide[:, :, 1:7, 4:10] = images
    stream, mask = noise.Stream(0, 3, torch.arange(5)), torch.ones(5, dtype=torch.bool)
    for model, batch in ((square, images), (framed, wide)):
        terms = model(batch, stream, mask)
        (terms.kl.sum() - terms.log_px.sum()).backward()
    for layer in ("encoder", "decoder"):
        mine, theirs = (getattr(model.network, layer).weight.grad for model in (square, framed))
        theirs = theirs.T if layer == "encoder" else theirs
        torch.testing.assert_close(theirs[flat], mine.T if layer == "encoder" else mine)
        assert not theirs[~flat].any()
