"""Evaluate a run: bounds with the running sigma, reconstructions, and the calibration of the decoder's noise.

Each image counts once. Writes the metrics with their protocol to RUN/evaluation/NAME.json, and to RUN/figures the originals
with reconstructions, errors and sigma, and the calibration of p(x|z). Runs on any number of processes:

  vaescale evaluate runs/digits-optimal --importance-samples 1000
  accelerate launch --config_file recipes/backends/cpu2.yaml -m vaescale evaluate runs/digits-optimal --data data/other/test
  ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m vaescale evaluate runs/digits-optimal --data data/other/test
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, add_weights, integer

FEW_EFFECTIVE = 10
MOST = 10_000_000  # draws, or images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, the images, the weights and the importance samples."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    add("--split", choices=("val", "train"), help="data set of the recipe to evaluate; default: val")
    data = "folder or URL of other shards to evaluate, with images of the same shape as the recipe's"
    add("--data", metavar="DIR", help=data)
    name = (
        "name of the result, RUN/evaluation/NAME.json (NAME-WEIGHTS.json for others than `ema`); default: the split, or data-FOLDER "
        "with --data"
    )
    add("--name", metavar="NAME", help=name)
    add_weights(parser)
    samples = "number of draws for each image to bound log p(x) more tightly (IWAE), usually 1000; each draw decodes all images"
    add("--importance-samples", type=integer(1, MOST), metavar="K", help=samples)
    refit = "use the sigma that is optimal for the training images with these weights in place of the running one; writes NAME-refit.json"
    add("--refit-sigma", action="store_true", help=refit)
    code = "measure the size of the code of `compress` too, without writing it: a run of a mass with a Gaussian q(z|x)"
    add("--code-length", action="store_true", help=code)
    prior = "prior of that code: `standard` for the model's, `gmm` for the mixture of fit-gmm, of a flat run; default: standard"
    add("--prior", choices=("standard", "gmm"), default="standard", help=prior)
    first = "evaluate only the first N images, and write NAME-first-N.json; default: all"
    add("--images", type=integer(1, MOST), metavar="N", help=first)
    images = (
        "number of images, from the first, for the importance-sampled bound; default: all that are evaluated"
    )
    add("--importance-images", type=integer(1, MOST), metavar="N", help=images)
    by_class = "also the bound of each class's images and, of a conditional run, the share of the images whose class has the largest bound"
    add("--per-class", action="store_true", help=by_class)
    futures = "of a run of sequences, also compare the best and the mean of N futures of each context with the truth (PSNR, SSIM), usually 100"
    add("--futures", type=integer(1, 10_000), metavar="N", help=futures)
    features = (
        "with --futures, also the Frechet distance of futures from the training sequences by these features, named as for `vaescale quality`; "
        "a classifier of sequences from `vaescale train-features` has those of videos too"
    )
    add("--features", metavar="WHICH", help=features)
    trust = "allow --features FILE.pt2, which is a program and can do anything"
    add("--trust-features", action="store_true", help=trust)
    cache = "folder for the cached moments of training sequences; default: ~/.cache/vaescale/references"
    add("--cache", type=Path, metavar="DIR", help=cache)
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the run and write the results and figures. Returns the metrics with their protocol."""
    from vaescale.commands.evaluate import evaluate

    return evaluate(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print the metrics as a table."""
    from vaescale.system.console import say, table

    effective = result["metrics"].get("effective_samples", FEW_EFFECTIVE)
    if effective < FEW_EFFECTIVE:
        say(
            f"the effective number of importance samples is only {effective:.1f} per image: log p(x) is noticeably above this bound"
        )
    if result["protocol"]["bound"].startswith("none"):
        say(f"bound: {result['protocol']['bound']}")
    images, of = (result["metrics"].get(name) for name in ("importance_images", "images"))
    if images and images < of:
        say(
            f"the importance-sampled bound is of the first {images:.0f} of {of:.0f} images (standard error "
            f"{result['metrics']['neg_iwae_standard_error']:.3g} nats); the other metrics are of all {of:.0f}"
        )
    sigma = result["sigma"]["sentence"] if result["sigma"] else ""
    for note in result["notes"]:
        say(note)
    if sigma and not any(note.startswith(sigma) for note in result["notes"]):
        say(sigma)
    table(
        f"{result['run']}, step {result['step']}, {result['data']} ({result['weights']} weights)",
        [(name, f"{value:.6g}") for name, value in result["metrics"].items()]
        + [("figure", path) for path in result["figures"]],
    )
    if "frames" in result:
        head = f"  {'frame':<10}{'-ELBO (nats)':>16}{'KL (nats)':>12}{'MSE':>12}"
        cells = "{neg_elbo_nats:16.2f}{kl_nats:12.3f}{mse:12.5f}"
        table(f"by frame\n{head}", [(f"{row['frame']:<10}", cells.format(**row)) for row in result["frames"]])
    if "futures" in result:
        names = [name for name in result["futures"][0] if name != "frame" and not name.endswith("_error")]
        head = f"  {'frame':<10}" + "".join(f"{name:>22}" for name in names)
        table(
            f"by frame after the context\n{head}",
            [
                (f"{row['frame']:<10}", "".join(f"{row[name]:22.5g}" for name in names))
                for row in result["futures"]
            ],
        )
    if "frechet" in result:
        levels = [name for name in result["frechet"][0] if name not in ("of", "sequences")]
        head = f"  {'future':<10}{'sequences':>12}" + "".join(f"{name:>12}" for name in levels)
        rows = [
            (f"{row['of']:<10}", f"{row['sequences']:12}" + "".join(f"{row[name]:12.5g}" for name in levels))
            for row in result["frechet"]
        ]
        table(f"Frechet distance from training sequences, by features of\n{head}", rows)
    if "classes" in result:
        head = f"  {'class':<16}{'images':>8}{'-ELBO (nats)':>16}{'standard error':>16}{'KL (nats)':>12}"
        cells = "{images:8.0f}{neg_elbo_nats:16.2f}{standard_error:16.2f}{kl_nats:12.2f}"
        rows = [(f"{row['class']:<16}", cells.format(**row)) for row in result["classes"]]
        table(f"by class\n{head}", rows)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
