"""Evaluate a run: bounds with the running sigma, reconstructions, and the calibration of the decoder's noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vaescale import comm, figures
from vaescale.aggregate import code_prior
from vaescale.aggregate.code_prior import PriorBound
from vaescale.commands import file_mixture
from vaescale.commands.file_mixture import CodedPrior
from vaescale.commands.futures import FEW, strips_of
from vaescale.commands.signature import checked
from vaescale.compression import code_length as code_lengths
from vaescale.conditions.config import ClassCondition
from vaescale.data.classes import count_classes
from vaescale.data.lookup import MOST_LOOKED_AT, first_usable, usable_at
from vaescale.data.mixed_reader import MixtureReader
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError, UserError
from vaescale.evaluation import likelihood as bounds
from vaescale.evaluation.classes import (
    CLASS_PROTOCOL,
    CLASSIFICATION_PROTOCOL,
    MARGINAL,
    ByClass,
    Classification,
)
from vaescale.evaluation.comparison import references_folder
from vaescale.evaluation.features import Extractor, open_extractor, open_video_extractor
from vaescale.evaluation.frames import FrameBounds
from vaescale.evaluation.future_distance import FRAMES, VIDEOS, FutureDistance, references_of
from vaescale.evaluation.futures import MORE_IS_BETTER as OF_FUTURES
from vaescale.evaluation.futures import Futures
from vaescale.evaluation.glimpse import error_maps
from vaescale.evaluation.importance import IMPORTANCE, ImportanceBound
from vaescale.evaluation.measures import Measure, measure
from vaescale.evaluation.reconstruction import METRICS, Reconstruction
from vaescale.evaluation.refit import Refitted, refuse_refit
from vaescale.evaluation.refit import refit_sigma as fit_sigma
from vaescale.evaluation.remarks import arrived_sigma, remarks
from vaescale.models.sequence_model import SequenceModel
from vaescale.runs import class_table
from vaescale.runs import folder as run_folder
from vaescale.runs.class_table import ClassTable
from vaescale.runs.identity import git_revision
from vaescale.runs.results import save_result
from vaescale.system.console import Progress, say
from vaescale.system.secrets import redact
from vaescale.trained import (
    Split,
    Trained,
    Weights,
    Which,
    in_order,
    number_of_classes,
    open_split,
    open_trained,
    refuse_codes,
    refuse_unlabelled,
)
from vaescale.training import launch

IWAE_PROTOCOL = (
    "-log of the mean importance weight of importance_samples draws, per image; falls with their number. "
    "effective_samples, (sum w)^2 / sum w^2, says how many of them carry it; importance_neg_elbo_nats is the ELBO of the same images "
    "by the same draws, neg_iwae_standard_error the spread over images, not the error of sampling"
)
Draws = Annotated[int, Field(ge=1, le=10_000_000)]  # or images
SHOWN = 12  # images in the picture
REFITTED = "refit"  # ends the name of a result with a sigma that was fitted anew
TAKEN = ("val", "train", "val-raw", "train-raw", "latents", "baselines")
MORE_IS_BETTER = (
    *("class_accuracy", "class_accuracy_low", "class_accuracy_high"),
    *("log_px_nats", "profile_log_px_nats", "active_units", "effective_samples"),
)


class Images(NamedTuple):
    """The images to evaluate: their reader, a description, the name of the result, their kind in words, and
    how many of them are measured, from the first.
    """

    reader: ShardReader
    description: str
    name: str
    kind: str
    number: int


@checked
def evaluate(
    run: Path,
    *,
    split: Split | None = None,
    data: str | None = None,
    name: str | None = None,
    weights: Weights = "ema",
    images: Draws | None = None,
    importance_samples: Draws | None = None,
    importance_images: Draws | None = None,
    refit_sigma: bool = False,
    per_class: bool = False,
    code_length: bool = False,
    prior: CodedPrior = "standard",
    futures: Draws | None = None,
    features: str | None = None,
    trust_features: bool = False,
    cache: Path | None = None,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Evaluate a run on a split of its recipe (by default `val`) or on other shards. Each image counts once; of a mixture's training
    images, as often as training draws it.

    data: a folder or URL of other shards than the recipe's. name: the name of the result, by default the split, or
    data-FOLDER with `data`. images: evaluate only the first so many; the name of the result then ends with -first-N. checkpoint: see `Which`;
    for another than the last the name of the result ends with it. importance_samples: number of draws for each image to bound log p(x) more tightly, for the first
    `importance_images` images or all. refit_sigma: use the maximum-likelihood sigma of the recipe's training images with these weights
    in place of the running one; the name of the result then ends with -refit. per_class: also the ELBO of each class's images and, of a conditional run, the classes that
    its bounds choose, and a bound of p(x) without the class: a pass for each class. code_length: the size of `compress`'s code, without
    writing it. prior: that of the code, `gmm` for the mixture of fit-gmm. futures: of a run of sequences, the number of futures to generate after each context and to compare with the
    truth. features: with futures, also their Frechet distance by these features, named as in `quality`; a folder of `train_features` has those of videos too.
    cache: the folder that keeps the moments of the training sequences; None for vaescale/references below ~/.cache.

    Writes RUN/evaluation/NAME.json and pictures. Returns the metrics with their protocol. Raises UserError for arguments that
    contradict each other, DataError for images that cannot be used.
    """
    if importance_images and not importance_samples:
        raise UserError("--importance-images needs --importance-samples; give both")
    if features and not futures:
        raise UserError(
            "--features is for the futures of a run of sequences; give --futures N, or use `vaescale quality`"
        )
    if data and split:
        raise UserError("--data and --split both choose the images; give one of them")
    if prior == "gmm" and not code_length:
        raise UserError("--prior gmm is the prior of the code that --code-length measures; give both")
    split = split or "val"
    endings = [] if weights == "ema" else [weights]
    endings += [] if checkpoint == "last" else [checkpoint]
    endings += [f"first-{images}"] if images else []
    endings += [REFITTED] if refit_sigma else []
    name = "-".join([_result_name(name, split, data), *endings])
    with launch.joined():
        trained = open_trained(run, weights=weights, which=checkpoint, of_sequences=True)
        asked = {"per-class": per_class, "code-length": code_length}
        _refuse_of_sequences(trained, futures, [name for name, value in asked.items() if value])
        if refit_sigma:
            refuse_refit(trained.recipe.likelihood)
        coder = _coder(trained, prior) if code_length else None
        if importance_samples:
            refuse_codes(trained, "--importance-samples", "leave it out: each image has one code")
        reader = comm.together(lambda: open_split(trained.recipe, split, place=data))
        noun = "sequences" if isinstance(trained.model, SequenceModel) else "images"
        kind = f"these {noun}'" if data else {"val": "the held-out", "train": "the training"}[split]
        number = min(len(reader), images or len(reader))
        of_mixture = ", an epoch of the mixture" if isinstance(reader, MixtureReader) else ""
        description = (
            redact(data or split) + of_mixture + (f", the first {number} of {len(reader)}" if images else "")
        )
        chosen = Images(reader, description, name, kind, number)
        what = f"evaluate, of the first {number} {noun}," if images else "evaluate"
        trained.announce(what, **{split if data is None else "other": reader})
        refuse_unlabelled(trained, reader)
        classes = _classes(trained, reader) if per_class else None
        distance = _distance(trained, features, trusted=trust_features, cache=cache) if features else None
        code = comm.on_main(git_revision)
        refitted = _refit(trained) if refit_sigma else None
        earlier = _earlier(trained, chosen, other_data=data is not None, samples=importance_samples)
        result = _measure(
            *(
                trained,
                chosen,
                earlier,
                code,
                importance_samples,
                importance_images,
                refitted,
                classes,
                coder,
            ),
            futures,
            distance,
        )
        return comm.on_main(lambda: _save(trained, chosen, result))


