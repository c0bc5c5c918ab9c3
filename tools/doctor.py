"""Print versions, devices, the way processes were launched, and missing software.

Start it the way you start training, for example `accelerate launch --config_file recipes/backends/cpu2.yaml -m vaescale
doctor` or `torchrun --nproc-per-node 2 -m vaescale doctor`, to check the devices and processes of training. Under a launcher the processes exchange numbers for two seconds.
"""

import argparse
import sys
from typing import Any

from vaescale.system.arguments import real

MOST_SECONDS = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the duration of the exchange."""
    parser.add_argument(
        "--seconds",
        type=real(above=0, most=MOST_SECONDS),
        default=2.0,
        help="duration of the test in which the processes of a launcher exchange numbers; default: 2",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return versions, devices, launch, missing software, and the result of the exchange between processes."""
    from vaescale.commands.doctor import doctor

    return doctor(seconds=arguments.seconds)


def show(result: dict[str, Any]) -> None:
    """Print the results as one table, with each list on one line."""
    from vaescale.system.console import table

    def text(name: str, value: Any) -> str:
        if isinstance(value, list):
            return "; ".join(value) or ("none: training runs on the CPU" if name == "gpus" else "nothing")
        return "not installed" if value is None else str(value)

    table("vaescale doctor", [(name, text(name, value)) for name, value in result.items()])


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
