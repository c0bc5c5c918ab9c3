"""One optimizer step: the loss goes through the wrapped module, so that its gradients are averaged over ranks."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.evaluation.likelihood import column_sums, model_metrics
from vaescale.models.shown import Shown
from vaescale.models.vae import VAE
from vaescale.objectives.base import Objective
from vaescale.system import heartbeat
from vaescale.training.config import Precision
from vaescale.training.rival import Rival
from vaescale.training.strategies.base import Strategy, Verdict

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepSums(NamedTuple):
    """This rank's sums of a step, on the device.

    sums: float64, see `column_sums`, and pieces: the loss and its pieces, float64 [] each, multiplied by the number of their
    images; None and empty for a step that is not logged. loss []: this rank's mean over its micro-batches. grad_norm []: the norm of
    the global gradient, before clipping.
    """

    sums: Tensor | None
    pieces: dict[str, Tensor]
    loss: Tensor
    grad_norm: Tensor
    global_batch: int


def train_step(
    strategy: Strategy,
    micro_batches: list[Batch],
    *,
    objective: Objective,
    judge: Callable[[Tensor, Tensor], Verdict],
    scale: Tensor | None = None,
    rival: Rival | None = None,
    precision: Precision,
    seed: int,
    step: int,
    logged: bool = True,
) -> StepSums:
    """Forward and backward over the micro-batches, one gradient exchange, one optimizer step; of both players, if there are two.

    precision: of the forward pass (see `AUTOCAST`); weights and loss are always float32. judge: maps the rank's loss [] and the
    gradient's norm [] to the verdict. scale []: factor of the loss in the backward pass. logged: whether `step_metrics` will read
    the result; what only it reads is not computed otherwise. rival: the second player of an adversarial objective.
    """
    device = strategy.device
    sums: list[Tensor] = []
    losses: list[Tensor] = []
    pieces: list[dict[str, Tensor]] = []
    seen: list[tuple[Shown, noise.Stream]] = []
    plays = rival is not None and rival.player.plays(step)
    for number, batch in enumerate(micro_batches, start=1):
        images, slots, mask = (
            tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.slots, batch.mask)
        )
        stream = noise.Stream(seed, step, slots)
        heartbeat.beat("the forward pass")
        with strategy.micro_batch(last=number == len(micro_batches)):
            condition = strategy.model.condition_of(batch.labels, batch.vectors)
            terms = strategy.forward(
                images,
                stream,
                mask,
                objective.importance_samples,
                objective.doubly_reparameterized,
                AUTOCAST[precision],
                logged,
                *(() if condition is None else (condition,)),
            )
            loss, named = objective(terms, stream)
            share = loss / len(micro_batches) if len(micro_batches) > 1 else loss
            heartbeat.beat("the backward pass and the exchange of gradients")
            strategy.backward(share if scale is None else share * scale)
        losses.append(loss.detach())
        if plays:
            assert isinstance(terms.shown, Shown)
            seen.append((terms.shown.detached(), stream))
        if logged:
            sums.append(column_sums(terms, mask, codes=strategy.model.num_codes))
            named = {"loss_nats": loss, **named}
            pieces.append({name: value.detach().double() * len(slots) for name, value in named.items()})
    total = {name: _sum([values[name] for values in pieces]) for name in pieces[0]} if logged else {}
    num_images = sum(len(batch.slots) for batch in micro_batches)
    loss = _sum(losses)
    if rival is not None and plays:
        heartbeat.beat("the discriminators' passes")
        played = rival.play(seen)
        loss = loss + played.faults
        figures = zip(rival.model.names(), played.figures.double() * num_images, strict=True)
        total |= dict(figures) if logged else {}
    verdict = strategy.step(step, partial(judge, loss))
    if rival is not None and plays:
        rival.finish(played, verdict)
    global_batch = num_images * comm.world_size()
    mean_loss = loss / len(micro_batches) if len(micro_batches) > 1 else loss
    return StepSums(_sum(sums) if logged else None, total, mean_loss, verdict.grad_norm, global_batch)


def step_metrics(result: StepSums, model: VAE) -> dict[str, float]:
    """Means of a logged step over the global batch. Nats are per image; mse and bits are per value."""
    assert result.sums is not None
    columns = len(result.sums)
    sums = comm.all_reduce_sum(torch.cat([result.sums, torch.stack(list(result.pieces.values()))]))
    metrics = model_metrics(model, sums[: columns - 1] / sums[columns - 1])
    pieces = zip(result.pieces, sums[columns:].tolist(), strict=True)
    metrics |= {name: value / result.global_batch for name, value in pieces}
    metrics["grad_norm"] = float(result.grad_norm)
    return {f"train/{name}": value for name, value in metrics.items()}


def _sum(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)
