"""What a run's latents are worth: where the KL goes, which latents are used, what they explain, and why the bound is not tight.

    information   I(x; z), KL(q(z)||p(z)), total correlation, beside the mean KL in closed form
    use           KL by latent, active units, the share that has collapsed over epsilon and delta
    variance      what z explains and what is left to the noise, beside probabilistic PCA with as many latents
    sigma         for a predicted sigma: is it larger where z is unlikely, and are samples noisier than reconstructions
    gaps          --gaps N: the amortization and the approximation gap of N held-out images (takes minutes)

Of the training images; the latents are encoded first, unless they are there. Of a ladder, it is the top group's. Writes
RUN/evaluation/latents.json and RUN/figures/latent_*.png. Runs on any number of processes.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaescale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vaescale.aggregate.points import Points
    from vaescale.run import Run

IMAGES = 10_000  # of which the data's covariance is taken
DRAWS = 1000  # decoded, of each kind
FAR = 3.0  # times the prior's standard deviations
BATCH = 250


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and what is asked for."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--draws", type=int, default=2000, metavar="N", help="of q(z|x), for the information; default: 2000"
    )
    parser.add_argument(
        "--gaps", type=int, default=0, metavar="N", help="also the inference gaps of N held-out images"
    )
    parser.add_argument(
        "--gap-steps",
        type=int,
        default=300,
        metavar="N",
        help="of gradient ascent on each image's q; default: 300",
    )
    parser.add_argument(
        "--importance-samples",
        type=int,
        default=1000,
        metavar="K",
        help="that bound log p(x) in the gaps; default: 1000",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write, draw. Returns all of it."""
    from vaescale import comm
    from vaescale.aggregate.collapse import use_of
    from vaescale.aggregate.information import information
    from vaescale.aggregate.latents import Drawing, ShardLatents
    from vaescale.run import latents_of, open_run
    from vaescale.training import backends

    least = {"draws": 2, "gaps": 0, "gap_steps": 1, "importance_samples": 1, "seed": 0}
    for name, bound in least.items():
        if getattr(arguments, name) < bound:
            raise UserError(
                f"--{name.replace('_', '-')} (={getattr(arguments, name)}) must be at least {bound}"
            )
    with backends.joined():
        opened = open_run(arguments.run)
        shards = latents_of(opened, "train")
        moments = ShardLatents(shards, Drawing(0, opened.recipe.seed)).held()
        in_prior_s_scale = _scaled(opened, moments)
        known = information(in_prior_s_scale, seed=arguments.seed, queries=arguments.draws)
        use = use_of(in_prior_s_scale)
        result: dict[str, Any] = {
            "run": str(opened.folder),
            "step": opened.step,
            "weights": opened.weights,
            "recipe_hash": opened.recipe.hash,
            "data_hash": shards.index.made["data_hash"],
            "latents": moments.size,
            "of": "the top group's latents" if len(opened.model.group_sizes) > 1 else "all latents",
            "information": known._asdict(),
            "latent_kl": use.latent_kl.tolist(),
            "active": use.active.tolist(),
            "collapsed": use.collapsed.tolist(),
            "variance": _variance(arguments, opened, moments),
            "sigma": _sigma(arguments, opened, moments),
            "gaps": _gaps(arguments, opened),
        }
        result["figures"] = comm.on_main(lambda: _save(opened, result))
    return result


def _scaled(opened: "Run", moments: "Points") -> "Points":
    """The latents as deviations from the model's own prior, in its standard deviations."""
    import torch

    with torch.no_grad():
        prior = opened.model.prior()
    mu, log_sigma = (part.flatten().float().cpu() for part in prior)
    return moments.scaled(mu, log_sigma.exp())


def _posterior_draws(arguments: argparse.Namespace, opened: "Run", moments: "Points") -> "Tensor":
    """Draws of q(z|x) for images at equal distances, [DRAWS, Z] on the model's device, on every rank."""
    import torch

    from vaescale import noise
    from vaescale.aggregate.information import evenly

    wanted = evenly(moments.count, DRAWS)
    mean, variance = moments.rows(wanted), moments.variances(wanted)
    epsilon = noise.normal(noise.Stream(arguments.seed, 1, wanted), noise.POSTERIOR, (moments.size,)).double()
    z: torch.Tensor = mean + variance.sqrt() * epsilon
    return z.float().to(next(opened.model.parameters()).device)


