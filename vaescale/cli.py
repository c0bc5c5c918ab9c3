"""The command `vaescale VERB`. Each verb is one file of `tools/`, which is imported when the verb is called.

A tool module has `add_arguments(parser)`, `run(arguments) -> dict` and, if its result is more than a table, `show(result)`.
One that finds faults has `exit_code(result)`. Messages go to stderr; with --json the result is one JSON object on stdout.
"""

import argparse
import atexit
import difflib
import errno
import importlib
import itertools
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from vaescale.commands import DISTRIBUTED
from vaescale.errors import DataError, TrainingStopped, UserError
from vaescale.runs import folder
from vaescale.system import collector, exit_codes, siblings
from vaescale.system.caches import provide_caches
from vaescale.system.early_stop import EarlyStop
from vaescale.system.files import strict_json
from vaescale.system.host import follow_parent, keep_freed_pages, take_signals
from vaescale.system.packages import missing_package
from vaescale.system.plugins import import_named
from vaescale.system.secrets import redact, redact_all
from vaescale.system.voice import Voice

VERBS = {
    "doctor": "print versions, devices, how processes were launched, and what is missing",
    "make-shards": "write a data set as WebDataset shards with an index, or index tars made by others",
    "verify-shards": "check shards against their index and name each fault",
    "new-recipe": "write a starter recipe for shards, from their index",
    "train": "train a recipe, or continue a run that stopped",
    "launch": "start a recipe or a verb on all processes of this machine, a Slurm job, a Kubernetes job or mpirun",
    "sweep": "train variants of a recipe: every combination of the values given",
    "evaluate": "evaluate a run on held-out data",
    "score": "score each image of any folder or data set under a run, and how well a score tells odd images",
    "quality": "judge samples against images: Frechet and kernel distance, precision, recall, coverage",
    "baselines": "compare a run with probabilistic PCA, and probe its latents with the images' classes",
    "train-features": "train a small classifier whose features `quality` compares",
    "compress": "compress images without loss by a run's VAE, to a file of the size of its negative ELBO",
    "decompress": "decode a file of compress, each image equal to the bit",
    "encode": "write the latents of a run's images as WebDataset shards",
    "fit-gmm": "fit a Gaussian mixture to a run's aggregate posterior",
    "fit-prior": "fit an autoregressive prior to the codes of a run with codes",
    "sample": "draw samples from the prior or the mixture; interpolate, or map two latents",
    "latents": "measure how informative the latents are, which are active and what they explain",
    "compare-runs": "compare runs on one page: table, curves, rate and distortion, pictures",
    "export": "write a run for MLflow, diffusers, torch.export or ONNX, without pickles",
    "import": "make a run of diffusers' AutoencoderKL",
    "average": "average the weights over any part of training, after it",
    "sync": "send to MLflow what a run could not send while it trained, or to another tracker",
    "chaos": "kill and damage a run on purpose, and compare it with an undisturbed one",
    "quickstart": "run the main workflow end to end on scikit-learn's handwritten digits",
}
MODULES = "modules_to_import"  # the name of --import's value, which no function takes
FIRST_SPEAKS_SECONDS = 10.0
# Verbs that end with 75 when a cluster asks them to stop before there is anything to save.
STARTS_AGAIN = ("train", "fit-prior", "launch")
# Verbs whose work other processes do, which speak on the same stderr.
SPOKEN_FOR = ("launch", "sweep", "quickstart")
EPILOG = """examples:
  vaescale make-shards digits data/digits
  vaescale make-shards celeba:img_align_celeba data/celeba64 --size 64
  vaescale train recipes/digits/optimal.yaml optimizer.lr=1e-3
  vaescale launch --processes 2 recipes/digits/optimal.yaml
  vaescale evaluate runs/digits-optimal

exit codes: 0 done, 2 recipe or arguments, 3 data, 4 training stopped or disk full, 75 preempted: the same
command continues (requeue), 130 Ctrl-C. `vaescale VERB --help` says more."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line on stderr, on the first of several processes."""
        message = message.replace(", KEY=VALUE", "")  # argparse counts optional words among the required ones
        self.exit(2, f"{self.prog}: {_speaker(waits=True)}{message}; see `{self.prog} --help`\n")


