"""One optimizer step: the loss goes through the prepared module, so that its gradients are averaged over ranks."""

import contextlib
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.errors import TrainingStopped
from vaescale.evaluation.likelihood import metric_columns, model_metrics
from vaescale.models.vae import VAE
from vaescale.objectives.elbo import ElboConfig, elbo_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepSums(NamedTuple):
    """This rank's share of a step, on the device. sums float64 [5]: log_px, kl, squared error, variance,
    images.

    grad_norm [] is the global gradient's, before clipping.
    """

    sums: Tensor
    grad_norm: Tensor
    global_batch: int


def train_step(
    accelerator: "Accelerator",
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    *,
    objective: ElboConfig,
    precision: str,
    seed: int,
    step: int,
    clip_norm: float | None,
) -> StepSums:
    """Forward and backward over the micro-batches, one gradient exchange, one optimizer step.

    precision: `bf16` by autocast in the forward pass, or `fp32`. Weights and the loss are float32 in both.
    """
    optimizer.zero_grad()
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    for number, batch in enumerate(micro_batches, start=1):
        images, slots, mask = (
            tensor.to(accelerator.device, non_blocking=True)
            for tensor in (batch.images, batch.slots, batch.mask)
        )
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16"):
                terms = model(images, noise.Stream(seed, step, slots), mask)
            accelerator.backward(elbo_loss(terms, beta=objective.beta) / len(micro_batches))
        with torch.no_grad():
            sums += torch.cat([metric_columns(terms).sum(0), mask.sum().double()[None]])
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
    optimizer.step()
    accelerator.unwrap_model(model).likelihood.end_step()
    global_batch = sum(len(batch.slots) for batch in micro_batches) * comm.world_size()
    return StepSums(sums, grad_norm, global_batch)


def step_metrics(result: StepSums, model: VAE, *, beta: float) -> dict[str, float]:
    """This step's means over the global batch. Nats are per image; mse and bits are per value."""
    sums = comm.all_reduce_sum(result.sums)
    means = sums[:4] / sums[4]
    metrics = model_metrics(model, means)
    metrics["loss_nats"] = beta * float(means[1]) - float(means[0])
    metrics["grad_norm"] = float(result.grad_norm)
    return {f"train/{name}": value for name, value in metrics.items()}


def refuse_non_finite(metrics: dict[str, float], step: int) -> None:
    """Raise TrainingStopped when a metric is NaN or Inf, before anything is written from such weights."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingStopped(
                f"{name} is {value} at step {step}; lower optimizer.lr, set optimizer.clip_norm, or use fp32"
            )
