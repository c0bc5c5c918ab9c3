"""Build a model from the sections of a recipe."""

from typing import Any

from vaescale.conditions.config import ConditionConfig
from vaescale.config import Size, sides
from vaescale.errors import UserError
from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.models.code_model import CodeModel
from vaescale.models.config import EquivarianceConfig, PosteriorConfig, Shows
from vaescale.models.flat import FlatVAE
from vaescale.models.ladder import LadderVAE
from vaescale.models.quantized import QuantizedVAE
from vaescale.models.sequence_model import SequenceModel
from vaescale.models.vae import VAE
from vaescale.networks.config import NetworkConfig, SvgConfig
from vaescale.networks.spectral import SpectralSum


def build_vae(
    network: NetworkConfig,
    posterior: PosteriorConfig,
    likelihood: LikelihoodConfig,
    *,
    image_size: Size,
    channels: int,
    spectral: bool = False,
    equivariance: EquivarianceConfig | None = None,
    shows: Shows | None = None,
    has_bound: bool = True,
    of_latents: bool = False,
    condition: ConditionConfig | None = None,
) -> VAE:
    """Build the model of these sections. image_size: the side of square images, or (H, W). spectral: whether its terms include the layers' singular values. equivariance: of the
    decoder, if the terms include it; for a network with a latent map. shows: what discriminators see, if there are any. has_bound: whether
    p(x|z) is trained, so that evaluation may report bounds. of_latents: whether the images are latents, or codes, of another model.
    condition: an additional input, the class or a vector of each image.

    Raises UserError when the network does not fit the images.
    """
    model: VAE
    if network.of_codes:
        if spectral or equivariance or shows or not has_bound:
            raise UserError(
                "a model of codes (data.holds codes) has the bound alone; set objective.kind=elbo and leave its other terms out"
            )
        model = CodeModel(network, likelihood, image_size=sides(image_size), channels=channels)
        model.of_latents = of_latents
        return model
    if isinstance(network, SvgConfig):
        if spectral or equivariance or shows or condition or not has_bound:
            raise UserError(
                "a model of sequences (data.holds sequences) has the bound alone; set objective.kind=elbo or iwae, and leave adversarial, "
                "perceptual and spectral terms and the condition out"
            )
        return SequenceModel(network, posterior, likelihood, image_size=sides(image_size), channels=channels)
    gaussian = LadderVAE if network.hierarchical else FlatVAE
    kind: Any = QuantizedVAE if posterior.quantized else gaussian
    model = kind(network, posterior, likelihood, image_size=sides(image_size), channels=channels)
    model.of_latents = of_latents
    if condition is not None:
        model.add_condition(condition)
    if spectral:
        model.spectral = SpectralSum(model.network)
    model.shows, model.has_bound = shows, has_bound
    if equivariance is not None:
        equivariance.sides(model.latent_shape[1], model.latent_shape[2])
        model.equivariance = equivariance
    return model
