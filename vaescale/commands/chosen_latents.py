"""Pictures that `vaescale sample` draws at chosen latents, written to RUN/figures and sent to MLflow.

They are lines between images, the plane of two latents, and samples before and after a descent to a smaller sigma.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vaescale import figures, noise
from vaescale.aggregate.refinement import RefinedSamples, refine_draws
from vaescale.aggregate.traversal import lines_between, plane_means
from vaescale.mixtures.gaussian import Mixture
from vaescale.runs.tracking import push
from vaescale.trained import Trained, open_split

SHOWN = 24  # refined samples in the picture
ROW = 12


def interpolate(trained: Trained, pairs: Sequence[tuple[int, int]], *, seed: int) -> dict[str, Any]:
    """Draw figures/interpolations.png: decoded means along straight lines between held-out images, by number.

    Raises UserError for a number beyond the held-out images.
    """
    recipe, reader = trained.recipe, open_split(trained.recipe, "val")
    lines = lines_between(trained.model, reader, pairs, data_seed=recipe.seed, seed=seed)
    rows = [(f"{first} to {second}", line) for (first, second), line in zip(pairs, lines, strict=True)]
    path = trained.folder / "figures" / "interpolations.png"
    title = trained.title("from one image (left) to another (right), decoded means between")
    figures.image_rows(path, rows, title=title, view=recipe.view)
    push(trained.folder, recipe.tracking)
    return {"pairs": [list(pair) for pair in pairs], "figure": str(path)}


def map_latents(trained: Trained, side: int, *, seed: int) -> dict[str, Any]:
    """Draw figures/latent_map.png: side x side decoded means over the plane of two latents.

    Raises UserError unless the model has exactly two latents.
    """
    means, values = plane_means(trained.model, side, seed=seed)
    path = trained.folder / "figures" / "latent_map.png"
    title = trained.title("decoded means over the plane of the latents")
    figures.image_map(path, means, values=values, title=title, view=trained.recipe.view)
    push(trained.folder, trained.recipe.tracking)
    return {"side": side, "figure": str(path)}


def refine_samples(
    trained: Trained,
    mixture: Mixture | None,
    *,
    count: int,
    steps: int,
    rate: float,
    weight: float,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Draw figures/refined.png: samples of the prior, or of a mixture in its place, before and after `refine`.

    Returns the means of log sigma and of the density before and after. Raises UserError when sigma does not depend on z.
    """
    device = next(trained.model.parameters()).device
    stream = noise.Stream(seed, 0, torch.arange(count, device=device))
    samples = refine_draws(
        trained.model, mixture, stream, steps=steps, rate=rate, weight=weight, temperature=temperature
    )
    source = "prior" if mixture is None else f"mixture of {len(mixture.weights)}"
    path = trained.folder / "figures" / "refined.png"
    title = trained.title(f"{source}, {steps} steps towards a smaller sigma(z)")
    figures.image_rows(path, _rows(samples), title=title, view=trained.recipe.view)
    push(trained.folder, trained.recipe.tracking)
    latents, before, after = samples
    return {
        "prior": source,
        "count": count,
        "steps": steps,
        "weight": weight,
        "mean_log_sigma_before": float(latents.log_sigma_before.mean()),
        "mean_log_sigma_after": float(latents.log_sigma_after.mean()),
        "log_density_before_nats": float(latents.density_before.mean()),
        "log_density_after_nats": float(latents.density_after.mean()),
        "distance_of_z": float((latents.after - latents.before).norm(dim=1).mean()),
        "change_of_images_rms": float((after - before).square().mean().sqrt()),
        "figure": str(path),
    }


def _rows(samples: RefinedSamples) -> list[tuple[str, Any]]:
    """Rows of images before, images after, and their difference in units of the largest one."""
    before, after = samples.images_before, samples.images_after
    difference = (after - before).abs().mean(1, keepdim=True).expand_as(before)
    largest = max(float(difference.max()), 1e-12)
    kinds = (
        ("drawn", before),
        ("refined", after),
        (f"|difference|, 0 to {largest:.2g}", difference / largest),
    )
    return [
        (name, images[start : start + ROW].cpu().numpy())
        for start in range(0, min(SHOWN, len(before)), ROW)
        for name, images in kinds
    ]
