"""How many cores this process may use, and how many a person asks for."""

import argparse
import os


def cores() -> int:
    """The cores that this process may run on; where the system does not say, all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def add_jobs(parser: argparse._ActionsContainer, *, of: str) -> None:
    """The option `--jobs N`; `of`: what they are, threads or processes."""
    words = f"{of}, 1 to 1024; default: the cores"
    parser.add_argument("--jobs", type=_jobs, default=cores(), metavar="N", help=words)


def _jobs(word: str) -> int:
    if not word.isdecimal() or not 1 <= int(word) <= 1024:
        raise argparse.ArgumentTypeError(f"{word!r} is not from 1 to 1024")
    return int(word)
