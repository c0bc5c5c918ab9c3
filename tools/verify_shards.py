"""Check a folder of shards against its index: sizes, hashes, the structure and end of each tar, the position and bytes
of every sample; with --deep also that every image decodes. Each fault is printed with shard, member and byte offset. The
exit code is 3 when there are faults.
"""

import argparse
import sys
from typing import Any

from vaescale.system.arguments import add_jobs
from vaescale.system.console import table

SHOWN = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add DIR, the depth of the check and the number of threads."""
    parser.add_argument("folder", metavar="DIR", help="folder of shards, such as data/digits/train")
    parser.add_argument("--deep", action="store_true", help="also decode every image")
    add_jobs(parser, workers="threads")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check every shard. Returns the folder, the number of samples and the faults."""
    from vaescale.commands.verify_shards import verify_shards

    return verify_shards(arguments.folder, deep=arguments.deep, jobs=arguments.jobs)


def show(result: dict[str, Any]) -> None:
    """Print one line for each fault, the table of the images, then the verdict."""
    from vaescale.data.making.table import table_rows

    faults = result["faults"]
    for fault in faults[:SHOWN]:
        member = f" member {fault['member']!r}" if fault["member"] else ""
        offset = f" at byte {fault['offset']}" if fault["offset"] >= 0 else ""
        sys.stdout.write(f"{fault['shard']}{member}{offset}: {fault['words']}\n")
    if len(faults) > SHOWN:
        sys.stdout.write(f"... and {len(faults) - SHOWN} more (--json lists all)\n")
    if result["table"] is not None:
        table("when they were written", [*table_rows(result["table"]).items()])
    sys.stdout.write(f"{result['folder']}: {_verdict(result)}\n")


def _verdict(result: dict[str, Any]) -> str:
    faults, shards = result["faults"], {fault["shard"] for fault in result["faults"]}
    if not faults:
        checked = "sizes, hashes, structure" + (", every image decoded" if result["deep"] else "")
        return f"{result['samples']} samples are sound ({checked})"
    counts = (
        f"{n} {noun}{'s' if n > 1 else ''}" for n, noun in ((len(faults), "fault"), (len(shards), "shard"))
    )
    return (
        f"{' in '.join(counts)}; delete these .tar files and run the same `vaescale make-shards` command again, which writes "
        f"only the missing ones (for tars from elsewhere: index the rest with --index-only)"
    )


def exit_code(result: dict[str, Any]) -> int:
    """Return 3 when there are faults, else 0."""
    return 3 if result["faults"] else 0


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
