"""What `vaescale quality` measures: how far a run's samples, and its reconstructions, are from images, by the features of both.

Each kind of picture is numbered, and rank r of N makes the numbers r, r + N, ..., so that all are the same on any number of
ranks; the features come together on all of them, and one compares.
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

from vaescale import comm, noise
from vaescale.aggregate.information import evenly
from vaescale.aggregate.sampling import from_latents, image_of, parse_decoding
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError
from vaescale.evaluation.features import Extractor
from vaescale.evaluation.frechet import Moments, frechet_distance, moments
from vaescale.evaluation.quality import kernel_distance, overlap
from vaescale.mixtures.gaussian import Mixture
from vaescale.models.vae import to_unit
from vaescale.system import heartbeat
from vaescale.system.console import Progress
from vaescale.system.files import write_whole
from vaescale.trained import Trained, images_at

BATCH = 250
MOST_REFERENCES = 50_000
LEAST = 10  # pictures of a kind, for five neighbours and a covariance
MOST_COMPARED = 10_000  # by neighbours and kernels, whose cost grows with the square


class Kind(NamedTuple):
    """Pictures to judge: of what, how decoded, how many, and those of given places (int64 [B]) as [B, C, H, W] in [0, 1]."""

    name: str
    decode: str
    number: int
    pictures: Callable[[Tensor], Tensor]


def kinds(
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

    Distances of few pictures are too large, so that rows compare where there are as many held-out images as samples. Raises
    DataError where there are next to none.
    """
    model = trained.model
    device = next(model.parameters()).device
    numbers = evenly(len(val), count)
    if len(numbers) < LEAST:
        raise comm.known_to_all(
            DataError(f"{len(numbers)} held-out images are too few to judge; {LEAST} are needed")
        )

    def images(places: Tensor) -> Tensor:
        return to_unit(images_at(val, numbers[places]).to(device))

    def reconstructions(places: Tensor) -> Tensor:
        own = numbers[places]
        stream = noise.Stream(trained.recipe.seed, 0, own.to(device))
        x = model.target(images_at(val, own).to(device), stream)
        return _levels(model.likelihood.mean(model.reconstruct(x)))

    def samples(mixture: Mixture | None, decode: str) -> Callable[[Tensor], Tensor]:
        def draw(places: Tensor) -> Tensor:
            stream = noise.Stream(seed, 0, places.to(device))
            params = from_latents(model, mixture, stream, temperature)
            return _levels(image_of(model.likelihood, params, parse_decoding(decode), stream))

        return draw

    found = [
        Kind("held-out images", "", len(numbers), images),
        Kind("reconstructions", "mean", len(numbers), reconstructions),
    ]
    sources: dict[str, Mixture | None] = {"prior": None, **mixtures}
    for decode in decodings:
        found += [Kind(name, decode, count, samples(mixture, decode)) for name, mixture in sources.items()]
    return found


def judge(kinds: list[Kind], extractor: Extractor, references: Tensor) -> list[dict[str, Any]]:
    """A row for each kind. references: the training images' features [N, F]. All ranks call it.

    The Frechet distance takes all features; kernel distance, precision, recall, density and coverage equally many of both, at most
    10,000.
    """
    against = _moments(references)
    rows = []
    for kind in kinds:
        found = features_of(kind, extractor)
        own = _moments(found)

        def compare(kind: Kind = kind, found: Tensor = found, own: Moments = own) -> dict[str, Any]:
            fewer = min(len(found), len(references), MOST_COMPARED)
            some, others = (one[evenly(len(one), fewer)] for one in (references, found))
            return {
                "of": kind.name,
                "decode": kind.decode,
                "count": len(found),
                "frechet": frechet_distance(own, against),
                "kernel": kernel_distance(some, others),
                **overlap(some, others)._asdict(),
            }

        rows.append(comm.on_main(compare))
    return rows


def _moments(features: Tensor) -> Moments:
    """Of features [N, F] that every rank has, each rank's share of them by itself."""
    return moments(torch.split(features[comm.rank() :: comm.world_size()], BATCH))


@torch.no_grad()
def features_of(kind: Kind, extractor: Extractor) -> Tensor:
    """Float32 [N, F] in the order of the numbers, on every rank."""
    own = torch.arange(comm.rank(), kind.number, comm.world_size())
    words = f"{kind.name} {kind.decode}".strip()

    def extract() -> list[Tensor]:
        parts = []
        with Progress(words, len(own), shown=comm.is_main()) as progress:
            for number, places in enumerate(torch.split(own, BATCH), start=1):
                parts.append(extractor.of(kind.pictures(places)).float().cpu())
                heartbeat.beat("features")
                progress.update(min(number * BATCH, len(own)))
        return parts

    parts = comm.gather_object([part.numpy() for part in comm.together(extract)])
    everything = [np.concatenate(part) for part in parts if part]
    found = np.empty((kind.number, everything[0].shape[1]), dtype=np.float32)
    for rank, part in enumerate(everything):
        found[rank :: comm.world_size()] = part
    return torch.from_numpy(found)


def references_of(
    reader: ShardReader, extractor: Extractor, trained: Trained, cache: Path
) -> tuple[Tensor, bool]:
    """The features of the training images, at most 50,000 at equal distances, and whether they were in the cache; if not they
    are put there. All ranks call it. Raises DataError for too few images.
    """
    data, count = trained.recipe.data, min(MOST_REFERENCES, len(reader))
    if count < LEAST:
        raise comm.known_to_all(
            DataError(f"{count} training images are too few to compare with; {LEAST} are needed")
        )
    device = next(trained.model.parameters()).device
    read = (data.image_size, data.channels, str(data.crop), data.resample)
    words = json.dumps([extractor.identity, reader.index.data_hash, read, count])
    path = cache / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.safetensors"
    kept = comm.on_main(lambda: _kept(path, count))
    if kept is not None:
        return kept, True
    numbers = evenly(len(reader), count)

    def images(places: Tensor) -> Tensor:
        return to_unit(images_at(reader, numbers[places]).to(device))

    kind = Kind("training images", "", count, images)
    found = features_of(kind, extractor)
    comm.on_main(lambda: write_whole(path, to_bytes({"features": found})))
    return found, False


def _kept(path: Path, count: int) -> Tensor | None:
    try:
        features = from_bytes(path.read_bytes())["features"]
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
    sound = features.dtype == torch.float32 and features.ndim == 2 and len(features) == count
    return features if sound and bool(torch.isfinite(features).all()) else None


def _levels(images: Tensor) -> Tensor:
    """As 8-bit files would hold them."""
    return (255 * images.float().clamp(0, 1)).round() / 255
