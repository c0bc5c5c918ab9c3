"""What a run's latents are worth: where the KL goes, which latents are used, what they explain, and why the bound is not tight.

    information   I(x; z), KL(q(z)||p(z)), total correlation, beside the mean KL in closed form
    use           KL by latent, active units, the share that has collapsed over epsilon and delta
    variance      what z explains and what is left to the noise, beside probabilistic PCA with as many latents
    sigma         for a predicted sigma: is it larger where q(z) is small
    noise         are samples noisier than reconstructions: the noise that the pictures themselves show
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
    from vaescale.data.latent_shards import LatentShards
    from vaescale.trained import Trained

SATURATED_NATS = 0.01
PROTOCOL = {
    "information": "of the training images' q(z|x): q(z) is summed exactly over all of them, expectations are over draws of some; nats",
    "active": "latents (of a map its channels) whose posterior mean, in the prior's scale, varies by more than 0.01",
    "collapsed": "share of the latents with a KL below epsilon for a share 1 - delta of the images, Lucas et al. 2019",
    "variance": "over an image's values in [0, 1], of decoded draws; law of total variance",
    "sigma": "mean log sigma(z) over an image's values, against log q(z) summed exactly over all training images (of narrow q(z|x), so "
    "that it is tiny wherever no image lies) and the mixture's log density",
    "noise": "standard deviation of white noise, estimated from about 1000 pictures of each kind: Immerkaer 1996",
    "gaps": "of held-out images; q* by gradient ascent, log p(x) bounded by importance sampling from q*; Cremer et al. 2018",
}


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
    from vaescale.aggregate.latents import Drawing, load
    from vaescale.commands import latents as measuring
    from vaescale.mixtures import files
    from vaescale.runs import folder as run_folder
    from vaescale.runs.identity import git_revision
    from vaescale.trained import latents_of, open_trained
    from vaescale.training import launch as backends

    least = {"draws": 2, "gaps": 0, "gap_steps": 1, "importance_samples": 1, "seed": 0}
    for name, bound in least.items():
        if getattr(arguments, name) < bound:
            raise UserError(
                f"--{name.replace('_', '-')} (={getattr(arguments, name)}) must be at least {bound}"
            )
    if arguments.gaps == 1:
        raise UserError("--gaps (=1) must be at least 2 images, or 0 for none")
    with backends.joined():
        trained = open_trained(arguments.run)
        if arguments.gaps:
            measuring.refuse_gaps(trained)
        fitted = trained.folder / "gmm"
        mixture = files.load(fitted, **trained.identity) if fitted.is_dir() else None
        if mixture is not None and mixture.means.shape[1] != trained.model.latent_dim:
            mixture = None  # of several groups together, and what is measured here is the top one
        shards = latents_of(trained, "train")
        moments = load(shards, Drawing(0, trained.recipe.seed))
        scaled, seed = measuring.in_prior_s_scale(trained, moments), arguments.seed
        use = use_of(scaled, trained.model.group_places[0])
        kinds = measuring.kinds_of_z(trained, moments, mixture, seed=seed)
        result: dict[str, Any] = {
            "run": str(trained.folder),
            **trained.identity,
            "data_hash": shards.index.made["data_hash"],
            "code": git_revision(),
            "seed": seed,
            "protocol": PROTOCOL,
            "measured": _measured(arguments, shards.index.made["data_hash"]),
            "latents": len(use.latent_kl),
            "of": "the top group's latents" if len(trained.model.group_sizes) > 1 else "all latents",
            "information": information(scaled, seed=seed, queries=arguments.draws)._asdict(),
            "latent_kl": use.latent_kl.tolist(),
            "active": use.active.tolist(),
            "collapsed": use.collapsed.tolist(),
            "variance": measuring.variance(trained, kinds, seed=seed),
            "sigma": measuring.sigma_and_density(trained, moments, mixture, kinds, seed=seed),
            "noise": measuring.noise_of(trained, kinds, seed=seed),
            "gaps": None,
        }
        earlier = comm.on_main(lambda: run_folder.read_json(trained.folder / "evaluation" / "latents.json"))
        alike = ("weights_hash", "data_hash", "code")
        if not arguments.gaps and all(earlier.get(name) == result[name] for name in alike):
            result["gaps"] = earlier.get("gaps")  # what took minutes is kept
            kept = earlier.get("measured", {}).items()
            result["measured"] |= {name: words for name, words in kept if name.endswith("_gap_nats")}
        if arguments.gaps:
            result["gaps"] = measuring.gaps(
                trained,
                arguments.gaps,
                steps=arguments.gap_steps,
                importance_samples=arguments.importance_samples,
                seed=seed,
            )
        result["figures"] = comm.on_main(lambda: _save(trained, shards, result))
    return result


def _measured(arguments: argparse.Namespace, data_hash: str) -> dict[str, str]:
    """What must be alike for two runs' metrics to compare, by what their names begin with."""
    drawn = ("mutual_information", "aggregate_kl", "total_correlation")
    gaps = f"{arguments.gaps} images, {arguments.gap_steps} steps, {arguments.importance_samples} importance samples"
    return {
        "latents/": f"images {data_hash[:12]}",
        **{f"latents/{name}_nats": f"{arguments.draws} draws" for name in drawn},
        **{f"latents/{name}_gap_nats": gaps for name in ("amortization", "approximation") if arguments.gaps},
    }


