"""Check a folder of shards against its index: sizes, hashes, the tars' members and end, every sample's place and
bytes; with --deep also that every image decodes. Each fault is named with shard, member and byte. Exit code 3 when
something is wrong.
"""

import argparse
import sys
from typing import Any

from vaescale.data.making.verifying import verify_shards
from vaescale.system.arguments import add_jobs
from vaescale.system.console import Progress

SHOWN = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR and --deep."""
    parser.add_argument("folder", metavar="DIR", help="folder of shards, such as data/digits/train")
    parser.add_argument("--deep", action="store_true", help="decode every image too")
    add_jobs(parser, workers="threads")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Look at every shard. Returns the folder, the number of samples and the faults."""
    with Progress(f"verify {arguments.folder}", 0) as progress:
        samples, faults = verify_shards(
            arguments.folder,
            deep=arguments.deep,
            jobs=arguments.jobs,
            progress=lambda done, total: progress.update(done, "shards", total=total),
        )
    return {
        "folder": arguments.folder,
        "samples": samples,
        "deep": arguments.deep,
        "faults": [fault._asdict() for fault in faults],
    }


def show(result: dict[str, Any]) -> None:
    """One line a fault, and the verdict."""
    faults = result["faults"]
    for fault in faults[:SHOWN]:
        member = f" member {fault['member']!r}" if fault["member"] else ""
        place = f" at byte {fault['offset']}" if fault["offset"] >= 0 else ""
        sys.stdout.write(f"{fault['shard']}{member}{place}: {fault['words']}\n")
    if len(faults) > SHOWN:
        sys.stdout.write(f"... and {len(faults) - SHOWN} more (--json names them all)\n")
    sys.stdout.write(f"{result['folder']}: {_verdict(result)}\n")


def _verdict(result: dict[str, Any]) -> str:
    faults, shards = result["faults"], {fault["shard"] for fault in result["faults"]}
    if not faults:
        checked = "sizes, hashes, structure" + (", every image decoded" if result["deep"] else "")
        return f"{result['samples']} samples are sound ({checked})"
    counts = (
        f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((len(faults), "fault"), (len(shards), "shard"))
    )
    return (
        f"{' in '.join(counts)}; delete the .tar files named and call the same `vaescale make-shards` again, which writes "
        f"only them (for tars made by others: --index-only)"
    )


def exit_code(result: dict[str, Any]) -> int:
    """3 when something is wrong."""
    return 3 if result["faults"] else 0


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
