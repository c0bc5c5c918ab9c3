"""Baselines beside a run: probabilistic PCA with as many latents, and probes of the latents by the images' classes.

Probabilistic PCA (Tipping & Bishop 1999) is the optimum of a linear VAE with one sigma (Lucas et al. 2019): its log-likelihood of
held-out images is exact, and the run's ELBO is a bound of the same quantity where its likelihood is a density of the same images.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale import noise
from vaescale.aggregate.information import evenly
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError, UserError
from vaescale.evaluation.likelihood import bits_per_dim
from vaescale.runs import folder as run_folder
from vaescale.trained import Trained, images_at, open_split, usable_at

MOST_DIMENSIONS = 4096  # of an image: PCA takes the eigenvectors of a D x D matrix
NEIGHBOURS, BATCH = 5, 500
LEAST_EIGENVALUE = 1e-10  # of the largest
Array = NDArray[np.float64]


class Baselines(NamedTuple):
    """words: rows by name, notes, and the numbers of images; pictures: named rows of images [N, C, H, W]."""

    words: dict[str, Any]
    pictures: list[tuple[str, Any]]


def baselines(trained: Trained, *, images: int, labels: int | None, groups: int, shown: int) -> Baselines:
    """Of at most `images` training images and as many held-out ones. labels: of how many training images the probes know the class.
    groups: of a ladder, whose latents the probes see, from the top.

    Raises UserError where the run was not evaluated, DataError for images that cannot be used.
    """
    from sklearn.decomposition import PCA

    model = trained.model
    size, latents, there = model.likelihood.dimensions, sum(model.group_sizes), len(model.group_sizes)
    if groups > there:
        raise UserError(
            f"--groups (={groups}) is too many: the latents of this run are {there} group{'s'[: there > 1]}"
        )
    train, val = (open_split(trained.recipe, split) for split in ("train", "val"))
    own, notes = _own_row(trained, val)
    rows: dict[str, dict[str, float | None]] = {trained.recipe.name: own}
    classed = train.most_class() > 0 and val.most_class() > 0
    sees = size <= MOST_DIMENSIONS
    known, held_out = (_images(reader, images if sees else shown) for reader in (train, val))
    originals = held_out[:shown]
    pictures = [
        ("original", _pictures(originals, trained)),
        ("this run", _reconstructions(trained, originals)),
    ]
    scores = None
    if not sees:
        notes.append(f"no PCA: images of {size} values are larger than {MOST_DIMENSIONS}")
    else:
        components = min(latents, _rank(known) - 1)
        name = f"pPCA, {components} latents"
        if components < latents:
            notes.append(
                f"PCA has {components} latents, the run {latents}: the training images vary in no more directions"
            )
        pca = PCA(components, svd_solver="covariance_eigh").fit(known)
        decoded = pca.inverse_transform(pca.transform(held_out)).clip(0, 1)
        nats = -float(pca.score(held_out))
        rows[name] = {
            "nll_nats": nats,
            "bits_per_dim": bits_per_dim(nats, size),
            "reconstruction_mse": float(np.square(held_out - decoded).mean()),
            "sigma": float(pca.noise_variance_**0.5),
        }
        if len(held_out) < len(val):
            notes.append(f"PCA's numbers are of {len(held_out)} of the {len(val)} held-out images (--images)")
        pictures.append(("PCA", _pictures(decoded[:shown], trained)))
        scores = (name, pca.transform(known), pca.transform(held_out))
    if classed:
        notes.append(
            f"the probes learn from the classes of {min(labels or images, images, len(train))} training images (--labels)"
        )
        if there > 1:
            notes.append(
                f"the probes see the {sum(model.group_sizes[:groups])} latents of the first {groups} of {there} groups (--groups)"
            )
        for name, row in _probe(trained, labels, images, groups, scores, train, val).items():
            rows.setdefault(name, {}).update(row)
    else:
        notes.append("no probes: these images have no classes")
    words = {
        "rows": rows,
        "notes": notes,
        "train_images": min(len(train), images),
        "held_out_images": min(len(val), images),
        "data_hash": train.index.data_hash,
        "val_data_hash": val.index.data_hash,
    }
    return Baselines(words, pictures)


def _own_row(trained: Trained, val: ShardReader) -> tuple[dict[str, float | None], list[str]]:
    """The run's own numbers, as `vaescale evaluate` left them, and what is to be said of them. Raises UserError where it did not, or
    of another step, other weights or other images.
    """
    found = run_folder.read_json(trained.folder / "evaluation" / "val.json")
    wanted = {
        "step": trained.step,
        "recipe_hash": trained.recipe.hash,
        "weights_hash": trained.weights_hash,
        "data_hash": val.index.data_hash,
    }
    if any(found.get(name) != value for name, value in wanted.items()):
        raise UserError(
            f"{trained.folder} is not evaluated at step {trained.step}; `vaescale evaluate {trained.folder}`"
        )
    metrics, likelihood = found["metrics"], trained.model.likelihood
    notes = ["PCA sees the images as they are stored; its nats and bits are of densities of images in [0, 1]"]
    nats = metrics.get("neg_elbo_nats")
    if metrics.get("importance_images") == metrics["images"]:
        nats = metrics["neg_iwae_nats"]
        notes.append(f"the run's nats are bounds by {metrics['importance_samples']:.0f} importance samples")
    elif nats is not None:
        notes.append(
            "the run's nats are the ELBO; `vaescale evaluate --importance-samples` bounds log p(x) more tightly"
        )
    if nats is None:
        notes.append("the run fits sigma to each image, which bounds nothing")
    if likelihood.measure != "density" or getattr(likelihood.config, "dequantize", False):
        notes.append(
            "the run sees or measures images otherwise than PCA (masses, binarized or dequantized images): nats, bits and, where "
            "the images are changed, errors do not compare"
        )
    row = {
        "nll_nats": nats,
        "bits_per_dim": None
        if nats is None
        else bits_per_dim(nats, likelihood.dimensions, likelihood.measure),
        "reconstruction_mse": metrics["reconstruction_mse"],
        "sigma": metrics.get("sigma"),
    }
    return row, notes


def _rank(images: Array) -> int:
    """In how many directions the images vary, beyond rounding."""
    values = np.linalg.eigvalsh(np.cov(images.T))
    return int((values > LEAST_EIGENVALUE * values[-1]).sum())


def _probe(
    trained: Trained,
    labels: int | None,
    images: int,
    groups: int,
    scores: tuple[str, Array, Array] | None,
    train: ShardReader,
    val: ShardReader,
) -> dict[str, dict[str, float]]:
    """Accuracies on held-out images: of a linear classifier and of nearest neighbours, on the run's latents and on PCA's. Raises
    DataError for images without a class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    one, other = (_latents(trained, reader, images, groups) for reader in (train, val))
    count = min(len(one.means), labels or len(one.means))
    taken = evenly(len(one.means), count).numpy()
    if min(one.classes.min(), other.classes.min()) < 0:
        raise DataError(
            "some images have no class, and probes need them all; write the shards anew with classes"
        )
    if len(set(one.classes[taken].tolist())) < 2:
        raise UserError(f"--labels (={labels}) images are all of one class; give more")
    found = {trained.recipe.name: (one.means, other.means)}
    if scores is not None:
        found[scores[0]] = scores[1:]
    rows = {}
    for name, (inputs, tests) in found.items():
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        near = make_pipeline(StandardScaler(), KNeighborsClassifier(min(NEIGHBOURS, count)))
        rows[name] = {
            "linear_probe": float(probe.fit(inputs[taken], one.classes[taken]).score(tests, other.classes)),
            f"knn_{NEIGHBOURS}": float(
                near.fit(inputs[taken], one.classes[taken]).score(tests, other.classes)
            ),
        }
    return rows


