"""The convolutional network: shapes, gradients everywhere, bf16, and no dependence on the batch's company."""

import pytest
import torch

from vaescale.errors import UserError
from vaescale.networks.conv import ConvConfig, ConvNetwork


def build(
    *, size: int = 8, channels: int = 1, out: int = 1, widths: tuple[int, ...] = (8, 12), latents: int = 3
) -> ConvNetwork:
    torch.manual_seed(0)
    config = ConvConfig(latent_dim=latents, widths=widths)
    return ConvNetwork(config, image_size=size, channels=channels, encoder_out=2 * latents, out_channels=out)


@pytest.mark.parametrize(
    ("size", "channels", "out", "widths"), [(8, 1, 1, (8, 12)), (32, 3, 6, (4, 8, 8)), (10, 2, 2, (5,))]
)
def test_shapes(size: int, channels: int, out: int, widths: tuple[int, ...]) -> None:
    network = build(size=size, channels=channels, out=out, widths=widths)
    parameters = network.encode(torch.rand(2, channels, size, size))
    assert parameters.shape == (2, 6)
    assert network.decode(parameters[:, :3]).shape == (2, out, size, size)


def test_every_parameter_gets_a_gradient() -> None:
    network = build()
    network.decode(network.encode(torch.rand(4, 1, 8, 8))[:, :3]).square().sum().backward()
    for name, parameter in network.named_parameters():
        if name != "encoder.3.bias":
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_an_image_does_not_depend_on_its_company() -> None:
    network = build()
    images = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(network.encode(images)[2:4], network.encode(images[2:4]), rtol=1e-5, atol=1e-6)


def test_bf16_stays_close() -> None:
    network = build()
    images = torch.rand(4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = network.encode(images)
    torch.testing.assert_close(low.float(), network.encode(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("size", "fits"), [(9, "use 8 or 12"), (2, "use 4")])
def test_an_indivisible_size_names_those_that_fit(size: int, fits: str) -> None:
    with pytest.raises(UserError, match=f"={size}\\).*{fits}"):
        build(size=size)
