"""Run the main job end to end on scikit-learn's handwritten digits: shards, training on two processes, evaluation,
mixture, samples and their quality. Each step is a command that you can type yourself. A step whose results exist is skipped.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: the quickstart has no options."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:  # noqa: ARG001
    """Run the steps whose results do not exist. Returns the results, the paths and the seconds of each step."""
    from vaescale.commands.quickstart import quickstart

    return quickstart()


def show(result: dict[str, Any]) -> None:
    """Print the results and the next commands to try."""
    from vaescale.system.console import table

    metrics, gmm, folder = result["metrics"], result["gmm"], result["run"]
    programs = ".venv/bin/" if Path(".venv/bin/vaescale").is_file() else ""
    rows = [
        ("negative ELBO", f"{metrics['neg_elbo_nats']:.2f} nats per image (a density: it can be negative)"),
        ("bits per dimension", f"{metrics['bits_per_dim']:.3f}  (nats / (64 ln 2) + 8, for 8-bit images)"),
        ("mean squared error", f"{metrics['mse']:.5f}"),
        ("sigma (running)", f"{metrics['sigma']:.4f}"),
        ("KL", f"{metrics['kl_nats']:.2f} nats"),
        ("active units", f"{metrics['active_units']:.0f}"),
        ("q(z) under the mixture", f"{gmm['val_nats']:.2f} nats, held out"),
        ("q(z) under N(0, I)", f"{gmm['prior_val_nats']:.2f} nats, held out"),
        *(("figure", path) for path in result["figures"]),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())),
    ]
    table(f"\n== Results on {metrics['images']:.0f} held-out digits ({folder})", rows)
    means = [row for row in result["quality"] if row["decode"] != "ancestral"]
    table(
        "\n== Frechet distance to the training images, of pixels (lower is better)",
        [(f"{row['of']}{', means' if row['decode'] else ''}", f"{row['frechet']:.4f}") for row in means],
    )
    table(
        "\n== Next",
        [
            (
                "see all runs",
                f"{programs}mlflow ui --backend-store-uri {result['mlflow']}  # http://127.0.0.1:5000",
            ),
            (
                "change a line",
                f"{programs}vaescale train {result['recipe']} name=digits-wide-sigma likelihood.sigma=0.3",
            ),
            ("more samples", f"{programs}vaescale sample {folder} --count 256"),
            ("all verbs", f"{programs}vaescale --help"),
        ],
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
