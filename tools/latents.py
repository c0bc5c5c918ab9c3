"""Measure what a run's latents say, which of them are used, what they explain, and why the bound is not tight.

    information   I(x; z), KL(q(z)||p(z)), total correlation, beside the mean KL in closed form
    use           KL by latent, active units, the share that has collapsed over epsilon and delta
    variance      what z explains and what the noise explains, beside probabilistic PCA with as many latents
    sigma         for a predicted sigma: is it larger where q(z) is small
    noise         the noise that pictures show: are samples noisier than reconstructions
    gaps          with --gaps N: the amortization and the approximation gap of N held-out images (takes minutes)

Measures the training images, and of a ladder the top group; encodes them unless RUN/latents has their latents. Writes
RUN/evaluation/latents.json and RUN/figures/latent_*.png. Runs on any number of processes.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaescale.system.arguments import integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN and what to measure."""
    add, many = parser.add_argument, integer(1)
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    add("--draws", type=integer(2), default=2000, metavar="N", help="draws for information; default: 2000")
    add("--gaps", type=integer(0), default=0, metavar="N", help="gaps of N held-out images; default: 0")
    add("--gap-steps", type=many, default=300, metavar="N", help="ascent steps for each q*; default: 300")
    samples = "importance samples that bound log p(x) in the gaps; default: 1000"
    add("--importance-samples", type=many, default=1000, metavar="K", help=samples)
    add("--seed", type=integer(0), default=0, help="seed of all draws; default: 0")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write, draw. Returns all measures."""
    from vaescale.commands.latents import latents

    return latents(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print a table for each measure."""
    from vaescale.system.console import say, table

    title = f"{result['run']}, step {result['step']}: information of {result['of']}, nats"
    table(title, [*_information_rows(result)])
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
        bound = f"log p(x), at least (K = {gaps['importance_samples']})"
        names = {"L[q]": "elbo_nats", "L[q*]": "optimized_elbo_nats", bound: "log_px_nats"}
        rows = [(label, f"{gaps[name]:9.3f}") for label, name in names.items()]
        for gap in ("amortization_gap", "approximation_gap"):
            rows.append((gap.replace("_", " "), _estimate(gaps, f"{gap}_nats", f"{gap}_error")))
        table(f"inference gaps of {gaps['images']} held-out images, nats", rows)
    table("figures", [(Path(path).stem, path) for path in result["figures"]])


def _estimate(values: dict[str, Any], name: str, error: str) -> str:
    return f"{values[name]:9.3f} +- {values[error]:.3f}"


def _information_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    known = result["information"]
    label = f"I(x; z), at most ln {known['images']} = {math.log(known['images']):.3f}"
    yield label, _estimate(known, "mutual_information", "mutual_information_error")
    yield "KL(q(z)||p(z))", _estimate(known, "aggregate_kl", "aggregate_kl_error")
    yield "their sum", f"{known['mutual_information'] + known['aggregate_kl']:9.3f}"
    yield "mean KL, closed form", f"{known['mean_kl']:9.3f}"
    yield "total correlation", _estimate(known, "total_correlation", "total_correlation_error")
    yield "KL of the marginals", f"{known['marginal_kl']:9.3f}"
    yield "active units", f"{sum(result['active']):5d} of {len(result['active'])}"


def _sigma_rows(sigma: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for kind, one in sigma["kinds"].items():
        pairs = zip(one["mean_density_nats"].values(), one["spearman"].values(), strict=True)
        cells = "".join(f"{density:16.2f} {spearman:9.3f}" for density, spearman in pairs)
        yield kind, f"{one['mean_log_sigma']:12.4f}{cells}"
    yield "all", f"{'':12}" + "".join(f"{'':16} {value:9.3f}" for value in sigma["spearman"].values())


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
