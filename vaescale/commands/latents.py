"""Measure a run's latents: information, use, variance, sigma, picture noise, and inference gaps."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vaescale import comm, figures
from vaescale.aggregate.collapse import DELTAS, EPSILONS, use_of
from vaescale.aggregate.gaps import mean_gaps, refuse_gaps
from vaescale.aggregate.information import MOST_OWN_SHARE, Information, information
from vaescale.aggregate.latents import Drawing, in_prior_scale, load
from vaescale.aggregate.picture_noise import noise_levels
from vaescale.aggregate.scatter import scatter
from vaescale.aggregate.sigma import sigma_and_density
from vaescale.aggregate.sources import draws_by_source
from vaescale.aggregate.variance import variance_splits
from vaescale.commands.encode import latents_of
from vaescale.commands.signature import Count, NonNegative, checked
from vaescale.data.latent_shards import LatentShards
from vaescale.errors import UserError
from vaescale.evaluation.remarks import remarks
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.gaussian import Mixture
from vaescale.runs import folder as run_folder
from vaescale.runs.identity import git_revision
from vaescale.runs.results import save_result
from vaescale.system import heartbeat
from vaescale.trained import Trained, Which, open_split, open_trained, refuse_codes, refuse_condition
from vaescale.training import launch
from vaescale.training.summary import went_wrong

NAME = "evaluation/latents.json"
PROTOCOL = {
    "information": "of the training images' q(z|x), expectations over draws of some; log q(z) is summed exactly over all images (own term "
    "included: I is at most ln N, KL and TC are upper bounds), over all but the draw's own (leave-one-out: I is an upper bound, KL and TC "
    "are lower bounds; Poole et al. 2019, eq. 13), or is that of a mixture fitted to the other half of the images (mixture: bounds as "
    "leave-one-out, not limited by N); nats",
    "active": "latents (channels of a map) whose posterior mean, in the prior's scale, has a variance above 0.01",
    "collapsed": "share of the latents with a KL below epsilon for a share 1 - delta of the images, Lucas et al. 2019",
    "variance": "over an image's values in [0, 1], of decoded draws; law of total variance",
    "sigma": "mean log sigma(z) over an image's values, against log q(z) summed exactly over all training images (of narrow q(z|x), so "
    "that it is tiny away from every image) and the mixture's log density",
    "noise": "standard deviation of white noise, estimated from about 1000 pictures of each kind: Immerkaer 1996",
    "gaps": "of held-out images; q* by gradient ascent, log p(x) bounded by importance sampling from q*; Cremer et al. 2018",
}
TERMS = ("mutual_information", "aggregate_kl", "total_correlation")
ENDINGS = ("", "_leave_one_out", "_mixture")
MORE_IS_BETTER = (
    *(f"latents/mutual_information{ending}_nats" for ending in ENDINGS),
    "latents/active_units",
)


@checked
def latents(
    run: Path,
    *,
    draws: Annotated[int, Field(ge=2)] = 2000,
    gaps: NonNegative = 0,
    gap_steps: Count = 300,
    importance_samples: Count = 1000,
    seed: NonNegative = 0,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Measure a run's latents on its training images. Writes RUN/evaluation/latents.json and RUN/figures/latent_*.png.

    draws: number of draws from q(z|x) for the information measures. gaps: number of held-out images whose inference gaps are
    measured, each with `gap_steps` steps of gradient ascent and `importance_samples` importance samples of log p(x); 0 keeps
    the gaps of an earlier call. checkpoint: see `Which`.

    Returns all measures with their protocol. Raises UserError for gaps that the model does not have.
    """
    if gaps == 1:
        raise UserError("--gaps (=1) must be at least 2 images, or 0 for none")
    with launch.joined():
        trained = open_trained(run, which=checkpoint)
        trained.announce("latents")
        refuse_codes(trained, "latents", "evaluate measures the use of the codes")
        refuse_condition(trained, "latents", "its measures are of q(z) and p(z); take evaluate")
        if gaps:
            refuse_gaps(trained.model)
        mixture = _mixture(trained)
        shards = latents_of(trained, "train")
        data_hash = shards.index.made["data_hash"]
        result = {
            "run": str(trained.folder),
            **trained.identity,
            "data_hash": data_hash,
            "code": git_revision(),
            "seed": seed,
            "protocol": PROTOCOL,
            "measured": _measured(data_hash, draws, gaps, gap_steps, importance_samples),
            **_measure(trained, shards, mixture, draws=draws, seed=seed),
        }
        result["notes"] += comm.on_main(lambda: _of_training(trained, sum(result["active"])))
        if gaps:
            result["gaps"] = mean_gaps(
                refuse_gaps(trained.model),
                comm.together(lambda: open_split(trained.recipe, "val")),
                gaps,
                steps=gap_steps,
                importance_samples=importance_samples,
                seed=seed,
            )
        else:
            earlier = comm.on_main(lambda: run_folder.read_json(trained.folder / NAME))
            _keep_gaps(result, earlier)
        result["figures"] = comm.on_main(lambda: _save(trained, shards, result))
    return result


