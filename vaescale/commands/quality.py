"""How far a run's samples and reconstructions are from its images, by the features of both."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vaescale import comm, figures, noise
from vaescale.aggregate.sampling import from_latents, image_of, parse_decoding, refuse_misfit
from vaescale.commands.identity import git_revision
from vaescale.data.lookup import evenly, images_at
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError, UserError
from vaescale.evaluation.comparison import (
    LEAST,
    MORE_IS_BETTER,
    MOST_COMPARED,
    MOST_REFERENCES,
    PROTOCOL,
    SCORES,
    Kind,
    judge,
    references_of,
    to_levels,
)
from vaescale.evaluation.features import Extractor, open_extractor
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.gaussian import Mixture
from vaescale.models.vae import to_unit
from vaescale.runs.results import save_result
from vaescale.system.console import say
from vaescale.trained import Trained, open_split, open_trained
from vaescale.training import launch

CACHE = Path("~/.cache/vaescale/references")
DECODINGS = ("mean", "ancestral")
SHOWN = 16  # pictures of each kind


def quality(
    run: Path,
    *,
    features: str,
    count: int | None = None,
    decode: Sequence[str] = DECODINGS,
    temperature: float = 1.0,
    weights: Literal["ema", "raw"] = "ema",
    seed: int = 0,
    trust_features: bool = False,
    cache: Path = CACHE,
) -> dict[str, Any]:
    """Judge a run's samples against its training images. Writes RUN/evaluation/quality-FEATURES.json and pictures.

    features: `pixels`, a folder of `train_features`, `inception[:FILE]` or a FILE.pt2, which is a program and needs
    `trust_features`. count: samples of each kind, by default as many as held-out images, at most 10,000. decode: `mean`,
    `ancestral` or `offset:ALPHA`. cache: the folder that keeps the training images' features.

    Returns a row of scores for each kind of picture, with the protocol. Raises UserError for arguments that make no sense,
    features that are not there and mixtures of another model, DataError for too few images.
    """
    if count is not None and not LEAST <= count <= MOST_REFERENCES:
        raise UserError(f"--count (={count}) must be from {LEAST} to {MOST_REFERENCES}")
    decodings = tuple(dict.fromkeys(decode))
    for decoding in decodings:
        parse_decoding(decoding)  # before anything is opened
    with launch.joined():
        trained = open_trained(run, weights=weights)
        model, data = trained.model, trained.recipe.data
        device = next(model.parameters()).device
        extractor = comm.together(
            lambda: open_extractor(
                features, image_shape=model.image_shape, device=device, trusted=trust_features
            )
        )
        train = comm.together(lambda: open_split(trained.recipe, "train"))
        val = comm.together(lambda: open_split(trained.recipe, "val"))
        mixtures = comm.together(lambda: _mixtures(trained))
        count = count or min(len(val), MOST_COMPARED)
        with torch.no_grad():
            references, cached = references_of(
                train, extractor, data, device=device, cache=cache.expanduser()
            )
            kinds = kinds_of(
                trained, val, mixtures, count=count, decodings=decodings, temperature=temperature, seed=seed
            )
            rows = judge(kinds, extractor, references)
            first = [kind.pictures(torch.arange(min(SHOWN, kind.number))).cpu() for kind in kinds]
        samples = f"{count} of each kind, 8-bit, seed {seed}, temperature {temperature:g}"
        measured = f"{count} samples at temperature {temperature:g}, {len(references)} images of {train.index.data_hash[:12]}"
        result = {
            "run": str(trained.folder),
            **trained.identity,
            "data_hash": train.index.data_hash,
            "code": git_revision(),
            "features": extractor.name,
            "protocol": _protocol(extractor, len(references), samples),
            "measured": {
                f"quality/{extractor.name}/": f"features {extractor.identity[:12]}, {measured}",
            },
            "references_from_cache": cached,
            "rows": rows,
        }
        return comm.on_main(lambda: _save(trained, result, first))


def kinds_of(
    trained: Trained,
    val: ShardReader,
    mixtures: dict[str, Mixture],
    *,
    count: int,
    decodings: tuple[str, ...],
    temperature: float,
    seed: int,
) -> list[Kind]:
    """Held-out images, their reconstructions, and samples of the prior and of each mixture under each decoding.

    The distances of few pictures are too large, so rows compare only where there are as many held-out images as samples.
    Raises DataError for fewer than `LEAST` held-out images.
    """
    model = trained.model
    device = next(model.parameters()).device
    numbers = evenly(len(val), count)
    if len(numbers) < LEAST:
        raise comm.known_to_all(
            DataError(f"{len(numbers)} held-out images are too few to judge; {LEAST} are needed")
        )

    def images(positions: Tensor) -> Tensor:
        return to_unit(images_at(val, numbers[positions]).to(device))

    def reconstructions(positions: Tensor) -> Tensor:
        stream = noise.Stream(trained.recipe.seed, 0, numbers[positions].to(device))
        x = model.target(images_at(val, numbers[positions]).to(device), stream)
        return to_levels(model.likelihood.mean(model.reconstruct(x)))

    def samples(mixture: Mixture | None, decode: str) -> Callable[[Tensor], Tensor]:
        def draw(positions: Tensor) -> Tensor:
            stream = noise.Stream(seed, 0, positions.to(device))
            params = from_latents(model, mixture, stream, temperature)
            return to_levels(image_of(model.likelihood, params, parse_decoding(decode), stream))

        return draw

    kinds = [
        Kind("held-out images", "", len(numbers), images),
        Kind("reconstructions", "mean", len(numbers), reconstructions),
    ]
    sources: dict[str, Mixture | None] = {"prior": None, **mixtures}
    for decode in decodings:
        kinds += [Kind(name, decode, count, samples(mixture, decode)) for name, mixture in sources.items()]
    return kinds


def _mixtures(trained: Trained) -> dict[str, Mixture]:
    """Each mixture of this model that fit-gmm left, by a name. Mixtures of other weights are left out, with a word."""
    folder = trained.folder / "gmm"
    if not folder.is_dir():
        return {}
    folders = [folder / f"components-{number}" for number in mixture_files.compared(folder)] or [folder]
    mixtures = {}
    for candidate in folders:
        if mixture_files.words(candidate).get("weights", trained.weights) != trained.weights:
            if comm.is_main():
                say(
                    f"{candidate} is left out: it was fitted to other weights than the {trained.weights} ones"
                )
            continue
        mixture = mixture_files.load(candidate, **trained.identity)
        refuse_misfit(mixture, trained.model, trained.folder)
        mixtures[f"mixture of {len(mixture.weights)}"] = mixture
    return mixtures


def _protocol(extractor: Extractor, references: int, samples: str) -> dict[str, str]:
    return {
        "features": extractor.words,
        "features_hash": extractor.identity,
        "reference": f"{references} training images",
        "samples": samples,
        **PROTOCOL,
    }


def _save(trained: Trained, result: dict[str, Any], first: list[Tensor]) -> dict[str, Any]:
    """Draw and save. first: some pictures of each row. Returns the result with the figures' paths."""
    name, rows = result["features"], result["rows"]
    paths = [trained.folder / "figures" / f"quality-{name}{suffix}.png" for suffix in ("", "-pictures")]
    figures.quality(paths[0], rows, title=trained.title(f"against training images, features: {name}"))
    strips = [(_label(row), pictures.numpy()) for row, pictures in zip(rows, first, strict=True)]
    figures.image_strips(paths[1], strips, title=trained.title("the pictures that are judged"))
    metrics = {f"quality/{name}/{_metric_name(row)}/{score}": row[score] for row in rows for score in SCORES}
    result["more_is_better"] = [key for key in metrics if key.rpartition("/")[2] in MORE_IS_BETTER]
    save_result(
        trained.folder,
        f"evaluation/quality-{name}.json",
        result,
        step=trained.step,
        metrics=metrics,
        tracking=trained.recipe.tracking,
    )
    return {**result, "figures": [str(path) for path in paths]}


def _metric_name(row: dict[str, Any]) -> str:
    """`prior-mean` of a row."""
    return "-".join(filter(None, (row["of"], row["decode"]))).replace(" ", "-").replace(":", "-")


def _label(row: dict[str, Any]) -> str:
    return f"{row['of']}{'' if row['decode'] in ('', 'mean') else ', ' + row['decode']}"
