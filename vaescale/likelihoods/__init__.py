"""p(x|z): one file a family. To add one, write its file, add a line to LIKELIHOODS and write a recipe.

The contract, an nn.Module inside the model:

    num_params(channels)                  channels that the decoder must return
    log_prob(x, params, mask) -> [B]      nats, summed over pixels; x [B, C, H, W] in [0, 1]; in training mode this
                                          may all-reduce once and collects what the sigma state needs
    mean(params)                          [B, C, H, W]
    sample(params, stream)                [B, C, H, W], a function of the stream's seed, step and slots alone
    end_step()                            once per optimizer step: fold what was collected into the state
    sigma                                 the noise level that evaluation uses, float64 [], or None
"""

from typing import TYPE_CHECKING

from vaescale.config import one_of
from vaescale.likelihoods.gaussian import Gaussian, GaussianConfig

# kind -> (its recipe section, its module)
LIKELIHOODS = {"gaussian": (GaussianConfig, Gaussian)}

if TYPE_CHECKING:
    LikelihoodConfig = GaussianConfig  # any of them: what all share is `kind`
else:
    LikelihoodConfig = one_of(config for config, _ in LIKELIHOODS.values())
