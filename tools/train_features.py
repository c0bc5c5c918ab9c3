"""Train a small classifier on a labelled data set. `vaescale quality` compares images by its features.

Writes OUT/features.safetensors and OUT/features.json, with the accuracy on held-out images. The same seed gives the same
features on the same kind of machine. Keep the features: scores computed with different features are not comparable.

Of sequences, these are the features of frames, and OUT/videos.safetensors and OUT/videos.json have those of videos of --frames T,
with the accuracy at the class and at telling sequences from ones with permuted frames. `vaescale evaluate --features` reads both.

  vaescale train-features data/digits/train --out features/digits
  vaescale train-features data/moving_mnist/train --out features/moving_mnist --frames 8
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add DIR, OUT and the options of training."""
    add = parser.add_argument
    add("train", metavar="DIR", help="folder or URL of labelled training shards, such as data/digits/train")
    val = "folder or URL of held-out shards; default: the folder val or test beside DIR"
    add("--val", metavar="DIR", help=val)
    add("--out", type=Path, required=True, metavar="OUT", help="folder to write the features to")
    frames = "frames of a video, where DIR holds sequences: those of the runs that are evaluated; default: of the shortest sequence"
    add("--frames", type=integer(3, 100_000), metavar="T", help=frames)
    steps = "training steps, each on 128 images or frames, and as many on 32 videos; default: 1000"
    add("--steps", type=integer(2), default=1000, help=steps)
    width = "channels of the first feature map, from 4 to 512; default: 32"
    add("--width", type=integer(1), default=32, help=width)
    add(
        "--seed",
        type=integer(0),
        default=0,
        help="random seed of the weights and of the order of images; default: 0",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the classifier and write its weights. Returns the content of features.json."""
    from vaescale.commands.train_features import train_features

    return train_features(**{name: value for name, value in vars(arguments).items() if name != "json"})


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