def _coder(trained: Trained, prior: CodedPrior) -> code_lengths.CodeLength:
    """The measure of the code's length. All ranks call it."""
    mixture = comm.on_main(lambda: file_mixture.chosen(trained) if prior == "gmm" else None)
    return comm.together(
        lambda: code_lengths.CodeLength(trained.model, seed=trained.recipe.seed, mixture=mixture)
    )


def _refuse_of_sequences(trained: Trained, futures: int | None, asked: Sequence[str]) -> None:
    """Raise UserError for what a run of sequences, or of images, does not have. asked: options that need images."""
    if not isinstance(trained.model, SequenceModel):
        if futures:
            raise UserError(
                f"--futures needs a model of sequences, and {trained.folder} is one of images; leave it out"
            )
    elif asked:
        raise UserError(
            f"--{asked[0]} needs a model of images, and {trained.folder} is one of sequences; leave it out"
        )


def _distance(trained: Trained, features: str, *, trusted: bool, cache: Path | None) -> FutureDistance:
    """The measure of the futures' distance from the recipe's training sequences. All ranks call it."""
    model, device = trained.model, trained.device
    assert isinstance(model, SequenceModel)
    shape = model.image_shape

    def levels() -> dict[str, Extractor]:
        frames = open_extractor(features, image_shape=shape, device=device, trusted=trusted)
        videos = open_video_extractor(features, image_shape=shape, frames=model.frames, device=device)
        return {FRAMES: frames} | ({VIDEOS: videos} if videos else {})

    opened = comm.together(levels)
    train = comm.together(lambda: open_split(trained.recipe, "train"))
    references = references_of(
        train,
        opened,
        trained.recipe.data,
        context=model.context,
        device=device,
        cache=references_folder(cache),
    )
    return FutureDistance(model, opened, references, seed=trained.recipe.seed)


