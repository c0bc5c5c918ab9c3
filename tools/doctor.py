"""Print versions, devices, how processes were launched, and what is missing.

Run it the way you run training, for example `accelerate launch --config_file recipes/backends/cpu2.yaml -m vaescale
doctor`, to see what training would see: its processes then exchange numbers for two seconds.
"""

import argparse
import sys
from typing import Any

from vaescale.system.arguments import real

MOST_SECONDS = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --seconds."""
    parser.add_argument(
        "--seconds",
        type=real(above=0, most=MOST_SECONDS),
        default=2.0,
        help="under a launcher: how long the processes exchange numbers; default: 2",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return versions, devices, launch, missing parts, and the result of the processes' exchange."""
    from vaescale.commands.doctor import doctor

    return doctor(seconds=arguments.seconds)


def show(result: dict[str, Any]) -> None:
    """Print one table, each list as one line."""
    from vaescale.system.console import table

    def text(name: str, value: Any) -> str:
        if isinstance(value, list):
            return "; ".join(value) or ("none: training runs on the CPU" if name == "gpus" else "nothing")
        return "not installed" if value is None else str(value)

    table("vaescale doctor", [(name, text(name, value)) for name, value in result.items()])


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
