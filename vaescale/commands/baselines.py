"""Baselines for a run: probabilistic PCA with as many latents, and probes that predict the images' classes from latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from vaescale import figures, noise
from vaescale.commands.signature import Count, checked
from vaescale.data.lookup import evenly, images_at, usable_at
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError, UserError
from vaescale.evaluation.likelihood import bits_per_dim
from vaescale.evaluation.ppca import MOST_DIMENSIONS, PPCA, ppca
from vaescale.evaluation.probes import Labelled, majority_share, probe
from vaescale.models.units import to_stored, to_unit
from vaescale.models.vae import VAE
from vaescale.runs import folder as run_folder
from vaescale.runs.identity import git_revision
from vaescale.runs.results import save_result
from vaescale.system import heartbeat
from vaescale.system.console import say
from vaescale.trained import Trained, Which, open_split, open_trained, refuse_condition

SHOWN, BATCH = 12, 500
UNEVEN = 1.5  # the largest class's share of the images, in shares of even classes, from which a note is due
Images = Annotated[int, Field(ge=10)]
PROTOCOL = {
    "pPCA": "fitted to the training images; exact mean log-likelihood of the held-out images, Tipping & Bishop 1999",
    "nll_nats": "-log p(x) for pPCA; for the run an upper bound of -log p(x)",
    "reconstruction_mse": "squared error per value of means clamped to [0, 1]",
    "linear_probe": "accuracy on held-out images of logistic regression on standardized latents (posterior means, or PCA's scores)",
    "knn_5": "accuracy on held-out images of the five nearest neighbours in the same latents",
    "..._balanced": "the mean over classes of the accuracy on each class's images",
    "majority_share": "share of the held-out images in the largest class: the accuracy of always naming it",
}
MORE_IS_BETTER = ("linear_probe", "knn_5", "linear_probe_balanced", "knn_5_balanced")
Array = NDArray[np.float64]
Rows = dict[str, dict[str, float | None]]


@checked
def baselines(
    run: Path,
    *,
    labels: Images | None = None,
    groups: Count = 1,
    images: Images = 20_000,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Compare a run with probabilistic PCA. Writes RUN/evaluation/baselines.json and RUN/figures/baselines.png.

    labels: number of labelled training images for the probes, by default all. groups: number of a ladder's groups, from the
    top, that are the probes' input. images: maximum number of images of each split. checkpoint: see `Which`.

    Returns the rows by name, notes on which numbers are comparable, and the protocol. Raises UserError when the run is not
    evaluated, DataError for images that cannot be used.
    """
    trained = open_trained(run, which=checkpoint)
    refuse_condition(trained, "baselines", "PCA and the probes know no condition; take evaluate")
    _refuse_groups(trained.model, groups)
    train, val = (open_split(trained.recipe, split) for split in ("train", "val"))
    trained.announce("baselines", train=train, val=val)
    row, notes = _row_of_run(trained, val)
    rows: Rows = {trained.recipe.name: row}
    pictures, fit = _add_ppca(trained, train, val, images, rows, notes)
    if train.most_class() > 0 and val.most_class() > 0:
        notes += _probe_notes(trained.model, groups, min(labels or images, images, len(train)))
        _begin("the means of q(z|x)")
        latents = [_latents(trained, reader, images, groups) for reader in (train, val)]
        for name, accuracies in _probe(trained, latents, labels, fit).items():
            rows.setdefault(name, {}).update(accuracies)
        share = majority_share(latents[1].classes)
        notes += _uneven(share, latents[1].classes, val.index.class_names)
    else:
        share = None
        notes.append("no probes: the images have no classes")
    classes = f"classes of {labels or 'all'} images, {images} images of each split at most"
    result = {
        "run": str(trained.folder),
        **trained.identity,
        "code": git_revision(),
        "protocol": PROTOCOL,
        "measured": {"baselines/": f"{classes}, latents of {groups} group{'s' if groups > 1 else ''}"},
        "rows": rows,
        "notes": notes,
        "majority_share": share,
        "train_images": min(len(train), images),
        "held_out_images": min(len(val), images),
        "data_hash": train.index.data_hash,
        "val_data_hash": val.index.data_hash,
    }
    return _save(trained, result, pictures)


