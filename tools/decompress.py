"""Decode a file of `vaescale compress` to pictures, each equal to the bit: FOLDER/SPLIT/CLASS/NAME.png, and FOLDER/labels.csv.

Needs the run that the file was made with: its path in the file, if that is a relative one, or --run. Refuses before it writes
anything where this machine or these weights would decode other images. A damaged chunk is named and left out, and the exit code is 3.
Runs on any number of processes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, the folder, the run and the chunks."""
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="a file of `vaescale compress`, such as images.vsz")
    add("folder", metavar="FOLDER", type=Path, help="new folder for the pictures")
    add(
        "--run",
        metavar="RUN",
        type=Path,
        help="the run that the file was made with; default: as the file says",
    )
    chunk = "decode only this chunk, from 0; may be given several times"
    add("--chunk", type=integer(0), action="append", default=[], dest="chunks", metavar="N", help=chunk)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode the images. Returns their number and the damaged chunks."""
    from vaescale.commands.decompress import decompress

    return decompress(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print what was decoded."""
    from vaescale.system.console import say, table

    if not result["is_whole"]:
        say(
            f"{result['file']} is cut off or its table is damaged: the chunks are those that a walk through it meets"
        )
    table(
        f"{result['file']}, decoded with {result['run']}",
        [
            ("folder", result["folder"]),
            ("images", f"{result['images']} of {result['chunks']} chunks"),
            ("images/s", f"{result['images_per_second']:.1f}"),
            *((f"chunk {number}", f"left out: {fault}") for number, fault in result["damaged"].items()),
        ],
    )


def exit_code(result: dict[str, Any]) -> int:
    """3 when a chunk is damaged or the file is not whole."""
    return 3 if result["damaged"] or not result["is_whole"] else 0


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
