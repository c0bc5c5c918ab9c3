"""The size of an image's code without writing it, as a measure of `evaluate`."""

import math
from collections.abc import Callable

import torch

from vaescale import comm, noise
from vaescale.compression.bits_back import Codec
from vaescale.errors import UserError
from vaescale.evaluation.measures import Seen
from vaescale.mixtures.gaussian import Mixture
from vaescale.models.vae import VAE


class CodeLength:
    """The mean length of the images' code. Raises UserError for a model whose images have none."""

    def __init__(self, model: VAE, *, seed: int, mixture: Mixture | None = None) -> None:
        """mixture: the prior in place of N(0, I), as in `Codec`; the metrics are then called code_length_gmm."""
        if model.likelihood.measure == "density":
            raise UserError(
                f"--code-length needs a mass over levels, and likelihood.kind (={model.likelihood.config.kind!r}) is a density; leave it "
                "out"
            )
        self._codec, self._seed = Codec(model, mixture=mixture), seed
        self._name = "code_length" if mixture is None else "code_length_gmm"
        self._prior = "the prior" if mixture is None else f"the mixture of {len(mixture.weights)}"
        self._sums = torch.zeros(2, dtype=torch.float64)

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:
        """Add a batch."""
        rows = torch.nonzero(seen.mask).flatten()
        if not len(rows):
            return
        for done, part in enumerate(torch.split(rows, self._codec.batch)):
            levels = (seen.x[part].double() * (self._codec.pixels.levels - 1)).round().long().cpu()
            stream = noise.Stream(self._seed, 0, seen.slots[part].cpu())
            batch = seen.batch
            condition = batch.vectors if self._codec.vector_size else batch.labels
            assert condition is not None
            of_part = condition[part.to(condition.device)].cpu().numpy()
            lengths = self._codec.lengths(levels.numpy(), stream, of_part)
            self._sums += torch.tensor([float(lengths.total.sum()), len(part)], dtype=torch.float64)
            report(min(1.0, (done + 1) * self._codec.batch / len(rows)))

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks."""
        bits, images = comm.all_reduce_sum(self._sums).tolist()
        mean = bits / max(1.0, images)
        return {
            f"{self._name}_nats": mean * math.log(2),
            f"{self._name}_bits_per_dim": mean / math.prod(self._codec.image_shape),
        }

    @property
    def protocol(self) -> dict[str, str]:
        """What the metrics are, by name."""
        return {
            f"{self._name}_nats": "length of the code of `compress` per image, float64: -log of the whole-number masses of x given z and of "
            f"z under {self._prior}, less those of z under the posterior; without keys, labels, checksums and initial bits",
            f"{self._name}_bits_per_dim": f"{self._name}_nats / (D ln 2)",
        }
