"""Build a model from the sections of a recipe."""

from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.models.config import PosteriorConfig
from vaescale.models.flat import FlatVAE
from vaescale.models.ladder import LadderVAE
from vaescale.models.vae import VAE
from vaescale.networks.config import NetworkConfig
from vaescale.networks.spectral import SpectralSum


def build_vae(
    network: NetworkConfig,
    posterior: PosteriorConfig,
    likelihood: LikelihoodConfig,
    *,
    image_size: int,
    channels: int,
    spectral: bool = False,
) -> VAE:
    """Build the model of these sections. spectral: whether its terms include the layers' singular values.

    Raises UserError when the network does not fit the images.
    """
    kind = LadderVAE if network.hierarchical else FlatVAE
    model = kind(network, posterior, likelihood, image_size=image_size, channels=channels)
    if spectral:
        model.spectral = SpectralSum(model.network)
    return model
