"""Draw samples from a run: z from the model's prior or from the fitted mixture, decoded as a mean, as a draw, or in between.

A decoder mean is E[x|z]; an ancestral sample is a draw from p(x|z); offset:ALPHA is the mean plus ALPHA times sigma(z).
Without --prior and --decode, RUN/figures/samples.png shows every combination side by side. Sample number i does not depend on
--count or on the number of processes.

  vaescale sample runs/digits-optimal --prior gmm --decode mean --count 50000 --shards samples/digits
  vaescale sample runs/digits-optimal --interpolate 3,17 --interpolate 5,9
  vaescale sample runs/digits-predicted --prior gmm --refine 200
  vaescale sample runs/digits-plane --map 20
  vaescale sample runs/digits-vq_vae --prior autoregressive
  vaescale sample runs/mnist-conditional --class 3
  vaescale sample runs/mnist-conditional --between 3,8 --between 4,9
  vaescale sample runs/phantom-vector --vector 0.8,0.6,0
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, integer, real

PAIR = "instead of samples: decoded means between the latents of held-out images number I and J"
PRIOR = (
    "distribution of z: `standard` for the model's prior, `gmm` for the mixture of fit-gmm, `autoregressive` for the prior over codes of \
fit-prior, or the folder of a run trained on this run's latents; default: all that the run has"
)
TEMPERATURE = "factor of the standard deviations of the prior (of every group) or the mixture, divisor of an autoregressive prior's logits; default: 1"
REFINE = "show samples before and after STEPS of gradient descent on mean log sigma(z), if sigma is predicted"
WEIGHT = "weight of -log density of z (mixture or prior) in the descent of --refine; default: 0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, the samples, where to write them, and the pictures to draw instead."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    add("--prior", type=_prior, metavar="WHICH", help=PRIOR)
    components = "use the mixture with K components that fit-gmm compared; default: the chosen mixture"
    add("--components", type=integer(1), metavar="K", help=components)
    add(
        "--decode",
        metavar="HOW",
        help="decoding: mean, ancestral or offset:ALPHA; default: mean and ancestral",
    )
    add("--temperature", type=real(above=0, most=10), metavar="T", help=TEMPERATURE)
    count = (
        "number of samples of each kind; a picture shows at most 256; default: 64; of a run of sequences, number of futures of each context, "
        "the best of which is shown; default: 20"
    )
    add("--count", type=integer(1), metavar="N", help=count)
    add("--seed", type=integer(0), default=0, help="random seed of the samples; default: 0")
    add(
        "--shards",
        type=Path,
        metavar="OUT",
        help="write the samples as 8-bit WebDataset shards to OUT instead of pictures",
    )
    add("--interpolate", action="append", type=_pair, metavar="I,J", help=PAIR)
    add("--refine", type=integer(1, 100_000), metavar="STEPS", help=REFINE)
    add("--refine-weight", type=real(least=0), metavar="W", help=WEIGHT)
    rate = "learning rate (Adam) of the descent of --refine; default: 0.02"
    add("--refine-rate", type=real(above=0), metavar="LR", help=rate)
    plane = "instead of samples: SIDE x SIDE decoded means over the plane of a model with two latents"
    add("--map", dest="map_side", type=integer(2, 64), metavar="SIDE", help=plane)
    of_class = (
        "the class of all samples of a conditional run, or of one with mixtures of classes: a name, a number, or `none`; default: by \
the classes' frequencies, and a picture with a row for each class"
    )
    add("--class", dest="class_name", metavar="WHICH", help=of_class)
    vectors = (
        "the vector of all samples of a run that is given vectors, such as 1,0,0.5, or `none`, or a .npy file of one or several, \
taken in turn; default: those of the held-out images in turn"
    )
    add("--vector", metavar="VALUES", help=vectors)
    pairs = "instead of samples: decoded means of a conditional run from class, or vector number, A to B at the same noise of z"
    add("--between", action="append", type=_classes, metavar="A,B", help=pairs)
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw the samples and write them. Returns a description of the samples, and the paths."""
    from vaescale.commands.sample import sample

    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    return sample(options.pop("run"), **options)


def _prior(text: str) -> str | Path:
    return text if text in ("standard", "gmm", "autoregressive") else Path(text)


def _classes(text: str) -> tuple[str, str]:
    """Parse a pair of classes, such as `3,5` or `cat,dog`."""
    words = [word.strip() for word in text.split(",")]
    if len(words) != 2 or not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} must be a pair of classes, such as 3,5 or cat,dog")
    return words[0], words[1]


def _pair(text: str) -> tuple[int, int]:
    """Parse a pair of image numbers, such as `3,17`."""
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must be a pair of image numbers, such as 3,17")
    return int(numbers[0]), int(numbers[1])


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
