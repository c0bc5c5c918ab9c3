"""Latents that are chosen rather than drawn: lines between images, the plane of two latents, points moved to a smaller sigma.

Each writes a picture to the run's figures, sends it to MLflow, and returns what it says.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaescale import figures, noise
from vaescale.aggregate.refinement import refine
from vaescale.aggregate.sampling import line, plane, quantiles
from vaescale.data.batch import Request
from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Mixture, log_density, on, sample
from vaescale.runs.tracking import push
from vaescale.trained import Trained, open_split

STEPS = 10  # of a line
SHOWN = 24


@torch.no_grad()
def lines_between(trained: Trained, pairs: Sequence[tuple[int, int]], *, seed: int) -> dict[str, Any]:
    """Along the straight lines between the posterior means of held-out images, by number. Raises UserError for others."""
    reader, model = open_split(trained.recipe, "val"), trained.model
    device = next(model.parameters()).device
    rows = []
    for pair in pairs:
        if max(pair) >= len(reader):
            raise UserError(
                f"--interpolate {pair[0]},{pair[1]}: the held-out images are 0 to {len(reader) - 1}"
            )
        got = reader.__getitems__(Request(np.array(pair), refill=False))
        if not got.usable.all():
            raise UserError(f"--interpolate {pair[0]},{pair[1]}: {got.faults[0].words}; take other images")
        numbers = torch.tensor(pair, device=device)
        x = model.target(got.images.to(device), noise.Stream(trained.recipe.seed, 0, numbers))
        mu = model.posterior(x).mu.flatten(1)
        # What a ladder draws below its top group is the same along the line.
        stream = noise.Stream(seed, 0, torch.zeros(STEPS, dtype=torch.int64, device=device))
        means = model.likelihood.mean(model.decode(line(mu[0], mu[1], STEPS), stream)).float()
        rows.append((f"{pair[0]} to {pair[1]}", torch.cat([x[:1], means, x[1:]]).cpu().numpy()))
    path = trained.folder / "figures" / "interpolations.png"
    title = trained.title("from one image (left) to another (right), decoded means between")
    figures.image_rows(path, rows, title=title)
    push(trained.folder, trained.recipe.tracking)
    return {"pairs": [list(pair) for pair in pairs], "figure": str(path)}


@torch.no_grad()
def plane_of(trained: Trained, side: int, *, seed: int) -> dict[str, Any]:
    """side x side decoded means over the plane of two latents. Raises UserError where there are not two."""
    model = trained.model
    if model.latent_dim != 2 or len(model.group_sizes) > 1:
        raise UserError(
            f"--map draws the plane of a vector of two latents, this run has {sum(model.group_sizes)}; train one with a conv "
            f"network and network.latent_dim=2"
        )
    device = next(model.parameters()).device
    along = quantiles(side)
    z = plane(along).to(device)
    stream = noise.Stream(seed, 0, torch.arange(len(z), device=device))
    means = model.likelihood.mean(model.decode(z, stream)).float().cpu().numpy()
    path = trained.folder / "figures" / "latent_map.png"
    title = trained.title("decoded means over the plane of the latents")
    figures.image_map(path, means, values=along.tolist(), title=title)
    push(trained.folder, trained.recipe.tracking)
    return {"side": side, "figure": str(path)}


def refined(
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
    """Samples of the prior, or of a mixture in its place, before and after `refine`. Raises UserError where sigma is constant."""
    model = trained.model
    device = next(model.parameters()).device
    stream = noise.Stream(seed, 0, torch.arange(count, device=device))
    with torch.no_grad():
        if mixture is None:
            z = prior_draws(trained, stream, temperature)
        else:
            mixture = on(mixture, device)
            z = sample(mixture, stream, temperature)

    def density(points: Tensor) -> Tensor:
        return model.prior_log_density(points) if mixture is None else log_density(mixture, points.double())

    done = refine(model, z, stream, density, steps=steps, rate=rate, weight=weight)
    with torch.no_grad():
        before, after = (
            model.likelihood.mean(model.decode(one, stream)).float() for one in (done.before, done.after)
        )
    source = "prior" if mixture is None else f"mixture of {len(mixture.weights)}"
    difference = (after - before).abs().mean(1, keepdim=True).expand_as(before)
    largest = max(float(difference.max()), 1e-12)
    rows = []
    for start in range(0, min(SHOWN, count), 12):
        for name, images in (
            ("drawn", before),
            ("refined", after),
            (f"|difference|, 0 to {largest:.2g}", difference / largest),
        ):
            rows.append((name, images[start : start + 12].cpu().numpy()))
    path = trained.folder / "figures" / "refined.png"
    title = trained.title(f"{source}, {steps} steps towards a smaller sigma(z)")
    figures.image_rows(path, rows, title=title)
    push(trained.folder, trained.recipe.tracking)
    return {
        "prior": source,
        "count": count,
        "steps": steps,
        "weight": weight,
        "mean_log_sigma_before": float(done.log_sigma_before.mean()),
        "mean_log_sigma_after": float(done.log_sigma_after.mean()),
        "log_density_before_nats": float(done.density_before.mean()),
        "log_density_after_nats": float(done.density_after.mean()),
        "distance_of_z": float((done.after - done.before).norm(dim=1).mean()),
        "change_of_images_rms": float((after - before).square().mean().sqrt()),
        "figure": str(path),
    }


@torch.no_grad()
def prior_draws(trained: Trained, stream: noise.Stream, scale: float = 1.0) -> Tensor:
    """Draws [B, Z] of the model's own prior of the latents that `VAE.posterior` infers, its standard deviations times `scale`."""
    prior = trained.model.prior()
    epsilon = noise.normal(stream, noise.PRIOR, (trained.model.latent_dim,)).to(prior.mu)
    return prior.mu.flatten() + scale * prior.log_sigma.exp().flatten() * epsilon
