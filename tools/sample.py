"""Draw samples from a run: z from the model's prior or from the fitted mixture, decoded as a mean, as a draw, or in between.

A decoder mean is E[x|z]; an ancestral sample adds the decoder's noise, as the model says images come about; offset:ALPHA is
the mean plus ALPHA times sigma(z). Without --prior and --decode all that there is stands side by side in
RUN/figures/samples.png. Sample number i is the same whatever --count is, and on any number of processes.

  vaescale sample runs/digits-optimal --prior gmm --decode mean --count 50000 --shards samples/digits
  vaescale sample runs/digits-optimal --interpolate 3,17 --interpolate 5,9
  vaescale sample runs/digits-predicted --prior gmm --refine 200
  vaescale sample runs/digits-plane --map 20
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaescale.errors import UserError

if TYPE_CHECKING:
    from vaescale.mixtures.gaussian import Mixture
    from vaescale.trained import Trained

SHOWN = 256  # as vaescale.commands.sample, which --help has no time to import
MOST_SHOWN = 100 * SHOWN
OF_SAMPLES = ("prior", "components", "decode", "temperature", "count")
UNUSED = {"map": OF_SAMPLES, "interpolate": OF_SAMPLES, "refine": ("decode",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN; from what, how and how many; where to."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--prior", choices=("standard", "gmm"), help="the model's own, or the mixture; default: both"
    )
    parser.add_argument(
        "--components",
        type=int,
        metavar="K",
        help="of the mixtures that fit-gmm compared; default: the chosen one",
    )
    parser.add_argument(
        "--decode", metavar="HOW", help="mean, ancestral or offset:ALPHA; default: mean and ancestral"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="times the standard deviations of the prior, of every group, or of the mixture's components; default: 1",
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=f"samples of each kind, {SHOWN} to a picture, or all in --shards; default: 64",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--shards", type=Path, metavar="OUT", help="write all samples there as WebDataset shards, 8-bit"
    )
    parser.add_argument(
        "--interpolate",
        action="append",
        type=_pair,
        metavar="I,J",
        help="instead: from held-out image number I to J, along the straight line between their posterior means",
    )
    parser.add_argument(
        "--refine",
        type=int,
        metavar="STEPS",
        help="instead: move samples by so many steps of descent on the decoder's mean log sigma(z), if it is predicted",
    )
    parser.add_argument(
        "--refine-weight",
        type=float,
        metavar="W",
        help="also of -W log density of z, under the mixture or the prior, whichever it is drawn from; default: 0",
    )
    parser.add_argument(
        "--refine-rate", type=float, metavar="LR", help="of the descent (Adam); default: 0.02"
    )
    parser.add_argument(
        "--map", type=int, metavar="SIDE", help="instead: SIDE x SIDE means over the plane of two latents"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw and write. Returns where."""
    from vaescale import comm
    from vaescale.commands import tours
    from vaescale.trained import open_trained
    from vaescale.training import launch as backends

    _refuse_senseless(arguments)
    with backends.joined():
        trained = open_trained(arguments.run)
        if arguments.map is not None:
            result = comm.on_main(lambda: tours.plane_of(trained, arguments.map, seed=arguments.seed))
        elif arguments.interpolate:
            result = comm.on_main(
                lambda: tours.lines_between(trained, arguments.interpolate, seed=arguments.seed)
            )
        elif arguments.refine is not None:
            result = comm.on_main(lambda: _refine(arguments, trained))
        else:
            result = _samples(arguments, trained)
    return {"run": str(trained.folder), "step": trained.step, "weights": trained.weights, **result}


def _samples(arguments: argparse.Namespace, trained: "Trained") -> dict[str, Any]:
    from vaescale import comm
    from vaescale.aggregate.sampling import parse_decoding
    from vaescale.commands import sample as sampling
    from vaescale.system.console import say

    decodings = [
        parse_decoding(words) for words in ([arguments.decode] if arguments.decode else ["mean", "ancestral"])
    ]
    sources: dict[str, Mixture | None] = {}
    if arguments.prior != "gmm":
        sources["prior"] = None
    if arguments.prior != "standard":
        mixture = _mixture(trained, arguments.components, needed=arguments.prior == "gmm")
        if mixture is not None:
            sources["mixture"] = mixture
        elif comm.is_main():
            say(f"no mixture in {trained.folder}; `vaescale fit-gmm {trained.folder}` adds its samples")
    draws = sampling.Draws(arguments.count, arguments.temperature, arguments.seed)
    components = [len(one.weights) for one in sources.values() if one is not None]
    drawn = {
        "priors": list(sources),
        "components": components,
        "temperature": arguments.temperature,
        "count": arguments.count,
        "seed": arguments.seed,
    }
    if arguments.shards is not None:
        if len(sources) * len(decodings) != 1:
            raise UserError("--shards takes one kind of samples; give --prior and --decode")
        ((source, mixture),) = sources.items()
        made = {
            "source": f"samples of {trained.recipe.name}",
            "step": trained.step,
            "prior": source,
            "components": 0 if mixture is None else len(mixture.weights),
            "decode": arguments.decode,
            "temperature": arguments.temperature,
            "seed": arguments.seed,
        }
        index = sampling.write_shards(trained, mixture, decodings[0], arguments.shards, made, draws=draws)
        return {**drawn, "decode": arguments.decode, **index}
    figures = sampling.draw_pages(trained, sources, decodings, draws=draws)
    return {**drawn, "decode": [one.words for one in decodings], "figures": figures}


