"""Distances of kinds of pictures from reference images, by their features.

The pictures of a kind are numbered, and rank r of N makes the numbers r, r + N, ..., so that the pictures do not depend on the
number of ranks. All ranks get all features, and the main process compares them.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from vaescale import comm
from vaescale.config import Window
from vaescale.data.config import DataConfig
from vaescale.data.lookup import evenly, images_at
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError
from vaescale.evaluation.features import Extractor
from vaescale.evaluation.frechet import Moments, frechet_distance, moments, moments_here
from vaescale.evaluation.quality import kernel_distance, overlap
from vaescale.models.units import to_stored, to_unit
from vaescale.system import heartbeat
from vaescale.system.caches import cache_home
from vaescale.system.console import Progress, say
from vaescale.system.files import write_whole

CACHE = "vaescale/references"
BATCH = 250
MOST_REFERENCES = 50_000
LEAST = 10  # minimum number of pictures of a kind, for five neighbours and a covariance
MOST_COMPARED = 10_000  # maximum number for neighbours and kernels, whose cost grows with its square
PROTOCOL = {
    "frechet": "between Gaussians, float64, all features",
    "kernel": "unbiased MMD^2 of (x . y / F + 1)^3, equally many of both, at most 10000",
    "overlap": "precision, recall, density and coverage: 5 neighbours, equally many of both, at most 10000; a point at the distance "
    "of the 5th neighbour is within the ball",
}
SCORES = ("frechet", "kernel", "precision", "recall", "density", "coverage")
MORE_IS_BETTER = ("precision", "recall", "density", "coverage")


class Kind(NamedTuple):
    """Pictures to judge: a name, their decoding, their number, and a function from positions (int64 [B]) to pictures.

    Pictures are [B, C, H, W] in [0, 1]. labels: the classes of all pictures in order, int64 [N] (-1: none), where they are known.
    """

    name: str
    decode: str
    number: int
    pictures: Callable[[Tensor], Tensor]
    labels: Tensor | None = None


def judge(
    kinds: list[Kind], extractor: Extractor, references: Tensor, *, labels: Tensor | None = None
) -> list[dict[str, Any]]:
    """Compare each kind with the references' features [N, F]. Returns a row for each kind. All ranks call it.

    labels: int64 [N], the references' classes: rows of kinds with classes then have `frechet_by_class`, from the pictures of a class to the
    references of that class, None where one has fewer than LEAST.

    The Frechet distance uses all features; kernel distance, precision, recall, density and coverage use equally many of
    each set, at most 10,000.
    """
    against = _moments(references)
    rows = []
    for kind in kinds:
        features = features_of(kind, extractor)
        moments_of_kind = _moments(features)

        def compare(
            kind: Kind = kind, features: Tensor = features, moments: Moments = moments_of_kind
        ) -> dict[str, Any]:
            fewer = min(len(features), len(references), MOST_COMPARED)
            images, samples = (values[evenly(len(values), fewer)] for values in (references, features))
            return {
                "of": kind.name,
                "decode": kind.decode,
                "count": len(features),
                "frechet": frechet_distance(moments, against),
                "kernel": kernel_distance(images, samples),
                **overlap(images, samples)._asdict(),
                **_by_class(features, kind.labels, references, labels),
            }

        rows.append(comm.on_main(compare))
    return rows


def _by_class(
    features: Tensor, labels: Tensor | None, references: Tensor, of_references: Tensor | None
) -> dict[str, list[float | None]]:
    """The Frechet distance of each class, on the main process alone."""
    if labels is None or of_references is None:
        return {}
    distances: list[float | None] = []
    for number in range(int(of_references.max()) + 1):
        pair = [features[labels == number], references[of_references == number]]
        enough = min(map(len, pair)) >= LEAST
        distances.append(frechet_distance(*map(moments_here, pair)) if enough else None)
    return {"frechet_by_class": distances}


@torch.no_grad()
def features_of(kind: Kind, extractor: Extractor) -> Tensor:
    """The features of a kind's pictures in order, float32 [N, F], on every rank. All ranks call it."""
    numbers = torch.arange(comm.rank(), kind.number, comm.world_size())
    title = f"{kind.name} {kind.decode}".strip()

    def extract() -> list[Tensor]:
        batches = []
        with Progress(
            f"features of {title}", len(numbers), unit="pictures", shown=comm.is_main()
        ) as progress:
            for number, positions in enumerate(torch.split(numbers, BATCH), start=1):
                batches.append(extractor.of(kind.pictures(positions)).float().cpu())
                heartbeat.beat("features")
                progress.update(min(number * BATCH, len(numbers)))
        return batches

    gathered = comm.gather_object([batch.numpy() for batch in comm.together(extract)])
    by_rank = [np.concatenate(batches) for batches in gathered if batches]
    features = np.empty((kind.number, by_rank[0].shape[1]), dtype=np.float32)
    for rank, share in enumerate(by_rank):
        features[rank :: comm.world_size()] = share
    return torch.from_numpy(features)


def references_of(
    reader: ShardReader, extractor: Extractor, config: DataConfig, *, device: torch.device, cache: Path
) -> tuple[Tensor, bool]:
    """The features of at most 50,000 evenly spaced images of a data set, and whether they came from the cache.

    config: the reader's options, which are part of the cache key. Writes missing features to the cache. All ranks call it.
    Raises DataError for too few images.
    """
    count = min(MOST_REFERENCES, len(reader))
    if count < LEAST:
        raise comm.known_to_all(
            DataError(f"{count} training images are too few to compare with; {LEAST} are needed")
        )
    path = cache / cache_name(extractor, reader, config, [count])
    kept = comm.on_main(lambda: _kept(path, count))
    if kept is not None:
        return kept, True
    numbers = evenly(len(reader), count)

    def images(positions: Tensor) -> Tensor:
        return to_unit(images_at(reader, numbers[positions]).to(device), reader.window)

    features = features_of(Kind("training images", "", count, images), extractor)
    comm.on_main(lambda: keep(path, to_bytes({"features": features})))
    return features, False


def cache_name(extractor: Extractor, reader: ShardReader, config: DataConfig, of: list[Any]) -> str:
    """The name of a file that keeps what an extractor made of a data set, as the options of its reader and `of` tell it apart."""
    read = (config.image_size, config.channels, str(config.crop), config.resample)
    read += () if config.window == Window() else tuple(config.window)  # type: ignore[assignment]
    key = json.dumps([extractor.identity, reader.index.data_hash, read, *of])
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache. Prints a message where that is not possible: what it holds is made again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        say(
            f"{path} cannot be written ({error.strerror}), so these features are computed again next time; --cache names another folder"
        )


def references_folder(given: Path | None) -> Path:
    """The folder that keeps what was made of reference images: the given one, or CACHE below ~/.cache."""
    return given.expanduser() if given else cache_home() / CACHE


def to_levels(images: Tensor, window: Window) -> Tensor:
    """Round images in [0, 1] to the values that files hold."""
    return to_unit(to_stored(images, window), window)


def _moments(features: Tensor) -> Moments:
    """The moments of features [N, F] that every rank has; each rank sums its share."""
    return moments(torch.split(features[comm.rank() :: comm.world_size()], BATCH))


def _kept(path: Path, count: int) -> Tensor | None:
    """The features in a cache file, or None if the file is missing or damaged."""
    try:
        features = from_bytes(path.read_bytes())["features"]
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
    sound = features.dtype == torch.float32 and features.ndim == 2 and len(features) == count
    return features if sound and bool(torch.isfinite(features).all()) else None
