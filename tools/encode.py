"""Write the latents of a run's images: the mean and log variance of q(z|x), as WebDataset shards beside the images' own.

Writes RUN/latents/SPLIT/: one shard for each shard of images, with the same keys and classes; KEY.moments.npy is float32
[2, ...latent shape]. index.json has, by channel, the mean and standard deviation of the aggregate posterior: what a latent
diffusion model shifts and scales by. Of a ladder: the latents of its top group. Runs on any number of processes, each sample
once; the same command goes on where it was stopped, and does nothing when all is there.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, splits and weights."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--split", choices=("train", "val"), action="append", help="default: both; may be given twice"
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="default: ema, if the run has them"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode. Returns what was written, for each split."""
    from vaescale.data.index import describe
    from vaescale.trained import latents_of, open_trained
    from vaescale.training import launch as backends

    with backends.joined():
        trained = open_trained(arguments.run, weights=arguments.weights)
        splits, suffix = {}, "-raw" if arguments.weights == "raw" else ""
        for split in arguments.split or ("train", "val"):
            words = describe(latents_of(trained, split, suffix=suffix).index)
            made = words.pop("made")
            splits[split] = {
                **{name: words[name] for name in ("folder", "shards", "samples", "bytes", "data_hash")},
                **{name: made[name] for name in ("latent_shape", "skipped", "mean", "std")},
            }
    return {"run": str(trained.folder), "step": trained.step, "weights": trained.weights, "splits": splits}


def show(result: dict[str, Any]) -> None:
    """One table for each split."""
    from vaescale.system.console import table

    for name, split in result["splits"].items():
        shape = "x".join(map(str, split["latent_shape"]))
        skipped = f", {split['skipped']} images skipped" if split["skipped"] else ""
        table(
            f"{result['run']}, step {result['step']} ({result['weights']} weights): latents of {name}",
            [
                ("folder", split["folder"]),
                ("samples", f"{split['samples']} in {split['shards']} shards{skipped}"),
                ("latent", shape),
                ("mean by channel", _range(split["mean"])),
                ("std by channel", _range(split["std"])),
            ],
        )


def _range(values: list[float]) -> str:
    if len(values) <= 8:
        return ", ".join(f"{value:.3f}" for value in values)
    return f"{min(values):.3f} to {max(values):.3f} ({len(values)} channels, in index.json)"


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