def _save(trained: Trained, result: dict[str, Any], pictures: list[tuple[str, Any]]) -> dict[str, Any]:
    """Save the result and draw the figure. Returns the result with the figure's path."""
    path = trained.folder / "figures" / "baselines.png"

    def draw() -> None:
        by_pca = " and by probabilistic PCA" if len(pictures) > 2 else ""
        title = trained.title(f"held-out images, reconstructed by the run{by_pca}")
        rows = _with_errors(pictures, result["rows"])
        figures.image_rows(path, rows, title=title, view=trained.recipe.view)

    metrics = {
        f"baselines/{'run' if name == trained.recipe.name else 'ppca'}/{key}": value
        for name, row in result["rows"].items()
        for key, value in row.items()
        if value is not None
    }
    result["more_is_better"] = [name for name in metrics if name.endswith(MORE_IS_BETTER)]
    save_result(
        trained.folder,
        "evaluation/baselines.json",
        result,
        step=trained.step,
        metrics=metrics,
        tracking=trained.recipe.tracking,
        draw=draw,
    )
    return {**result, "figure": str(path)}


def _with_errors(pictures: list[tuple[str, Any]], rows: Rows) -> list[tuple[str, Any]]:
    """The rows of pictures, those of reconstructions with their error. rows: of the result, in the same order."""
    errors = [row["reconstruction_mse"] for row in rows.values()]
    return [
        pictures[0],
        *(
            (name if error is None else f"{name}\nMSE {error:.3g}", images)
            for (name, images), error in zip(pictures[1:], errors, strict=False)
        ),
    ]


def _refuse_groups(model: VAE, groups: int) -> None:
    number = len(model.group_sizes)
    if groups > number:
        raise UserError(
            f"--groups (={groups}) is too many: the latents of this run have {number} group{'s'[: number > 1]}"
        )


def _row_of_run(trained: Trained, val: ShardReader) -> tuple[dict[str, float | None], list[str]]:
    """The run's metrics, as `vaescale evaluate` wrote them, and notes on their meaning.

    Raises UserError when the metrics are missing, or are for another step, other weights or other images.
    """
    evaluated = run_folder.read_json(trained.folder / "evaluation" / "val.json")
    wanted = {
        "step": trained.step,
        "recipe_hash": trained.recipe.hash,
        "weights_hash": trained.weights_hash,
        "data_hash": val.index.data_hash,
    }
    if any(evaluated.get(name) != value for name, value in wanted.items()):
        raise UserError(
            f"{trained.folder} is not evaluated at step {trained.step}; run `vaescale evaluate {trained.folder}`"
        )
    metrics, likelihood = evaluated["metrics"], trained.model.likelihood
    nats, notes = _nats(metrics)
    if likelihood.measure != "density" or getattr(likelihood.config, "dequantize", False):
        notes.append(
            "the likelihoods of the run and of PCA differ (masses, binarized or dequantized images): nats and bits are not "
            "comparable, nor are errors if the run changes the images"
        )
    dimensions, added = likelihood.dimensions, likelihood.added_bits
    row = {
        "nll_nats": nats,
        "bits_per_dim": None if nats is None or added is None else bits_per_dim(nats, dimensions, added),
        "reconstruction_mse": metrics["reconstruction_mse"],
        "sigma": metrics.get("sigma"),
    }
    return row, notes


def _nats(metrics: dict[str, float]) -> tuple[float | None, list[str]]:
    """The tightest bound of -log p(x) that covers all images, or None without a bound, and notes on it."""
    notes = ["PCA is fitted to the images as stored; its nats and bits are for densities of images in [0, 1]"]
    nats = metrics.get("neg_elbo_nats")
    if metrics.get("importance_images") == metrics["images"]:
        nats = metrics["neg_iwae_nats"]
        notes.append(f"the run's nats are bounds with {metrics['importance_samples']:.0f} importance samples")
    elif nats is not None:
        notes.append(
            "the run's nats are the ELBO; `vaescale evaluate --importance-samples` bounds log p(x) more tightly"
        )
    else:
        fits = "neg_profile_elbo_nats" in metrics
        why = "fits sigma to each image" if fits else "trains no likelihood of images"
        notes.append(f"the run {why}, so it has no bound of log p(x)")
    return nats, notes


def _add_ppca(
    trained: Trained, train: ShardReader, val: ShardReader, images: int, rows: Rows, notes: list[str]
) -> tuple[list[tuple[str, Any]], tuple[str, PPCA] | None]:
    """Add the row and the notes of probabilistic PCA, if the images are small enough.

    Returns rows of pictures, and the name and the fit of PCA (None for larger images).
    """
    model = trained.model
    size, latents = model.likelihood.dimensions, sum(model.group_sizes)
    fitted = size <= MOST_DIMENSIONS
    known, held_out = (_images(reader, images if fitted else SHOWN) for reader in (train, val))
    originals = held_out[:SHOWN]
    pictures = [
        ("original", _pictures(originals, model)),
        ("this run", _reconstructions(trained, originals)),
    ]
    if not fitted:
        notes.append(f"no PCA: the images have {size} values, more than {MOST_DIMENSIONS}")
        return pictures, None
    _begin(f"probabilistic PCA of {len(known)} images of {size} values")
    fit = ppca(known, held_out, latents, depth=model.window.bits)
    if fit is None:
        notes.append("no PCA: the training images are all the same, or vary in one direction only")
        return pictures, None
    fits = (f"pPCA, {fit.latents} latents", fit)
    if fit.latents < latents:
        notes.append(
            f"PCA has {fit.latents} latents, the run {latents}: the training images vary in {fit.latents} directions only"
        )
    rows[fits[0]] = {**fit.metrics}
    if len(held_out) < len(val):
        notes.append(f"PCA's numbers use {len(held_out)} of the {len(val)} held-out images (--images)")
    pictures.append((fits[0], _pictures(fit.reconstructions[:SHOWN], model)))
    return pictures, fits


