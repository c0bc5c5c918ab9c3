"""Measure the distance of a run's samples and reconstructions from its images, by their features."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from vaescale import comm, figures, noise
from vaescale.aggregate import code_prior
from vaescale.aggregate.class_choice import ClassChoice
from vaescale.aggregate.sampling import Prior, from_latents, image_of, parse_decoding, refuse_misfit
from vaescale.aggregate.vector_choice import VectorChoice
from vaescale.commands.sample import choice_of
from vaescale.commands.second_stage import open_second_stage
from vaescale.commands.signature import Count, NonNegative, Temperature, checked
from vaescale.data.lookup import evenly, images_at, usable_at
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
    references_folder,
    references_of,
    to_levels,
)
from vaescale.evaluation.features import Extractor, open_extractor
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.by_class import FOLDER, ClassMixtures, load_by_class
from vaescale.models.units import to_unit
from vaescale.runs import class_table
from vaescale.runs.identity import git_revision
from vaescale.runs.results import save_result
from vaescale.system.console import say
from vaescale.trained import Trained, Weights, Which, open_split, open_trained, refuse_unlabelled
from vaescale.training import launch

DECODINGS = ("mean", "ancestral")
SHOWN = 16  # pictures of each kind


class Samples(NamedTuple):
    """The samples to judge: the number of each kind, the decodings, and the temperature and seed of the latents."""

    number: int
    decodings: tuple[str, ...]
    temperature: float
    seed: int


@checked
def quality(
    run: Path,
    *,
    features: str,
    count: Count | None = None,
    decode: Annotated[Sequence[str], Field(min_length=1)] = DECODINGS,
    temperature: Temperature = 1.0,
    prior: Path | None = None,
    weights: Weights = "ema",
    seed: NonNegative = 0,
    trust_features: bool = False,
    cache: Path | None = None,
    per_class: bool = False,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Judge a run's samples against its training images. Writes RUN/evaluation/quality-FEATURES.json and pictures.

    features: `pixels`, a folder of `train_features`, `inception[:FILE]` or a FILE.pt2, which is a program and needs
    `trust_features`. count: samples of each kind, by default the number of held-out images, at most 10,000. decode: `mean`,
    `ancestral` or `offset:ALPHA`. prior: the folder of a run that was trained on this run's latents, to judge its samples too. cache: the folder that keeps the training images' features; None for vaescale/references below ~/.cache. checkpoint: see `Which`.
    per_class: also the Frechet distance of the pictures of each class from its training images, of a conditional run or one with mixtures of
    classes (fit-gmm --per-class). Samples of these have classes by their frequencies.

    Returns a row of scores for each kind of picture, with the protocol. Raises UserError for invalid arguments,
    missing features and mixtures of another model, DataError for too few images.
    """
    decodings = _checked(count, decode)
    with launch.joined():
        trained = open_trained(run, weights=weights, which=checkpoint)
        extractor = comm.together(lambda: _extractor(trained, features, trust_features))
        train = comm.together(lambda: open_split(trained.recipe, "train"))
        val = comm.together(lambda: open_split(trained.recipe, "val"))
        trained.announce(f"quality ({extractor.name})", train=train, val=val)
        refuse_unlabelled(trained, val)
        choice = comm.on_main(lambda: choice_of(trained, None))
        if per_class and not isinstance(choice, ClassChoice):
            raise UserError(
                f"--per-class needs a run that is given classes, or mixtures of classes, and {run} has neither; leave it out, or run "
                f"`vaescale fit-gmm RUN --per-class` of a run without a condition"
            )
        priors: dict[str, Prior] = {**comm.together(lambda: _mixtures(trained))}
        second = open_second_stage(prior, trained) if prior else None
        if second:
            priors["second stage"] = second
        samples = Samples(count or min(len(val), MOST_COMPARED), decodings, temperature, seed)
        references, cached = references_of(
            train, extractor, trained.recipe.data, device=trained.device, cache=references_folder(cache)
        )
        kinds = kinds_of(trained, val, priors, samples, choice)
        labels = torch.from_numpy(train.labels())[evenly(len(train), len(references))] if per_class else None
        with torch.no_grad():
            rows = judge(kinds, extractor, references, labels=labels)
            first = [kind.pictures(torch.arange(min(SHOWN, kind.number))).cpu() for kind in kinds]
        data_hash = train.index.data_hash
        result = {
            "run": str(trained.folder),
            **trained.identity,
            "data_hash": data_hash,
            "code": git_revision(),
            **_protocol(extractor, samples, len(references), data_hash),
            "references_from_cache": cached,
            **({"second_stage": second.identity} if second else {}),
            **(
                {"classes": list(choice.table.names)} if per_class and isinstance(choice, ClassChoice) else {}
            ),
            "rows": rows,
        }
        return comm.on_main(lambda: _save(trained, result, first))


