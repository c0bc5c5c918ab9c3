"""Fit a Gaussian mixture to a run's aggregate posterior q(z) = E_x q(z|x), to sample from in place of the prior.

Encodes the images first, unless RUN/latents has them. Fits the mixture to draws from q(z|x), or to the moments of q(z|x) by a
bound with one responsibility vector for each image. Compares several numbers of components on held-out images. Writes
RUN/gmm/mixture.*, all candidates to RUN/gmm/components-K, the comparison to RUN/gmm/selection.json and
RUN/figures/mixture_selection.png. The mixture of a ladder replaces the learned prior of its top group or, with --groups, of its
first groups together. Runs on any number of processes, with the same result:

  accelerate launch --config_file recipes/backends/cpu2.yaml -m vaescale fit-gmm runs/digits-optimal --components 1,10,50

  ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m vaescale fit-gmm runs/digits-optimal --components 1,10,50
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, integer, real

MOST_DRAWS = 1000  # per image
BETWEEN_0_AND_1 = real(above=0, below=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, and the options of the latents, of EM and of the choice."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    components = "numbers of components to compare, such as 1,10,50; default: 10"
    add("--components", type=_numbers, default=(10,), metavar="K[,K...]", help=components)
    kinds = ("full", "tied", "diag", "spherical")
    add("--covariance", choices=kinds, default="full", help="form of the covariances; default: full")
    draws = "number of draws from each q(z|x), 0 to fit its moments; default: 1 to 8, for 65536 latents"
    add("--samples-per-image", type=integer(0, MOST_DRAWS), metavar="S", help=draws)
    groups = "number of a ladder's groups, from the top, to fit together; default: 1"
    add("--groups", type=integer(1), default=1, metavar="G", help=groups)
    add("--start", choices=("kmeans", "random"), default="kmeans", help="start of EM; default: kmeans")
    restarts = "number of starts of EM, of which the best fit is kept; default: 1"
    add("--restarts", type=integer(1), default=1, metavar="N", help=restarts)
    stop = "stop EM when an iteration improves the mean log density by less; default: 1e-3"
    add("--tolerance", type=BETWEEN_0_AND_1, default=1e-3, metavar="NATS", help=stop)
    most = "maximum number of EM iterations; default: 500"
    add("--max-iterations", type=integer(1), default=500, metavar="N", help=most)
    ridge = "multiple of each latent's variance to add to the covariances' diagonals; default: 1e-6"
    add("--ridge", type=BETWEEN_0_AND_1, default=1e-6, help=ridge)
    criterion = "criterion that chooses the number of components; default: held-out (density)"
    add("--select", choices=("held-out", "bic"), default="held-out", help=criterion)
    online = "use stepwise EM with this number of passes over the shards, for latents larger than memory: faster, slightly worse"
    add("--online", type=integer(1), metavar="PASSES", help=online)
    batch = "latents per step of stepwise EM (--online), over all processes; default: 8192"
    add("--online-batch", type=integer(1), default=8192, metavar="N", help=batch)
    add("--seed", type=integer(0), default=0, help="random seed of EM and of the draws; default: 0")
    by_class = "fit a mixture to the latents of each class, for `vaescale sample --class`, and write them to RUN/gmm/classes"
    add("--per-class", action="store_true", help=by_class)
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit, choose and save a mixture. Returns the densities of the chosen mixture and of all candidates."""
    from vaescale.commands.fit_gmm import fit_gmm

    return fit_gmm(**{name: value for name, value in vars(arguments).items() if name != "json"})


def _numbers(text: str) -> tuple[int, ...]:
    """Parse the numbers of components, such as `1,10,50`."""
    pieces = text.split(",")
    numbers = tuple(int(piece) for piece in pieces if piece.strip().isdecimal())
    if len(numbers) < len(pieces) or min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must be different numbers of at least 1, such as 1,10,50")
    return numbers


def show(result: dict[str, Any]) -> None:
    """Print the densities, in nats per latent vector, and the candidates."""
    from vaescale.system.console import say, table

    if "classes" in result:
        _show_classes(result)
        return
    collapsed, several = len(result["collapsed_latents"]), len(result["candidates"]) > 1
    rows = [
        ("mixture, training latents", f"{result['train_nats']:.4f}"),
        ("mixture, held-out latents", f"{result['val_nats']:.4f}"),
        ("the model's prior, held-out latents", f"{result['gmm/val_prior_log_density_nats']:.4f}"),
        ("the mixture replaces", result["replaces"]),
    ]
    if collapsed:
        rows.append(("collapsed latents", f"{collapsed}, whose q(z|x) is the same for every image"))
    rows.append(("mixture", f"{result['run']}/gmm"))
    if several:
        rows.append(("figure", f"{result['run']}/figures/mixture_selection.png"))
    fit = f"{result['components']} components ({result['covariance']}), {result['iterations']} iterations"
    table(f"{result['run']}, step {result['step']}: {fit}; mean log density, nats", rows)
    for note in result["notes"]:
        say(note)
    if several:
        chosen = f"(chosen: {result['components']}, by {result['selected_by']})"
        cells = "{val_nats:12.4f} {bic:16.1f} {iterations:10d}"
        rows = [(str(row["components"]), cells.format(**row)) for row in result["candidates"]]
        table(f"{'components':<12}{'held out':>12} {'BIC':>16} {'iterations':>10}   {chosen}", rows)


def _show_classes(result: dict[str, Any]) -> None:
    """Print the densities of each class's mixture and of the model's prior, in nats per latent vector."""
    from vaescale.system.console import table

    head = f"  {'class':<16}{'images':>8}{'components':>12}{'held out':>12}{'prior':>12}"
    cells = "{images:8d}{components:12d}{val_nats:12.3f}{prior_val_nats:12.3f}"
    rows = [(f"{row['class']:<16}", cells.format(**row)) for row in result["classes"]]
    table(
        f"{result['run']}, step {result['step']}: a mixture for each class; mean log density, nats\n{head}",
        rows,
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