def _prior_draws(arguments: argparse.Namespace, opened: "Run", scale: float = 1.0) -> "Tensor":
    import torch

    from vaescale import noise

    prior = opened.model.prior()
    slots = torch.arange(DRAWS, device=prior.mu.device)
    epsilon = noise.normal(noise.Stream(arguments.seed, 1, slots), noise.PRIOR, (opened.model.latent_dim,))
    return prior.mu.flatten() + scale * prior.log_sigma.exp().flatten() * epsilon.to(prior.mu)


def _variance(arguments: argparse.Namespace, opened: "Run", moments: "Points") -> dict[str, Any] | None:
    """The splits of the model's images from q(z) and from p(z), of probabilistic PCA, and the data's total."""
    from collections.abc import Iterator

    import numpy as np
    import torch

    from vaescale import comm, noise
    from vaescale.aggregate.information import evenly
    from vaescale.aggregate.variance import data_covariance, model_split, ppca_split
    from vaescale.data.batch import Request
    from vaescale.run import open_split

    model, reader = opened.model, open_split(opened.recipe, "train")
    device = next(model.parameters()).device

    def decoded(z: torch.Tensor) -> Iterator[torch.Tensor]:
        slots = torch.arange(len(z), device=device)
        here = slice(comm.rank(), None, comm.world_size())
        for part, own in zip(torch.split(z[here], BATCH), torch.split(slots[here], BATCH), strict=True):
            yield model.decode(part, noise.Stream(arguments.seed, 2, own))

    def images() -> Iterator[torch.Tensor]:
        numbers = evenly(len(reader), IMAGES)[comm.rank() :: comm.world_size()]
        for part in torch.split(numbers, BATCH):
            got = reader.__getitems__(Request(np.asarray(part), refill=False))
            yield got.images[got.usable].float() / 255

    if (
        model.likelihood.variance(next(decoded(_prior_draws(arguments, opened)))) is None
        and model.likelihood.sigma is None
    ):
        return None
    with torch.no_grad():
        splits = {
            "q(z)": model_split(model, decoded(_posterior_draws(arguments, opened, moments))),
            "p(z)": model_split(model, decoded(_prior_draws(arguments, opened))),
        }
    covariance = data_covariance(images(), model.likelihood.dimensions)
    ppca = ppca_split(covariance, model.num_latents)
    if ppca is not None:
        splits[f"pPCA, {model.num_latents} latents"] = ppca
    diagonal = covariance.diagonal() if covariance.shape[1] > 1 else covariance
    return {"data_total": float(diagonal.sum()), **{name: split._asdict() for name, split in splits.items()}}


def _sigma(arguments: argparse.Namespace, opened: "Run", moments: "Points") -> dict[str, Any] | None:
    """Mean log sigma(z) against the log density of z, over several kinds of z."""
    import torch
    from scipy.stats import pearsonr, spearmanr

    from vaescale import noise
    from vaescale.aggregate.refinement import mean_log_sigma
    from vaescale.aggregate.sampling import refuse_misfit
    from vaescale.mixtures import files
    from vaescale.mixtures.gaussian import log_density, on, sample

    model = opened.model
    device = next(model.parameters()).device
    with torch.no_grad():
        stream = noise.Stream(arguments.seed, 3, torch.arange(DRAWS, device=device))
        places = {"posterior": _posterior_draws(arguments, opened, moments)}
        fitted = files.load(opened.folder / "gmm") if (opened.folder / "gmm").is_dir() else None
        if fitted is not None:
            refuse_misfit(fitted, model, opened.folder)
            places["mixture"] = sample(fitted, stream)
        places |= {
            "prior": _prior_draws(arguments, opened),
            f"prior x {FAR:g}": _prior_draws(arguments, opened, FAR),
        }
        sets = {}
        for name, z in places.items():
            try:
                sigma = [
                    mean_log_sigma(model, part, stream._replace(slots=own))
                    for part, own in zip(
                        torch.split(z, BATCH), torch.split(stream.slots, BATCH), strict=False
                    )
                ]
            except UserError:
                return None
            if fitted is None:
                density = model.prior_log_density(z).double()
            else:
                density = log_density(on(fitted, device), z.double())
            sets[name] = (density.cpu().numpy(), torch.cat(sigma).double().cpu().numpy())
    import numpy as np

    densities, sigmas = (np.concatenate([one[place] for one in sets.values()]) for place in (0, 1))
    return {
        "density": "the fitted mixture's" if "mixture" in sets else "the prior's",
        "pearson": float(pearsonr(densities, sigmas).statistic),
        "spearman": float(spearmanr(densities, sigmas).statistic),
        "kinds": {
            name: {
                "mean_log_sigma": float(log_sigma.mean()),
                "mean_log_density_nats": float(density.mean()),
                "spearman": float(spearmanr(density, log_sigma).statistic),
                "points": [density[:300].tolist(), log_sigma[:300].tolist()],
            }
            for name, (density, log_sigma) in sets.items()
        },
    }


