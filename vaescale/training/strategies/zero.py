"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) partitioned over the ranks.

Rajbhandari, Rasley, Ruwase & He 2020, "ZeRO: memory optimizations toward training trillion parameter models".

DeepSpeed updates flat float32 partitions of the weights with torch's own optimizer, so the state that `Strategy` keeps in that
optimizer, the average included, is partitioned too. Its loss scaling and clipping stay off: the verdict has both.
"""

import contextlib
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vaescale.training.averages import MAIN
from vaescale.training.optimizer import TORCHS_OWN
from vaescale.training.strategies.base import Strategy, Verdict, refuse_learned_codebook

# Counts of values. DeepSpeed's defaults suit billions of weights: a bucket of 5e8 is 2 GB, and no model has 1e9 weights.
BUCKETS = {
    "reduce_bucket_size": 1 << 24,
    "allgather_bucket_size": 1 << 24,
    "stage3_prefetch_bucket_size": 1 << 23,
    "stage3_max_live_parameters": 1 << 25,
    "stage3_max_reuse_distance": 1 << 24,
}
MICRO_BATCH = 1  # DeepSpeed requires a number, from which it computes its throughput only


class Zero(Strategy):
    """The layout ZeRO; the launcher's environment sets the stage, 1, 2 or 3."""

    name = "zero"
    optimizers = TORCHS_OWN  # DeepSpeed takes no others
    wrapped: Any  # DeepSpeed's engine

    def _wrap(
        self, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        refuse_learned_codebook(self.model, "ZeRO")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        plugin = self.accelerator.state.deepspeed_plugin
        self.stage = int(plugin.zero_stage)
        self.name = f"zero{self.stage}"
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": 1,  # the step divides the loss itself
            "gradient_clipping": 0.0,
            "zero_force_ds_cpu_optimizer": False,
        }
        for name, size in BUCKETS.items():
            plugin.deepspeed_config["zero_optimization"].setdefault(name, size)
        optimizer = build_optimizer(self.model)
        with contextlib.redirect_stdout(sys.stderr):
            wrapped, _ = self.accelerator.prepare(self.model, optimizer)
        self.zero = wrapped.optimizer
        assert self.zero.optimizer is optimizer
        self._judge: Callable[[Tensor], Verdict] | None = None
        self._verdict: Verdict | None = None
        optimizer.register_step_pre_hook(lambda *_: self._decide())
        return wrapped, optimizer

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch. DeepSpeed must know before its forward pass whether gradients are exchanged after it."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient. DeepSpeed's engine reduces it to the rank that has its partition."""
        self.wrapped.backward(loss)

    def step(self, step: int, judge: Callable[[Tensor], Verdict]) -> Verdict:
        """Update the weights. DeepSpeed calls the optimizer once per partition, and not at all for a gradient of NaN or Inf."""
        self._at(step)
        self._judge, self._verdict = judge, None
        self.wrapped.step()
        if self._verdict is None:
            self._verdict = judge(torch.full((), torch.inf, device=self.device))
            self._average([{"params": self._held()}])
        self._end(self._verdict)
        return self._verdict

    def _decide(self) -> None:
        """Judge the step before the first partition is updated, when DeepSpeed knows the global norm."""
        if self._verdict is None:
            assert self._judge is not None
            self._verdict = self._judge(torch.as_tensor(self.zero._global_grad_norm, device=self.device))
            self._hand_over(self._verdict)

    def _held(self) -> list[Tensor]:
        partitions = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        return list(partitions)

    def _replicated(self) -> dict[str, Tensor]:
        return super()._replicated() if self.stage < 3 else dict(self.model.named_buffers())

    def _link(self) -> None:
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _full(self, parameter: Tensor, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not parameter.requires_grad:  # the optimizer has no copy of it
            with self._gathered(parameter):
                return parameter.detach().clone()
        if key is None:
            full: Tensor = safe_get_full_fp32_param(parameter)
        else:
            full = safe_get_full_optimizer_state(parameter, key)
        return full.view(self._shape(parameter))

    def _put(self, parameter: Tensor, key: str | None, value: Tensor) -> None:
        if not parameter.requires_grad:
            self._show(parameter, value)
            return
        if self.stage == 3:
            partition = self.zero.get_local_fp32_param(parameter, key)  # the last one is padded
            start = self.accelerator.process_index * partition.numel()
            values = value.flatten()[start : start + partition.numel()].to(partition)
            whole = torch.cat([values, values.new_zeros(partition.numel() - values.numel())])
            self.zero.set_local_hp_param(whole, parameter, key)
        else:
            extended: Any = parameter  # DeepSpeed adds methods to it
            extended.set_full_hp_param(value.to(self.device), key)
        if key is None:
            self._show(parameter, value)

    def _show(self, parameter: Tensor, value: Tensor) -> None:
        """Set the weights that the forward pass uses; the optimizer's partition does not change."""
        with self._gathered(parameter):
            parameter.data.copy_(value.view(self._shape(parameter)))

    def _gathered(self, parameter: Tensor) -> AbstractContextManager[Any]:
        """A parameter as a whole within the block, on all ranks; what rank 0 changes is kept."""
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0, enabled=self.stage == 3
        )
        return gathered

    @torch.no_grad()
    def _swap(self, *, to_average: bool) -> None:
        """Show the averages, or the weights again, both from the optimizer's partitions."""
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            self._show(parameter, self._full(parameter, MAIN if to_average else None))

    @staticmethod
    def _shape(parameter: Tensor) -> torch.Size:
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape
