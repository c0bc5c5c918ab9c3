"""A network, a posterior and a likelihood make a model; its forward pass returns Terms."""

from vaescale.likelihoods import LikelihoodConfig
from vaescale.models.flat import FlatVAE
from vaescale.models.ladder import LadderVAE
from vaescale.models.posterior import PosteriorConfig
from vaescale.models.vae import VAE
from vaescale.networks import HIERARCHICAL, NetworkConfig
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
    """The model that the network's kind makes; spectral: its terms have the layers' singular values. Raises UserError when
    it does not fit the images.
    """
    kind = LadderVAE if network.kind in HIERARCHICAL else FlatVAE
    model = kind(network, posterior, likelihood, image_size=image_size, channels=channels)
    if spectral:
        model.spectral = SpectralSum(model.network)
    return model
