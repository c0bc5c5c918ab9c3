"""Compare a run with probabilistic PCA, and with classes, probe its latents by a linear classifier and nearest neighbours.

The probes see the posterior means of the latents: a ladder's top group or, with --groups, its first groups together, each
group given the means above it. For PCA they see its scores. Evaluate the run first. Writes RUN/evaluation/baselines.json and
RUN/figures/baselines.png.

  vaescale baselines runs/digits-optimal
  vaescale baselines runs/digits-optimal --labels 100
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import integer

LEAST_IMAGES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN and how many labels, groups and images to take."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--labels",
        type=integer(LEAST_IMAGES),
        metavar="N",
        help="number of training images whose classes the probes learn from; default: all, at most --images",
    )
    parser.add_argument(
        "--groups",
        type=integer(1),
        default=1,
        metavar="G",
        help="number of a ladder's groups, from the top, that the probes see; default: 1",
    )
    parser.add_argument(
        "--images",
        type=integer(LEAST_IMAGES),
        default=20_000,
        metavar="N",
        help="the most images of each split; default: 20000",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the baselines. Returns the table."""
    from vaescale.commands.baselines import baselines

    return baselines(arguments.run, labels=arguments.labels, groups=arguments.groups, images=arguments.images)


def show(result: dict[str, Any]) -> None:
    """Print a line for the run and one for each baseline."""
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
    for note in result["notes"]:
        say(note)
    table("figure", [("pictures", result["figure"])])


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
