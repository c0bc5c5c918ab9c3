"""Write a data set as WebDataset shards (PNG and class) with an index beside them.

Makes OUT/train and OUT/val. A split that is there already is left as it is.

sources:
  digits    scikit-learn's 1,797 scanned handwritten digits, 8x8 (needs no download)
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.console import say
from vaescale.data.shards import INDEX, describe, read_index, write_shards
from vaescale.data.sources import SOURCES, open_source
from vaescale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE and OUT."""
    parser.add_argument("source", metavar="SOURCE", help=f"one of: {', '.join(SOURCES)}")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that gets a folder of shards per split")
    parser.add_argument("--samples-per-shard", type=int, default=500, metavar="N", help="default: 500")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write each split. Returns the splits' descriptions."""
    if arguments.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard (={arguments.samples_per_shard}) must be at least 1")
    if arguments.source not in SOURCES:
        open_source(arguments.source, "train")
    result = {}
    for split in SOURCES[arguments.source][0]:
        folder = arguments.out / split
        if (folder / INDEX).is_file():
            index = read_index(folder)
            say(f"{folder} is there already ({index.num_samples} samples); delete it to write it anew")
        else:
            samples = open_source(arguments.source, split)
            index = write_shards(samples, folder, samples_per_shard=arguments.samples_per_shard)
        result[split] = describe(index)
    return result


def show(result: dict[str, Any]) -> None:
    """One line a split."""
    for split in result.values():
        sys.stdout.write(
            f"{split['folder']}: {split['samples']} images of {split['image']} in {split['shards']} shards, "
            f"{split['bytes']} bytes, {split['classes']} classes\n"
        )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