def kinds_of(
    trained: Trained,
    val: ShardReader,
    priors: Mapping[str, Prior],
    samples: Samples,
    choice: ClassChoice | VectorChoice | None = None,
) -> list[Kind]:
    """Held-out images, their reconstructions, and samples of the prior and of each further prior under each decoding.

    choice: the samples' classes. Distances are biased upwards for few pictures, so rows are comparable only with as many held-out images as samples.
    Raises DataError for fewer than `LEAST` held-out images.
    """
    model, device = trained.model, trained.device
    numbers = evenly(len(val), samples.number)
    if len(numbers) < LEAST:
        raise comm.known_to_all(
            DataError(f"{len(numbers)} held-out images are too few to judge; {LEAST} are needed")
        )

    def images(positions: Tensor) -> Tensor:
        return to_unit(images_at(val, numbers[positions]).to(device), val.window)

    def reconstructions(positions: Tensor) -> Tensor:
        stream = noise.Stream(trained.recipe.seed, 0, numbers[positions].to(device))
        fetched = usable_at(val, numbers[positions])
        x = model.target(fetched.images.to(device), stream)
        given = model.given(model.condition_of(fetched.labels, fetched.vectors))
        return to_levels(model.likelihood.mean(given.reconstruct(x)), model.window)

    labels = torch.from_numpy(val.labels())[numbers] if isinstance(choice, ClassChoice) else None
    kinds = [
        Kind("held-out images", "", len(numbers), images, labels),
        Kind("reconstructions", "mean", len(numbers), reconstructions, labels),
    ]
    sources: dict[str, Prior] = {"prior": None, **priors}
    of_samples = (
        choice.of(noise.Stream(samples.seed, 0, torch.arange(samples.number)))
        if isinstance(choice, ClassChoice)
        else None
    )
    for decode in samples.decodings:
        kinds += [
            Kind(
                name,
                decode,
                samples.number,
                _drawn(trained, source, decode, samples, choice),
                of_samples if model.condition or isinstance(source, ClassMixtures) else None,
            )
            for name, source in sources.items()
        ]
    return kinds


def _drawn(
    trained: Trained, prior: Prior, decode: str, samples: Samples, choice: ClassChoice | VectorChoice | None
) -> Callable[[Tensor], Tensor]:
    """A function from positions to samples, with latents from a prior and classes or vectors of `choice`."""
    likelihood, decoding = trained.model.likelihood, parse_decoding(decode)

    def draw(positions: Tensor) -> Tensor:
        stream = noise.Stream(samples.seed, 0, positions.to(trained.device))
        params = from_latents(trained.model, prior, stream, samples.temperature, choice=choice)
        return to_levels(image_of(likelihood, params, decoding, stream), likelihood.window)

    return draw


def _checked(count: int | None, decode: Sequence[str]) -> tuple[str, ...]:
    """The decodings without repetition. Raises UserError for an unknown decoding and for too few or too many samples."""
    if count is not None and not LEAST <= count <= MOST_REFERENCES:
        raise UserError(f"--count (={count}) must be from {LEAST} to {MOST_REFERENCES}")
    decodings = tuple(dict.fromkeys(decode))
    for decoding in decodings:
        parse_decoding(decoding)
    return decodings


