"""Fit a full-covariance Gaussian mixture to a run's aggregate posterior, the prior that its decoder was trained on.

Fits draws from q(z|x) of the training images, reports the log density of held-out draws beside N(0, I)'s, and
writes RUN/gmm/mixture.safetensors and mixture.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, size, draws and seed."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument("--components", type=int, default=10, metavar="K", help="default: 10")
    parser.add_argument(
        "--samples-per-image", type=int, default=8, metavar="S", help="draws from q(z|x); default: 8"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the starting centres; default: 0")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit, compare, save. Returns the log densities."""
    from vaescale.aggregate import gmm
    from vaescale.aggregate.latents import sample_aggregate
    from vaescale.models.flat import FlatVAE
    from vaescale.run import in_order, open_run, open_split
    from vaescale.training.folder import append_metrics, update_summary
    from vaescale.training.tracking import push

    for name, least in (("components", 1), ("samples_per_image", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} (={getattr(arguments, name)}) must be at least {least}"
            )
    opened = open_run(arguments.run)
    model = opened.model
    if not isinstance(model, FlatVAE):
        raise UserError(
            f"{arguments.run} is a {opened.recipe.network.kind}, whose latents are groups that depend on one another; "
            f"a mixture is fitted to a single latent vector (conv, resnet, linear)"
        )
    train, val = (
        sample_aggregate(
            model,
            in_order(open_split(opened.recipe, split), workers=opened.recipe.data.workers),
            seed=opened.recipe.seed,
            samples_per_image=arguments.samples_per_image,
        )
        for split in ("train", "val")
    )
    mixture, history = gmm.fit(train, arguments.components, seed=arguments.seed)
    metrics = {
        "gmm/train_log_density_nats": float(gmm.log_density(mixture, train).mean()),
        "gmm/val_log_density_nats": float(gmm.log_density(mixture, val).mean()),
        "gmm/val_standard_normal_log_density_nats": float(gmm.standard_normal_log_density(val).mean()),
    }
    details: dict[str, Any] = {
        "components": arguments.components,
        "samples_per_image": arguments.samples_per_image,
        "seed": arguments.seed,
        "step": opened.step,
        "recipe_hash": opened.recipe.hash,
        "iterations": len(history),
        **metrics,
    }
    gmm.save(mixture, opened.folder / "gmm", details)
    append_metrics(opened.folder, opened.step, metrics)
    update_summary(opened.folder, "gmm", details)
    push(opened.folder, opened.recipe.tracking)
    return {"run": str(opened.folder), **details}


def show(result: dict[str, Any]) -> None:
    """The log densities, in nats per latent vector."""
    from vaescale.console import table

    table(
        f"{result['run']}: {result['components']} components, {result['iterations']} EM iterations; mean log density, nats",
        [
            ("mixture, training latents", f"{result['gmm/train_log_density_nats']:.4f}"),
            ("mixture, held-out latents", f"{result['gmm/val_log_density_nats']:.4f}"),
            ("N(0, I), held-out latents", f"{result['gmm/val_standard_normal_log_density_nats']:.4f}"),
        ],
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
