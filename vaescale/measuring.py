"""What `vaescale latents` measures of a trained model, from the moments of q(z|x) of its training images.

Each is a mapping of plain numbers, the same on every rank.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from vaescale import comm, noise
from vaescale.aggregate.gaps import inference_gaps
from vaescale.aggregate.information import evenly
from vaescale.aggregate.points import Points
from vaescale.aggregate.refinement import mean_log_sigma
from vaescale.aggregate.variance import data_covariance, model_split, ppca_split
from vaescale.data.batch import Request
from vaescale.data.latents import LatentShards
from vaescale.data.reader import ShardReader
from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Mixture, log_density, on, sample
from vaescale.models.flat import FlatVAE
from vaescale.run import Run, open_split
from vaescale.tours import prior_draws

IMAGES = 10_000  # of which the data's covariance is taken
DRAWS = 1000  # decoded, of each kind
FAR = 3.0  # times the prior's standard deviations
SHOWN = 300  # points of each kind in a picture
BATCH = 250
SCATTERED, LEAST_FOR_TSNE = 2000, 100


@torch.no_grad()
def in_prior_s_scale(opened: Run, moments: Points) -> Points:
    """The latents as deviations from the model's own prior, in its standard deviations."""
    mu, log_sigma = (part.flatten().float().cpu() for part in opened.model.prior())
    return moments.scaled(mu, log_sigma.exp())


@torch.no_grad()
def variance(opened: Run, moments: Points, *, seed: int) -> dict[str, Any] | None:
    """The splits of the model's images from q(z) and from p(z), of probabilistic PCA with as many latents, and the data's
    total. None where the likelihood has no variance.
    """
    model, reader = opened.model, open_split(opened.recipe, "train")
    device = next(model.parameters()).device
    slots = torch.arange(DRAWS, device=device)

    def decoded(z: Tensor) -> Iterator[Tensor]:
        here = slice(comm.rank(), len(z), comm.world_size())
        for part, own in zip(torch.split(z[here], BATCH), torch.split(slots[here], BATCH), strict=False):
            yield model.decode(part, noise.Stream(seed, 2, own))

    from_prior = prior_draws(opened, noise.Stream(seed, 1, slots))
    if model.likelihood.variance(next(decoded(from_prior))) is None and model.likelihood.sigma is None:
        return None
    splits = {
        "q(z)": model_split(model, decoded(posterior_draws(opened, moments, seed=seed))),
        "p(z)": model_split(model, decoded(from_prior)),
    }
    covariance = data_covariance(_images(reader), model.likelihood.dimensions)
    ppca = ppca_split(covariance, sum(model.group_sizes))
    if ppca is not None:
        splits[f"pPCA, {sum(model.group_sizes)} latents"] = ppca
    diagonal = covariance.diagonal() if covariance.shape[1] > 1 else covariance
    return {"data_total": float(diagonal.sum()), **{name: split._asdict() for name, split in splits.items()}}


@torch.no_grad()
def sigma_and_density(
    opened: Run, moments: Points, mixture: Mixture | None, *, seed: int
) -> dict[str, Any] | None:
    """Mean log sigma(z) against the log density of z, the mixture's if there is one, over several kinds of z; with points to
    draw. None where sigma does not depend on z.
    """
    model = opened.model
    device = next(model.parameters()).device
    slots = torch.arange(DRAWS, device=device)
    places = {"posterior": posterior_draws(opened, moments, seed=seed)}
    if mixture is not None:
        places["mixture"] = sample(mixture, noise.Stream(seed, 3, slots))
    for name, scale in (("prior", 1.0), (f"prior x {FAR:g}", FAR)):
        places[name] = prior_draws(opened, noise.Stream(seed, 1, slots), scale)
    there = None if mixture is None else on(mixture, device)
    kinds = {}
    for name, z in places.items():
        parts = zip(torch.split(z, BATCH), torch.split(slots[: len(z)], BATCH), strict=True)
        try:
            log_sigma = torch.cat(
                [mean_log_sigma(model, part, noise.Stream(seed, 3, own)) for part, own in parts]
            )
        except UserError:
            return None
        density = model.prior_log_density(z) if there is None else log_density(there, z.double())
        kinds[name] = (density.double().cpu().numpy(), log_sigma.double().cpu().numpy())
    densities, sigmas = (np.concatenate([kind[place] for kind in kinds.values()]) for place in (0, 1))
    return {
        "density": "the fitted mixture's" if mixture is not None else "the prior's",
        "pearson": float(pearsonr(densities, sigmas).statistic),
        "spearman": float(spearmanr(densities, sigmas).statistic),
        "kinds": {
            name: {
                "mean_log_sigma": float(log_sigma.mean()),
                "mean_log_density_nats": float(density.mean()),
                "spearman": float(spearmanr(density, log_sigma).statistic),
                "points": [density[:SHOWN].tolist(), log_sigma[:SHOWN].tolist()],
            }
            for name, (density, log_sigma) in kinds.items()
        },
    }


