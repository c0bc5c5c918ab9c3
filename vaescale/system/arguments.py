"""Types for argparse, so that the parser refuses a value out of bounds in one sentence that names the option."""

import argparse
import math
import re
from collections.abc import Callable
from typing import TypeVar

from vaescale.system.host import cores

MOST_JOBS = 1024
WEIGHTS = r"^(raw|ema(-[a-z0-9.-]+)?)$"
CHECKPOINT = r"^(last|best|[0-9]{1,9})$"
Number = TypeVar("Number", int, float)


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`, both included; without `most` there is no upper bound."""
    bounds = f"at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        value = _parsed(text, int, "a whole number")
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


def size(least: int, most: int) -> Callable[[str], int | tuple[int, int]]:
    """A parser of the side of a square, or of HEIGHTxWIDTH, each from `least` to `most`."""
    side = integer(least, most)

    def parse(text: str) -> int | tuple[int, int]:
        height, cross, width = text.partition("x")
        if cross and not (height.strip() and width.strip()):
            raise argparse.ArgumentTypeError(f"{text!r} must be a side, or HEIGHTxWIDTH such as 48x96")
        return (side(height), side(width)) if cross else side(text)

    return parse


def real(
    *,
    above: float = -math.inf,
    below: float = math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> Callable[[str], float]:
    """A parser of finite numbers above `above`, below `below`, at least `least` and at most `most`."""
    limits = {"above": above, "below": below, "at least": least, "at most": most}
    bounds = " and ".join(f"{name} {value:g}" for name, value in limits.items() if math.isfinite(value))

    def parse(text: str) -> float:
        value = _parsed(text, float, "a number")
        if not (math.isfinite(value) and above < value < below and least <= value <= most):
            raise argparse.ArgumentTypeError(f"{text} must be {bounds or 'finite'}")
        return value

    return parse


def add_weights(parser: argparse._ActionsContainer) -> None:
    """Add the option `--weights NAME`, and refuse what no weights are called."""
    parser.add_argument(
        "--weights",
        type=_weights,
        default="ema",
        metavar="NAME",
        help="ema: the averaged weights, if the run has them; raw; or another average of the run, such as ema-0.9999; default: ema",
    )


def add_checkpoint(parser: argparse._ActionsContainer) -> None:
    """Add the option `--checkpoint last|best|STEP`."""
    parser.add_argument(
        "--checkpoint",
        type=_checkpoint,
        default="last",
        metavar="WHICH",
        help="last; best: of those kept, the one with the smallest value of training.keep_best; or a step; default: last",
    )


def _checkpoint(text: str) -> str:
    if re.fullmatch(CHECKPOINT, text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be last, best or a step such as 400")
    return text


def _weights(text: str) -> str:
    if re.fullmatch(WEIGHTS, text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be ema, raw or an average's name such as ema-0.9999")
    return text


def add_jobs(parser: argparse._ActionsContainer, *, workers: str) -> None:
    """Add the option `--jobs N`. workers: what N counts, `threads` or `processes`."""
    parser.add_argument(
        "--jobs",
        type=integer(1, MOST_JOBS),
        default=cores(),
        metavar="N",
        help=f"number of {workers}, from 1 to {MOST_JOBS}; default: the number of cores",
    )


def _parsed(text: str, kind: Callable[[str], Number], name: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
