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
from vaescale.aggregate.information import aggregate_log_density, evenly
from vaescale.aggregate.refinement import mean_log_sigma
from vaescale.aggregate.sampling import prior_draws
from vaescale.aggregate.variance import data_covariance, model_split, ppca_split
from vaescale.data.batch import Request
from vaescale.data.latent_shards import LatentShards
from vaescale.data.reader import ShardReader
from vaescale.errors import UserError
from vaescale.evaluation.noise_level import LEAST_SIZE, noise_level
from vaescale.mixtures.gaussian import Mixture, log_density, sample
from vaescale.mixtures.points import Moments, Scaled
from vaescale.mixtures.starts import SEEDS
from vaescale.models.flat import FlatVAE
from vaescale.system.console import Progress
from vaescale.trained import Trained, images_at, open_split

IMAGES = 10_000  # of which the data's covariance is taken
DRAWS = 1000  # decoded, of each kind
FAR = 3.0  # times the prior's standard deviations
SHOWN = 300  # points of each kind in a picture
BATCH = 250
SCATTERED, LEAST_FOR_TSNE = 2000, 100
GAP_BATCH = 32


@torch.no_grad()
def in_prior_s_scale(trained: Trained, moments: Moments) -> Moments:
    """The latents as deviations from the model's own prior, in its standard deviations."""
    mu, log_sigma = (part.flatten().float().cpu() for part in trained.model.prior())
    return Scaled(moments, mu, log_sigma.exp())


@torch.no_grad()
def variance(trained: Trained, kinds: dict[str, Tensor], *, seed: int) -> dict[str, Any] | None:
    """The splits of the model's images from q(z) and from p(z), by the kinds of z of `kinds_of_z`; of probabilistic PCA with as many latents, and the data's
    total. None where the likelihood has no variance.
    """
    model, reader = trained.model, comm.together(lambda: open_split(trained.recipe, "train"))
    device = next(model.parameters()).device
    slots = torch.arange(DRAWS, device=device)

    def decoded(z: Tensor) -> Iterator[Tensor]:
        here = slice(comm.rank(), len(z), comm.world_size())
        for part, own in zip(torch.split(z[here], BATCH), torch.split(slots[here], BATCH), strict=False):
            yield model.decode(part, noise.Stream(seed, 2, own))

    first = model.likelihood.variance(next(decoded(kinds["prior"])))
    if first is None and model.likelihood.sigma is None:
        return None
    splits = {
        "q(z)": model_split(model, decoded(kinds["posterior"])),
        "p(z)": model_split(model, decoded(kinds["prior"])),
    }
    covariance = data_covariance(_images(reader), model.likelihood.dimensions)
    ppca = ppca_split(covariance, sum(model.group_sizes))
    if ppca is not None:
        splits[f"pPCA, {sum(model.group_sizes)} latents"] = ppca
    diagonal = covariance.diagonal() if covariance.shape[1] > 1 else covariance
    return {"data_total": float(diagonal.sum()), **{name: split._asdict() for name, split in splits.items()}}


@torch.no_grad()
def kinds_of_z(
    trained: Trained, moments: Moments, mixture: Mixture | None, *, seed: int
) -> dict[str, Tensor]:
    """Draws [B, Z] of q(z), of the mixture if there is one, of the prior, and of one three times as wide; on every rank."""
    slots = torch.arange(DRAWS, device=next(trained.model.parameters()).device)
    kinds = {"posterior": posterior_draws(trained, moments, seed=seed)}
    if mixture is not None:
        kinds[f"mixture of {len(mixture.weights)}"] = sample(mixture, noise.Stream(seed, 3, slots))
    for name, scale in (("prior", 1.0), (f"prior x {FAR:g}", FAR)):
        kinds[name] = prior_draws(trained.model, noise.Stream(seed, 1, slots), scale)
    return kinds


