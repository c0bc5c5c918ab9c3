"""Fit a Gaussian mixture to a run's aggregate posterior q(z) = E_x q(z|x), the prior that its decoder was trained on.

The training images' latents are encoded first, unless they are there (RUN/latents). Fitted are draws from q(z|x), or with
--samples-per-image 0 its moments: a bound with one responsibility for each image. Several numbers of components are compared
on held-out images. Writes RUN/gmm/mixture.safetensors and mixture.json, each other candidate to RUN/gmm/components-K, and the
comparison to RUN/gmm/selection.json and RUN/figures/mixture_selection.png. Of a ladder it is the latents of the top group, or
with --groups of the first ones together, whose learned prior the mixture replaces. Runs on any number of processes, with the same result:

  accelerate launch --config_file recipes/backends/cpu2.yaml tools/fit_gmm.py runs/digits-optimal --components 1,10,50
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaescale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vaescale.commands.fit_gmm import Material
    from vaescale.mixtures import em
    from vaescale.mixtures.gaussian import Mixture
    from vaescale.mixtures.selection import Candidate
    from vaescale.runs.tracking import TrackingConfig


SELECTION = "mixture_selection.png"
MOST_DRAWS = 1000  # of an image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, what is fitted, how, and how it is chosen."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--components", type=_numbers, default=(10,), metavar="K[,K...]", help="one or several; default: 10"
    )
    parser.add_argument(
        "--covariance", choices=("full", "tied", "diag", "spherical"), default="full", help="default: full"
    )
    parser.add_argument(
        "--samples-per-image",
        type=int,
        metavar="S",
        help="draws from q(z|x); 0: its moments; default: enough for 65536 latents, from 1 to 8",
    )
    parser.add_argument(
        "--groups",
        type=int,
        default=1,
        metavar="G",
        help="of a ladder: of so many groups together, from the top; default: 1",
    )
    parser.add_argument("--start", choices=("kmeans", "random"), default="kmeans", help="default: kmeans")
    parser.add_argument(
        "--restarts", type=int, default=1, metavar="N", help="the best of N starts is kept; default: 1"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="NATS",
        help="stop when a step gains less; default: 1e-3",
    )
    parser.add_argument("--max-iterations", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument(
        "--ridge",
        type=float,
        default=1e-6,
        help="added to the covariances' diagonals, times each latent's variance over the data; default: 1e-6",
    )
    parser.add_argument(
        "--select",
        choices=("held-out", "bic"),
        default="held-out",
        help="what chooses among several; default: held-out",
    )
    parser.add_argument(
        "--online",
        type=int,
        metavar="PASSES",
        help="stepwise EM in so many passes over the shards, for more latents than memory: faster, a little worse",
    )
    parser.add_argument(
        "--online-batch",
        type=int,
        default=8192,
        metavar="N",
        help="latents of a step, of all processes; default: 8192",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the starts; default: 0")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode, fit, choose, save. Returns the densities of the chosen mixture and of all candidates."""
    from vaescale.training import launch as backends

    _refuse_senseless(arguments)
    with backends.joined():
        return _fit(arguments)


