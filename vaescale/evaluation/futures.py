"""Futures that a model of sequences generates after a context, against the frames that did follow: best of N, and the mean of N.

The best of N futures of a sequence has the highest mean score over the horizon, by PSNR and by SSIM each (Denton & Fergus 2018,
section 4.1, with N = 100). It rises with N, and says that the truth is among the futures; the mean falls as these differ.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.errors import DataError
from vaescale.evaluation.measures import Seen
from vaescale.evaluation.reconstruction import psnr, ssim
from vaescale.likelihoods.base import LocationScale
from vaescale.models.sequence_model import SequenceModel

SCORES = {"psnr_db": psnr, "ssim": ssim}
LEVEL = "sigma"
MORE_IS_BETTER = (
    *(f"{which}_{score}" for which in ("best", "mean_future", "copied") for score in SCORES),
    "futures_variance",
)
PROTOCOL = {
    "best_psnr_db": "of each context's futures, the one with the highest mean over the horizon; their means in [0, 1], mean over sequences and frames",
    "mean_future_psnr_db": "mean over the futures",
    "copied_psnr_db": "the last frame of the context in the place of each future frame: what a prediction has to beat",
    "futures_variance": "unbiased variance of a value over the futures of one context, mean over values, frames and sequences",
}


@torch.no_grad()
def future(model: SequenceModel, x: Tensor, slots: Tensor, *, seed: int, number: int) -> Tensor:
    """The means [B, horizon, C, H, W] in [0, 1] of future `number` after the contexts of x, a function of seed, slot and number."""
    params = model.generate(x, noise.Stream(seed, number, slots))
    return model.means(params).float().clamp(0, 1)


class Futures:
    """Scores of N futures of each sequence: the metrics of PROTOCOL, and those of SSIM where frames are large enough.

    `NAME_standard_error` is that of a metric over the sequences. Raises DataError when no sequence can be used.
    """

    table: list[dict[str, float]]
    """The metrics by frame after the context (counted from 1), with their standard errors; known after `metrics`."""

    def __init__(self, model: SequenceModel, *, number: int, seed: int) -> None:
        self._model, self._number, self._seed = model, number, seed
        self.table = []
        self._names: list[str] = []
        self._sums: Tensor | None = None

    @property
    def protocol(self) -> dict[str, str]:
        """What the metrics are."""
        of = f" ({self._number} futures of each context, which is given with its own latents)"
        return {name: meaning + of for name, meaning in PROTOCOL.items()}

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:
        """Add a batch."""
        values = self._scores(seen.x, seen.slots, report)
        self._names = list(values)
        by_frame = torch.stack([*values.values()], dim=2)  # [B, horizon, names]
        rows = torch.cat([by_frame, by_frame.mean(1, keepdim=True)], dim=1).flatten(1)
        rows = torch.where(seen.mask[:, None], rows, 0.0)
        sums = torch.cat([rows.sum(0), rows.square().sum(0), seen.mask.sum().double()[None]])
        self._sums = sums if self._sums is None else self._sums + sums

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks."""
        total = None if self._sums is None else comm.all_reduce_sum(self._sums)
        if total is None or not total[-1]:
            raise comm.known_to_all(
                DataError("no sequence could be used; `vaescale verify-shards DIR --deep` names the faults")
            )
        count = total[-1]
        mean, square = (total[:-1] / count).view(2, -1, len(self._names))
        error = ((square - mean.square()).clamp_min(0) / (count - 1).clamp_min(1)).sqrt()
        rows = [self._row(*each) for each in zip(mean.tolist(), error.tolist(), strict=True)]
        self.table = [{"frame": frame, **row} for frame, row in enumerate(rows[:-1], start=1)]
        return {**rows[-1], "futures": float(self._number)}

    def _row(self, means: list[float], errors: list[float]) -> dict[str, float]:
        with_errors = {
            f"{name}_standard_error": error for name, error in zip(self._names, errors, strict=True)
        }
        return dict(zip(self._names, means, strict=True)) | with_errors

    def _scores(self, x: Tensor, slots: Tensor, report: Callable[[float], None]) -> dict[str, Tensor]:
        """Each metric of each sequence and frame, float64 [B, horizon]."""
        model = self._model
        truth = x[:, model.context :]
        scores: dict[str, list[Tensor]] = {name: [] for name in SCORES}
        total = square = torch.zeros_like(truth, dtype=torch.float64)
        for number in range(self._number):
            means = future(model, x, slots, seed=self._seed, number=number)
            for name, values in _scores_of(truth, means).items():
                scores[name].append(values)
            total, square = total + means, square + means.double().square()
            report((number + 1) / self._number)
        result = {}
        for name, values_of in scores.items():
            if values_of:
                values = torch.stack(values_of, dim=1)  # [B, N, horizon]
                best = values.mean(2).argmax(1)
                result[f"best_{name}"] = values[torch.arange(len(values)), best]
                result[f"mean_future_{name}"] = values.mean(1)
        copied = x[:, model.context - 1 : model.context].expand_as(truth)
        result |= {f"copied_{name}": values for name, values in _scores_of(truth, copied).items()}
        variance = (square - total.square() / self._number) / max(1, self._number - 1)
        return result | {"futures_variance": variance.clamp_min(0).flatten(2).mean(2)}