class _Latents(NamedTuple):
    """Posterior means [N, Z] and classes [N] of the images whose pixels `_images` gives."""

    means: Array
    classes: NDArray[np.int64]


@torch.no_grad()
def _latents(trained: Trained, reader: ShardReader, most: int, groups: int) -> _Latents:
    model, parts = trained.model, torch.split(evenly(len(reader), most), BATCH)
    device = next(model.parameters()).device
    means, classes = [], []
    for numbers in parts:
        got = usable_at(reader, numbers)
        x = model.target(got.images.to(device), noise.Stream(trained.recipe.seed, 0, numbers.to(device)))
        means.append(model.joint_means(x, groups).double().cpu().numpy())
        classes.append(got.labels.numpy())
    return _Latents(np.concatenate(means), np.concatenate(classes))


def _images(reader: ShardReader, most: int) -> Array:
    """At most so many at equal distances, flat, float64 [N, D] in [0, 1]."""
    parts = torch.split(evenly(len(reader), most), BATCH)
    return np.concatenate([images_at(reader, numbers).flatten(1).numpy() / 255.0 for numbers in parts])


@torch.no_grad()
def _reconstructions(trained: Trained, images: Array) -> NDArray[np.float32]:
    model = trained.model
    device = next(model.parameters()).device
    levels = torch.from_numpy(images * 255).round().byte().view(-1, *model.image_shape).to(device)
    x = model.target(levels, noise.Stream(trained.recipe.seed, 0, torch.arange(len(levels), device=device)))
    means: NDArray[np.float32] = model.likelihood.mean(model.reconstruct(x)).float().cpu().numpy()
    return means


def _pictures(images: Array, trained: Trained) -> NDArray[np.float32]:
    return images.reshape(-1, *trained.model.image_shape).astype(np.float32)
