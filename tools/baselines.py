"""What a run is to be held against, on the same images: probabilistic PCA with as many latents (its exact likelihood, its sigma, its
reconstructions), and, where there are classes, what a linear probe and nearest neighbours make of the latents.

The latents are the posterior's means, of a ladder's top group or, with --groups, of the first ones together, each given the means above
it; PCA's are its scores. Writes RUN/evaluation/baselines.json and RUN/figures/baselines.png.

  vaescale baselines runs/digits-optimal
  vaescale baselines runs/digits-optimal --labels 100
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaescale.errors import UserError

if TYPE_CHECKING:
    from vaescale.trained import Trained

SHOWN = 12
PROTOCOL = {
    "pPCA": "fitted to the training images; exact mean log-likelihood of the held-out ones, Tipping & Bishop 1999",
    "nll_nats": "-log p(x) of pPCA, a bound of it of the run",
    "reconstruction_mse": "per value, of means clamped to [0, 1]",
    "linear_probe": "accuracy on held-out images of logistic regression on standardized latents (posterior means, or PCA's scores)",
    "knn_5": "the same of the five nearest neighbours",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, how many labels."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--labels",
        type=int,
        metavar="N",
        help="classes of so many training images teach the probes; default: all, at most 20000",
    )
    parser.add_argument(
        "--groups",
        type=int,
        default=1,
        metavar="G",
        help="of a ladder: of so many groups, from the top; default: 1",
    )
    parser.add_argument(
        "--images", type=int, default=20_000, metavar="N", help="of each split, at most; default: 20000"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit, measure, write, draw. Returns the table."""

    from vaescale.commands.baselines import baselines
    from vaescale.runs.identity import git_revision
    from vaescale.trained import open_trained

    if arguments.images < 10 or (arguments.labels is not None and arguments.labels < 10):
        raise UserError("--images and --labels must be at least 10")
    if arguments.groups < 1:
        raise UserError(f"--groups (={arguments.groups}) must be at least 1")
    trained = open_trained(arguments.run)
    found = baselines(
        trained, images=arguments.images, labels=arguments.labels, groups=arguments.groups, shown=SHOWN
    )
    result = {
        "run": str(trained.folder),
        **trained.identity,
        "code": git_revision(),
        "protocol": PROTOCOL,
        "measured": {
            "baselines/": f"classes of {arguments.labels or 'all'} images, {arguments.images} images of each split at most, "
            f"latents of {arguments.groups} group{'s'[: arguments.groups > 1]}"
        },
        **found.words,
    }
    return _save(trained, result, found.pictures)


def _save(trained: "Trained", result: dict[str, Any], pictures: list[tuple[str, Any]]) -> dict[str, Any]:
    from vaescale import figures
    from vaescale.runs.folder import append_metrics, write_json
    from vaescale.runs.tracking import push

    path = trained.folder / "figures" / "baselines.png"
    figures.image_rows(path, pictures, title=trained.title("held-out images and what is left of them"))
    write_json(trained.folder / "evaluation" / "baselines.json", result)
    metrics = {
        f"baselines/{'run' if name == trained.recipe.name else 'ppca'}/{key}": value
        for name, row in result["rows"].items()
        for key, value in row.items()
        if value is not None
    }
    append_metrics(trained.folder, trained.step, metrics)
    push(trained.folder, trained.recipe.tracking)
    return {**result, "figure": str(path)}


def show(result: dict[str, Any]) -> None:
    """A line for the run and one for each baseline."""
    from vaescale.system.console import say, table

    columns = list(dict.fromkeys(key for row in result["rows"].values() for key in row))

    def cell(value: float | None) -> str:
        return f"{'' if value is None else format(value, '.5g'):>15}"

    head = " ".join(f"{name:>15}" for name in columns)
    width = max(map(len, result["rows"]))
    table(
        f"{result['run']}, step {result['step']}: {result['held_out_images']} held-out images\n  {'':{width}}  {head}",
        [(name, " ".join(cell(row.get(key)) for key in columns)) for name, row in result["rows"].items()],
    )
    for words in result["notes"]:
        say(words)
    table("figure", [("pictures", result["figure"])])


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
