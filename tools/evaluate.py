"""Evaluate a run: bounds with the running sigma, reconstructions, and the calibration of the decoder's noise.

Each image counts once. Writes RUN/evaluation/NAME.json, with the protocol beside the numbers, and to RUN/figures the originals
with reconstructions, errors and sigma, and the calibration of p(x|z). Runs on any number of processes:

  vaescale evaluate runs/digits-optimal --importance-samples 1000
  accelerate launch --config_file recipes/backends/cpu2.yaml -m vaescale evaluate runs/digits-optimal --data data/other/test
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import integer

FEW_EFFECTIVE = 10
MOST = 10_000_000  # draws, or images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, which images and weights to take, and how tight a bound."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    add("--split", choices=("val", "train"), help="a data set of the recipe; default: val")
    data = "other shards than the recipe's, with images of the same shape: a folder or URL"
    add("--data", metavar="DIR", help=data)
    name = (
        "name of the result, RUN/evaluation/NAME.json (NAME-raw.json for raw weights); default: the split, or data- and the "
        "data's folder"
    )
    add("--name", metavar="NAME", help=name)
    weights = "averaged or raw weights; default: ema, if the run has them"
    add("--weights", choices=("ema", "raw"), default="ema", help=weights)
    samples = "also bound log p(x) with K draws for each image (IWAE); 1000 is usual, and takes K decodings of the data"
    add("--importance-samples", type=integer(1, MOST), metavar="K", help=samples)
    images = "bound log p(x) of the first N images only; default: all"
    add("--importance-images", type=integer(1, MOST), metavar="N", help=images)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, write, draw. Returns the numbers with their protocol."""
    from vaescale.commands.evaluate import evaluate

    return evaluate(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print the numbers as a table."""
    from vaescale.system.console import say, table

    effective = result["metrics"].get("effective_samples", FEW_EFFECTIVE)
    if effective < FEW_EFFECTIVE:
        say(
            f"only {effective:.1f} importance samples of an image count on average: log p(x) is noticeably above this bound"
        )
    if result["protocol"]["bound"].startswith("none"):
        say(f"bound: {result['protocol']['bound']}")
    table(
        f"{result['run']}, step {result['step']}, {result['data']} ({result['weights']} weights)",
        [(name, f"{value:.6g}") for name, value in result["metrics"].items()]
        + [("figure", path) for path in result["figures"]],
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
