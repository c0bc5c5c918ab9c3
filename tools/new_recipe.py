"""Write a starter recipe for your shards: network, latents, batch, learning rate and length that their index suggests, with a comment each.

DATA is the folder that make-shards wrote, with `train` and `val` (or `test`) in it.

  vaescale make-shards folder:~/photos data/photos --size 64
  vaescale new-recipe data/photos
  vaescale train photos.yaml
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add DATA, the file and the name."""
    parser.add_argument("data", metavar="DATA", help="folder or URL with train and val, such as data/photos")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="file to write; default: NAME.yaml")
    parser.add_argument("--name", metavar="NAME", help="name of the run; default: that of the folder")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the recipe. Returns its path, what was found and what was chosen."""
    from vaescale.commands.new_recipe import new_recipe

    return new_recipe(arguments.data, out=arguments.out, name=arguments.name)


def show(result: dict[str, Any]) -> None:
    """Print what was found and chosen, and the next commands."""
    from vaescale.system.console import say, table

    rows = [(name, str(value)) for name, value in result.items() if value is not None and name != "recipe"]
    table(result["recipe"], rows)
    say(f"next: vaescale train {result['recipe']} --dry-run --time-steps; vaescale train {result['recipe']}")


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
