"""Judge a run's samples against its training images, by the features of both: Frechet and kernel distance, precision, recall,
density and coverage.

Rows are held-out images, reconstructions, and samples of the prior and of each mixture that fit-gmm left, as decoder means and
with the decoder's noise. Numbers compare under the same features, data and count alone: distances of few pictures are too large,
so by default there are as many samples as held-out images, at most 10000. --features is

  pixels            the values themselves, for small images
  DIR               a classifier from `vaescale train-features`
  inception[:FILE]  Inception v3 with torch-fidelity's weights, the FID of the literature
  FILE.pt2          a module that torch.export.save wrote: images [B, C, H, W] in [0, 1] to features [B, F]

Writes RUN/evaluation/quality-FEATURES.json and RUN/figures/quality-FEATURES*.png. The training images' features are kept in a
cache. Runs on any number of processes, with the same samples:

  vaescale train-features data/fashion_mnist/train --out features/fashion_mnist
  vaescale quality runs/fashion_mnist-optimal --features features/fashion_mnist
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaescale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vaescale.evaluation.features import Extractor
    from vaescale.mixtures.gaussian import Mixture
    from vaescale.trained import Trained

CACHE = Path("~/.cache/vaescale/references")
PROTOCOL = {
    "frechet": "between Gaussians, float64, all features",
    "kernel": "unbiased MMD^2 of (x . y / F + 1)^3, equally many of both, at most 10000",
    "overlap": "precision, recall, density and coverage: 5 neighbours, equally many of both, at most 10000",
}
SHOWN = 16  # pictures of each kind
SCORES = ("frechet", "kernel", "precision", "recall", "density", "coverage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, by which features, which samples."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--features", required=True, metavar="WHICH", help="pixels, DIR, inception[:FILE] or FILE.pt2"
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="samples of each kind; default: as many as there are held-out images, at most 10000",
    )
    parser.add_argument(
        "--decode",
        action="append",
        metavar="HOW",
        help="mean, ancestral or offset:ALPHA; may be given several times; default: mean and ancestral",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="as of `vaescale sample`; default: 1"
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="default: ema, if the run has them"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--trust-features", action="store_true", help="load FILE.pt2, which is a program: it can do anything"
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR", help=f"of references; default: {CACHE}"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw, compare, write. Returns a row for each kind of picture."""
    import torch

    from vaescale import comm
    from vaescale.commands import quality as judging
    from vaescale.evaluation.features import open_extractor
    from vaescale.runs.identity import git_revision
    from vaescale.trained import open_split, open_trained
    from vaescale.training import launch as backends

    decodings = _decodings(arguments)
    with backends.joined():
        trained = open_trained(arguments.run, weights=arguments.weights)
        device = next(trained.model.parameters()).device
        extractor = comm.together(
            lambda: open_extractor(
                arguments.features,
                image_shape=trained.model.image_shape,
                device=device,
                trusted=arguments.trust_features,
            )
        )
        train = comm.together(lambda: open_split(trained.recipe, "train"))
        val = comm.together(lambda: open_split(trained.recipe, "val"))
        mixtures = comm.together(lambda: _mixtures(trained))
        count = arguments.count or min(len(val), judging.MOST_COMPARED)
        with torch.no_grad():
            references, cached = judging.references_of(
                train, extractor, trained, arguments.cache.expanduser()
            )
            kinds = judging.kinds(
                trained,
                val,
                mixtures,
                count=count,
                decodings=decodings,
                temperature=arguments.temperature,
                seed=arguments.seed,
            )
            rows = judging.judge(kinds, extractor, references)
            first = [kind.pictures(torch.arange(min(SHOWN, kind.number))).cpu() for kind in kinds]
        result = {
            "run": str(trained.folder),
            **trained.identity,
            "data_hash": train.index.data_hash,
            "code": git_revision(),
            "features": extractor.name,
            "protocol": {
                "features": extractor.words,
                "features_hash": extractor.identity,
                "reference": f"{len(references)} training images",
                "samples": f"{count} of each kind, 8-bit, seed {arguments.seed}, temperature {arguments.temperature:g}",
                **PROTOCOL,
            },
            "measured": {
                f"quality/{extractor.name}/": f"features {extractor.identity[:12]}, {count} samples at temperature "
                f"{arguments.temperature:g}, {len(references)} images of {train.index.data_hash[:12]}"
            },
            "references_from_cache": cached,
            "rows": rows,
        }
        return comm.on_main(lambda: _save(trained, extractor, result, first))