def _gaps(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any] | None:
    """The mean gaps of some held-out images, shared among the ranks."""
    import numpy as np
    import torch

    from vaescale import comm, noise
    from vaescale.aggregate.gaps import inference_gaps
    from vaescale.aggregate.information import evenly
    from vaescale.data.batch import Request
    from vaescale.models.flat import FlatVAE
    from vaescale.run import open_split

    if not arguments.gaps:
        return None
    model = opened.model
    if not isinstance(model, FlatVAE) or model.likelihood.reads_x:
        raise UserError(
            "--gaps is for a single latent vector and a likelihood that bounds log p(x); leave it out here"
        )
    device = next(model.parameters()).device
    reader = open_split(opened.recipe, "val")
    numbers = evenly(len(reader), arguments.gaps)[comm.rank() :: comm.world_size()]
    rows = torch.zeros(0, 3, dtype=torch.float64)
    for part in torch.split(numbers, 32) if len(numbers) else ():
        got = reader.__getitems__(Request(np.asarray(part), refill=False))
        stream = noise.Stream(arguments.seed, 0, part[got.usable].to(device))
        found = inference_gaps(
            model,
            got.images[got.usable].to(device),
            stream,
            steps=arguments.gap_steps,
            importance_samples=arguments.importance_samples,
        )
        rows = torch.cat([rows, torch.stack(found, dim=1).cpu()])
    rows = torch.cat(comm.gather_object(rows))
    amortized, optimized, log_px = rows.unbind(1)
    error = len(rows) ** -0.5
    return {
        "images": len(rows),
        "steps": arguments.gap_steps,
        "importance_samples": arguments.importance_samples,
        "elbo_nats": float(amortized.mean()),
        "optimized_elbo_nats": float(optimized.mean()),
        "log_px_nats": float(log_px.mean()),
        "amortization_gap_nats": float((optimized - amortized).mean()),
        "amortization_gap_error": float((optimized - amortized).std() * error),
        "approximation_gap_nats": float((log_px - optimized).mean()),
        "approximation_gap_error": float((log_px - optimized).std() * error),
    }


