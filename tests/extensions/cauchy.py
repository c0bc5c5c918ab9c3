"""A likelihood from outside the package: Cauchy values around a decoded median, with one learned scale."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vaescale import noise
from vaescale.likelihoods.base import Likelihood, total
from vaescale.likelihoods.config import LikelihoodConfig


class Cauchy(Likelihood):
    """log p(x|z) = -sum log(pi s (1 + ((x - m) / s)^2)). The decoder returns the median."""

    def __init__(self, config: "CauchyConfig", *, image_shape: tuple[int, int, int]) -> None:
        super().__init__(config, image_shape=image_shape)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.initial_scale)))

    def num_params(self, channels: int) -> int:
        return channels

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        return -total(torch.log(math.pi * scale * (1 + ((x - self.mean(params)) / scale).square())))

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params.float())

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        uniform = noise.uniform(stream, noise.DECODER, tuple(params.shape[1:]))
        return self.mean(params) + self.log_scale.exp() * torch.tan(math.pi * (uniform - 0.5))


class CauchyConfig(LikelihoodConfig):
    """Cauchy values around a decoded median."""

    implementation = Cauchy
    kind: Literal["cauchy"] = "cauchy"
    initial_scale: float = Field(default=0.1, gt=0, description="start value of the learned scale")
