"""Compare all decoders and a beta sweep on Fashion-MNIST, at equal steps: a table, a rate-distortion plot, a picture.

    vaescale make-shards idx:DOWNLOADED_FOLDER data/fashion_mnist --holdout 0
    python -m tools.studies.decoders

Trains every recipe of recipes/fashion_mnist except the ladder's, and `fixed` with other betas, each by `vaescale train`;
finished runs are reused. Writes table.md, rate_distortion.png and decoders.png to --out, and logs them with the runs in the
recipes' MLflow experiment.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tools.studies.runs import Trained, train
from vaescale import figures, noise
from vaescale.errors import UserError
from vaescale.models.units import to_unit
from vaescale.runs.tracking import log_files
from vaescale.trained import in_order, open_split, open_trained

RECIPES = Path("recipes/fashion_mnist")
BETAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 3.0, 10.0)  # 1 is the recipe `fixed`
# Not part of the study: `base` has no decoder, the others have another network or other images.
OTHERS = ("base", "ladder", "second_stage", "with_mnist")
SHOWN = 8
# Numbers that are not comparable are in separate tables.
GROUPS = (
    "density of 8-bit images",
    "density of dequantized images",
    "mass over 256 levels",
    "mass of binary images",
    "no bound: sigma is fitted to each image",
)


def main() -> None:
    """Train the missing runs, then write the table and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to write to; default: runs/fashion_mnist-decoders, with a suffix for --only and overrides",
    )
    parser.add_argument(
        "--only", metavar="RECIPE,RECIPE", help="train only these recipes, without the beta sweep"
    )
    parser.add_argument("--no-mlflow", action="store_true", help="log neither the runs nor the study")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe keys to override in all runs, such as training.steps=100",
    )
    arguments = parser.parse_intermixed_args()
    try:
        study(arguments)
    except UserError as error:
        sys.stderr.write(f"decoders.py: {error}\n")
        sys.exit(error.exit_code)


def study(arguments: argparse.Namespace) -> None:
    """Train the runs, then write the table and figures. Overrides change the names of the run folders."""
    changed = "".join(f"-{re.sub('[^A-Za-z0-9._]+', '_', override)}" for override in arguments.overrides)
    selection = "-part" if arguments.only else ""
    out: Path = arguments.out or Path(f"runs/fashion_mnist-decoders{selection}{changed}")
    overrides = [*arguments.overrides, *(["tracking.mlflow=null"] if arguments.no_mlflow else [])]
    names = arguments.only.split(",") if arguments.only else recipes()
    decoders = [
        train(name, RECIPES / f"{name}.yaml", [f"name=fashion_mnist-{name}{changed}", *overrides])
        for name in names
    ]
    betas = [run._replace(label="beta 1") for run in decoders if run.label == "fixed"]
    for beta in () if arguments.only else BETAS:
        keys = [f"name=fashion_mnist-beta_{beta}{changed}", f"objective.beta={beta}", *overrides]
        betas.append(train(f"beta {beta:g}", RECIPES / "fixed.yaml", keys))
    betas.sort(key=lambda run: run.beta)
    out.mkdir(parents=True, exist_ok=True)
    tables = table(decoders, betas)
    (out / "table.md").write_text(tables)
    sys.stdout.write(tables)
    draw(out, decoders, betas)
    log_files(decoders[0].recipe.tracking, "decoders: table and plots", sorted(out.iterdir()))


def recipes() -> list[str]:
    """The names of the recipes that are compared."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in OTHERS)


def table(decoders: list[Trained], betas: list[Trained]) -> str:
    """The tables as Markdown: densities, masses and numbers without a bound separately; then the betas as noise levels."""
    lines = []
    for group in GROUPS:
        runs = sorted((run for run in decoders if group_of(run) == group), key=bound)
        lines += _rows(group, [(run, bound(run)) for run in runs]) if runs else []
    if betas:
        lines += beta_rows(betas)
    return "\n".join(lines) + "\n"


def group_of(run: Trained) -> str:
    """The entry of GROUPS for a run's numbers."""
    config = run.recipe.likelihood
    if "neg_elbo_nats" not in run.metrics:
        return GROUPS[4]
    if config.measure == "mass":
        return GROUPS[2] if config.own_levels is None else GROUPS[3]
    return GROUPS[1] if getattr(config, "dequantize", False) else GROUPS[0]


def bound(run: Trained) -> float:
    """The negative ELBO, or its profile form."""
    return run.metrics.get("neg_elbo_nats", run.metrics.get("neg_profile_elbo_nats", math.nan))