def _mixture(trained: "Trained", components: int | None, *, needed: bool) -> "Mixture | None":
    from vaescale.aggregate.sampling import refuse_misfit
    from vaescale.mixtures import files as mixture_files

    folder = trained.folder / "gmm"
    fitted: dict[str, Any] = trained.identity
    if components is not None:
        others = mixture_files.compared(folder)
        if others and components not in others:
            raise UserError(
                f"there is no mixture of {components} components; there are {', '.join(map(str, others))}"
            )
        fitted = {**fitted, "components": components}
        folder = folder / f"components-{components}" if others else folder
    if not needed and components is None and not folder.is_dir():
        return None
    mixture = mixture_files.load(folder, **fitted)
    refuse_misfit(mixture, trained.model, trained.folder)
    return mixture


def _refine(arguments: argparse.Namespace, trained: "Trained") -> dict[str, Any]:
    from vaescale.commands import tours

    mixture = None
    if arguments.prior != "standard":
        mixture = _mixture(trained, arguments.components, needed=arguments.prior == "gmm")
    return tours.refined(
        trained,
        mixture,
        count=arguments.count,
        steps=arguments.refine,
        rate=arguments.refine_rate,
        weight=arguments.refine_weight,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )


def _pair(words: str) -> tuple[int, int]:
    """`3,17`."""
    parts = words.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{words!r} is no pair of image numbers, such as 3,17")
    return int(parts[0]), int(parts[1])


def _refuse_senseless(arguments: argparse.Namespace) -> None:
    instead = [
        name for name in ("shards", "interpolate", "refine", "map") if getattr(arguments, name) is not None
    ]
    if len(instead) > 1:
        raise UserError(f"--{instead[0]} and --{instead[1]} do not go together; take one of them")
    for name in UNUSED.get(instead[0], ()) if instead else ():
        if getattr(arguments, name) is not None:
            raise UserError(f"--{instead[0]} has no use for --{name}; leave it out")
    for name in ("refine_weight", "refine_rate"):
        if getattr(arguments, name) is not None and arguments.refine is None:
            raise UserError(f"--{name.replace('_', '-')} is of --refine; give that too")
    arguments.refine_weight = 0.0 if arguments.refine_weight is None else arguments.refine_weight
    arguments.refine_rate = 0.02 if arguments.refine_rate is None else arguments.refine_rate
    arguments.count = 64 if arguments.count is None else arguments.count
    arguments.temperature = 1.0 if arguments.temperature is None else arguments.temperature
    if arguments.prior == "standard" and arguments.components is not None:
        raise UserError("--components is of a mixture, --prior is standard; leave one out")
    if arguments.count < 1:
        raise UserError(f"--count (={arguments.count}) must be at least 1")
    if not 0 < arguments.temperature <= 10:
        raise UserError(f"--temperature (={arguments.temperature}) must be above 0 and at most 10")
    if arguments.seed < 0:
        raise UserError(f"--seed (={arguments.seed}) must be at least 0")
    if arguments.shards is None and arguments.count > MOST_SHOWN:
        raise UserError(
            f"--count (={arguments.count}) is too many for pictures, at most {MOST_SHOWN}; give --shards OUT"
        )
    if arguments.refine is not None and arguments.count > SHOWN:
        raise UserError(f"--count (={arguments.count}) must be at most {SHOWN} with --refine")
    if arguments.refine is not None and not 1 <= arguments.refine <= 100_000:
        raise UserError(f"--refine (={arguments.refine}) must be from 1 to 100000")
    if not 0 <= arguments.refine_weight < math.inf or not 0 < arguments.refine_rate < math.inf:
        raise UserError(
            f"--refine-weight (={arguments.refine_weight}) must be at least 0, --refine-rate (={arguments.refine_rate}) above 0"
        )
    if arguments.map is not None and not 2 <= arguments.map <= 64:
        raise UserError(f"--map (={arguments.map}) must be from 2 to 64")


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