def program() -> int:
    """`main` as a program of its own: when all exit handlers have run, the process ends without Python's shutdown.

    Taking torch's and MLflow's modules apart takes most of a second, in which nothing is written.
    """
    codes: list[int] = []

    def leave() -> None:
        if not codes:
            return
        logging.shutdown()  # its own handler was registered before this one
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            return  # Python's shutdown reports it
        os._exit(codes[0])

    atexit.register(leave)  # what is registered later runs before it
    codes.append(main())
    return codes[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in VERBS:
        return run_tool(importlib.import_module(f"vaescale.tools.{given[0].replace('-', '_')}"), given[1:])
    parser = Parser(
        prog="vaescale",
        description="Train variational autoencoders with calibrated decoders, then measure and sample them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", required=True)
    for name, meaning in VERBS.items():
        verbs.add_parser(name, help=meaning)
    near = difflib.get_close_matches(given[0], VERBS, n=1) if given else []
    if near and not given[0].startswith("-"):
        parser.error(f"unknown verb {given[0]!r}; did you mean {near[0]}?")
    parser.parse_args(given)
    raise AssertionError("parse_args exits: no verb was given")


def run_tool(tool: ModuleType, arguments: Sequence[str] | None = None) -> int:
    """Run a tool module as a program. Returns the exit code; a user's mistake is one sentence on stderr."""
    verb = tool.__name__.rpartition(".")[2].replace("_", "-")
    if verb == "--main--":
        verb = os.path.basename(sys.argv[0]).removesuffix(".py").replace("_", "-")
    parser = Parser(
        prog=f"vaescale {verb}",
        description=tool.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest=MODULES,
        metavar="MODULE",
        help="import this module of yours first, which registers kinds of its own: a name, or a .py file; may be repeated",
    )
    tool.add_arguments(parser)
    # KEY=VALUE may follow --dry-run, except where what follows belongs to another verb.
    passes_on = getattr(tool, "PASSES_ARGUMENTS_ON", False)
    options = (parser.parse_args if passes_on else parser.parse_intermixed_args)(arguments)
    if (refused := exit_codes.refused_before()) is not None:
        return refused  # the launcher's restart of a start whose sentence was said
    keep_freed_pages()
    early = EarlyStop(f"vaescale {verb}", shown=_is_first_process()) if verb in STARTS_AGAIN else None
    take_signals()
    if exit_codes.FOLDER in os.environ:
        follow_parent(signal.SIGTERM)  # a rank saves when its launcher is killed
    sys.excepthook = _without_credentials
    collector.pause_until_start()  # until the verb has imported what it needs
    words = " ".join([f"vaescale {verb}", *map(str, sys.argv[2:] if arguments is None else arguments)])
    try:
        with Voice(redact(words), shown=_is_first_process() and verb not in SPOKEN_FOR):
            code = exit_codes.leave(_call(tool, verb, options))
    finally:
        collector.start()
        if early is not None:
            early.withdraw()
    if _processes() > 1:
        # A gloo thread that lets go of its last tensor while Python shuts down aborts the process ("terminate called
        # without an active exception": 4 of 26 short runs). So end without that shutdown.
        if "vaescale.data.workers" in sys.modules:
            from vaescale.data.workers import end_workers

            end_workers()
        sys.stdout.flush()
        sys.stderr.flush()
        siblings.end_silent(code)
        os._exit(code)
    return code


def _without_credentials(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback of an unexpected error, without credentials."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _call(tool: ModuleType, verb: str, options: argparse.Namespace) -> int:
    modules = [*options.__dict__.pop(MODULES, []), *_modules_in(getattr(options, "words", []))]
    try:
        # launch is one process for each node, or joins the ranks that another launcher has started.
        if _processes() > 1 and verb not in (*DISTRIBUTED, "launch"):
            raise UserError("runs on one process for now; call it without a launcher")
        provide_caches(shown=_is_first_process())
        import_named(modules)
        if isinstance(run := getattr(options, "run", None), Path):
            folder.refuse_other(run)  # before the verb imports torch
        result = tool.run(options)
        if _is_first_process():
            _print(tool, result, title=f"vaescale {verb}", as_json=options.json)
        if hasattr(tool, "exit_code"):
            return int(tool.exit_code(result))
    except UserError as error:
        if EarlyStop.active is not None:
            EarlyStop.active.fail_with(error.exit_code)
        alone = isinstance(error, DataError) and not _known_to_all(error)
        speaker = _speaker(waits=not alone and not exit_codes.lets_others_end(error.exit_code))
        sys.stderr.write(redact(f"vaescale {verb}: {speaker}{error}\n"))
        exit_codes.remember_refusal(error.exit_code)
        return error.exit_code
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        remedy = "; make room and run the same command again" if full else ""
        place = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(redact(f"vaescale {verb}: {place}{error.strerror or error}{remedy}\n"))
        return 4 if full else 2
    except RuntimeError as error:
        # In a collective before training begins; training itself has its own end.
        lost = sys.modules["vaescale.comm"].lost_rank(error) if "vaescale.comm" in sys.modules else ""
        if not lost:
            raise
        sys.stderr.write(
            f"vaescale {verb}: {_speaker(waits=False)}another rank has ended or is cut off ({lost}): its log says why\n"
        )
        return TrainingStopped.exit_code
    except ModuleNotFoundError as error:
        package = missing_package(error)
        if package is None:
            raise
        speaker = _speaker(waits=True)
        sys.stderr.write(f"vaescale {verb}: {speaker}{package} is not installed; pip install {package}\n")
        return 2
    except KeyboardInterrupt as stopped:
        remedies = {
            "train": "; the same command continues from the last checkpoint, if there is one",
            "make-shards": "; the same command continues where it stopped",
        }
        if _is_first_process():
            sys.stderr.write(f"vaescale {verb}: {str(stopped) or 'stopped' + remedies.get(verb, '')}\n")
        return 130
    return 0


def _modules_in(words: Sequence[str]) -> list[str]:
    """The values of --import among the words for another verb, whose recipe this process reads too."""
    pairs = itertools.pairwise(words)
    after = [value for option, value in pairs if option == "--import"]
    return after + [word.partition("=")[2] for word in words if word.startswith("--import=")]


def _print(tool: ModuleType, result: dict[str, Any], *, title: str, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(strict_json(redact_all(result)) + "\n")
    elif hasattr(tool, "show"):
        tool.show(result)
    else:
        from vaescale.system.console import table

        table(title, [(name, _cell(value)) for name, value in result.items() if value != []])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _processes() -> int:
    """The number of processes that a launcher started."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def _is_first_process() -> bool:
    """Whether this process is the first of the launch, which prints for all of them."""
    return os.environ.get("RANK", "0") == "0"


def _speaker(*, waits: bool) -> str:
    """What to write before an error: nothing on the first process, the rank on another one.

    waits: for the first one, if all have the error. It reports it, and its end makes the launcher end the others; if one of these
    ended before, the launcher would end the first one as well, before it has spoken.
    """
    if _is_first_process():
        return ""
    if waits:
        time.sleep(FIRST_SPEAKS_SECONDS)
    return f"rank {os.environ['RANK']}: "


def _known_to_all(error: DataError) -> bool:
    """Whether all ranks raise this error. A process that read data has already imported comm, and torch with it."""
    from vaescale import comm

    return comm.is_known_to_all(error)


def _version() -> str:
    from vaescale import __version__

    return f"vaescale {__version__}"