def _mixture(trained: Trained) -> Mixture | None:
    """The run's mixture, if it has one for the latents that are measured: all of a flat model, the top group of a ladder."""
    folder = trained.folder / "gmm"
    mixture = (
        mixture_files.load(folder, **trained.identity) if (folder / mixture_files.DETAILS).is_file() else None
    )
    if mixture is not None and mixture.means.shape[1] != trained.model.latent_dim:
        return None  # the mixture is for several groups, the measures are for the top group
    return mixture


def _measure(
    trained: Trained, shards: LatentShards, mixture: Mixture | None, *, draws: int, seed: int
) -> dict[str, Any]:
    """All measures except the gaps."""
    model, data_seed = trained.model, trained.recipe.seed
    reader = comm.together(lambda: open_split(trained.recipe, "train"))
    moments = load(shards, Drawing(0, data_seed))
    scaled = in_prior_scale(model, moments)
    heartbeat.beat("the information of the latents")
    known, use = information(scaled, seed=seed, queries=draws), use_of(scaled, model.group_places[0])
    terms = known._asdict()
    mixture_of_others = {name: terms.pop(f"mixture_{name}") for name in ("components", "covariance")}
    heartbeat.beat("draws of the latents")
    sources = draws_by_source(model, moments, mixture, seed=seed)
    heartbeat.beat("the variance of decoded pictures")
    variance = variance_splits(model, reader, sources, seed=seed)
    heartbeat.beat("sigma and the density of the latents")
    sigma = sigma_and_density(model, moments, mixture, sources, seed=seed)
    return {
        "latents": len(use.latent_kl),
        "of": "the top group's latents" if len(model.group_sizes) > 1 else "all latents",
        "information": terms,
        "information_mixture": mixture_of_others,
        "latent_kl": use.latent_kl.tolist(),
        "active": use.active.tolist(),
        "collapsed": use.collapsed.tolist(),
        "variance": variance,
        "sigma": sigma,
        "noise": noise_levels(model, reader, sources, seed=seed, data_seed=data_seed),
        "gaps": None,
        "notes": [_limited_note(known)] if known.limited else [],
        "limited": _limited(known) if known.limited else {},
    }


def _of_training(trained: Trained, active: int) -> list[str]:
    """The sentences on a run whose training went wrong. active: number of active latents."""
    likelihood = trained.recipe.likelihood
    rows = run_folder.read_metrics(trained.folder)
    sentences = [*remarks({"active_units": active}, likelihood), *went_wrong(rows, likelihood)]
    return list(dict.fromkeys(sentences))


def _limited_note(known: Information) -> str:
    return (
        f"{known.images} images are too few for the sum over all of them: an image's own term is {known.own_share:.2f} of q(z) (more "
        f"than {MOST_OWN_SHARE:g}), so I(x; z) with it is too low, and KL and total correlation are too high; read those of the mixture"
    )


def _limited(known: Information) -> dict[str, str]:
    """For `compare-runs`, by metric: why its value says more about the number of images than about the model."""
    return {
        f"latents/{term}_nats": f"limited by {known.images} images, whose own term is {known.own_share:.2f} of q(z); compare "
        f"latents/{term}_mixture_nats"
        for term in TERMS
    }