def _decodings(arguments: argparse.Namespace) -> tuple[str, ...]:
    """How samples are decoded, each once. Raises UserError for what makes no sense."""
    from vaescale.aggregate.sampling import parse_decoding
    from vaescale.commands import quality as judging

    given = arguments.count
    if given is not None and not judging.LEAST <= given <= judging.MOST_REFERENCES:
        raise UserError(f"--count (={given}) must be from {judging.LEAST} to {judging.MOST_REFERENCES}")
    if not 0 < arguments.temperature <= 10 or arguments.seed < 0:
        raise UserError("--temperature must be above 0 and at most 10, --seed at least 0")
    decodings = tuple(dict.fromkeys(arguments.decode or ("mean", "ancestral")))
    for words in decodings:
        parse_decoding(words)
    return decodings


def _mixtures(trained: "Trained") -> "dict[str, Mixture]":
    """Each that fit-gmm left, of this very model, by words."""
    from vaescale import comm
    from vaescale.aggregate.sampling import refuse_misfit
    from vaescale.mixtures import files
    from vaescale.system.console import say

    folder = trained.folder / "gmm"
    if not folder.is_dir():
        return {}
    places = [folder / f"components-{number}" for number in files.compared(folder)] or [folder]
    found = {}
    for place in places:
        if files.words(place).get("weights", trained.weights) != trained.weights:
            if comm.is_main():
                say(f"{place} is left out: it was fitted to other weights than the {trained.weights} ones")
            continue
        mixture = files.load(place, **trained.identity)
        refuse_misfit(mixture, trained.model, trained.folder)
        found[f"mixture of {len(mixture.weights)}"] = mixture
    return found


def _save(
    trained: "Trained", extractor: "Extractor", result: dict[str, Any], first: "list[Tensor]"
) -> dict[str, Any]:
    """JSON, metrics, pictures, MLflow. first: some pictures of each row. Returns the result with the figures' paths."""
    from vaescale import figures
    from vaescale.runs.folder import append_metrics, write_json
    from vaescale.runs.tracking import push

    name = extractor.name
    write_json(trained.folder / "evaluation" / f"quality-{name}.json", result)
    metrics = {
        f"quality/{name}/{'-'.join(filter(None, (row['of'], row['decode']))).replace(' ', '-').replace(':', '-')}/{column}": row[
            column
        ]
        for row in result["rows"]
        for column in SCORES
    }
    append_metrics(trained.folder, trained.step, metrics)
    labels = [_label(row) for row in result["rows"]]
    made = [trained.folder / "figures" / f"quality-{name}{which}.png" for which in ("", "-pictures")]
    title = trained.title(f"against training images, features: {name}")
    figures.quality(made[0], result["rows"], title=title)
    strips = [(label, part.numpy()) for label, part in zip(labels, first, strict=True)]
    figures.image_strips(made[1], strips, title=trained.title("what was judged"))
    push(trained.folder, trained.recipe.tracking)
    return {**result, "figures": [str(path) for path in made]}


def _label(row: dict[str, Any]) -> str:
    return f"{row['of']}{'' if row['decode'] in ('', 'mean') else ', ' + row['decode']}"


def show(result: dict[str, Any]) -> None:
    """A line for each kind of picture."""
    from vaescale.system.console import table

    columns = ("count", *SCORES)
    head = " ".join(f"{name:>10}" for name in columns)
    names = [" ".join(filter(None, (row["of"], row["decode"]))) for row in result["rows"]]
    width = max(map(len, names))
    table(
        f"{result['run']}, step {result['step']} ({result['weights']} weights), features: {result['protocol']['features']}, "
        f"{result['protocol']['reference']}\n  {'':{width}}  {head}",
        [
            (name, " ".join(f"{row[column]:10.4g}" for column in columns))
            for name, row in zip(names, result["rows"], strict=True)
        ],
    )
    table(
        "distances: less is better; shares: more is better", [("figure", path) for path in result["figures"]]
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