def _fit(arguments: argparse.Namespace) -> dict[str, Any]:
    from vaescale import comm
    from vaescale.commands.fit_gmm import gather, prior_nats, replaces
    from vaescale.mixtures.selection import choose, refuse_unfit
    from vaescale.trained import open_trained

    trained = open_trained(arguments.run)
    material = gather(
        trained,
        groups=arguments.groups,
        samples_per_image=arguments.samples_per_image,
        online=arguments.online is not None,
    )
    of = f" of the first {arguments.groups} groups" if arguments.groups > 1 else " of the top group"
    refuse_unfit(
        material.spread,
        max(arguments.components),
        material.images,
        arguments.covariance,
        of if len(trained.model.group_sizes) > 1 else "",
    )
    ridge = arguments.ridge * material.spread.total.clamp_min(1e-12)
    candidates = [_candidate(arguments, number, ridge, material) for number in arguments.components]
    chosen = choose(candidates, arguments.select)
    of_prior = prior_nats(trained.model, material.val)
    metrics = {
        "gmm/components": float(len(chosen.mixture.weights)),
        "gmm/train_log_density_nats": chosen.train_nats,
        "gmm/val_log_density_nats": chosen.val_nats,
        "gmm/val_prior_log_density_nats": of_prior,
        "gmm/bic": chosen.bic,
    }
    result = {
        "run": str(trained.folder),
        **chosen.words(),
        "groups": arguments.groups,
        "samples_per_image": material.draws,
        "start": arguments.start,
        "restarts": arguments.restarts,
        "ridge": arguments.ridge,
        "online_passes": arguments.online,
        "seed": arguments.seed,
        "replaces": replaces(trained.model, arguments.groups),
        "collapsed_latents": material.spread.collapsed.nonzero()[:, 0].tolist(),
        **trained.identity,
        "data_hash": material.data_hash,
        "measured": {
            "gmm/": f"{arguments.groups} group{'s'[: arguments.groups > 1]} of latents, {material.draws} draws of an image, images "
            f"{material.data_hash[:12]}"
        },
        "prior_val_nats": of_prior,
        **metrics,
        "covariance": arguments.covariance,
        "selected_by": arguments.select,
        "candidates": [one.words() for one in candidates],
    }
    comm.on_main(lambda: _save(trained.folder, candidates, chosen, result, metrics, trained.recipe.tracking))
    return result


def _candidate(
    arguments: argparse.Namespace, number: int, ridge: "Tensor", material: "Material"
) -> "Candidate":
    from vaescale import comm
    from vaescale.aggregate.latents import ShardLatents
    from vaescale.mixtures import em, selection
    from vaescale.mixtures.stepwise import fit_stepwise
    from vaescale.system.console import Progress, say

    train = material.train
    words = f"fit {number} component{'s' if number > 1 else ''}"

    def fit(start: "Mixture") -> "em.Fit":
        with Progress(words, 0, shown=comm.is_main()) as progress:

            def tell(iteration: int, nats: float) -> None:
                progress.update(iteration, f"iterations  {nats:.3f} nats")

            if isinstance(train, ShardLatents) and arguments.online is not None:
                return fit_stepwise(
                    train,
                    start,
                    batch=arguments.online_batch,
                    passes=arguments.online,
                    seed=arguments.seed,
                    ridge=ridge,
                    tell=tell,
                )
            return em.fit(
                train,
                start,
                ridge=ridge,
                tolerance=arguments.tolerance,
                max_iterations=arguments.max_iterations,
                tell=tell,
            )

    if comm.is_main():
        say(
            f"fitting {number} component{'s' if number > 1 else ''} to {train.count} latents of {train.size} values"
        )
    found = selection.candidate(
        train,
        material.drawn,
        material.val,
        number,
        fit=fit,
        restarts=arguments.restarts,
        images=material.images,
        kind=arguments.covariance,
        how=arguments.start,
        seed=arguments.seed,
        ridge=ridge,
    )
    if comm.is_main() and not found.converged and arguments.online is None:
        say(f"{number} components: not converged after {found.iterations} iterations; raise --max-iterations")
    return found