@torch.no_grad()
def sigma_and_density(
    trained: Trained, moments: Moments, mixture: Mixture | None, kinds: dict[str, Tensor], *, seed: int
) -> dict[str, Any] | None:
    """Mean log sigma(z) against the log density of several kinds of z, with points to draw. Densities: q(z) itself, the sum over all
    training images' narrow q(z|x), and if there is one the mixture, which smoothes it. None where sigma does not depend on z.
    """
    log_sigmas = []
    for z in kinds.values():
        slots = torch.arange(len(z), device=z.device)
        parts = zip(torch.split(z, BATCH), torch.split(slots, BATCH), strict=True)
        try:
            found = [mean_log_sigma(trained.model, part, noise.Stream(seed, 3, own)) for part, own in parts]
        except UserError:
            return None
        log_sigmas.append(torch.cat(found).double().cpu().numpy())
    everything = torch.cat([*kinds.values()]).double().cpu()
    densities = {"log q(z)": aggregate_log_density(moments, everything).numpy()}
    if mixture is not None:
        densities["log mixture"] = log_density(mixture, everything).numpy()
    sigmas, ends = np.concatenate(log_sigmas), np.cumsum([len(one) for one in log_sigmas])[:-1]
    by_kind = {
        name: dict(zip(kinds, np.split(values, ends), strict=True)) for name, values in densities.items()
    }
    drawn = by_kind[list(densities)[-1]]
    return {
        "pearson": {name: float(pearsonr(values, sigmas).statistic) for name, values in densities.items()},
        "spearman": {name: float(spearmanr(values, sigmas).statistic) for name, values in densities.items()},
        "drawn": list(densities)[-1],
        "kinds": {
            name: {
                "mean_log_sigma": float(log_sigma.mean()),
                "mean_density_nats": {key: float(own[name].mean()) for key, own in by_kind.items()},
                "spearman": {
                    key: float(spearmanr(own[name], log_sigma).statistic) for key, own in by_kind.items()
                },
                "points": [drawn[name][:SHOWN].tolist(), log_sigma[:SHOWN].tolist()],
            }
            for name, log_sigma in zip(kinds, log_sigmas, strict=True)
        },
    }


@torch.no_grad()
def noise_of(trained: Trained, kinds: dict[str, Tensor], *, seed: int) -> dict[str, dict[str, float]]:
    """The estimated noise of images, of their reconstructions, and of what several kinds of z decode to, each as decoder means and
    as ancestral samples; the mean over about a thousand. {} for images that are too small to tell.
    """
    model = trained.model
    if min(model.image_shape[1:]) < LEAST_SIZE:
        return {}
    reader = comm.together(lambda: open_split(trained.recipe, "train"))
    device = next(model.parameters()).device
    here = slice(comm.rank(), None, comm.world_size())
    numbers = evenly(len(reader), DRAWS)[here]

    def pictures() -> Iterator[tuple[str, str, Tensor]]:
        for part in torch.split(numbers, BATCH):
            stream = noise.Stream(trained.recipe.seed, 0, part.to(device))
            x = model.target(images_at(reader, part).to(device), stream)
            params = model.reconstruct(x)
            yield "images", "mean", x
            yield "reconstructions", "mean", model.likelihood.mean(params)
            yield "reconstructions", "ancestral", model.likelihood.sample(params, stream)
        for name, z in kinds.items():
            slots = torch.arange(len(z), device=device)[here]
            for part, own in zip(torch.split(z[here], BATCH), torch.split(slots, BATCH), strict=True):
                stream = noise.Stream(seed, 4, own)
                params = model.decode(part, stream)
                yield name, "mean", model.likelihood.mean(params)
                yield name, "ancestral", model.likelihood.sample(params, stream)

    columns = ("mean", "ancestral")
    names = ["images", "reconstructions", *kinds]
    sums = torch.zeros(len(names), len(columns), 2, dtype=torch.float64)
    for name, column, images in pictures():
        levels = noise_level(images.float().clamp(0, 1)).double().cpu()  # as files and figures show them
        own = torch.stack([levels.sum(), levels.new_tensor(float(len(levels)))])
        sums[names.index(name), columns.index(column)] += own
    sums = comm.all_reduce_sum(sums.flatten()).view(sums.shape)
    return {
        name: {
            column: float(total / count) for column, (total, count) in zip(columns, row, strict=True) if count
        }
        for name, row in zip(names, sums, strict=True)
    }


