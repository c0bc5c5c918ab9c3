"""Compare decoders of SVG on stochastic Moving MNIST at equal steps: a table of bounds and of futures against the truth.

    vaescale make-shards moving-mnist:DOWNLOADED_FOLDER data/moving_mnist --count 5000
    vaescale train-features data/moving_mnist/train --out features/moving_mnist --frames 8 --width 8 --steps 500
    python -m tools.studies.sequences --futures 20 --images 100 --features features/moving_mnist

Trains every recipe of recipes/moving_mnist with each seed by `vaescale train`, and evaluates it by `vaescale evaluate --futures N`;
finished runs are reused. With --features also the Frechet distances of frames and videos, of all held-out sequences and one future of each,
whatever N and --images. Writes table.md to --out.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.studies.runs import Trained, call, train
from vaescale.errors import UserError
from vaescale.perceptual.classifier import DETAILS
from vaescale.runs.folder import read_json

RECIPES = Path("recipes/moving_mnist")
JUDGED = "judged"  # the result with Frechet distances
SCORES = ("best_psnr_db", "mean_future_psnr_db", "best_ssim", "mean_future_ssim")
HEAD = (
    "| Decoder | Seed | -log p (nats per sequence) | per frame | bits/dim | KL (nats) | MSE | PSNR, best of {futures} (dB) | PSNR, mean | SSIM, "
    "best of {futures} | SSIM, mean |"
)
FRECHET_HEAD = " Frechet, frames, means | frames, draws | videos, means | videos, draws |"
DISTANCES = tuple(f"frechet_{level}_{row}" for level in ("frames", "videos") for row in ("means", "draws"))
FLOORS = {"true": "(true sequences)", "copied": "(last frame repeated)"}


class Row(NamedTuple):
    """A run of the study: its recipe's name, its seed, and the metrics of `vaescale evaluate --futures`."""

    name: str
    seed: int
    metrics: dict[str, float]

    @property
    def bound(self) -> float:
        """The negative ELBO in nats per sequence; infinite where sigma is fitted to each frame, which gives no bound."""
        return self.metrics.get("neg_elbo_nats", math.inf)

    @property
    def bits(self) -> float:
        """The bound in bits per dimension, which masses and densities share; infinite without one."""
        return self.metrics.get("bits_per_dim", math.inf)


def main() -> None:
    """Train the missing runs, evaluate them, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/moving_mnist-decoders"), help="folder to write to")
    add("--only", metavar="RECIPE,RECIPE", help="only these recipes")
    add("--seeds", type=int, default=1, metavar="N", help="number of seeds, from 0; default: 1")
    add("--futures", type=int, default=20, metavar="N", help="futures of each context; default: 20")
    add("--images", type=int, metavar="N", help="evaluate the first N held-out sequences; default: all")
    features = "also the Frechet distance of futures by these features, as for `vaescale evaluate`"
    add("--features", metavar="WHICH", help=features)
    add("overrides", nargs="*", metavar="key=value", help="recipe keys to override in all runs")
    arguments = parser.parse_intermixed_args()
    try:
        study(arguments)
    except UserError as error:
        sys.stderr.write(f"sequences.py: {error}\n")
        sys.exit(error.exit_code)


def study(arguments: argparse.Namespace) -> None:
    """Train and evaluate the runs, then write the table."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "base")
    names = arguments.only.split(",") if arguments.only else names
    rows = []
    for name in names:
        for seed in range(arguments.seeds):
            suffix = f"-seed{seed}" if seed else ""
            keys = [f"name=moving_mnist-{name}{suffix}", f"seed={seed}", *arguments.overrides]
            run = train(name, RECIPES / f"{name}.yaml", keys)
            metrics = evaluated(run, arguments.futures, arguments.images)
            if arguments.features:
                metrics |= judged(run, arguments.features)
            rows.append(Row(name, seed, metrics))
    text = table(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(text)
    sys.stdout.write(text)


def evaluated(run: Trained, futures: int, images: int | None) -> dict[str, float]:
    """The metrics of a run's held-out sequences, measured unless they have been, with as many futures and the same weights."""
    first = [] if images is None else ["--images", str(images)]
    name = f"val-first-{images}" if images else "val"

    def measured() -> dict[str, Any]:
        metrics: dict[str, Any] = result_of(run, name).get("metrics", {})
        return metrics if metrics.get("futures") == futures else {}

    if not measured():
        call("evaluate", str(run.folder), "--futures", str(futures), *first)
    return measured()


def judged(run: Trained, features: str) -> dict[str, float]:
    """The Frechet distances of a run's futures, measured unless they have been, with the same features and weights."""
    identity = read_json(Path(features) / DETAILS).get("sha256")

    def measured() -> dict[str, float]:
        result = result_of(run, JUDGED)
        if not result or identity not in (None, result["features_hash"]["frames"]):
            return {}
        return {name: value for name, value in result["metrics"].items() if name.startswith("frechet_")}

    if not measured():
        call("evaluate", str(run.folder), "--futures", "1", "--features", features, "--name", JUDGED)
    return measured()


def result_of(run: Trained, name: str) -> dict[str, Any]:
    """A result of `vaescale evaluate` for the trained weights; empty without one."""
    result = read_json(run.folder / "evaluation" / f"{name}.json")
    is_of_run = (
        result.get("recipe_hash") == run.recipe.hash and result.get("step") == run.recipe.training.steps
    )
    return result if is_of_run else {}


def table(rows: list[Row]) -> str:
    """The table as Markdown, the lowest bits per dimension first; runs without a bound last. Scores have their standard errors over the sequences.

    Where runs have Frechet distances, lines for true sequences and for copies of the last frame follow.
    """
    rows = sorted(rows, key=lambda row: (row.bits, row.bound, row.name, row.seed))
    head = HEAD.format(futures=f"{rows[0].metrics['futures']:.0f}")
    lines, empty = [*map(_line, rows)], ["-"] * (head.count("|") - 2)
    distances = next((row.metrics for row in rows if "frechet_frames_true" in row.metrics), None)
    if distances:
        head += FRECHET_HEAD
        lines = [
            f"{line} {_distances(row.metrics, DISTANCES)} |" for line, row in zip(lines, rows, strict=True)
        ]
        for row, name in FLOORS.items():
            names = [f"frechet_{level}_{kind}" for level in ("frames", "videos") for kind in (row, "none")]
            lines.append(f"| {' | '.join([name, *empty, _distances(distances, names)])} |")
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines]) + "\n"


def _distances(metrics: dict[str, float], names: Sequence[str]) -> str:
    return " | ".join(f"{metrics[name]:.3f}" if name in metrics else "-" for name in names)


def _line(row: Row) -> str:
    metrics = row.metrics
    bounds = ["none"] * 3
    if math.isfinite(row.bound):
        bits = metrics.get("bits_per_dim", math.nan)
        bounds = [f"{row.bound:,.0f}", f"{metrics['neg_elbo_nats_per_frame']:,.1f}", f"{bits:.3f}"]
    scores = [_score(metrics, name) for name in SCORES]
    cells = [row.name, str(row.seed), *bounds, f"{metrics['kl_nats']:.2f}", f"{metrics['mse']:.4f}", *scores]
    return f"| {' | '.join(cells)} |"


def _score(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    digits = 2 if name.endswith("_db") else 3
    return f"{metrics[name]:.{digits}f} +- {metrics[f'{name}_standard_error']:.{digits}f}"


if __name__ == "__main__":
    main()
