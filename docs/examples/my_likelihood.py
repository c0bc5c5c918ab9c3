"""A likelihood of your own: log-normal noise around a decoded mean, for images that are never black (medical, astronomical).

    vaescale train recipes/digits/base.yaml --import docs/examples/my_likelihood.py name=mine "likelihood={kind: shifted_log_normal}"
    vaescale evaluate runs/mine --import docs/examples/my_likelihood.py

With y = log(x + a) and the offset a > 0 fixed, y is Gaussian with a decoded mean m and one learned sigma, so that

    log p(x|z) = sum_d  -((y - m) / sigma)^2 / 2 - log sigma - log(2 pi) / 2 - y        y = log(x + a)

where the last term is log |dy/dx| (change of variables). `tests/test_plugins.py` checks it against torch.distributions.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import vaescale
from vaescale import noise
from vaescale.likelihoods.base import Likelihood, total
from vaescale.likelihoods.config import LikelihoodConfig


class ShiftedLogNormal(Likelihood):
    """log(x + a) is Gaussian. params [B, C, H, W]: the mean m of log(x + a)."""

    def __init__(self, config: "ShiftedLogNormalConfig", *, image_shape: tuple[int, int, int]) -> None:
        super().__init__(config, image_shape=image_shape)
        self.offset = config.offset
        self.log_sigma = nn.Parameter(torch.tensor(math.log(config.initial_sigma)))

    def num_params(self, channels: int) -> int:
        """One decoded number for each value."""
        return channels

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """Nats [B], the sum over values."""
        y = torch.log(x + self.offset)
        squares = ((y - self._mean_of_log(params)) / self.log_sigma.exp()).square()
        return total(-0.5 * squares - self.log_sigma - 0.5 * math.log(2 * math.pi) - y)

    def mean(self, params: Tensor) -> Tensor:
        """E[x|z] = exp(m + sigma^2 / 2) - a."""
        return torch.exp(self._mean_of_log(params) + 0.5 * (2 * self.log_sigma).exp()) - self.offset

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """A draw for each slot of the stream: exp(m + sigma epsilon) - a."""
        epsilon = noise.normal(stream, noise.DECODER, tuple(params.shape[1:])).to(params)
        return torch.exp(self._mean_of_log(params) + self.log_sigma.exp() * epsilon) - self.offset

    def _mean_of_log(self, params: Tensor) -> Tensor:
        """m, between log a and log(1 + a): the range of log(x + a)."""
        low, high = math.log(self.offset), math.log1p(self.offset)
        return low + (high - low) * torch.sigmoid(params.float())


@vaescale.register
class ShiftedLogNormalConfig(LikelihoodConfig):
    """Log-normal noise around a decoded mean."""

    implementation = ShiftedLogNormal
    kind: Literal["shifted_log_normal"] = "shifted_log_normal"
    offset: float = Field(default=0.1, gt=0, description="a, which keeps log(x + a) finite where x is 0")
    initial_sigma: float = Field(default=0.3, gt=0, description="start value of the learned sigma")


def _contrast(x: Tensor, means: Tensor) -> Tensor:
    """The standard deviation of a reconstruction's values over that of the image's, [B]."""
    return means.flatten(1).std(1) / x.flatten(1).std(1).clamp_min(1e-6)


vaescale.register_metric(
    "contrast", _contrast, "standard deviation of a reconstruction's values, over the image's"
)
