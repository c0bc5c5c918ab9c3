"""Judge a run's samples against its training images, by the features of both: Frechet and kernel distance, precision, recall,
density and coverage.

The rows are held-out images, reconstructions, and samples of the prior and of each mixture of fit-gmm, as decoder means and with
the decoder's noise. Compare numbers only for the same features, data and count: distances are biased upwards for few images, so
by default there are as many samples as held-out images, at most 10000. --features is

  pixels            the pixel values, for small images
  DIR               a classifier from `vaescale train-features`
  inception[:FILE]  Inception v3 with torch-fidelity's weights, as for the FID of the literature
  FILE.pt2          a module that torch.export.save wrote: images [B, C, H, W] in [0, 1] to features [B, F]

Writes RUN/evaluation/quality-FEATURES.json and RUN/figures/quality-FEATURES*.png, and caches the features of the training
images. Runs on any number of processes, with the same samples:

  vaescale train-features data/fashion_mnist/train --out features/fashion_mnist
  vaescale quality runs/fashion_mnist-optimal --features features/fashion_mnist
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, add_weights, integer, real

COLUMNS = ("count", "frechet", "kernel", "precision", "recall", "density", "coverage")
MOST_TEMPERATURE = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, the features, and the samples to judge."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    add(
        "--features",
        required=True,
        metavar="WHICH",
        help="features to compare by: pixels, DIR, inception[:FILE] or FILE.pt2",
    )
    count = "number of samples of each kind; default: the number of held-out images, at most 10000"
    add("--count", type=integer(1), metavar="N", help=count)
    decode = (
        "decoding: mean, ancestral or offset:ALPHA; may be given several times; default: mean and ancestral"
    )
    add("--decode", action="append", metavar="HOW", help=decode)
    temperature = "factor of the latents' standard deviations, as in `vaescale sample`; default: 1"
    add(
        "--temperature", type=real(above=0, most=MOST_TEMPERATURE), default=1.0, metavar="T", help=temperature
    )
    prior = "judge samples of a run trained on this run's latents too, as in `vaescale sample --prior RUN`"
    add("--prior", type=Path, metavar="RUN", help=prior)
    add_weights(parser)
    add("--seed", type=integer(0), default=0, help="random seed of the samples; default: 0")
    trust = "allow --features FILE.pt2, which is a program and can do anything"
    add("--trust-features", action="store_true", help=trust)
    cache = "folder for cached features; default: ~/.cache/vaescale/references"
    add("--cache", type=Path, metavar="DIR", help=cache)
    by_class = "also the Frechet distance of the pictures of each class from the training images of that class, for runs that sample by class"
    add("--per-class", action="store_true", help=by_class)
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the pictures and write the scores. Returns a row for each kind of picture."""
    from vaescale.commands.quality import DECODINGS, quality

    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    return quality(**{**options, "decode": arguments.decode or DECODINGS})


def show(result: dict[str, Any]) -> None:
    """Print the scores, one line for each kind of picture."""
    from vaescale.system.console import say, table

    head = " ".join(f"{name:>10}" for name in COLUMNS)
    names = [" ".join(filter(None, (row["of"], row["decode"]))) for row in result["rows"]]
    title = f"{result['run']}, step {result['step']} ({result['weights']} weights)"
    how = f"features: {result['protocol']['features']}, {result['protocol']['reference']}"
    table(
        f"{title}, {how}\n  {'':{max(map(len, names))}}  {head}",
        [
            (name, " ".join(f"{row[column]:10.4g}" for column in COLUMNS))
            for name, row in zip(names, result["rows"], strict=True)
        ],
    )
    for row in result["rows"] if "classes" in result else ():
        distances = zip(result["classes"], row.get("frechet_by_class", ()), strict=False)
        shown = ", ".join(
            f"{of_class} {'few' if value is None else f'{value:.4g}'}" for of_class, value in distances
        )
        name = " ".join(filter(None, (row["of"], row["decode"])))
        say(f"{name}: Frechet distance by class: {shown or 'the samples have no classes'}")
    paths = [("figure", path) for path in result["figures"]]
    table("distances: lower is better; shares: higher is better", paths)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
