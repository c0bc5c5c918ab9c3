"""The Frechet distance of futures from the training sequences, by features of single frames and of videos.

    frames   each frame after the context is a point
    videos   each sequence is a point: the context, which is true, with what follows it, so that a jump between them counts

Rows are true sequences, which is what a perfect model has, one future of each context, as decoder means and with the decoder's noise,
and the last frame of the context in the place of each frame after it. All have equally many points: distances of few are too large.

Videos: Unterthiner et al. 2018, whose features (I3D) are not here. The memory does not grow with the number of sequences.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.batch import Request
from vaescale.data.config import DataConfig
from vaescale.data.lookup import evenly
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError
from vaescale.evaluation.comparison import LEAST, cache_name, keep, to_levels
from vaescale.evaluation.features import Extractor
from vaescale.evaluation.frechet import Moments, Sums, frechet_distance
from vaescale.evaluation.measures import Seen
from vaescale.models.sequence_model import SequenceModel
from vaescale.models.units import to_unit
from vaescale.system import heartbeat
from vaescale.system.console import Progress

BATCH = 32  # sequences
MOST_REFERENCES = 10_000
FRAMES, VIDEOS = "frames", "videos"
TRUE, MEANS, DRAWS, COPIED = "true", "means", "draws", "copied"
ROWS = {
    TRUE: "the true frames: what a perfect model has",
    MEANS: "the decoder's means of one future of each context",
    DRAWS: "a draw of the decoder's noise around these means",
    COPIED: "the last frame of the context in the place of each future frame",
}

Levels = Mapping[str, Extractor]
"""The extractors by what is a point: FRAMES, and VIDEOS where there is one."""


class References(NamedTuple):
    """The moments of training sequences by level, the number of these sequences, and the hash of their set."""

    moments: dict[str, Moments]
    sequences: int
    data_hash: str


class FutureDistance:
    """The Frechet distances of a model's futures, named `frechet_LEVEL_ROW`. Fills `table`, a row for each of ROWS."""

    table: list[dict[str, str | float]]
    """of, sequences, and the distance of each level; known after `metrics`."""

    def __init__(self, model: SequenceModel, levels: Levels, references: References, *, seed: int) -> None:
        self._model, self._levels, self._references, self._seed = model, levels, references, seed
        self._sums = {(level, row): Sums() for level in levels for row in ROWS}
        self._number = torch.zeros(1, dtype=torch.float64, device=next(model.parameters()).device)
        self.table = []

    @property
    def protocol(self) -> dict[str, str]:
        """What the metrics are, and which features they have."""
        context, frames = self._model.context, self._model.frames
        points = {
            FRAMES: f"a point is one of the frames {context + 1} to {frames}",
            VIDEOS: f"a point is a sequence of {frames} frames, the first {context} of them true",
        }
        against = f"against {self._references.sequences} training sequences, between Gaussians, float64"
        of = {
            f"frechet_{level}_{row}": f"{meaning}; {points[level]}; {against}"
            for level in self._levels
            for row, meaning in ROWS.items()
        }
        return of | {
            f"frechet_{level}": f"features: {extractor.description}, sha256 {extractor.identity[:12]}"
            for level, extractor in self._levels.items()
        }

    @property
    def identity(self) -> dict[str, str]:
        """The hash of the features by level."""
        return {level: extractor.identity for level, extractor in self._levels.items()}

    @property
    def measured(self) -> dict[str, str]:
        """The conditions under which two runs' metrics are comparable, by metric."""
        references = self._references
        return {
            f"frechet_{level}_{row}": f"features {extractor.identity[:12]}, {references.sequences} training sequences {references.data_hash[:12]}"
            for level, extractor in self._levels.items()
            for row in ROWS
        }

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:  # noqa: ARG002
        """Add a batch."""
        mask = seen.mask
        if not mask.any():
            return
        model, context = self._model, self._model.context
        true = to_unit(seen.batch.images.to(mask.device), model.window)[mask]
        stream = noise.Stream(self._seed, 0, seen.slots[mask])
        params = model.generate(seen.x[mask], stream)
        given = true[:, :context]
        after = {
            TRUE: true[:, context:],
            MEANS: to_levels(model.means(params), model.window),
            DRAWS: to_levels(model.frame_draws(params, stream), model.window),
            COPIED: true[:, context - 1 : context].expand_as(true[:, context:]),
        }
        for row, frames in after.items():
            for level, features in _features(self._levels, given, frames.to(true)):
                self._sums[level, row].add(features)
        self._number += mask.sum()

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks. Raises DataError for fewer than LEAST sequences."""
        number = int(comm.all_reduce_sum(self._number))
        if number < LEAST:
            raise comm.known_to_all(
                DataError(f"{number} sequences are too few for a Frechet distance; {LEAST} are needed")
            )
        against = self._references.moments
        distances = {
            (level, row): frechet_distance(sums.moments(), against[level])
            for (level, row), sums in self._sums.items()
        }
        self.table = [
            {"of": row, "sequences": number, **{level: distances[level, row] for level in self._levels}}
            for row in ROWS
        ]
        return {f"frechet_{level}_{row}": value for (level, row), value in distances.items()}


def references_of(
    reader: ShardReader,
    levels: Levels,
    config: DataConfig,
    *,
    context: int,
    device: torch.device,
    cache: Path,
) -> References:
    """The moments of at most 10,000 evenly spaced sequences of a set, the first T frames of each. All ranks call it.

    config: the reader's options, on which the moments depend. Keeps them in the folder `cache`. Raises DataError for too few sequences.
    """
    count = min(MOST_REFERENCES, len(reader))
    paths = {
        name: cache / cache_name(extractor, reader, config, [name, context, *reader.form.shape, count])
        for name, extractor in levels.items()
    }
    kept = comm.on_main(lambda: {name: _kept(path) for name, path in paths.items()})
    missing = {name: levels[name] for name, moments in kept.items() if moments is None}
    sums = {name: Sums() for name in missing}
    if missing:

        def read() -> int:
            number = 0
            with torch.no_grad():
                for sequences in _sequences(reader, count, device):
                    for name, features in _features(missing, sequences[:, :context], sequences[:, context:]):
                        sums[name].add(features)
                    number += len(sequences)
            return number

        number = sum(comm.gather_object(comm.together(read)))
        if number < LEAST:
            raise comm.known_to_all(
                DataError(f"{number} training sequences are too few to compare with; {LEAST} are needed")
            )
    found = {name: moments or sums[name].moments() for name, moments in kept.items()}
    for name in missing:
        _keep(paths[name], found[name])
    frames = reader.form.shape[0] - context
    return References(found, found[FRAMES].images // frames, reader.index.data_hash)


def _features(levels: Levels, given: Tensor, after: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The features by level of frames that follow a context, each [B, ., C, H, W] in [0, 1]."""
    for name, extractor in levels.items():
        yield (
            name,
            extractor.of(after.flatten(0, 1) if name == FRAMES else torch.cat([given, after], dim=1)),
        )


