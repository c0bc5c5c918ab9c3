"""Write the latents of a run's images, the mean and log variance of q(z|x), or their codes, as WebDataset shards.

Writes RUN/latents/SPLIT/: one shard for each shard of images, with the same keys and classes. KEY.moments.npy is float32
[2, ...latent shape]. index.json has the mean and standard deviation of the aggregate posterior for each channel; a latent
diffusion model shifts and scales the latents by them. --dtype, --flip, --draws and --standardize write latents that such a model
reads as they are (vaescale.data.latents), to RUN/latents/SPLIT-OPTIONS. A ladder's shards hold the latents of its top group. Of a run with codes, KEY.codes.npy is int32 [h, w]. Runs on any number
of processes and encodes each sample once. Run the same command again to continue after a stop; it does nothing when all shards
are written.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, add_weights, integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, splits and weights."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        action="append",
        help="data set of the recipe to encode; may be given twice; default: both splits",
    )
    add_weights(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "fp16", "bf16"),
        default="float32",
        help="dtype of the stored values; bf16 is stored as safetensors; default: float32",
    )
    flip = "both: also the latents of each image's mirror image, as KEY_mirrored; default: none"
    parser.add_argument("--flip", choices=("none", "both"), default="none", help=flip)
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--moments", action="store_true", help="mean and log variance of q(z|x); the default")
    draws = "N draws of q(z|x) for each image in place of its moments"
    stored.add_argument("--draws", type=integer(1), default=0, metavar="N", help=draws)
    scale = "channel: to mean 0 and standard deviation 1 by channel, over the training images; default: none"
    parser.add_argument("--standardize", choices=("none", "channel"), default="none", help=scale)
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode the images. Returns a description of the shards of each split."""
    from vaescale.commands.encode import SPLITS, encode

    names = ("weights", "checkpoint", "dtype", "flip", "draws", "standardize")
    options = {name: getattr(arguments, name) for name in names}
    return encode(arguments.run, splits=arguments.split or SPLITS, **options)


def show(result: dict[str, Any]) -> None:
    """Print one table for each split."""
    from vaescale.system.console import table

    for name, split in result["splits"].items():
        if "codes" in split:
            _show_codes(result, name, split)
            continue
        shape = "x".join(map(str, split["latent_shape"]))
        skipped = f", {split['skipped']} images skipped" if split["skipped"] else ""
        table(
            f"{result['run']}, step {result['step']} ({result['weights']} weights): latents of {name}",
            [
                ("folder", split["folder"]),
                ("samples", f"{split['samples']} in {split['shards']} shards{skipped}"),
                ("latent", f"{shape}, {_stored(split)}"),
                ("mean by channel", _range(split["mean"])),
                ("std by channel", _range(split["std"])),
            ],
        )


def _show_codes(result: dict[str, Any], name: str, split: dict[str, Any]) -> None:
    from vaescale.system.console import table

    shape = "x".join(map(str, split["code_shape"]))
    skipped = f", {split['skipped']} images skipped" if split["skipped"] else ""
    mirrored = ", with mirror images" if split["flip"] == "both" else ""
    table(
        f"{result['run']}, step {result['step']} ({result['weights']} weights): codes of {name}",
        [
            ("folder", split["folder"]),
            ("samples", f"{split['samples']} in {split['shards']} shards{skipped}"),
            ("codes", f"{shape} of {split['codes']} in int32{mirrored}"),
        ],
    )


def _stored(split: dict[str, Any]) -> str:
    kind = f"{split['draws']} draws" if split["draws"] else "moments"
    mirrored = ", with mirror images" if split["flip"] == "both" else ""
    return f"{kind} in {split['dtype']}{mirrored}{', standardized by channel' * split['standardized']}"


def _range(values: list[float]) -> str:
    if len(values) <= 8:
        return ", ".join(f"{value:.3f}" for value in values)
    return f"{min(values):.3f} to {max(values):.3f} ({len(values)} channels, in index.json)"


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
