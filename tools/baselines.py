"""Compare a run with probabilistic PCA; if the images have classes, also predict these from the latents (probes).

The probes are a linear classifier and nearest neighbours. Their inputs are the posterior means of the run's latents, and the
scores of PCA. A ladder's inputs are those of its top group or, with --groups, of its first groups, each group given the means
above it. Evaluate the run first. Writes RUN/evaluation/baselines.json and RUN/figures/baselines.png.

  vaescale baselines runs/digits-optimal
  vaescale baselines runs/digits-optimal --labels 100
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, integer

LEAST_IMAGES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN and the numbers of labels, groups and images."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--labels",
        type=integer(LEAST_IMAGES),
        metavar="N",
        help="number of labelled training images for the probes; default: all, up to --images",
    )
    parser.add_argument(
        "--groups",
        type=integer(1),
        default=1,
        metavar="G",
        help="number of a ladder's groups, from the top, that are the probes' input; default: 1",
    )
    parser.add_argument(
        "--images",
        type=integer(LEAST_IMAGES),
        default=20_000,
        metavar="N",
        help="maximum number of images of each split; default: 20000",
    )
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the baselines. Returns the table and the path of the figure."""
    from vaescale.commands.baselines import baselines

    return baselines(
        arguments.run,
        labels=arguments.labels,
        groups=arguments.groups,
        images=arguments.images,
        checkpoint=arguments.checkpoint,
    )


def show(result: dict[str, Any]) -> None:
    """Print a line for the run and one for each baseline."""
    from vaescale.system.console import say, table

    columns = list(dict.fromkeys(key for row in result["rows"].values() for key in row))

    def cell(name: str, value: float | None) -> str:
        return f"{'' if value is None else format(value, '.5g'):>{max(15, len(name))}}"

    head = " ".join(f"{name:>15}" for name in columns)
    width = max(map(len, result["rows"]))
    table(
        f"{result['run']}, step {result['step']}: {result['held_out_images']} held-out images\n  {'':{width}}  {head}",
        [
            (name, " ".join(cell(key, row.get(key)) for key in columns))
            for name, row in result["rows"].items()
        ],
    )
    for note in result["notes"]:
        say(note)
    table("figure", [("pictures", result["figure"])])


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
