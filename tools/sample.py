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
    from vaescale.run import Run

SHOWN = 256  # of a panel
SHARD_SAMPLES, BATCH = 1000, 250


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
        default=1.0,
        metavar="T",
        help="times the standard deviations of the prior, of every group, or of the mixture's components; default: 1",
    )
    parser.add_argument(
        "--count", type=int, default=64, metavar="N", help="samples of each kind; default: 64"
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
        default=0.0,
        metavar="W",
        help="also of -W log density of z, under the mixture or the prior, whichever it is drawn from; default: 0",
    )
    parser.add_argument(
        "--refine-rate", type=float, default=0.02, metavar="LR", help="of the descent (Adam); default: 0.02"
    )
    parser.add_argument(
        "--map", type=int, metavar="SIDE", help="instead: SIDE x SIDE means over the plane of two latents"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw and write. Returns where."""
    from vaescale import comm, tours
    from vaescale.run import open_run
    from vaescale.training import backends

    _refuse_senseless(arguments)
    with backends.joined():
        opened = open_run(arguments.run)
        if arguments.map is not None:
            result = comm.on_main(lambda: tours.plane_of(opened, arguments.map, seed=arguments.seed))
        elif arguments.interpolate:
            result = comm.on_main(
                lambda: tours.lines_between(opened, arguments.interpolate, seed=arguments.seed)
            )
        elif arguments.refine is not None:
            result = comm.on_main(lambda: _refine(arguments, opened))
        else:
            result = _samples(arguments, opened)
    return {"run": str(opened.folder), "step": opened.step, "weights": opened.weights, **result}


def _samples(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any]:
    from vaescale import comm
    from vaescale.aggregate.sampling import parse_decoding
    from vaescale.console import say

    decodings = [
        parse_decoding(words) for words in ([arguments.decode] if arguments.decode else ["mean", "ancestral"])
    ]
    sources: dict[str, Mixture | None] = {}
    if arguments.prior != "gmm":
        sources["prior"] = None
    if arguments.prior != "standard":
        mixture = _mixture(opened, arguments.components, needed=arguments.prior == "gmm")
        if mixture is not None:
            sources["mixture"] = mixture
        elif comm.is_main():
            say(f"no mixture in {opened.folder}; `vaescale fit-gmm {opened.folder}` adds its samples")
    count = arguments.count if arguments.shards is not None else min(SHOWN, arguments.count)
    drawn = {"priors": list(sources), "count": count, "seed": arguments.seed}
    if arguments.shards is not None:
        if len(sources) * len(decodings) != 1:
            raise UserError("--shards takes one kind of samples; give --prior and --decode")
        ((source, mixture),) = sources.items()
        made = {
            "source": f"samples of {opened.recipe.name}",
            "step": opened.step,
            "prior": source,
            "components": 0 if mixture is None else len(mixture.weights),
            "decode": arguments.decode,
            "temperature": arguments.temperature,
            "seed": arguments.seed,
        }
        index = _write_shards(arguments, opened, mixture, decodings[0], made)
        return {**drawn, "decode": arguments.decode, **index}
    figure = comm.on_main(lambda: _draw_panels(arguments, opened, sources, decodings))
    return {**drawn, "decode": [one.name for one in decodings], "figure": figure}


def _mixture(opened: "Run", components: int | None, *, needed: bool) -> "Mixture | None":
    from vaescale.aggregate.sampling import refuse_misfit
    from vaescale.mixtures import files as mixture_files

    folder = opened.folder / "gmm"
    fitted = {"recipe_hash": opened.recipe.hash, "step": opened.step, "weights": opened.weights}
    if components is not None:
        fitted["components"] = components
        folder = (
            folder / f"components-{components}" if (folder / f"components-{components}").is_dir() else folder
        )
    if not needed and components is None and not folder.is_dir():
        return None
    mixture = mixture_files.load(folder, **fitted)
    refuse_misfit(mixture, opened.model, opened.folder)
    return mixture


def _draw_panels(
    arguments: argparse.Namespace, opened: "Run", sources: "dict[str, Mixture | None]", decodings: list[Any]
) -> str:
    import torch

    from vaescale import figures, noise
    from vaescale.aggregate.sampling import from_latents, image_of
    from vaescale.training.tracking import push

    device = next(opened.model.parameters()).device
    stream = noise.Stream(arguments.seed, 0, torch.arange(min(SHOWN, arguments.count), device=device))
    at = "" if arguments.temperature == 1 else f" at temperature {arguments.temperature:g}"
    panels = []
    for name, mixture in sources.items():
        params = from_latents(opened.model, mixture, stream, arguments.temperature)
        for decoding in decodings:
            words = {"mean": "decoder mean", "offset": f"mean + {decoding.alpha:g} sigma"}
            images = image_of(opened.model.likelihood, params, decoding, stream)
            of = name if mixture is None else f"mixture of {len(mixture.weights)}"
            panels.append((f"{of}{at}, {words.get(decoding.name, decoding.name)}", images.cpu().numpy()))
    path = opened.folder / "figures" / "samples.png"
    figures.sample_panels(path, panels, title=opened.title("samples"))
    push(opened.folder, opened.recipe.tracking)
    return str(path)


def _write_shards(
    arguments: argparse.Namespace,
    opened: "Run",
    mixture: "Mixture | None",
    decoding: Any,
    made: dict[str, Any],
) -> dict[str, Any]:
    """Each process writes its shards; a shard's bytes do not depend on their number."""
    import torch

    from vaescale import comm, noise
    from vaescale.aggregate.sampling import from_latents, image_of
    from vaescale.console import Progress
    from vaescale.data.items import Item
    from vaescale.data.writing import Making, write_index, write_part

    starts = range(0, arguments.count, SHARD_SAMPLES)
    own = range(comm.rank(), len(starts), comm.world_size())
    device = next(opened.model.parameters()).device

    def shard(number: int) -> Any:
        items = []
        stop = min(arguments.count, starts[number] + SHARD_SAMPLES)
        for slots in torch.split(torch.arange(starts[number], stop, device=device), BATCH):
            stream = noise.Stream(arguments.seed, 0, slots)
            params = from_latents(opened.model, mixture, stream, arguments.temperature)
            images = image_of(opened.model.likelihood, params, decoding, stream)
            levels = (255 * images.float().clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            items += [
                Item(f"{slot:09d}", level, -1) for slot, level in zip(slots.tolist(), levels, strict=True)
            ]
        return write_part(items, arguments.shards, number, Making())

    def write() -> dict[int, Any]:
        done = {}
        with Progress("sample", len(own), shown=comm.is_main()) as progress:
            for number in own:
                done[number] = shard(number)
                progress.update(len(done), "shards")
        return done

    comm.on_main(lambda: _refuse_full(arguments.shards))
    everything: dict[int, Any] = {}
    for part in comm.gather_object(comm.together(write)):
        everything |= part
    ordered = [everything[number] for number in sorted(everything)]
    written = comm.on_main(lambda: write_index(arguments.shards, ordered, made).data_hash)
    return {"shards": str(arguments.shards), "samples": arguments.count, "data_hash": written}


def _refuse_full(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; delete it or choose another folder for --shards")


def _refine(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any]:
    from vaescale import tours

    mixture = None
    if arguments.prior != "standard":
        mixture = _mixture(opened, arguments.components, needed=arguments.prior == "gmm")
    return tours.refined(
        opened,
        mixture,
        count=min(SHOWN, arguments.count),
        steps=arguments.refine,
        rate=arguments.refine_rate,
        weight=arguments.refine_weight,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )


def _pair(words: str) -> tuple[int, int]:
    """`3,17`."""
    one, other = (int(word) for word in words.split(","))
    if min(one, other) < 0:
        raise ValueError(words)
    return one, other


_pair.__name__ = "pair of image numbers"  # argparse says so of what is none


def _refuse_senseless(arguments: argparse.Namespace) -> None:
    instead = [
        name for name in ("shards", "interpolate", "refine", "map") if getattr(arguments, name) is not None
    ]
    if len(instead) > 1:
        raise UserError(f"--{instead[0]} and --{instead[1]} do not go together; take one of them")
    if arguments.prior == "standard" and arguments.components is not None:
        raise UserError("--components is of a mixture, --prior is standard; leave one out")
    if arguments.count < 1:
        raise UserError(f"--count (={arguments.count}) must be at least 1")
    if not 0 < arguments.temperature <= 10:
        raise UserError(f"--temperature (={arguments.temperature}) must be above 0 and at most 10")
    if arguments.seed < 0:
        raise UserError(f"--seed (={arguments.seed}) must be at least 0")
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
