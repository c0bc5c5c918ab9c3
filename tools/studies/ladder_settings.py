"""Measure what the settings of the published ladder change, on a small ladder and CIFAR-10, at equal steps: a table.

    vaescale make-shards hf:uoft-cs/cifar10 data/cifar10
    python tools/studies/ladder_settings.py
    python tools/studies/ladder_settings.py --only authors,bounded training.steps=500 training.evaluate_every=100

Trains recipes/cifar10/ladder.yaml (`authors`), ladder_bounded.yaml (`bounded`), and `authors` with one setting at a time as
ladder_bounded.yaml has it, each by `vaescale train` in float32 with a ladder of four groups. The weights are averaged over 100
steps: over the recipe's 10,000, an average that does not warm up would still be four fifths initial weights after 2,000. Finished
runs are reused. Writes table.md to --out. Arguments key=value override keys of every run.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from vaescale.runs.folder import read_metrics
from vaescale.system.files import write_whole

AUTHORS, BOUNDED = (f"recipes/cifar10/{name}.yaml" for name in ("ladder", "ladder_bounded"))
SMALL = (
    *("network.width=32", "network.encoder=32x1,32d2,16x1,16d4,4x1,4d4,1x1", "network.decoder=1x1,4m1,16m4,32m16"),
    *("data.global_batch=16", "training.precision=fp32", "training.steps=2000", "training.evaluate_every=500"),
    *("training.checkpoint_every=2000", "training.log_every=100", "training.ema_decay=0.99"),
    "tracking.mlflow=null",
)  # fmt: skip
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "authors": (AUTHORS, ()),
    "bounded": (BOUNDED, ()),
    "decay of kernels": (AUTHORS, ("optimizer.decay=kernels",)),
    "input in [-1, 1]": (AUTHORS, ("network.standardize=null",)),
    "bounded log sigma": (AUTHORS, ("posterior.bounded=true",)),
    "first scale 0.25": (AUTHORS, ("likelihood.first_scale=0.25",)),
    "scale ceiling 20": (AUTHORS, ("likelihood.scale_ceiling=20",)),
    "average with warm-up": (AUTHORS, ("training.ema_warmup=true",)),
    "first rate lr / 100": (AUTHORS, ("optimizer.warmup_from_zero=false",)),
    "epsilon 1e-8": (AUTHORS, ("optimizer.epsilon=1e-8",)),
    "skip by the usual norm": (AUTHORS, ("optimizer.skip_norm=null", "optimizer.skip_factor=10")),
}
COLUMNS = (
    "train/neg_elbo_nats",
    "val/neg_elbo_nats",
    "val/bits_per_dim",
    "val/kl_nats",
    "train/skipped_steps",
)


def main() -> None:
    """Train the missing runs and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ladder-settings"), help="folder to write to")
    parser.add_argument("--only", metavar="NAME,NAME", help="train only these variants")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys of every run")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--only {unknown[0]!r} is no variant; choose from {', '.join(VARIANTS)}")
    runs = {name: _train(name, arguments.out, arguments.overrides) for name in names}
    table = table_of({name: read_metrics(run) for name, run in runs.items()})
    write_whole(arguments.out / "table.md", table.encode())
    sys.stdout.write(table)


def _train(name: str, out: Path, overrides: list[str]) -> Path:
    """Train a variant, or continue it, by `vaescale train`. Returns its run folder."""
    recipe, settings = VARIANTS[name]
    run = out / name.replace(" ", "-").replace("/", "per").translate(str.maketrans("", "", "[],"))
    command = [sys.executable, "-m", "vaescale", "train", recipe]
    subprocess.run([*command, *SMALL, *settings, f"run_dir={run}", *overrides], check=True)
    return run


def table_of(rows_by_name: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: for each variant and evaluated step, the held-out metrics and those of training at that step."""
    lines = [f"| variant | step | {' | '.join(COLUMNS)} |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    for name, rows in rows_by_name.items():
        for row in rows:
            if "val/neg_elbo_nats" in row:
                cells = [f"{row[column]:.6g}" if column in row else "" for column in COLUMNS]
                lines.append(f"| {name} | {row['step']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