def _keep_gaps(result: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Take over the gaps of an earlier result for the same model, images and code, because they take minutes to measure."""
    if any(earlier.get(name) != result[name] for name in ("weights_hash", "data_hash", "code")):
        return
    result["gaps"] = earlier.get("gaps")
    kept = earlier.get("measured", {}).items()
    result["measured"] |= {name: how for name, how in kept if name.endswith("_gap_nats")}


def _measured(
    data_hash: str, draws: int, gaps: int, gap_steps: int, importance_samples: int
) -> dict[str, str]:
    """The conditions under which two runs' metrics are comparable, by prefix of the metric names."""
    how = f"{gaps} images, {gap_steps} steps, {importance_samples} importance samples"
    return {
        "latents/": f"images {data_hash[:12]}",
        **{f"latents/{term}": f"{draws} draws" for term in TERMS},
        **{f"latents/{name}_gap_nats": how for name in ("amortization", "approximation") if gaps},
    }


def _save(trained: Trained, shards: LatentShards, result: dict[str, Any]) -> list[str]:
    """Save the result and draw the figures. Returns the paths of the figures."""
    kinds = result["sigma"]["kinds"] if result["sigma"] else {}
    points = {name: kind.pop("points") for name, kind in kinds.items()}  # only for the picture
    paths: list[Path] = []
    result["more_is_better"] = list(MORE_IS_BETTER)
    save_result(
        trained.folder,
        NAME,
        result,
        step=trained.step,
        metrics=_metrics(result),
        tracking=trained.recipe.tracking,
        draw=lambda: paths.extend(_draw(trained, shards, result, points)),
    )
    return [str(path) for path in paths]


def _draw(
    trained: Trained, shards: LatentShards, result: dict[str, Any], points: dict[str, Any]
) -> list[Path]:
    """Draw the figures. points: of sigma(z) against a density, by kind. Returns their paths."""
    folder = trained.folder / "figures"
    head = f"{trained.recipe.name}, step {trained.step}"
    curves = [
        (f"delta {delta:g}", EPSILONS, shares)
        for delta, shares in zip(DELTAS, result["collapsed"], strict=True)
    ]
    paths = [folder / "latent_use.png", folder / "latent_scatter.png"]
    title = f"{head}: use of the latents"
    figures.latent_use(paths[0], result["latent_kl"], result["active"], curves, title=title)
    placed = scatter(shards, seed=trained.recipe.seed)
    by = ", by class" if (placed.classes >= 0).any() else ""
    figures.latent_scatter(
        paths[1],
        placed.points,
        placed.classes,
        class_names=shards.index.class_names,
        axes_labels=placed.axes,
        note=placed.note,
        title=f"{head}: posterior means of {len(placed.points)} images{by}",
    )
    if variance := result["variance"]:
        bars = [
            (name, split["latent"], split["observed"])
            for name, split in variance.items()
            if name != "data_total"
        ]
        paths.append(folder / "latent_variance.png")
        title = f"{head}: variance of the images"
        figures.variance_split(paths[-1], bars, data=variance["data_total"], title=title)
    if sigma := result["sigma"]:
        sets = [(name, *of_kind) for name, of_kind in points.items()]
        paths.append(folder / "latent_sigma.png")
        title = f"{head}: sigma(z) against {sigma['drawn']}, Spearman {sigma['spearman'][sigma['drawn']]:.2f}"
        figures.sigma_and_density(paths[-1], sets, density=sigma["drawn"], title=title)
    return paths


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    known = result["information"]
    metrics = {
        **{f"latents/{term}{ending}_nats": known[term + ending] for term in TERMS for ending in ENDINGS},
        "latents/own_share": known["own_share"],
        "latents/active_units": float(sum(result["active"])),
    }
    for name in ("amortization_gap_nats", "approximation_gap_nats"):
        metrics |= {f"latents/{name}": result["gaps"][name]} if result["gaps"] else {}
    for name, value in result["sigma"]["spearman"].items() if result["sigma"] else ():
        metrics[f"latents/sigma_spearman/{name.removeprefix('log ').removesuffix('(z)')}"] = value
    for name, row in result["noise"].items():
        metrics |= {
            f"latents/noise/{name.replace(' ', '-')}-{column}": value for column, value in row.items()
        }
    return metrics