def _begin(part: str) -> None:
    """Say which part of the work begins; each may take a minute."""
    heartbeat.beat(part)
    say(f"baselines: {part}")


def _probe_notes(model: VAE, groups: int, count: int) -> list[str]:
    notes = [f"the probes learn from the classes of {count} training images (--labels)"]
    number = len(model.group_sizes)
    if number > 1:
        notes.append(
            f"the probes' input is the {sum(model.group_sizes[:groups])} latents of the first {groups} of {number} groups (--groups)"
        )
    return notes


def _uneven(share: float, of_images: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """A note if accuracies are mostly the largest class's. share: of the held-out images in it; names: of the classes, if known."""
    numbers, counts = np.unique(of_images, return_counts=True)
    if share < UNEVEN / len(numbers):
        return []
    largest = int(numbers[counts.argmax()])
    name = names[largest] if 0 <= largest < len(names) else str(largest)
    return [
        f"{share:.1%} of the held-out images are of the class {name}, one of {len(numbers)}: an accuracy of {share:.4g} needs no latents; read "
        "the balanced ones"
    ]


def _probe(
    trained: Trained, latents: list[Labelled], labels: int | None, fit: tuple[str, PPCA] | None
) -> dict[str, dict[str, float]]:
    """Accuracies of probes on held-out images, from the run's latents and from PCA's scores.

    Raises DataError for images without a class, UserError when the labels are of one class.
    """
    train, val = latents
    taken = evenly(len(train.classes), min(len(train.classes), labels or len(train.classes))).numpy()
    if min(train.classes.min(), val.classes.min()) < 0:
        raise DataError(
            "some images have no class, and the probes need the class of every image; write the shards again with classes"
        )
    if len(set(train.classes[taken].tolist())) < 2:
        raise UserError(f"--labels (={labels}) images are all of one class; give more")
    _begin(f"probes of the classes of {len(taken)} images")
    inputs = {trained.recipe.name: (train.latents, val.latents)}
    if fit is not None:
        inputs[fit[0]] = (fit[1].train_scores, fit[1].val_scores)
    return {
        name: probe(Labelled(known[taken], train.classes[taken]), Labelled(held_out, val.classes))
        for name, (known, held_out) in inputs.items()
    }


@torch.no_grad()
def _latents(trained: Trained, reader: ShardReader, most: int, groups: int) -> Labelled:
    """Posterior means and classes of the images that `_images` returns."""
    model, device = trained.model, trained.device
    means, classes = [], []
    for numbers in torch.split(evenly(len(reader), most), BATCH):
        fetched = usable_at(reader, numbers)
        stream = noise.Stream(trained.recipe.seed, 0, numbers.to(device))
        x = model.target(fetched.images.to(device), stream)
        means.append(model.joint_means(x, groups).double().cpu().numpy())
        classes.append(fetched.labels.numpy())
    return Labelled(np.concatenate(means), np.concatenate(classes))


def _images(reader: ShardReader, most: int) -> Array:
    """At most `most` evenly spaced images of the data set, flat, float64 [N, D] in [0, 1]."""
    numbers = torch.split(evenly(len(reader), most), BATCH)
    return np.concatenate(
        [
            to_unit(images_at(reader, batch), reader.window, dtype=torch.float64).flatten(1).numpy()
            for batch in numbers
        ]
    )


@torch.no_grad()
def _reconstructions(trained: Trained, images: Array) -> NDArray[np.float32]:
    model, device = trained.model, trained.device
    levels = to_stored(torch.from_numpy(images), model.window).view(-1, *model.image_shape).to(device)
    x = model.target(levels, noise.Stream(trained.recipe.seed, 0, torch.arange(len(levels), device=device)))
    means: NDArray[np.float32] = model.likelihood.mean(model.reconstruct(x)).float().cpu().numpy()
    return means


def _pictures(images: Array, model: VAE) -> NDArray[np.float32]:
    return images.reshape(-1, *model.image_shape).astype(np.float32)
