"""One optimizer step: the loss goes through the prepared module, so that its gradients are averaged over ranks."""

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.evaluation.likelihood import column_sums, model_metrics
from vaescale.models.vae import VAE
from vaescale.objectives import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepSums(NamedTuple):
    """This rank's share of a step, on the device. sums float64: what `column_sums` sums; pieces: the loss and its pieces,
    float64 [] each, times their images.

    grad_norm [] is the global gradient's, before clipping.
    """

    sums: Tensor
    pieces: dict[str, Tensor]
    grad_norm: Tensor
    global_batch: int


def train_step(
    accelerator: "Accelerator",
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    *,
    objective: Objective,
    skips: Callable[[Tensor, Tensor], Tensor],
    precision: str,
    seed: int,
    step: int,
    clip_norm: float | None,
) -> StepSums:
    """Forward and backward over the micro-batches, one gradient exchange, one optimizer step.

    precision: `bf16` by autocast in the forward pass, or `fp32`. Weights and the loss are float32 in both.
    skips: from the rank's loss [] and the gradient's norm [], 1 where the optimizer must leave the weights as they are.
    """
    optimizer.zero_grad()
    sums: list[Tensor] = []
    pieces: list[dict[str, Tensor]] = []
    for number, batch in enumerate(micro_batches, start=1):
        images, slots, mask = (
            tensor.to(accelerator.device, non_blocking=True)
            for tensor in (batch.images, batch.slots, batch.mask)
        )
        stream = noise.Stream(seed, step, slots)
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16"):
                terms = model(
                    images, stream, mask, objective.importance_samples, objective.doubly_reparameterized
                )
            loss, named = objective(terms, stream)
            accelerator.backward(loss / len(micro_batches))
        sums.append(column_sums(terms, mask))
        named = {"loss_nats": loss, **named}
        pieces.append({name: value.detach().double() * len(slots) for name, value in named.items()})
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
    total = {name: torch.stack([part[name] for part in pieces]).sum() for name in pieces[0]}
    # The fused optimizers read it on the device: where it is 1, nothing moves.
    own: Any = getattr(optimizer, "optimizer", optimizer)
    own.found_inf = skips(total["loss_nats"], grad_norm)
    optimizer.step()
    accelerator.unwrap_model(model).likelihood.end_step()
    global_batch = sum(len(batch.slots) for batch in micro_batches) * comm.world_size()
    return StepSums(torch.stack(sums).sum(0), total, grad_norm, global_batch)


def step_metrics(result: StepSums, model: VAE) -> dict[str, float]:
    """This step's means over the global batch. Nats are per image; mse and bits are per value."""
    columns = len(result.sums)
    sums = comm.all_reduce_sum(torch.cat([result.sums, torch.stack(list(result.pieces.values()))]))
    metrics = model_metrics(model, sums[: columns - 1] / sums[columns - 1])
    pieces = zip(result.pieces, sums[columns:].tolist(), strict=True)
    metrics |= {name: value / result.global_batch for name, value in pieces}
    metrics["grad_norm"] = float(result.grad_norm)
    return {f"train/{name}": value for name, value in metrics.items()}
