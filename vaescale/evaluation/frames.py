"""The bound of sequences, frame by frame, and that of the horizon alone.

q(z_t | x_1..t) of the context's latents sees the context alone. With c frames given, the terms after them are therefore a bound by
themselves, on the density of what the model generates after a context:

    log p(x_c+1..T | x_1..c) >= sum_t>c E_q log p(x_t | x_1..t-1, z_2..t) - KL_t        nats
"""

import math
from collections.abc import Callable

import torch

from vaescale import comm
from vaescale.errors import DataError
from vaescale.evaluation.likelihood import bits_per_dim
from vaescale.evaluation.measures import Seen
from vaescale.models.sequence_model import SequenceModel


class FrameBounds:
    """The one-sample ELBO of each predicted frame. Gives horizon_neg_elbo_nats and horizon_bits_per_dim, and fills `table`."""

    table: list[dict[str, float]]
    """frame (counted from 1), neg_elbo_nats, log_px_nats, kl_nats and mse of each predicted frame; known after `metrics`."""

    def __init__(self, model: SequenceModel) -> None:
        self._model, self.table = model, []
        device = next(model.parameters()).device
        self._sums = torch.zeros(3, model.predicted_frames, dtype=torch.float64, device=device)
        self._number = torch.zeros(1, dtype=torch.float64, device=device)

    @property
    def protocol(self) -> dict[str, str]:
        """What the metrics are."""
        context = self._model.context
        which = f"the bound of the {self._model.frames - context} frames after the context of {context}, given these"
        return dict.fromkeys((self._name, "horizon_bits_per_dim"), which)

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:  # noqa: ARG002
        """Add a batch."""
        model, params = self._model, seen.drawn.params
        error = (seen.x[:, 1:] - model.means(params)).square().flatten(2).mean(2)
        terms = (model.frame_log_px(seen.x, params, seen.mask), model.frame_kl(seen.encoded), error)
        rows = torch.stack([each.double() for each in terms])  # [3, B, S]
        self._sums += torch.where(seen.mask[None, :, None], rows, 0.0).sum(1)
        self._number += seen.mask.sum()

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks."""
        total = comm.all_reduce_sum(torch.cat([self._sums.flatten(), self._number]))
        if not total[-1]:
            raise comm.known_to_all(
                DataError("no sequence could be used; `vaescale verify-shards DIR --deep` names the faults")
            )
        model, likelihood = self._model, self._model.likelihood
        log_px, kl, error = (total[:-1] / total[-1]).view(3, -1)
        rows = zip((kl - log_px).tolist(), log_px.tolist(), kl.tolist(), error.tolist(), strict=True)
        names = ("neg_elbo_nats", "log_px_nats", "kl_nats", "mse")
        self.table = [
            {"frame": frame, **dict(zip(names, row, strict=True))} for frame, row in enumerate(rows, start=2)
        ]
        nats = float((kl - log_px)[model.context - 1 :].sum())
        values = (model.frames - model.context) * math.prod(model.image_shape)
        metrics = {self._name: nats}
        if not likelihood.reads_x and likelihood.added_bits is not None:
            metrics["horizon_bits_per_dim"] = bits_per_dim(nats, values, likelihood.added_bits)
        return metrics

    @property
    def _name(self) -> str:
        return f"horizon_neg_{'profile_' if self._model.likelihood.reads_x else ''}elbo_nats"
