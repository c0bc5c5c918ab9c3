"""A network, a posterior and a likelihood make a model; its forward pass returns Terms."""

from vaescale.likelihoods import LikelihoodConfig
from vaescale.models.flat import FlatVAE
from vaescale.models.ladder import LadderVAE
from vaescale.models.posterior import PosteriorConfig
from vaescale.models.vae import VAE
from vaescale.networks import HIERARCHICAL, NetworkConfig


def build_vae(
    network: NetworkConfig,
    posterior: PosteriorConfig,
    likelihood: LikelihoodConfig,
    *,
    image_size: int,
    channels: int,
) -> VAE:
    """The model that the network's kind makes. Raises UserError when it does not fit the images."""
    model = LadderVAE if network.kind in HIERARCHICAL else FlatVAE
    return model(network, posterior, likelihood, image_size=image_size, channels=channels)
