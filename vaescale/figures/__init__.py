"""Figures: PNG files and an HTML page from arrays, without a display."""

from vaescale.figures.animation import animation
from vaescale.figures.config import Scale
from vaescale.figures.curves import calibration, curves_of_runs, group_rates, rate_distortion, training_curves
from vaescale.figures.histograms import score_histograms
from vaescale.figures.images import image_map, image_rows, image_strips, picture_rows, sample_panels
from vaescale.figures.judged import quality
from vaescale.figures.latents import (
    latent_scatter,
    latent_use,
    mixture_selection,
    sigma_and_density,
    variance_split,
)

__all__ = [
    "Scale",
    "animation",
    "calibration",
    "curves_of_runs",
    "group_rates",
    "image_map",
    "image_rows",
    "image_strips",
    "latent_scatter",
    "latent_use",
    "mixture_selection",
    "picture_rows",
    "quality",
    "rate_distortion",
    "sample_panels",
    "score_histograms",
    "sigma_and_density",
    "training_curves",
    "variance_split",
]