def _classes(trained: Trained, reader: ShardReader) -> ClassTable:
    """The classes of a conditional run, or of the images. All ranks call it."""
    if number_of_classes(trained) is not None:
        return comm.on_main(lambda: class_table.read(trained.folder, number_of_classes(trained)))
    counts = count_classes(reader, comm.on_main(reader.most_class) + 1)
    if not any(counts.of_class):
        raise comm.known_to_all(
            DataError(f"no image of {reader.index.place} has a class, which --per-class needs; leave it out")
        )
    return ClassTable(counts.names(reader.index.class_names), counts.frequencies)


def _refit(trained: Trained) -> Refitted:
    """Fit sigma to the recipe's training images, with progress. All ranks call it."""
    reader = comm.together(lambda: open_split(trained.recipe, "train"))
    total, ranks = len(reader), comm.world_size()
    with Progress("sigma of the training images", total, unit="images", shown=comm.is_main()) as progress:
        return fit_sigma(
            trained.model,
            in_order(reader, workers=trained.recipe.data.workers),
            seed=trained.recipe.seed,
            progress=lambda done: progress.update(min(done * ranks, total)),
        )


def _result_name(given: str | None, split: str, data: str | None) -> str:
    """The name of the result's file. Raises UserError for an invalid file name, or the name of another verb's result."""
    usual = "data-" + Path(data.partition("?")[0]).name if data else split
    name = given or usual
    if name != Path(name).name or name.startswith(".") or name == "data-":
        raise UserError(f"--name {name!r} is not a valid file name; use letters, digits and dashes")
    if name != usual and (name in TAKEN or name.startswith("quality-")):
        raise UserError(f"--name {name} is reserved for another result; choose another name")
    return name


def _earlier(trained: Trained, images: Images, *, other_data: bool, samples: int | None) -> dict[str, Any]:
    """The earlier result of this name, or {}. Raises UserError if it is for other data."""
    name, hashed = images.name, images.reader.index.data_hash
    earlier = comm.on_main(lambda: run_folder.read_json(trained.folder / "evaluation" / f"{name}.json"))
    if other_data and earlier.get("data_hash", hashed) != hashed:
        raise UserError(f"{trained.folder}/evaluation/{name}.json is for other images; give these a --name")
    before = earlier.get("metrics", {}).get("importance_samples", 0)
    if comm.is_main() and before > (samples or before):
        say(
            f"the bound with {before:.0f} importance samples in evaluation/{name}.json will be replaced by a looser one"
        )
    return earlier