def _scores_of(truth: Tensor, means: Tensor) -> dict[str, Tensor]:
    """The scores of each frame, [B, horizon] each, of frames [B, horizon, C, H, W]."""
    shape = truth.shape[:2]
    values = {
        name: score(truth.flatten(0, 1).float(), means.flatten(0, 1).float())
        for name, score in SCORES.items()
    }
    return {name: value.view(shape) for name, value in values.items() if value is not None}


class Strips(NamedTuple):
    """Pictures of sequences. rows: named frames [T, C, H, W] in [0, 1] of each. The row named LEVEL, [T, 1, H, W], has standard deviations in
    their place, NaN where a frame has none; level: what they are, None without such a row.
    """

    rows: list[list[tuple[str, Tensor]]]
    level: str | None


@torch.no_grad()
def strips(
    model: SequenceModel, images: Tensor, slots: Tensor, *, seed: int, futures: int = 1, shown: int = 1
) -> Strips:
    """Rows for each of some sequences: the truth, the decoded means given the frames before each, the best of several futures by PSNR, some
    futures after the context, and the decoder's standard deviation where it differs between values or frames.

    images: as stored [B, T, C, H, W]; slots: int64 [B]. The first frame, or the context, is the sequence's own.
    """
    device, context = next(model.parameters()).device, model.context
    slots = slots.to(device)
    x = model.target(images.to(device), noise.Stream(seed, 0, slots))
    params = model.reconstruct(x)
    decoded = torch.cat([x[:, :1], model.means(params).to(x)], dim=1)
    level = _level(model, x, params)
    drawn = [future(model, x, slots, seed=seed, number=number) for number in range(futures)]
    truth = x[:, context:].float()
    score = torch.stack([_scores_of(truth, each)["psnr_db"].mean(1) for each in drawn])  # [N, B]
    best = score.argmax(0)
    result = []
    for row in range(len(x)):
        given = x[row, :context].float()

        def after(number: int, row: int = row, given: Tensor = given) -> Tensor:
            return torch.cat([given, drawn[number][row]])

        rows = [("truth", x[row]), ("decoded", decoded[row])]
        if futures > 1:
            rows.append((f"best of {futures}", after(int(best[row]))))
        rows += [(f"future {number + 1}", after(number)) for number in range(min(shown, futures))]
        rows = [(name, frames.float().clamp(0, 1).cpu()) for name, frames in rows]
        if level is not None:
            values = level[1][row].float().cpu()
            rows.append((LEVEL, torch.cat([torch.full_like(values[:1], torch.nan), values])))
        result.append(rows)
    return Strips(result, None if level is None else level[0])


def _level(model: SequenceModel, x: Tensor, params: Tensor) -> tuple[str, Tensor] | None:
    """The decoder's standard deviation with a description, the mean over channels [B, S, 1, H, W]; None where all values have one, or none."""
    likelihood, images = model.likelihood, model.images_of(x, params)
    named = likelihood.noise_map(images[1])
    if likelihood.reads_x and isinstance(likelihood, LocationScale):
        powered = (images[0] - likelihood.mean(images[1])).abs() ** likelihood.state.power
        every = torch.ones(len(powered), dtype=torch.bool, device=powered.device)
        sigma = torch.exp(likelihood.state.log_sigma(powered, None, every))
        named = "sigma of each frame", sigma.expand_as(powered)
    if named is None:
        return None
    return named[0], named[1].mean(1).view(*params.shape[:2], 1, *model.image_shape[1:])
