"""Several measures of a data set in one pass over its images: what they share is computed once for each batch."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from vaescale import noise
from vaescale.data.batch import Batch
from vaescale.models.vae import VAE, Encoded, Inferred


class Seen:
    """A batch of images, and what the model makes of it; each is computed when a measure first asks for it.

    slots int64 [B]: the images' numbers; mask bool [B] is false for padding and for images that cannot be used; skipped: the number of
    the latter; x [B, C, H, W]: from `VAE.target`; batch: as it was read; model: with the images' conditions, if it has any.
    """

    def __init__(self, model: VAE, batch: Batch, *, seed: int) -> None:
        device = next(model.parameters()).device
        self.model = model.given(model.condition_of(batch.labels, batch.vectors))
        self.batch, self.skipped = batch, len(batch.faults)
        self.slots, self.mask = batch.slots.to(device), batch.mask.to(device)
        self.stream = noise.Stream(seed, 0, self.slots)
        self.x: Tensor = model.target(batch.images.to(device), self.stream)

    @cached_property
    def encoded(self) -> Encoded:
        """What the encoder makes of x."""
        return self.model.encode(self.x)

    @cached_property
    def drawn(self) -> Inferred:
        """One draw from q(z|x), without its log weight."""
        return self.model.infer(self.encoded, self.stream, 1, False, weighted=False)

    @cached_property
    def params(self) -> Tensor:
        """The likelihood's raw parameters from the means of q(z|x)."""
        return self.model.decode_means(self.encoded)


class Measure(Protocol):
    """Sums over images of what is to be known of them."""

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:
        """Add this rank's next batch. report: called with the share of it that is done, where that takes long."""

    def metrics(self) -> dict[str, float]:
        """The metrics of all images over all ranks, by name. All ranks call it. Raises DataError when no image can be used."""


@torch.no_grad()
def measure(
    model: VAE,
    batches: Iterable[Batch],
    measures: Sequence[Measure],
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Take all measures of the images in one pass, in evaluation mode; the noise of an image depends on seed and image number only.

    progress: called with the number of this rank's images that are done.
    """
    was_training = model.training
    model.eval()
    done = reported = 0

    def report(share: float) -> None:
        nonlocal reported
        if progress is not None and (now := done + int(share * len(batch.slots))) > reported:
            reported = now
            progress(now)

    for batch in batches:
        seen = Seen(model, batch, seed=seed)
        for each in measures:
            each.add(seen, report)
        report(1.0)
        done += len(batch.slots)
    model.train(was_training)
    return {name: value for each in measures for name, value in each.metrics().items()}