def scatter(shards: LatentShards, *, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64], str]:
    """Posterior means of images at equal distances as points [N, 2], their classes, and what the axes are: the two latents, or of
    more than two a t-SNE of them (van der Maaten & Hinton 2008).
    """
    samples = shards.index.shards.samples
    wanted, starts = evenly(int(samples.sum()), SCATTERED).numpy(), np.cumsum(samples) - samples
    found, classes = [], []
    for number, start in enumerate(starts.tolist()):
        here = wanted[(wanted >= start) & (wanted < start + samples[number])] - start
        if len(here):
            block = shards.read(number)
            found.append(block.moments[here, 0].astype(np.float64))
            classes.append(block.labels[here])
    means, labels = np.concatenate(found), np.concatenate(classes)
    if means.shape[1] == 1:
        return np.column_stack([means[:, 0], np.zeros(len(means))]), labels, "z"
    if means.shape[1] == 2:
        return means, labels, "z_1 and z_2"
    if len(means) < LEAST_FOR_TSNE:
        return PCA(2).fit_transform(means), labels, f"two principal components of {means.shape[1]} latents"
    placed = TSNE(2, init="pca", random_state=seed % SEEDS).fit_transform(means)
    return placed.astype(np.float64), labels, f"t-SNE of {means.shape[1]} latents"


def gaps(trained: Trained, images: int, *, steps: int, importance_samples: int, seed: int) -> dict[str, Any]:
    """The mean inference gaps of some held-out images, at least two, shared among the ranks. Raises UserError where
    `refuse_gaps` does.
    """
    model = refuse_gaps(trained)
    device = next(model.parameters()).device
    reader = comm.together(lambda: open_split(trained.recipe, "val"))
    rows = torch.zeros(0, 3, dtype=torch.float64)
    numbers = evenly(len(reader), images)[comm.rank() :: comm.world_size()]
    with Progress("gaps", len(numbers), shown=comm.is_main()) as progress:
        for part in torch.split(numbers, GAP_BATCH):
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
            progress.update(len(rows), "images")
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


def refuse_gaps(trained: Trained) -> FlatVAE:
    """The model, if its gaps can be measured. Raises UserError for a ladder, and for a likelihood that bounds nothing."""
    model = trained.model
    if not isinstance(model, FlatVAE) or model.likelihood.reads_x:
        raise UserError(
            "--gaps is for a single latent vector and a likelihood that bounds log p(x); leave it out here"
        )
    return model


def posterior_draws(trained: Trained, moments: Moments, *, seed: int) -> Tensor:
    """Draws of q(z|x) for images at equal distances, float32 [DRAWS, Z] on the model's device, on every rank."""
    wanted = evenly(moments.count, DRAWS)
    mean, spread = moments.rows(wanted), moments.variances(wanted)
    epsilon = noise.normal(noise.Stream(seed, 1, wanted), noise.POSTERIOR, (moments.size,)).double()
    return (mean + spread.sqrt() * epsilon).float().to(next(trained.model.parameters()).device)


def _images(reader: ShardReader) -> Iterator[Tensor]:
    """This rank's share of images at equal distances, float [B, C, H, W] in [0, 1]."""
    for part in torch.split(evenly(len(reader), IMAGES)[comm.rank() :: comm.world_size()], BATCH):
        got = reader.__getitems__(Request(np.asarray(part), refill=False))
        yield got.images[got.usable].float() / 255
