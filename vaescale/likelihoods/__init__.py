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

from vaescale.likelihoods.gaussian import Gaussian, GaussianConfig

LikelihoodConfig = GaussianConfig
LIKELIHOODS = {"gaussian": Gaussian}