def scatter(shards: LatentShards, *, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64], str]:
    """Posterior means of images at equal distances as points [N, 2], their classes, and what the axes are: the two latents, or of
    more than two a t-SNE of them (van der Maaten & Hinton 2008).
    """
    blocks = [shards.read(number) for number in range(len(shards.index.shards))]
    means = np.concatenate([block.moments[:, 0] for block in blocks]).astype(np.float64)
    labels = np.concatenate([block.labels for block in blocks])
    taken = evenly(len(means), SCATTERED).numpy()
    means, labels = means[taken], labels[taken]
    if means.shape[1] == 1:
        return np.column_stack([means[:, 0], np.zeros(len(means))]), labels, "z"
    if means.shape[1] == 2:
        return means, labels, "z_1 and z_2"
    if len(means) < LEAST_FOR_TSNE:
        return PCA(2).fit_transform(means), labels, f"two principal components of {means.shape[1]} latents"
    found = TSNE(2, init="pca", random_state=seed).fit_transform(means)
    return found.astype(np.float64), labels, f"t-SNE of {means.shape[1]} latents"


def gaps(opened: Run, images: int, *, steps: int, importance_samples: int, seed: int) -> dict[str, Any]:
    """The mean inference gaps of some held-out images, at least two, shared among the ranks. Raises UserError where
    `refuse_gaps` does.
    """
    model = refuse_gaps(opened)
    device = next(model.parameters()).device
    reader = open_split(opened.recipe, "val")
    rows = torch.zeros(0, 3, dtype=torch.float64)
    numbers = evenly(len(reader), images)[comm.rank() :: comm.world_size()]
    for part in torch.split(numbers, 32):
        got = reader.__getitems__(Request(np.asarray(part), refill=False))
        if not got.usable.any():
            continue
        found = inference_gaps(
            model,
            got.images[got.usable].to(device),
            noise.Stream(seed, 0, part[got.usable].to(device)),
            steps=steps,
            importance_samples=importance_samples,
        )
        rows = torch.cat([rows, torch.stack(found, dim=1).cpu()])
    rows = torch.cat(comm.gather_object(rows))
    amortized, optimized, log_px = rows.unbind(1)
    differences = {"amortization": optimized - amortized, "approximation": log_px - optimized}
    return {
        "images": len(rows),
        "steps": steps,
        "importance_samples": importance_samples,
        "elbo_nats": float(amortized.mean()),
        "optimized_elbo_nats": float(optimized.mean()),
        "log_px_nats": float(log_px.mean()),
        **{f"{name}_gap_nats": float(gap.mean()) for name, gap in differences.items()},
        **{f"{name}_gap_error": float(gap.std() / len(rows) ** 0.5) for name, gap in differences.items()},
    }


def refuse_gaps(opened: Run) -> FlatVAE:
    """The model, if its gaps can be measured. Raises UserError for a ladder, and for a likelihood that bounds nothing."""
    model = opened.model
    if not isinstance(model, FlatVAE) or model.likelihood.reads_x:
        raise UserError(
            "--gaps is for a single latent vector and a likelihood that bounds log p(x); leave it out here"
        )
    return model


def posterior_draws(opened: Run, moments: Points, *, seed: int) -> Tensor:
    """Draws of q(z|x) for images at equal distances, float32 [DRAWS, Z] on the model's device, on every rank."""
    wanted = evenly(moments.count, DRAWS)
    mean, spread = moments.rows(wanted), moments.variances(wanted)
    epsilon = noise.normal(noise.Stream(seed, 1, wanted), noise.POSTERIOR, (moments.size,)).double()
    return (mean + spread.sqrt() * epsilon).float().to(next(opened.model.parameters()).device)


def _images(reader: ShardReader) -> Iterator[Tensor]:
    """This rank's share of images at equal distances, float [B, C, H, W] in [0, 1]."""
    for part in torch.split(evenly(len(reader), IMAGES)[comm.rank() :: comm.world_size()], BATCH):
        got = reader.__getitems__(Request(np.asarray(part), refill=False))
        yield got.images[got.usable].float() / 255