def _measure(
    trained: Trained,
    images: Images,
    earlier: dict[str, Any],
    code: str,
    importance_samples: int | None,
    importance_images: int | None,
    refitted: Refitted | None,
    classes: ClassTable | None,
    coder: code_lengths.CodeLength | None,
    futures: int | None,
    distance: FutureDistance | None,
) -> dict[str, Any]:
    """The metrics of all images, with their protocol, and the coverage of p(x|z)'s intervals. All ranks call it."""
    model, seed, data = trained.model, trained.recipe.seed, trained.recipe.data
    reader, hashed = images.reader, images.reader.index.data_hash

    bound, pictures = bounds.Bound(model, max_skipped=data.max_skipped), Reconstruction(model)
    measures: list[Measure] = [bound, pictures]
    if importance_samples:
        measures.insert(1, ImportanceBound(model, samples=importance_samples, most_images=importance_images))
    by_class = None if classes is None else ByClass(model, names=classes.names)
    classification = None
    if by_class is not None and classes is not None:
        measures.append(by_class)
        if isinstance(model.condition, ClassCondition):
            classification = Classification(model, frequencies=classes.frequencies)
            measures.append(classification)
    prior = code_prior.of_weights(trained.folder, model, trained.identity) if model.num_codes else None
    if prior is not None:
        measures.append(PriorBound(model, prior))
    if coder is not None:
        measures.append(coder)
    frames = FrameBounds(model) if isinstance(model, SequenceModel) else None
    if frames is not None:
        measures.append(frames)
    generated = None
    if futures and isinstance(model, SequenceModel):
        generated = Futures(model, number=futures, seed=seed)
        measures.append(generated)
    if distance is not None:
        measures.append(distance)
    name = f"evaluate {trained.recipe.name}"
    with Progress(name, images.number, unit="images", shown=comm.is_main()) as progress:
        metrics = measure(
            model,
            in_order(reader, workers=data.workers, images=images.number),
            measures,
            seed=seed,
            progress=lambda done: progress.update(min(done * comm.world_size(), images.number)),
        )
    protocol = bounds.protocol(model)
    if prior is not None:
        protocol |= code_prior.PROTOCOL
    if model.condition is not None:
        kind = model.condition.kind
        protocol["bound"] += f"; given the {kind} of each image: a bound on log p(x|y), not on log p(x)"
    if by_class is not None:
        protocol |= CLASS_PROTOCOL | (CLASSIFICATION_PROTOCOL if classification else {})
    if coder is not None:
        protocol |= coder.protocol
    for each in (frames, generated, distance):
        protocol |= each.protocol if each else {}
    if refitted is not None:
        protocol["sigma"] = refitted.protocol
    if data.augment:
        protocol["training_images"] = (
            f"augmented in training ({data.augment.words}), so the model's density is of augmented images; the evaluated ones are not"
        )
    if not importance_samples:
        origin = {"weights_hash": trained.weights_hash, "data_hash": hashed, "code": code}
        metrics |= _kept(earlier, origin)
    if "importance_samples" in metrics:
        protocol["neg_iwae_nats"] = IWAE_PROTOCOL
        if isinstance(model, SequenceModel):
            protocol["neg_iwae_nats"] += (
                "; images are sequences, x their frames from the second on given the first, and a draw has the latents of all steps"
            )
    return {
        "run": str(trained.folder),
        "data": images.description,
        **trained.identity,
        "data_hash": hashed,
        "code": code,
        "protocol": protocol | pictures.protocol,
        "measured": _measured(
            images, metrics, refitted, is_given=model.condition is not None, distance=distance
        ),
        "more_is_better": [f"evaluation/{images.name}/{key}" for key in metrics if _more_is_better(key)],
        "metrics": metrics,
        **({"classes": by_class.table} if by_class else {}),
        **({"confusion": classification.confusion} if classification else {}),
        **({"frames": frames.table} if frames else {}),
        **({"futures": generated.table} if generated else {}),
        **({"frechet": distance.table, "features_hash": distance.identity} if distance else {}),
        "notes": [] if refitted else remarks(metrics, trained.recipe.likelihood, of=images.kind),
        "sigma": _sigma(trained, metrics, refitted, images.kind),
        "interval_coverage": pictures.coverage,
    }


def _sigma(
    trained: Trained, metrics: dict[str, float], refitted: Refitted | None, kind: str
) -> dict[str, Any] | None:
    """The sigma in use, that of the images, the nats between them and a sentence; None without a sigma that is optimal."""
    sentence = arrived_sigma(metrics, trained.recipe.likelihood, of=kind)
    if sentence is None:
        return None
    each = "a sequence" if "neg_elbo_nats_per_frame" in metrics else "an image"
    numbers = {"used": metrics["sigma"], "data": metrics["data_sigma"], "gap_nats": metrics["sigma_gap_nats"]}
    if refitted is not None:
        sentence = (
            f"sigma is {refitted.after:.3g}, fitted to {refitted.images} training {'sequences' if each == 'a sequence' else 'images'} (the running one was {refitted.before:.3g}, "
            f"{refitted.gap_nats:.3g} nats {each} worse on them), and {metrics['data_sigma']:.3g} fits {kind} errors best "
            f"({metrics['sigma_gap_nats']:.3g} nats {each} between them)"
        )
        numbers |= refitted._asdict()
    return {**numbers, "sentence": sentence}


def _kept(earlier: dict[str, Any], origin: dict[str, str]) -> dict[str, float]:
    """The importance-sampled bound of an earlier result of the same origin, because it takes minutes to measure."""
    if any(earlier.get(name) != value for name, value in origin.items()):
        return {}
    return {key: value for key, value in earlier["metrics"].items() if key in IMPORTANCE}


