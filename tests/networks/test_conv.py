"""The convolutional network: shapes, gradients everywhere, bf16, and no dependence on the batch's company."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from vaescale.errors import UserError
from vaescale.networks.config import ConvConfig
from vaescale.networks.conv import ConvNetwork
from vaescale.networks.layers import GlobalBatchNorm


def build(
    *, size: int = 8, channels: int = 1, out: int = 1, widths: tuple[int, ...] = (8, 12), latents: int = 3
) -> ConvNetwork:
    torch.manual_seed(0)
    config = ConvConfig(latent_dim=latents, widths=widths)
    return ConvNetwork(
        config, image_size=(size, size), channels=channels, encoder_out=2 * latents, out_channels=out
    )


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


def reference_sigma_vae(channels: int, latents: int, size: int) -> int:
    """Parameters of the network in the sigma-VAE authors' code, layer by layer."""
    features = 128 * (size // 4) ** 2
    encoder = [(channels, 32, 3), (32, 64, 4), (64, 128, 5)]
    decoder = [(128, 64, 6), (64, 32, 6), (32, channels, 5)]
    maps = sum(a * b * kernel**2 + b for a, b, kernel in (*encoder, *decoder))
    return maps + 2 * (features * latents + latents) + latents * features + features


def reference_wae(latents: int, size: int) -> int:
    """Tolstikhin et al. 2018, appendix C.2: 5x5 convolutions, batch normalization after all but the first of the decoder."""
    encoder = [(3, 128), (128, 256), (256, 512), (512, 1024)]
    decoder = [(1024, 512), (512, 256), (256, 128)]
    maps = sum(a * b * 25 + b + 2 * b for a, b in (*encoder, *decoder)) + 128 * 3 * 25 + 3
    into, start = 1024 * (size // 16) ** 2, 1024 * (size // 8) ** 2
    return maps + 2 * (into * latents + latents) + latents * start + start


def reference_infogan(latents: int, size: int) -> int:
    """Dai & Wipf's code: two convolutions and a hidden layer of 1024 on both sides."""
    start = 128 * (size // 4) ** 2
    encoder = (
        16 * 64
        + 64
        + 64 * 128 * 16
        + 128
        + 2 * 128
        + start * 1024
        + 1024
        + 2 * 1024
        + 1024 * 2 * latents
        + 2 * latents
    )
    decoder = latents * 1024 + 1024 + 2 * 1024 + 1024 * start + start + 2 * start
    return encoder + decoder + 128 * 64 * 16 + 64 + 2 * 64 + 64 * 16 + 1


@pytest.mark.parametrize(
    ("preset", "size", "channels", "latents", "expected"),
    [
        ("sigma_vae_svhn", 28, 1, 20, reference_sigma_vae(1, 20, 28)),
        ("sigma_vae_svhn", 32, 3, 20, reference_sigma_vae(3, 20, 32)),
        ("wae_celeba", 64, 3, 64, reference_wae(64, 64)),
        ("infogan", 28, 1, 64, reference_infogan(64, 28)),
    ],
)
def test_presets_have_the_published_layers(
    preset: str, size: int, channels: int, latents: int, expected: int
) -> None:
    config = ConvConfig(latent_dim=latents, preset=preset)
    with torch.device("meta"):
        network = ConvNetwork(
            config, image_size=(size, size), channels=channels, encoder_out=2 * latents, out_channels=channels
        )
    left_out = sum(
        module.weight.numel() for module in network.modules() if isinstance(module, GlobalBatchNorm)
    )
    assert sum(parameter.numel() for parameter in network.parameters()) == expected - left_out, (
        "all but the biases before a BatchNorm, which it subtracts again"
    )


def test_a_preset_without_batch_norm_is_a_line_of_the_recipe() -> None:
    network = ConvNetwork(
        ConvConfig(latent_dim=4, preset="wae_celeba", norm="group"),
        image_size=(16, 16),
        channels=3,
        encoder_out=8,
        out_channels=3,
    )
    kinds = {type(module).__name__ for module in network.modules()}
    assert "GroupNorm" in kinds
    assert "GlobalBatchNorm" not in kinds


@pytest.mark.parametrize(
    ("preset", "size", "fits"),
    [("wae_celeba", 40, "use 32 or 48"), ("infogan", 30, "use 28 or 32"), ("sigma_vae_svhn", 2, "use 4")],
)
def test_a_preset_names_the_sizes_that_fit(preset: str, size: int, fits: str) -> None:
    with pytest.raises(UserError, match=f"={size}\\).*network.preset \\(={preset}\\).*{fits}"):
        ConvNetwork(
            ConvConfig(latent_dim=4, preset=preset),
            image_size=(size, size),
            channels=3,
            encoder_out=8,
            out_channels=3,
        )


def test_a_preset_has_its_own_widths() -> None:
    with pytest.raises(ValidationError, match=r"leave network\.widths out"):
        ConvConfig(latent_dim=4, preset="infogan", widths=(8,))


class Reference(torch.nn.Module):
    """The sigma-VAE authors' network and WAE's, written out with torch's own layers."""

    def __init__(self, name: str, channels: int, latents: int, size: int) -> None:
        super().__init__()
        nn = torch.nn
        if name == "sigma_vae_svhn":
            start = size // 4
            self.encoder = nn.Sequential(
                *(nn.Conv2d(channels, 32, 3, 1, 1), nn.ReLU()),
                *(nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 5, 2, 2), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(128 * start**2, 2 * latents)),
            )
            self.decoder = nn.Sequential(
                *(nn.Linear(latents, 128 * start**2), nn.Unflatten(1, (128, start, start))),
                *(
                    nn.ConvTranspose2d(128, 64, 6, 2, 2),
                    nn.ReLU(),
                    nn.ConvTranspose2d(64, 32, 6, 2, 2),
                    nn.ReLU(),
                ),
                nn.Conv2d(32, channels, 5, 1, 2),
            )
            return
        widths = [channels, 128, 256, 512, 1024]
        down = [
            (nn.Conv2d(a, b, 5, 2, 2), nn.BatchNorm2d(b), nn.ReLU()) for a, b in itertools.pairwise(widths)
        ]
        up = [
            (nn.ConvTranspose2d(a, b, 5, 2, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise([1024, 512, 256, 128])
        ]
        self.encoder = nn.Sequential(
            *(layer for block in down for layer in block),
            *(nn.Flatten(), nn.Linear(1024 * (size // 16) ** 2, 2 * latents)),
        )
        start = size // 8
        self.decoder = nn.Sequential(
            *(nn.Linear(latents, 1024 * start**2), nn.ReLU(), nn.Unflatten(1, (1024, start, start))),
            *(layer for block in up for layer in block),
            nn.Conv2d(128, channels, 5, 1, 2),
        )


@pytest.mark.parametrize("preset", ["sigma_vae_svhn", "wae_celeba"])
def test_presets_compute_what_the_published_layers_do(preset: str) -> None:
    """With the same weights in the same order, in training mode: order, strides, padding, norms and activations."""
    torch.manual_seed(0)
    network = ConvNetwork(
        ConvConfig(latent_dim=3, preset=preset),
        image_size=(16, 16),
        channels=2,
        encoder_out=6,
        out_channels=2,
    )
    reference = Reference(preset, 2, 3, 16)
    with torch.no_grad():
        own = iter(network.parameters())
        for layer, following in itertools.pairwise([*reference.encoder, *reference.decoder, None]):
            for name, other in layer.named_parameters():
                if name == "bias" and isinstance(following, nn.BatchNorm2d):
                    continue  # it stays as it is, and changes nothing
                values = next(own)
                values += 0.05 * torch.randn_like(values)
                other.copy_(values)
        assert next(own, None) is None
    x, z = torch.rand(4, 2, 16, 16), torch.randn(4, 3)
    torch.testing.assert_close(network.encode(x), reference.encoder(2 * x - 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network.decode(z), reference.decoder(z), rtol=1e-3, atol=1e-3)


def test_small_maps_do_not_blind_the_encoder() -> None:
    """Eight channels at 1x1 in groups of one value would be the same for all images."""
    torch.manual_seed(0)
    network = ConvNetwork(
        ConvConfig(latent_dim=4, widths=(16, 16, 8)),
        image_size=(8, 8),
        channels=1,
        encoder_out=8,
        out_channels=1,
    )
    with torch.no_grad():
        encoded = network.encode(torch.rand(50, 1, 8, 8))
    assert float((encoded.std(0) / encoded.abs().mean()).min()) > 0.01
