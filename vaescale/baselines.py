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
from vaescale.data.batch import Request
from vaescale.data.latents import LatentShards
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError, UserError
from vaescale.evaluation.likelihood import bits_per_dim
from vaescale.run import Run, latents_of, open_split
from vaescale.training import folder as run_folder

MOST_DIMENSIONS = 4096  # of an image: PCA takes the eigenvectors of a D x D matrix
NEIGHBOURS = 5
Array = NDArray[np.float64]


class Baselines(NamedTuple):
    """words: rows by name, notes, and the numbers of images; pictures: named rows of images [N, C, H, W]."""

    words: dict[str, Any]
    pictures: list[tuple[str, Any]]


def baselines(opened: Run, *, images: int, labels: int | None, shown: int) -> Baselines:
    """Of at most `images` training images and as many held-out ones. labels: of how many training images the probes know the class.

    Raises UserError for images that are too large for PCA or latents that are as many as values, DataError for unusable images.
    """
    from sklearn.decomposition import PCA

    model = opened.model
    size, latents = model.likelihood.dimensions, sum(model.group_sizes)
    own = _own_row(opened)
    train, val = (open_split(opened.recipe, split) for split in ("train", "val"))
    known, held_out = _images(train, images), _images(val, images)
    notes = ["PCA sees the images as they are stored; nats and bits are of densities of images in [0, 1]"]
    if model.likelihood.measure != "density" or getattr(opened.recipe.likelihood, "dequantize", False):
        notes.append("the run's bound is of another kind than PCA's likelihood: the two do not compare")
    rows: dict[str, dict[str, float | None]] = {opened.recipe.name: own}
    pictures = []
    components = min(latents, size - 1, len(known) - 1)
    if size > MOST_DIMENSIONS:
        notes.append(f"no PCA: images of {size} values are larger than {MOST_DIMENSIONS}")
        pca = None
    else:
        if components < latents:
            notes.append(
                f"PCA has {components} latents, the run {latents}: no more are left of {size} values"
            )
        pca = PCA(components, svd_solver="covariance_eigh").fit(known)
        decoded = pca.inverse_transform(pca.transform(held_out))
        nats = -float(pca.score(held_out))
        rows[f"pPCA, {components} latents"] = {
            "neg_log_px_nats": nats,
            "bits_per_dim": bits_per_dim(nats, size),
            "reconstruction_mse": float(np.square(held_out - decoded).mean()),
            "sigma": float(pca.noise_variance_**0.5),
        }
        pictures = [("PCA", _pictures(decoded[:shown], opened))]
    probed = _probe(opened, labels, pca, known, train, held_out, val) if train.most_class() > 0 else {}
    if not probed:
        notes.append("no probes: these images have no classes")
    for name, row in probed.items():
        rows.setdefault(name, {}).update(row)
    originals = held_out[:shown]
    first = [("original", _pictures(originals, opened)), ("this run", _reconstructions(opened, originals))]
    words = {"rows": rows, "notes": notes, "train_images": len(known), "held_out_images": len(held_out)}
    return Baselines(words, [*first, *pictures])


def _own_row(opened: Run) -> dict[str, float | None]:
    """The run's own numbers, as `vaescale evaluate` left them. Raises UserError where it did not, or of another step."""
    found = run_folder.read_json(opened.folder / "evaluation" / "val.json")
    if found.get("step") != opened.step or found.get("recipe_hash") != opened.recipe.hash:
        raise UserError(
            f"{opened.folder} is not evaluated at step {opened.step}; `vaescale evaluate {opened.folder}`"
        )
    metrics = found["metrics"]
    nats = metrics.get("neg_iwae_nats", metrics.get("neg_elbo_nats"))
    return {
        "neg_log_px_nats": nats,
        "bits_per_dim": metrics.get("bits_per_dim"),
        "reconstruction_mse": metrics["reconstruction_mse"],
        "sigma": metrics.get("sigma"),
    }


def _probe(
    opened: Run,
    labels: int | None,
    pca: Any,
    known: Array,
    train: ShardReader,
    held_out: Array,
    val: ShardReader,
) -> dict[str, dict[str, float]]:
    """Accuracies on held-out images: of a linear classifier and of nearest neighbours, on the run's latents and on PCA's."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = min(len(known), labels or len(known))
    taken = evenly(len(known), count).numpy()
    classes = _labels(train, len(known)), _labels(val, len(held_out))
    means = _means(latents_of(opened, "train"), len(known)), _means(latents_of(opened, "val"), len(held_out))
    found = {opened.recipe.name: means}
    if pca is not None:
        found[f"pPCA, {pca.n_components_} latents"] = (pca.transform(known), pca.transform(held_out))
    rows = {}
    for name, (one, other) in found.items():
        if len(one) != len(classes[0]) or len(other) != len(classes[1]):
            raise DataError(
                "some images could not be encoded; `vaescale verify-shards DIR --deep` names what is wrong with them"
            )
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        near = make_pipeline(StandardScaler(), KNeighborsClassifier(min(NEIGHBOURS, count)))
        rows[name] = {
            "linear_probe": float(probe.fit(one[taken], classes[0][taken]).score(other, classes[1])),
            f"knn_{NEIGHBOURS}": float(near.fit(one[taken], classes[0][taken]).score(other, classes[1])),
        }
    return rows


def _means(latents: LatentShards, most: int) -> Array:
    """The posterior's means of at most so many images at equal distances, [N, Z]."""
    blocks = [latents.read(number).moments[:, 0] for number in range(len(latents.index.shards))]
    everything = np.concatenate(blocks).astype(np.float64)
    taken: Array = everything[evenly(len(everything), most).numpy()]
    return taken


def _labels(reader: ShardReader, most: int) -> NDArray[np.int64]:
    return np.concatenate([got.labels.numpy() for got in _fetched(reader, most)])


def _images(reader: ShardReader, most: int) -> Array:
    """At most so many at equal distances, flat, float64 [N, D] in [0, 1]."""
    return np.concatenate([got.images.flatten(1).numpy() / 255.0 for got in _fetched(reader, most)])


def _fetched(reader: ShardReader, most: int) -> Any:
    for numbers in torch.split(evenly(len(reader), most), 500):
        got = reader.__getitems__(Request(np.asarray(numbers), refill=False))
        if not bool(got.usable.all()):
            raise DataError(
                f"{got.faults[0].words}; `vaescale verify-shards DIR --deep` names all that is wrong"
            )
        yield got


@torch.no_grad()
def _reconstructions(opened: Run, images: Array) -> NDArray[np.float32]:
    model = opened.model
    device = next(model.parameters()).device
    levels = torch.from_numpy(images * 255).round().byte().view(-1, *model.image_shape).to(device)
    x = model.target(levels, noise.Stream(opened.recipe.seed, 0, torch.arange(len(levels), device=device)))
    means: NDArray[np.float32] = model.likelihood.mean(model.reconstruct(x)).float().cpu().numpy()
    return means


def _pictures(images: Array, opened: Run) -> NDArray[np.float32]:
    return images.reshape(-1, *opened.model.image_shape).astype(np.float32)
