"""A network from outside the package: one hidden layer on either side."""

from typing import Literal

from einops.layers.torch import Rearrange
from pydantic import Field
from torch import Tensor, nn

from vaescale.networks.base import FlatNetwork
from vaescale.networks.config import NetworkConfig


class PerceptronNetwork(FlatNetwork):
    """Pixels to hidden to parameters, and back."""

    def __init__(
        self,
        config: "PerceptronConfig",
        *,
        image_size: tuple[int, int],
        channels: int,
        encoder_out: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.latent_shape = (config.latent_dim,)
        height, width = image_size
        places = height * width
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * places, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, encoder_out),
        )
        self.decoder = nn.Sequential(
            nn.Linear(config.latent_dim, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, out_channels * places),
            Rearrange("b (c i j) -> b c i j", i=height, j=width),
        )

    def encode(self, x: Tensor) -> Tensor:
        parameters: Tensor = self.encoder(x)
        return parameters

    def decode(self, z: Tensor) -> Tensor:
        parameters: Tensor = self.decoder(z)
        return parameters


class PerceptronConfig(NetworkConfig):
    """A multi-layer perceptron."""

    implementation = PerceptronNetwork
    kind: Literal["perceptron"] = "perceptron"
    latent_dim: int = Field(gt=0, description="number of latents")
    hidden: int = Field(default=32, gt=0, description="size of the hidden layers")
