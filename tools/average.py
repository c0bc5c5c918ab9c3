"""Put an average of the weights of any length together after training, without training again.

A run trained with `training.ema_sigma_rel=[0.05,0.1] training.keep_every=N` keeps two averages in each of its checkpoints. Their sum,
with factors found by least squares, is nearly the average of any length between and around them (Karras et al. 2024). OUT is a run
folder: `vaescale evaluate OUT` and the other verbs for trained runs accept it.

  vaescale average runs/digits-optimal averaged/s08 --sigma-rel 0.08
  vaescale average runs/digits-optimal averaged/d999 --decay 0.999
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, OUT and the length of the average."""
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a run folder with checkpoints at several steps"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that does not exist yet")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--sigma-rel",
        metavar="S",
        type=real(above=0, below=0.2886),
        help="a power-function average whose standard deviation is this share of training, such as 0.1",
    )
    length.add_argument(
        "--decay", metavar="D", type=real(above=0, below=1), help="an exponential average, such as 0.9999"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the run folder. Returns its path, and how the average was put together."""
    from vaescale.commands.average import average

    return average(arguments.run, arguments.out, sigma_rel=arguments.sigma_rel, decay=arguments.decay)


def show(result: dict[str, Any]) -> None:
    """Print the factors as a table."""
    from vaescale.system.console import say, table

    rows = [(f"step {one['step']}, {one['average']}", f"{one['factor']:+.4f}") for one in result["factors"]]
    table(f"{result['out']}: {result['weights']} at step {result['step']}", rows)
    say(f"error of the profile: {result['profile_error']:.2%}")


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
