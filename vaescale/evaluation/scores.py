"""Scores of single images under a trained model: how odd an image is. Of each score, a larger value means odd.

A likelihood alone ranks simple images of another data set as more likely than the training images (Nalisnick, Matsukawa, Teh,
Gorur & Lakshminarayanan 2019). Two scores correct for it: the likelihood ratio to a background model (Ren et al. 2019),
and the input complexity (Serra et al. 2020).
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale.config import Window
from vaescale.data.batch import Batch, Fault
from vaescale.data.pictures import encode
from vaescale.errors import UserError
from vaescale.evaluation.likelihood import Bound, refuse_without_bound
from vaescale.evaluation.measures import Seen
from vaescale.likelihoods.base import Likelihood
from vaescale.models.vae import VAE

RATIO, COMPLEXITY, CORRECTED = "likelihood_ratio_nats", "complexity_bits", "corrected_complexity_bits"
NOT_RANKED = ("bits_per_dim",)  # ranks images as the bound does
PROTOCOL = {
    "noise": "one draw of z, which depends on the recipe's seed and the number of the image in its split",
    "mse": "squared error per value of the means decoded from that draw",
    RATIO: "-ELBO minus the -ELBO of the background model, each with one draw (Ren et al. 2019)",
    COMPLEXITY: "length of the image as a lossless file, the format's header included",
    CORRECTED: "-ELBO of the 8-bit image in bits, minus complexity_bits (Serra et al. 2020); its zero has no meaning",
}
Compressor = Literal["png", "webp"]


class Background(NamedTuple):
    """The model that a likelihood ratio divides by, and the seed of its draws."""

    model: VAE
    seed: int


class Rows(NamedTuple):
    """The scores of a batch's usable images: names, classes int64 [N] (-1: none), values float64 [N, scores], and the faults
    of the others.
    """

    names: list[str]
    labels: list[int]
    values: NDArray[np.float64]
    faults: tuple[Fault, ...]


class Scores:
    """The measure of single images: it hands the rows of each batch to `take`, and its sums to `bound`.

    background: for the likelihood ratio; complexity: the compressor for the complexity; None for neither. The noise of an
    image depends on its slot, as in `evaluate`, so that the means over images are those of `evaluate`.
    """

    def __init__(
        self,
        model: VAE,
        take: Callable[[Rows, Batch], None],
        *,
        bound: Bound,
        background: Background | None = None,
        complexity: Compressor | None = None,
    ) -> None:
        self._model, self._take, self._bound = model, take, bound
        self._background, self._complexity = background, complexity
        self._names = score_names(model.likelihood, background=background, complexity=complexity)

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:  # noqa: ARG002
        """Score a batch."""
        terms = self._bound.added(seen)
        log_px, kl = terms.log_px.double(), terms.kl.double().sum(1)
        likelihood, dimensions = self._model.likelihood, math.prod(self._model.image_shape)
        columns = [kl - log_px, -log_px, kl, terms.squared_error.double() / dimensions]
        if not likelihood.reads_x:
            bits = (kl - log_px) / (dimensions * math.log(2)) + (likelihood.added_bits or 0.0)
            columns += [bits] if likelihood.added_bits is not None else []
            if self._background is not None:
                columns.append(kl - log_px - _neg_elbo(self._background, seen.batch))
            if self._complexity is not None:
                length = _file_bits(_as_modelled(seen, likelihood), seen.mask, self._complexity)
                columns += [length, bits * dimensions - length]
        used = seen.mask.cpu().numpy()
        assert len(columns) == len(self._names)
        values = torch.stack(columns, dim=1).cpu().numpy()[used]
        rows = np.flatnonzero(used).tolist()
        batch = seen.batch
        self._take(
            Rows([batch.keys[n] for n in rows], batch.labels[used].tolist(), values, batch.faults), batch
        )

    def metrics(self) -> dict[str, float]:
        """Nothing: the metrics are those of `bound`, which may count several data sets."""
        return {}


def score_names(
    likelihood: Likelihood, *, background: Background | None = None, complexity: Compressor | None = None
) -> tuple[str, ...]:
    """The names of an image's scores, as `evaluate` names their means.

    Raises UserError for corrections of a likelihood that fits sigma to each image, which gives no bound.
    """
    if likelihood.reads_x and (background is not None or complexity is not None):
        option = "--background" if background is not None else "--complexity"
        raise UserError(
            f"this likelihood fits sigma to each image, which gives no bound of log p(x) to correct; leave {option} out"
        )
    if complexity is not None and likelihood.window != Window():
        raise UserError(
            f"--complexity compresses 8-bit images, and this run has {likelihood.window.text()}; leave it out"
        )
    of = "profile_" if likelihood.reads_x else ""
    names = [f"neg_{of}elbo_nats", f"neg_{of}log_px_nats", "kl_nats", "mse"]
    names += [] if likelihood.reads_x or likelihood.added_bits is None else ["bits_per_dim"]
    names += [RATIO] if background is not None else []
    return (*names, *((COMPLEXITY, CORRECTED) if complexity is not None else ()))


def refuse_background(model: VAE, background: VAE) -> None:
    """Raise UserError for a background model whose likelihood is not comparable with the model's."""
    refuse_without_bound(background, "give another run as --background")
    if background.likelihood.reads_x:
        raise UserError("--background fits sigma to each image, which gives no bound; give another run")
    if background.image_shape != model.image_shape:
        shapes = ["x".join(map(str, one.image_shape)) for one in (background, model)]
        raise UserError(
            f"--background is a model of {shapes[0]} images and RUN one of {shapes[1]}; both must have one shape"
        )
    windows = [one.window.text() for one in (background, model)]
    if background.window != model.window:
        raise UserError(
            f"--background is a model of {windows[0]} and RUN one of {windows[1]}; both must have one data.range"
        )
    kinds = [(one.likelihood.measure, one.likelihood.levels) for one in (background, model)]
    if kinds[0][0] != kinds[1][0] or (kinds[0][0] == "mass" and kinds[0] != kinds[1]):
        described = [kind if kind == "density" else f"mass over {levels} levels" for kind, levels in kinds]
        raise UserError(
            f"--background has a {described[0]} and RUN a {described[1]}; their ratio has no meaning, give a run with a "
            f"{described[1]}"
        )


