"""Arrays to PNG files, without a display."""

from vaescale.figures.curves import group_rates, rate_distortion, training_curves
from vaescale.figures.images import image_map, image_rows, image_strips, reconstructions, sample_panels
from vaescale.figures.latents import latent_use, mixture_selection, sigma_and_density, variance_split

__all__ = [
    "group_rates",
    "image_map",
    "image_rows",
    "image_strips",
    "latent_use",
    "mixture_selection",
    "rate_distortion",
    "reconstructions",
    "sample_panels",
    "sigma_and_density",
    "training_curves",
    "variance_split",
]
