"""Bernoulli decoder of black and white images: a mass over {0, 1}^D. Kingma & Welling 2014, appendix C.1.

    log p(x|z) = sum (x logit - log(1 + exp(logit)))                                     nats

Grey images are binarized first: at one half, or by a new draw at each step with the grey level as probability (as Burda, Grosse
& Salakhutdinov 2016 train on MNIST). The popular cross-entropy with grey targets is not a likelihood, since it does not
integrate to one over [0, 1] (Loaiza-Ganem & Cunningham 2019); `continuous_bernoulli` adds the missing normalization.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vaescale import noise
from vaescale.likelihoods.base import Likelihood, total
from vaescale.likelihoods.config import BernoulliConfig
from vaescale.likelihoods.sigma import wide


class Bernoulli(Likelihood):
    """The Bernoulli likelihood: log Bernoulli(x; sigmoid(params))."""

    config: BernoulliConfig

    def target(self, x: Tensor, stream: noise.Stream) -> Tensor:
        """Binarized images of zeros and ones."""
        if self.config.binarize == "threshold":
            return (x > 0.5).to(x)
        return (noise.uniform(stream, noise.BINARIZE, tuple(x.shape[1:])) < x).to(x)

    def expected_target(self, x: Tensor) -> Tensor:
        """x binarized at one half, or x itself where a draw binarizes it."""
        return (x > 0.5).to(x) if self.config.binarize == "threshold" else x

    def num_params(self, channels: int) -> int:
        """Channels for one logit of each value."""
        return channels

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The log mass in nats [B]. x holds zeros and ones."""
        logits = wide(params)
        return total(x * logits - softplus(logits))

    def mean(self, params: Tensor) -> Tensor:
        """The probability of a one, [B, C, H, W]."""
        return torch.sigmoid(wide(params))

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """A draw of zeros and ones."""
        mean = self.mean(params)
        return (noise.uniform(stream, noise.DECODER, tuple(mean.shape[1:])) < mean).to(mean)
