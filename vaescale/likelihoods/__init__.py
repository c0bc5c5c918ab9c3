"""p(x|z): one file a family. To add one, write its file, add a line to LIKELIHOODS and write a recipe.

The contract is `base.Likelihood`, an nn.Module inside the model. To write:

    num_params(channels)                  channels that the decoder must return
    log_prob(x, params, mask) -> [B]      nats, summed over pixels; x [B, C, H, W] in [0, 1]; in training mode this
                                          may all-reduce once and collects what the sigma state needs
    mean(params)                          [B, C, H, W]
    sample(params, stream)                [B, C, H, W], a function of the stream's seed, step and slots alone

and where the default does not do:

    measure                               "density" on [0, 1], or "mass" over levels
    target(x, stream)                     what is encoded and modelled in place of x: binarized or dequantized images
    variance(params)                      of p(x|z), for the reported sigma
    end_step(), sigma                     the state: update it once per optimizer step; the noise level, or None
    reads_x                               log_prob fits something to x itself, so that it bounds nothing
"""

from typing import TYPE_CHECKING

from vaescale.config import Config, one_of
from vaescale.likelihoods.base import Likelihood
from vaescale.likelihoods.bernoulli import Bernoulli, BernoulliConfig
from vaescale.likelihoods.bitwise import Bitwise, BitwiseConfig
from vaescale.likelihoods.categorical import Categorical, CategoricalConfig
from vaescale.likelihoods.continuous_bernoulli import ContinuousBernoulli, ContinuousBernoulliConfig
from vaescale.likelihoods.discretized_logistic import (
    DiscretizedLogistic,
    DiscretizedLogisticConfig,
    DiscretizedLogisticMixture,
    DiscretizedLogisticMixtureConfig,
)
from vaescale.likelihoods.gaussian import Gaussian, GaussianConfig
from vaescale.likelihoods.laplace import Laplace, LaplaceConfig
from vaescale.likelihoods.structured_gaussian import StructuredGaussian, StructuredGaussianConfig
from vaescale.likelihoods.student_t import StudentT, StudentTConfig

# kind -> (its recipe section, its module)
LIKELIHOODS: dict[str, tuple[type[Config], type[Likelihood]]] = {
    "gaussian": (GaussianConfig, Gaussian),
    "structured_gaussian": (StructuredGaussianConfig, StructuredGaussian),
    "laplace": (LaplaceConfig, Laplace),
    "student_t": (StudentTConfig, StudentT),
    "continuous_bernoulli": (ContinuousBernoulliConfig, ContinuousBernoulli),
    "bernoulli": (BernoulliConfig, Bernoulli),
    "categorical": (CategoricalConfig, Categorical),
    "bitwise": (BitwiseConfig, Bitwise),
    "discretized_logistic": (DiscretizedLogisticConfig, DiscretizedLogistic),
    "discretized_logistic_mixture": (DiscretizedLogisticMixtureConfig, DiscretizedLogisticMixture),
}

if TYPE_CHECKING:
    LikelihoodConfig = GaussianConfig  # any of them: what all share is `kind`
else:
    LikelihoodConfig = one_of(config for config, _ in LIKELIHOODS.values())