def _measured(
    images: Images,
    metrics: dict[str, float],
    refitted: Refitted | None,
    *,
    is_given: bool,
    distance: FutureDistance | None,
) -> dict[str, str]:
    """The conditions under which two runs' metrics are comparable, by prefix of the metric names."""
    prefix = f"evaluation/{images.name}/"
    how = ", given the class" if is_given else ""
    how += ", sigma fitted to the training images" if refitted else ""
    first = f"the first {images.number} " if images.number < len(images.reader) else ""
    measured = {prefix: f"{first}images {images.reader.index.data_hash[:12]}{how}"}
    if "neg_marginal_nats" in metrics:
        measured |= {
            f"{prefix}{key}": f"{first}images {images.reader.index.data_hash[:12]}" for key in MARGINAL
        }
    if "futures" in metrics:
        how_many = f"{first}sequences {images.reader.index.data_hash[:12]}, {metrics['futures']:.0f} futures"
        measured |= {f"{prefix}{key}": how_many for key in OF_FUTURES if key in metrics}
    if distance is not None:
        hashed = images.reader.index.data_hash[:12]
        measured |= {
            f"{prefix}{key}": f"{first}sequences {hashed}, {how}" for key, how in distance.measured.items()
        }
    if "importance_samples" in metrics:
        bound = f"{metrics['importance_samples']:.0f} importance samples of {metrics['importance_images']:.0f} images"
        measured |= {f"{prefix}{key}": bound for key in IMPORTANCE}
    return measured


def _more_is_better(metric: str) -> bool:
    return metric in (*MORE_IS_BETTER, *OF_FUTURES) or (metric in METRICS and METRICS[metric].more_is_better)


def _save(trained: Trained, images: Images, result: dict[str, Any]) -> dict[str, Any]:
    """Save the result and draw the pictures. Returns the result with the pictures' paths."""
    paths: list[Path] = []
    # The metrics of other data than the recipe's have names of their own.
    metrics = {f"evaluation/{images.name}/{key}": value for key, value in result["metrics"].items()}
    save_result(
        trained.folder,
        f"evaluation/{images.name}.json",
        result,
        step=trained.step,
        metrics=metrics,
        tracking=trained.recipe.tracking,
        draw=lambda: paths.extend(_draw(trained, images, result)),
    )
    return {**result, "figures": [str(path) for path in paths]}


def _draw(trained: Trained, images: Images, result: dict[str, Any]) -> list[Path]:
    """Draw the pictures. Returns their paths."""
    suffix = "" if images.name == "val" else f"-{images.name}"
    folder = trained.folder / "figures"
    paths = _draw_reconstructions(trained, images, folder / f"reconstructions{suffix}.png")
    if result["interval_coverage"]:
        paths.append(folder / f"calibration{suffix}.png")
        label = f"{trained.recipe.name}, step {trained.step}"
        title = f"calibration of p(x|z), {Path(images.description).name} images"
        figures.calibration(paths[-1], [(label, result["interval_coverage"])], title=title)
    return paths


def _draw_reconstructions(trained: Trained, images: Images, path: Path) -> list[Path]:
    """Draw the first images, or sequences, with what the model makes of them. Returns the path; nothing where none can be used."""
    title = trained.title(f"{images.description} images, decoded from the mean of q(z|x)")
    if isinstance(trained.model, SequenceModel):
        title = trained.title(
            f"{images.description} sequences, decoded from the mean of q(z|x), and a future"
        )
        of_each, scale = strips_of(trained, images.reader, count=FEW)
        rows = [row for rows in of_each for row in rows]
        if rows:
            figures.image_strips(path, rows, title=title, view=trained.recipe.view, scale=scale)
    else:
        rows = _rows(trained, images.reader)
        if rows:
            figures.image_rows(path, rows, title=title, view=trained.recipe.view)
    if not rows:
        number = min(len(images.reader), MOST_LOOKED_AT)
        say(f"none of the first {number} samples can be used; {path.name} is not drawn")
    return [path] if rows else []


def _rows(trained: Trained, reader: ShardReader) -> list[tuple[str, NDArray[np.float32]]]:
    """The first images, their reconstructions, the errors, and sigma where it differs between values. Nothing where none can be used."""
    slots = first_usable(reader, SHOWN)
    if not len(slots):
        return []
    fetched = usable_at(reader, slots)
    condition = trained.model.condition_of(fetched.labels, fetched.vectors)
    rows = error_maps(trained.model, fetched.images, slots, condition=condition, seed=trained.recipe.seed)
    return [(name, pictures.numpy()) for name, pictures in rows]