def _save(
    folder: Path,
    candidates: "list[Candidate]",
    chosen: "Candidate",
    result: dict[str, Any],
    metrics: dict[str, float],
    tracking: "TrackingConfig",
) -> None:
    """The mixtures, the comparison and its picture; what an earlier fit left of other candidates goes."""
    import shutil

    from vaescale import figures
    from vaescale.mixtures import files as mixture_files
    from vaescale.runs.folder import append_metrics, update_summary, write_json
    from vaescale.runs.tracking import push
    from vaescale.system.console import say

    own = {*chosen.words(), *metrics, "candidates"}
    of_all = {name: value for name, value in result.items() if name not in own}
    earlier = sorted((folder / "gmm").glob("components-*"))
    if earlier:
        say(f"the earlier mixtures of {folder} ({', '.join(old.name for old in earlier)}) are replaced")
    for old in earlier:
        shutil.rmtree(old)
    for one in candidates if len(candidates) > 1 else []:
        place = folder / "gmm" / f"components-{len(one.mixture.weights)}"
        mixture_files.save(one.mixture, place, {**of_all, **one.words()})
    mixture_files.save(chosen.mixture, folder / "gmm", {**of_all, **chosen.words()})
    write_json(folder / "gmm" / "selection.json", result)
    picture = folder / "figures" / SELECTION
    if len(candidates) == 1:
        picture.unlink(missing_ok=True)  # of an earlier fit
    else:
        figures.mixture_selection(
            picture,
            result["candidates"],
            chosen=len(chosen.mixture.weights),
            prior_nats=metrics["gmm/val_prior_log_density_nats"],
            title=f"{folder.name}, step {result['step']}: {chosen.mixture.kind} mixtures of q(z)",
        )
    append_metrics(folder, result["step"], metrics)
    update_summary(folder, "gmm", {name: value for name, value in result.items() if name != "candidates"})
    push(folder, tracking)


def _numbers(words: str) -> tuple[int, ...]:
    """`1,10,50`."""
    parts = words.split(",")
    numbers = tuple(int(part) for part in parts if part.strip().isdecimal())
    if len(numbers) < len(parts) or min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{words!r} is no list of different numbers from 1, such as 1,10,50")
    return numbers


def _refuse_senseless(arguments: argparse.Namespace) -> None:
    least = {
        "samples_per_image": 0,
        "groups": 1,
        "restarts": 1,
        "max_iterations": 1,
        "seed": 0,
        "online": 1,
        "online_batch": 1,
    }
    for name, bound in least.items():
        given = getattr(arguments, name)
        if given is not None and given < bound:
            raise UserError(f"--{name.replace('_', '-')} (={given}) must be at least {bound}")
    if (arguments.samples_per_image or 0) > MOST_DRAWS:
        raise UserError(f"--samples-per-image (={arguments.samples_per_image}) must be at most {MOST_DRAWS}")
    for name in ("tolerance", "ridge"):
        given = getattr(arguments, name)
        if not 0 < given < 1:
            raise UserError(f"--{name} (={given}) must be between 0 and 1")


def show(result: dict[str, Any]) -> None:
    """The densities, in nats a latent vector."""
    from vaescale.system.console import table

    kind, size = result["covariance"], len(result["collapsed_latents"])
    table(
        f"{result['run']}, step {result['step']}: {result['components']} components ({kind}), "
        f"{result['iterations']} iterations; mean log density, nats",
        [
            ("mixture, training latents", f"{result['train_nats']:.4f}"),
            ("mixture, held-out latents", f"{result['val_nats']:.4f}"),
            ("the model's prior, held-out latents", f"{result['gmm/val_prior_log_density_nats']:.4f}"),
            ("it replaces", result["replaces"]),
            *(
                [("collapsed latents", f"{size}: q(z|x) of these is the same for every image")]
                if size
                else []
            ),
            ("mixture", f"{result['run']}/gmm"),
            *([("figure", f"{result['run']}/figures/{SELECTION}")] if len(result["candidates"]) > 1 else []),
        ],
    )
    if len(result["candidates"]) > 1:
        rows = [
            (str(one["components"]), f"{one['val_nats']:12.4f} {one['bic']:16.1f} {one['iterations']:10d}")
            for one in result["candidates"]
        ]
        table(
            f"{'components':<12}{'held out':>12} {'BIC':>16} {'iterations':>10}   (chosen: {result['components']}, by {result['selected_by']})",
            rows,
        )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