def _sequences(reader: ShardReader, count: int, device: torch.device) -> Iterator[Tensor]:
    """This rank's share of `count` evenly spaced sequences in [0, 1], without those that cannot be used."""
    numbers = evenly(len(reader), count)[comm.rank() :: comm.world_size()]
    with Progress(
        "features of training sequences", len(numbers), unit="sequences", shown=comm.is_main()
    ) as progress:
        done = 0
        for part in torch.split(numbers, BATCH):
            fetched = reader.__getitems__(Request(np.asarray(part), refill=False))
            heartbeat.beat("features")
            yield to_unit(fetched.images[fetched.usable].to(device), reader.window)
            done += len(part)
            progress.update(done)


def _keep(path: Path, moments: Moments) -> None:
    number = torch.tensor([moments.images], dtype=torch.int64)
    content = {"mean": moments.mean, "covariance": moments.covariance, "number": number}
    comm.on_main(lambda: keep(path, to_bytes(content)))


def _kept(path: Path) -> Moments | None:
    """The moments in a cache file, or None if the file is missing or damaged."""
    try:
        content = from_bytes(path.read_bytes())
        mean, covariance, number = content["mean"], content["covariance"], int(content["number"])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError):
        return None
    sound = mean.ndim == 1 and covariance.shape == (len(mean), len(mean)) and number >= LEAST
    sound = sound and {mean.dtype, covariance.dtype} == {torch.float64}
    return Moments(mean, covariance, number) if sound and bool(torch.isfinite(covariance).all()) else None