def bound_at(run: Trained, variance: float) -> float:
    """The negative ELBO of the same weights at another sigma^2: D/2 (log(2 pi sigma^2) + MSE / sigma^2) + KL."""
    nll = 0.5 * run.dimensions * (math.log(2 * math.pi * variance) + run.metrics["mse"] / variance)
    return nll + run.metrics["kl_nats"]


def _rows(title: str, runs: list[tuple[Trained, float]]) -> list[str]:
    nats_are = "-profile ELBO (nats)" if title == GROUPS[4] else "-ELBO (nats)"
    lines = [
        f"| {title} | {nats_are} | bits/dim | MSE | sigma | KL (nats) | active units |",
        "|---|---|---|---|---|---|---|",
    ]
    for run, nats in runs:
        metrics = run.metrics
        bits, sigma = metrics.get("bits_per_dim"), metrics.get("sigma")
        lines.append(
            f"| {run.label} | {nats:.1f} | {'' if bits is None else f'{bits:.3f}'} | {metrics['mse']:.5f} | "
            f"{'' if sigma is None else f'{sigma:.4f}'} | {metrics['kl_nats']:.1f} | {metrics['active_units']:.0f} |"
        )
    return [*lines, ""]


def beta_rows(betas: list[Trained]) -> list[str]:
    """The table of the beta sweep, with the bound at the noise level sigma^2 = beta and at the best one, sigma^2 = MSE."""
    lines = [
        "| sigma = 1, and | -ELBO at sigma^2 = beta | -ELBO at sigma^2 = MSE | MSE | sqrt(beta) | KL (nats) | active units |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in betas:
        metrics, beta = run.metrics, run.beta
        lines.append(
            f"| {run.label} | {bound_at(run, beta):.1f} | {bound_at(run, metrics['mse']):.1f} | {metrics['mse']:.5f} | "
            f"{math.sqrt(beta):.4f} | {metrics['kl_nats']:.1f} | {metrics['active_units']:.0f} |"
        )
    return [*lines, ""]


def draw(out: Path, decoders: list[Trained], betas: list[Trained]) -> None:
    """Draw the rate-distortion plot of the runs with grey images, and reconstructions and samples of all runs."""
    last = sorted(decoders, key=lambda run: run.label == "optimal")  # drawn on top of runs with equal numbers
    points = [
        (run.label, run.metrics["kl_nats"], run.metrics["mse"])
        for run in last
        if str(run.recipe.likelihood.kind) != "bernoulli"
    ]
    curve = [(run.label.removeprefix("beta "), run.metrics["kl_nats"], run.metrics["mse"]) for run in betas]
    title = f"Fashion-MNIST, held out, {decoders[0].recipe.training.steps} steps"
    figures.rate_distortion(out / "rate_distortion.png", curve, points, title=title)
    runs = [*decoders, *(run for run in betas if run.label != "beta 1")]
    rows = [("originals", originals(runs[0])), *((run.label, strip(run)) for run in runs)]
    heading = f"{title}: reconstructions (means) | prior samples: means | the same with the decoder's noise"
    figures.image_strips(out / "decoders.png", rows, title=heading)


def originals(run: Trained) -> NDArray[np.float32]:
    """The originals of the reconstructions."""
    first = next(in_order(open_split(run.recipe, "val")))
    images: NDArray[np.float32] = to_unit(first.images[:SHOWN]).numpy()
    return images


@torch.no_grad()
def strip(run: Trained) -> NDArray[np.float32]:
    """Reconstructions, prior samples as means and as draws, each SHOWN, with a white image between."""
    trained = open_trained(Path(run.recipe.run_dir))
    model, device = trained.model, next(trained.model.parameters()).device
    first = next(in_order(open_split(trained.recipe, "val")))
    stream = noise.Stream(0, 0, torch.arange(SHOWN, device=device))
    x = model.target(first.images[:SHOWN].to(device), stream)
    reconstructed = model.likelihood.mean(model.reconstruct(x))
    params = model.from_prior(stream)
    white = torch.ones_like(x[:1])
    drawn = model.likelihood.sample(params, stream)
    if run.label.startswith("beta"):  # with the noise level of beta
        drawn = model.likelihood.mean(params)
        drawn = drawn + math.sqrt(run.beta) * noise.normal(stream, noise.DECODER, model.image_shape)
    parts = [reconstructed, white, model.likelihood.mean(params), white, drawn]
    images: NDArray[np.float32] = torch.cat(parts).clamp(0, 1).float().cpu().numpy()
    return images


if __name__ == "__main__":
    main()