def _save(opened: "Run", result: dict[str, Any]) -> list[str]:
    """JSON, pictures, MLflow."""
    from vaescale import figures
    from vaescale.aggregate.collapse import DELTAS, EPSILONS
    from vaescale.training.folder import append_metrics, write_json
    from vaescale.training.tracking import push

    folder = opened.folder / "figures"
    head = f"{opened.recipe.name}, step {opened.step}"
    curves = [
        (f"delta {delta:g}", EPSILONS, shares)
        for delta, shares in zip(DELTAS, result["collapsed"], strict=True)
    ]
    figures.latent_use(
        folder / "latent_use.png",
        result["latent_kl"],
        result["active"],
        curves,
        title=f"{head}: use of the latents",
    )
    made = [folder / "latent_use.png"]
    if variance := result["variance"]:
        bars = [
            (name, part["latent"], part["observed"])
            for name, part in variance.items()
            if name != "data_total"
        ]
        made.append(folder / "latent_variance.png")
        title = f"{head}: variance of the images (data: {variance['data_total']:.2f})"
        figures.variance_split(made[-1], bars, title=title)
    if sigma := result["sigma"]:
        points = [(name, *kind.pop("points")) for name, kind in sigma["kinds"].items()]
        made.append(folder / "latent_sigma.png")
        title = f"{head}: sigma(z) against {sigma['density']} density, Spearman {sigma['spearman']:.2f}"
        figures.sigma_and_density(made[-1], points, title=title)
    write_json(opened.folder / "evaluation" / "latents.json", result)
    append_metrics(opened.folder, opened.step, _metrics(result))
    push(opened.folder, opened.recipe.tracking)
    return [str(path) for path in made]


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    known = result["information"]
    metrics = {
        "latents/mutual_information_nats": known["mutual_information"],
        "latents/aggregate_kl_nats": known["aggregate_kl"],
        "latents/total_correlation_nats": known["total_correlation"],
        "latents/active_units": float(sum(result["active"])),
    }
    for name in ("amortization_gap_nats", "approximation_gap_nats"):
        metrics |= {f"latents/{name}": result["gaps"][name]} if result["gaps"] else {}
    metrics |= {"latents/sigma_spearman": result["sigma"]["spearman"]} if result["sigma"] else {}
    return metrics


def show(result: dict[str, Any]) -> None:
    """A table for each part."""
    from vaescale.console import table

    known = result["information"]

    def nats(name: str, error: str | None = None) -> str:
        return f"{known[name]:9.3f}" + (f" +- {known[error]:.3f}" if error else "")

    both = known["mutual_information"] + known["aggregate_kl"]
    table(
        f"{result['run']}, step {result['step']}: information of {result['of']} ({known['images']} images), nats",
        [
            (
                f"I(x; z), at most ln N = {math.log(known['images']):.3f}",
                nats("mutual_information", "mutual_information_error"),
            ),
            ("KL(q(z)||p(z))", nats("aggregate_kl", "aggregate_kl_error")),
            ("their sum", f"{both:9.3f}"),
            ("mean KL, closed form", nats("mean_kl")),
            ("total correlation", nats("total_correlation", "total_correlation_error")),
            ("KL of the marginals", nats("marginal_kl")),
            ("active units", f"{sum(result['active']):5d} of {result['latents']}"),
        ],
    )
    if result["variance"]:
        rows = [
            (
                name,
                f"{part['latent']:10.4f} {part['observed']:10.4f} {part['latent'] + part['observed']:10.4f}",
            )
            for name, part in result["variance"].items()
            if name != "data_total"
        ]
        table(
            f"variance of the images{'from z':>13} {'noise':>10} {'total':>10}",
            [*rows, ("data", f"{'':21} {result['variance']['data_total']:10.4f}")],
        )
    if result["sigma"]:
        rows = [
            (
                name,
                f"{one['mean_log_sigma']:10.4f} {one['mean_log_density_nats']:12.2f} {one['spearman']:10.3f}",
            )
            for name, one in result["sigma"]["kinds"].items()
        ]
        pooled = f"all: Spearman {result['sigma']['spearman']:.3f}, Pearson {result['sigma']['pearson']:.3f}"
        table(
            f"z from       mean log sigma(z)  log density  Spearman   ({result['sigma']['density']}; {pooled})",
            rows,
        )
    if gaps := result["gaps"]:
        table(
            f"inference gaps of {gaps['images']} held-out images, nats",
            [
                ("L[q]", f"{gaps['elbo_nats']:10.3f}"),
                ("L[q*]", f"{gaps['optimized_elbo_nats']:10.3f}"),
                (f"log p(x), at least (K = {gaps['importance_samples']})", f"{gaps['log_px_nats']:10.3f}"),
                (
                    "amortization gap",
                    f"{gaps['amortization_gap_nats']:10.3f} +- {gaps['amortization_gap_error']:.3f}",
                ),
                (
                    "approximation gap",
                    f"{gaps['approximation_gap_nats']:10.3f} +- {gaps['approximation_gap_error']:.3f}",
                ),
            ],
        )
    table("figures", [(Path(path).stem, path) for path in result["figures"]])


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