def _extractor(trained: Trained, features: str, trusted: bool) -> Extractor:
    return open_extractor(
        features, image_shape=trained.model.image_shape, device=trained.device, trusted=trusted
    )


def _mixtures(trained: Trained) -> Mapping[str, Prior]:
    """The mixtures of fit-gmm for this model, by name. Mixtures of other weights are left out, with a message. Of a model with codes,
    the prior of fit-prior.
    """
    if trained.model.num_codes:
        prior = code_prior.of_weights(trained.folder, trained.model, trained.identity)
        return {} if prior is None else {"autoregressive prior": prior}
    folder, mixtures = trained.folder / "gmm", dict[str, Prior]()
    if (folder / FOLDER).is_dir():
        classes = len(class_table.read(trained.folder, None).names)
        of_classes = load_by_class(folder, classes, **trained.identity)
        refuse_misfit(of_classes, trained.model, trained.folder)
        mixtures["mixtures of the classes"] = of_classes
    if not (folder / mixture_files.DETAILS).is_file():
        return mixtures
    folders = [folder / f"components-{number}" for number in mixture_files.compared(folder)] or [folder]
    for candidate in folders:
        if mixture_files.read_details(candidate).get("weights", trained.weights) != trained.weights:
            if comm.is_main():
                say(
                    f"{candidate} is left out: it was fitted to other weights than the {trained.weights} ones"
                )
            continue
        mixture = mixture_files.load(candidate, **trained.identity)
        refuse_misfit(mixture, trained.model, trained.folder)
        mixtures[f"mixture of {len(mixture.weights)}"] = mixture
    return mixtures


def _protocol(extractor: Extractor, samples: Samples, references: int, data_hash: str) -> dict[str, Any]:
    """The protocol of the rows, and the conditions under which two runs' metrics are comparable."""
    number, temperature = samples.number, f"temperature {samples.temperature:g}"
    return {
        "features": extractor.name,
        "protocol": {
            "features": extractor.description,
            "features_hash": extractor.identity,
            "reference": f"{references} training images",
            "samples": f"{number} of each kind, 8-bit, seed {samples.seed}, {temperature}",
            **PROTOCOL,
        },
        "measured": {
            f"quality/{extractor.name}/": f"features {extractor.identity[:12]}, {number} samples at {temperature}, "
            f"{references} images of {data_hash[:12]}"
        },
    }


def _save(trained: Trained, result: dict[str, Any], first: list[Tensor]) -> dict[str, Any]:
    """Save the result and draw the figures. first: some pictures of each row. Returns the result with the figures' paths."""
    name, rows = result["features"], result["rows"]
    paths = [trained.folder / "figures" / f"quality-{name}{suffix}.png" for suffix in ("", "-pictures")]

    def draw() -> None:
        figures.quality(paths[0], rows, title=trained.title(f"against training images, features: {name}"))
        strips = [(_label(row), pictures.numpy()) for row, pictures in zip(rows, first, strict=True)]
        title = trained.title("the pictures that are judged")
        figures.image_strips(paths[1], strips, title=title, view=trained.recipe.view)

    metrics = {f"quality/{name}/{_metric_name(row)}/{score}": row[score] for row in rows for score in SCORES}
    result["more_is_better"] = [key for key in metrics if key.rpartition("/")[2] in MORE_IS_BETTER]
    save_result(
        trained.folder,
        f"evaluation/quality-{name}.json",
        result,
        step=trained.step,
        metrics=metrics,
        tracking=trained.recipe.tracking,
        draw=draw,
    )
    return {**result, "figures": [str(path) for path in paths]}


def _metric_name(row: dict[str, Any]) -> str:
    """The name of a row in metrics, such as `prior-mean`."""
    return "-".join(filter(None, (row["of"], row["decode"]))).replace(" ", "-").replace(":", "-")


def _label(row: dict[str, Any]) -> str:
    return f"{row['of']}{'' if row['decode'] in ('', 'mean') else ', ' + row['decode']}"