def _save(trained: "Trained", shards: "LatentShards", result: dict[str, Any]) -> list[str]:
    """JSON, pictures, MLflow."""
    from vaescale import figures
    from vaescale.aggregate.collapse import DELTAS, EPSILONS
    from vaescale.commands import latents as measuring
    from vaescale.runs.folder import append_metrics, write_json
    from vaescale.runs.tracking import push

    folder = trained.folder / "figures"
    head = f"{trained.recipe.name}, step {trained.step}"
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
    made = [folder / "latent_use.png", folder / "latent_scatter.png"]
    points, labels, words = measuring.scatter(shards, seed=trained.recipe.seed)
    by = ", by class" if (labels >= 0).any() else ""
    title = f"{head}: posterior means of {len(points)} images{by}"
    figures.latent_scatter(made[1], points, labels, axes_words=words, title=title)
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
        sets = [(name, *kind.pop("points")) for name, kind in sigma["kinds"].items()]
        made.append(folder / "latent_sigma.png")
        title = f"{head}: sigma(z) against {sigma['drawn']}, Spearman {sigma['spearman'][sigma['drawn']]:.2f}"
        figures.sigma_and_density(made[-1], sets, density=sigma["drawn"], title=title)
    write_json(trained.folder / "evaluation" / "latents.json", result)
    append_metrics(trained.folder, trained.step, _metrics(result))
    push(trained.folder, trained.recipe.tracking)
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
    for name, value in result["sigma"]["spearman"].items() if result["sigma"] else ():
        metrics[f"latents/sigma_spearman/{name.removeprefix('log ').removesuffix('(z)')}"] = value
    for name, row in result["noise"].items():
        metrics |= {
            f"latents/noise/{name.replace(' ', '-')}-{column}": value for column, value in row.items()
        }
    return metrics


def show(result: dict[str, Any]) -> None:
    """A table for each part."""
    from vaescale.system.console import say, table

    table(
        f"{result['run']}, step {result['step']}: information of {result['of']} "
        f"({result['information']['images']} images), nats",
        _information_rows(result),
    )
    known = result["information"]
    if known["mutual_information"] > math.log(known["images"]) - SATURATED_NATS:
        say(
            "I(x; z) is the most that so many images can have: their q(z|x) do not overlap, and KL and total correlation are of that "
            "many narrow Gaussians; held-out densities of a mixture (fit-gmm) say more"
        )
    if result["variance"]:
        head = f"variance of the images{'from z':>13} {'noise':>10} {'total':>10}"
        table(head, _variance_rows(result["variance"]))
    if sigma := result["sigma"]:
        head = "".join(f"{name:>16} {'Spearman':>9}" for name in sigma["spearman"])
        table(f"z from        log sigma(z){head}", _sigma_rows(sigma))
    if result["noise"]:
        table(f"noise in pictures of {'means':>10} {'ancestral':>11}", _noise_rows(result["noise"]))
    if gaps := result["gaps"]:
        table(f"inference gaps of {gaps['images']} held-out images, nats", _gap_rows(gaps))
    table("figures", [(Path(path).stem, path) for path in result["figures"]])


def _information_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    known = result["information"]

    def nats(name: str, error: str | None = None) -> str:
        return f"{known[name]:9.3f}" + (f" +- {known[error]:.3f}" if error else "")

    both = known["mutual_information"] + known["aggregate_kl"]
    bound = f"I(x; z), at most ln N = {math.log(known['images']):.3f}"
    return [
        (bound, nats("mutual_information", "mutual_information_error")),
        ("KL(q(z)||p(z))", nats("aggregate_kl", "aggregate_kl_error")),
        ("their sum", f"{both:9.3f}"),
        ("mean KL, closed form", nats("mean_kl")),
        ("total correlation", nats("total_correlation", "total_correlation_error")),
        ("KL of the marginals", nats("marginal_kl")),
        ("active units", f"{sum(result['active']):5d} of {len(result['active'])}"),
    ]


def _variance_rows(variance: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (name, f"{part['latent']:10.4f} {part['observed']:10.4f} {part['latent'] + part['observed']:10.4f}")
        for name, part in variance.items()
        if name != "data_total"
    ]
    return [*rows, ("data", f"{'':21} {variance['data_total']:10.4f}")]


def _sigma_rows(sigma: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            kind,
            f"{one['mean_log_sigma']:12.4f}"
            + "".join(
                f"{one['mean_density_nats'][name]:16.2f} {one['spearman'][name]:9.3f}"
                for name in sigma["spearman"]
            ),
        )
        for kind, one in sigma["kinds"].items()
    ]
    pooled = "".join(f"{'':16} {value:9.3f}" for value in sigma["spearman"].values())
    return [*rows, ("all", f"{'':12}{pooled}")]


def _noise_rows(noise: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    columns = ("mean", "ancestral")
    cells = {
        name: [f"{row[column]:11.4f}" if column in row else "" for column in columns]
        for name, row in noise.items()
    }
    return [(name, " ".join(row)) for name, row in cells.items()]


def _gap_rows(gaps: dict[str, Any]) -> list[tuple[str, str]]:
    def gap(name: str) -> tuple[str, str]:
        return f"{name} gap", f"{gaps[f'{name}_gap_nats']:10.3f} +- {gaps[f'{name}_gap_error']:.3f}"

    return [
        ("L[q]", f"{gaps['elbo_nats']:10.3f}"),
        ("L[q*]", f"{gaps['optimized_elbo_nats']:10.3f}"),
        (f"log p(x), at least (K = {gaps['importance_samples']})", f"{gaps['log_px_nats']:10.3f}"),
        gap("amortization"),
        gap("approximation"),
    ]


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
