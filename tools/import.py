"""Make a run of diffusers' AutoencoderKL: a folder with config.json and safetensors, as of Stable Diffusion or FLUX.

OUT is a run folder: `vaescale evaluate OUT` and the other verbs for trained runs accept it, and `train RECIPE init_from=OUT` begins
from it. Its network is the folder's; data, likelihood and training are the recipe's. Nothing is fetched, and no pickle is loaded.

  vaescale import stable-diffusion/vae runs/sd-vae --data data/photos256/val data.image_size=256
  vaescale train recipes/mine.yaml init_from=runs/sd-vae network.freeze=encoder
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add FOLDER, OUT, the recipe and the data."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="an AutoencoderKL, or a pipeline with one in vae/")
    add("out", metavar="OUT", type=Path, help="a folder that does not exist yet")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="keys of the recipe, such as data.image_size=256")
    add("--recipe", metavar="FILE", type=Path, help="data, likelihood, optimizer and training of the run")
    add("--data", metavar="DIR", type=Path, help="shards whose first 2,000 images give the optimal sigma")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the run folder. Returns what is in it."""
    from vaescale.commands.import_autoencoder import import_autoencoder

    return import_autoencoder(**{name: value for name, value in vars(arguments).items() if name != "json"})


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