class Extremes:
    """The images with the highest and the lowest scores so far, `most` of each. Slots, names and values belong together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[float, int, str, Tensor]] = []

    def add(self, scores: NDArray[np.float64], names: list[str], batch: Batch) -> None:
        """Add the usable images of a batch. scores [N]."""
        if not self._most:  # a slice of the last 0 is everything
            return
        usable = batch.mask.nonzero()[:, 0]
        order = np.argsort(scores, kind="stable")
        for row in dict.fromkeys([*order[: self._most].tolist(), *order[-self._most :].tolist()]):
            place = int(usable[row])
            image = batch.images[place].clone()  # not the whole batch
            self._kept.append((float(scores[row]), int(batch.slots[place]), names[row], image))
        self._cut()

    def merge(self, others: list["Extremes"]) -> None:
        """Take the images that other processes kept."""
        self._kept = [one for other in others for one in other._kept]
        self._cut()

    def highest(self) -> list[tuple[float, int, str, Tensor]]:
        """(score, slot, name, image uint8 [C, H, W]) of the highest, the highest first."""
        return self._kept[: -self._most - 1 : -1]

    def lowest(self) -> list[tuple[float, int, str, Tensor]]:
        """The same of the lowest, the lowest first."""
        return self._kept[: self._most]

    def _cut(self) -> None:
        self._kept.sort(key=lambda one: math.inf if math.isnan(one[0]) else one[0])
        if len(self._kept) > 2 * self._most:
            self._kept = self._kept[: self._most] + self._kept[-self._most :]


def _neg_elbo(background: Background, batch: Batch) -> Tensor:
    """The background model's -ELBO, float64 [B]."""
    seen = Seen(background.model, batch, seed=background.seed)
    terms = background.model.terms(seen.x, seen.drawn, seen.mask, measured=False)
    return terms.kl.double().sum(1) - terms.log_px.double()


def _as_modelled(seen: Seen, likelihood: Likelihood) -> Tensor:
    """The 8-bit images that the likelihood gives a probability to: binarized for black and white, else as they were read."""
    if likelihood.measure == "mass":
        return (255 * seen.x).round().to(torch.uint8).cpu()
    return seen.batch.images.cpu()


def _file_bits(images: Tensor, mask: Tensor, compressor: Compressor) -> Tensor:
    """The length in bits of each image uint8 [B, C, H, W] as a file, float64 [B]; 0 where the mask is false."""
    pictures = images.permute(0, 2, 3, 1).contiguous().numpy()
    lengths = [
        8.0 * len(encode(picture, compressor)) if used else 0.0
        for picture, used in zip(pictures, mask.tolist(), strict=True)
    ]
    return torch.tensor(lengths, dtype=torch.float64, device=mask.device)
