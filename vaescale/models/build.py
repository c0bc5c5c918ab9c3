"""Build a model from the sections of a recipe."""

from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.models.config import EquivarianceConfig, PosteriorConfig
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
    equivariance: EquivarianceConfig | None = None,
    of_latents: bool = False,
) -> VAE:
    """Build the model of these sections. spectral: whether its terms include the layers' singular values. equivariance: of the
    decoder, if the terms include it; for a network with a latent map. of_latents: whether the images are latents of another model.

    Raises UserError when the network does not fit the images.
    """
    kind = LadderVAE if network.hierarchical else FlatVAE
    model = kind(network, posterior, likelihood, image_size=image_size, channels=channels)
    model.of_latents = of_latents
    if spectral:
        model.spectral = SpectralSum(model.network)
    if equivariance is not None:
        equivariance.sides(model.latent_shape[-1])
        model.equivariance = equivariance
    return model
