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
STEPS = 10
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
    from vaescale.run import open_run
    from vaescale.training import backends

    _refuse_senseless(arguments)
    with backends.joined():
        opened = open_run(arguments.run)
        if arguments.map is not None:
            result = _map(arguments, opened)
        elif arguments.interpolate:
            result = _interpolate(arguments, opened)
        elif arguments.refine is not None:
            result = _refine(arguments, opened)
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
    drawn = {"priors": list(sources), "count": arguments.count, "seed": arguments.seed}
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
    if components is not None:
        kept = folder / f"components-{components}"
        found = sorted(int(path.name.partition("-")[2]) for path in folder.glob("components-*"))
        if not kept.is_dir():
            raise UserError(
                f"{folder} holds no mixture of {components} components (of {found}); `vaescale fit-gmm "
                f"{opened.folder} --components {components},...` fits several"
            )
        folder = kept
    if not needed and not folder.is_dir():
        return None
    mixture = mixture_files.load(folder)
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
    figures.sample_panels(path, panels, title=_title(opened, "samples"))
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


def _interpolate(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any]:
    from vaescale import comm

    return comm.on_main(lambda: _draw_lines(arguments, opened))


def _draw_lines(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any]:
    import numpy as np
    import torch

    from vaescale import figures, noise
    from vaescale.aggregate.sampling import line
    from vaescale.data.batch import Request
    from vaescale.run import open_split
    from vaescale.training.tracking import push

    reader = open_split(opened.recipe, "val")
    rows = []
    with torch.no_grad():
        for pair in arguments.interpolate:
            if max(pair) >= len(reader):
                raise UserError(
                    f"--interpolate {pair[0]},{pair[1]}: the held-out images are 0 to {len(reader) - 1}"
                )
            device = next(opened.model.parameters()).device
            numbers = torch.tensor(pair, device=device)
            got = reader.__getitems__(Request(np.array(pair), refill=False))
            x = opened.model.target(got.images.to(device), noise.Stream(opened.recipe.seed, 0, numbers))
            mu = opened.model.posterior(x).mu.flatten(1)
            z = line(mu[0], mu[1], STEPS)
            # What a ladder draws below its top group is the same along the line.
            stream = noise.Stream(arguments.seed, 0, torch.zeros(STEPS, dtype=torch.int64, device=device))
            means = opened.model.likelihood.mean(opened.model.decode(z, stream)).float()
            rows.append((f"{pair[0]} to {pair[1]}", torch.cat([x[:1], means, x[1:]]).cpu().numpy()))
    path = opened.folder / "figures" / "interpolations.png"
    title = _title(opened, "from one image (left) to another (right), decoded means between")
    figures.image_rows(path, rows, title=title)
    push(opened.folder, opened.recipe.tracking)
    return {"pairs": [list(pair) for pair in arguments.interpolate], "figure": str(path)}


def _refine(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any]:
    from vaescale import comm

    return comm.on_main(lambda: _refined(arguments, opened))


def _refined(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any]:
    """Samples before and after, with their sigma and density."""
    import torch

    from vaescale import figures, noise
    from vaescale.aggregate.refinement import refine
    from vaescale.mixtures.gaussian import log_density, on, sample
    from vaescale.training.tracking import push

    model = opened.model
    device = next(model.parameters()).device
    mixture = None
    if arguments.prior != "standard":
        mixture = _mixture(opened, arguments.components, needed=arguments.prior == "gmm")
    stream = noise.Stream(arguments.seed, 0, torch.arange(min(SHOWN, arguments.count), device=device))
    if mixture is None:
        prior = model.prior()
        epsilon = noise.normal(stream, noise.PRIOR, (model.latent_dim,)).to(prior.mu)
        z = prior.mu.flatten() + arguments.temperature * prior.log_sigma.exp().flatten() * epsilon
    else:
        z = sample(mixture, stream, arguments.temperature)
    there = None if mixture is None else on(mixture, device)

    def density(points: torch.Tensor) -> torch.Tensor:
        return model.prior_log_density(points) if there is None else log_density(there, points.double())

    done = refine(
        model,
        z.detach(),
        stream,
        density,
        steps=arguments.refine,
        rate=arguments.refine_rate,
        weight=arguments.refine_weight,
    )
    with torch.no_grad():
        before, after = (
            model.likelihood.mean(model.decode(one, stream)).float() for one in (done.before, done.after)
        )
    source = "prior" if mixture is None else f"mixture of {len(mixture.weights)}"
    rows = []
    for start in range(0, min(36, len(z)), 12):
        for name, images in (("drawn", before), ("refined", after)):
            rows.append((name, images[start : start + 12].cpu().numpy()))
    path = opened.folder / "figures" / "refined.png"
    title = _title(opened, f"{source}, {arguments.refine} steps towards a smaller sigma(z)")
    figures.image_rows(path, rows, title=title)
    push(opened.folder, opened.recipe.tracking)
    return {
        "prior": source,
        "steps": arguments.refine,
        "weight": arguments.refine_weight,
        "mean_log_sigma_before": float(done.log_sigma_before.mean()),
        "mean_log_sigma_after": float(done.log_sigma_after.mean()),
        "log_density_before_nats": float(done.density_before.mean()),
        "log_density_after_nats": float(done.density_after.mean()),
        "distance_of_z": float((done.after - done.before).norm(dim=1).mean()),
        "change_of_images_rms": float((after - before).square().mean().sqrt()),
        "figure": str(path),
    }


def _map(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any]:
    from vaescale import comm

    return comm.on_main(lambda: _draw_map(arguments, opened))


def _draw_map(arguments: argparse.Namespace, opened: "Run") -> dict[str, Any]:
    import torch

    from vaescale import figures, noise
    from vaescale.aggregate.sampling import plane
    from vaescale.training.tracking import push

    if opened.model.latent_dim != 2 or len(opened.model.group_sizes) > 1:
        raise UserError(
            f"--map draws the plane of two latents, this run has {opened.model.num_latents}; train one with network.latent_dim=2"
        )
    device = next(opened.model.parameters()).device
    z = plane(arguments.map).to(device)
    stream = noise.Stream(arguments.seed, 0, torch.arange(len(z), device=device))
    with torch.no_grad():
        means = opened.model.likelihood.mean(opened.model.decode(z, stream)).float().cpu().numpy()
    path = opened.folder / "figures" / "latent_map.png"
    figures.image_map(path, means, title=_title(opened, "decoded means over the plane of the latents"))
    push(opened.folder, opened.recipe.tracking)
    return {"side": arguments.map, "figure": str(path)}


def _title(opened: "Run", words: str) -> str:
    return f"{opened.recipe.name}, step {opened.step}, {opened.weights} weights: {words}"


def _pair(words: str) -> tuple[int, int]:
    """`3,17`."""
    one, other = (int(word) for word in words.split(","))
    if min(one, other) < 0:
        raise ValueError(words)
    return one, other


_pair.__name__ = "pair of image numbers"  # argparse says so of what is none


def _refuse_senseless(arguments: argparse.Namespace) -> None:
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
