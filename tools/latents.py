"""Measure what a run's latents encode, which of them are used, what they explain, and why the bound is not tight.

    information   I(x; z), KL(q(z)||p(z)), total correlation (TC): brackets, and by a mixture of other images; the mean KL
    use           KL by latent, active units, the share that has collapsed over epsilon and delta
    variance      the variance explained by z and by the noise, compared with probabilistic PCA of as many latents
    sigma         for a predicted sigma: whether it is larger where q(z) is small
    noise         the visible noise of pictures: whether samples are noisier than reconstructions
    gaps          with --gaps N: the amortization and the approximation gap of N held-out images (takes minutes)

Measures the latents of the training images (a ladder's top group) and encodes the images first unless RUN/latents has them.
Writes RUN/evaluation/latents.json and RUN/figures/latent_*.png. Runs on any number of processes.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, integer

DRAWS = "number of draws from q(z|x) for the information measures"
GAPS = "number of held-out images whose inference gaps are measured"
ASCENT = "steps of gradient ascent to the best q(z|x) of each --gaps image"
SAMPLES = "importance samples of each --gaps image for the bound of log p(x)"
ESTIMATE = "{:9.3f} +- {:6.3f}".format
REST = ("ln_images", "own_share", "mean_kl", "marginal_kl")
ESTIMATES = f"{'with own term':>37} {'leave-one-out':>19} {'mixture':>19}"
TERMS = (("I(x; z)", "mutual_information"), ("KL(q(z)||p(z))", "aggregate_kl"), ("TC", "total_correlation"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN and the options of the measures."""
    add, many = parser.add_argument, integer(1)
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    add("--draws", type=integer(2), default=2000, metavar="N", help=f"{DRAWS}; default: 2000")
    add("--gaps", type=integer(0), default=0, metavar="N", help=f"{GAPS}; default: 0")
    add("--gap-steps", type=many, default=300, metavar="N", help=f"{ASCENT}; default: 300")
    add("--importance-samples", type=many, default=1000, metavar="K", help=f"{SAMPLES}; default: 1000")
    add("--seed", type=integer(0), default=0, help="random seed of all draws; default: 0")
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the latents and write the results and figures. Returns all measures."""
    from vaescale.commands.latents import latents

    return latents(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print a table for each measure."""
    from vaescale.system.console import say, table

    title = f"{result['run']}, step {result['step']}: information of {result['of']}, nats"
    table(f"{title}\n{ESTIMATES}", [*_information_rows(result)])
    for note in result["notes"]:
        say(note)
    if variance := result["variance"]:
        cells = "{latent:10.4f} {observed:10.4f} ".format
        splits = {name: split for name, split in variance.items() if name != "data_total"}
        rows = [(name, f"{cells(**split)}{sum(split.values()):10.4f}") for name, split in splits.items()]
        rows.append(("data", f"{'':21} {variance['data_total']:10.4f}"))
        table(f"variance of the images{'from z':>13} {'noise':>10} {'total':>10}", rows)
    if sigma := result["sigma"]:
        head = "".join(f"{name:>16} {'Spearman':>9}" for name in sigma["spearman"])
        table(f"z from        log sigma(z){head}", [*_sigma_rows(sigma)])
    if noise := result["noise"]:
        rows = [(name, " ".join(f"{value:11.4f}" for value in row.values())) for name, row in noise.items()]
        table(f"noise in pictures of {'means':>10} {'ancestral':>11}", rows)
    if gaps := result["gaps"]:
        names = {"L[q]": "elbo_nats", "L[q*]": "optimized_elbo_nats", "log p(x), at least": "log_px_nats"}
        rows = [(label, f"{gaps[name]:9.3f}") for label, name in names.items()]
        for gap in ("amortization_gap", "approximation_gap"):
            rows.append((gap.replace("_", " "), ESTIMATE(gaps[f"{gap}_nats"], gaps[f"{gap}_error"])))
        table(f"gaps of {gaps['images']} held-out images, K = {gaps['importance_samples']}, nats", rows)
    table("figures", [(Path(path).stem, path) for path in result["figures"]])


def _information_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    known = result["information"] | {"ln_images": math.log(result["information"]["images"])}
    for label, term in TERMS:
        columns = (f"{term}{ending}" for ending in ("", "_leave_one_out", "_mixture"))
        yield label, " ".join(ESTIMATE(known[name], known[f"{name}_error"]) for name in columns)
    yield from ((name.replace("_", " "), f"{known[name]:9.3f}") for name in REST)
    yield "active units", f"{sum(result['active']):5d} of {len(result['active'])}"


def _sigma_rows(sigma: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for source, row in sigma["kinds"].items():
        pairs = zip(row["mean_density_nats"].values(), row["spearman"].values(), strict=True)
        cells = "".join(f"{density:16.2f} {spearman:9.3f}" for density, spearman in pairs)
        yield source, f"{row['mean_log_sigma']:12.4f}{cells}"
    yield "all", f"{'':12}" + "".join(f"{'':16} {value:9.3f}" for value in sigma["spearman"].values())


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
