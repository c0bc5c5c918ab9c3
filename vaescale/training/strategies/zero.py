"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) in one part on each rank.

Rajbhandari, Rasley, Ruwase & He 2020, "ZeRO: memory optimizations toward training trillion parameter models".

DeepSpeed moves flat float32 parts of the weights with torch's own optimizer, so what `Strategy` keeps in that optimizer's
state, the average among it, is in parts too. Its loss scaling and clipping stay off: both are in the verdict.
"""

import contextlib
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vaescale.training.strategies.base import AVERAGE, Strategy, Verdict

# In numbers. DeepSpeed's own are for models of billions: a bucket of 5e8 is 2 GB, and 1e9 live weights are all of ours.
BUCKETS = {
    "reduce_bucket_size": 1 << 24,
    "allgather_bucket_size": 1 << 24,
    "stage3_prefetch_bucket_size": 1 << 23,
    "stage3_max_live_parameters": 1 << 25,
    "stage3_max_reuse_distance": 1 << 24,
}
MICRO_BATCH = 1  # DeepSpeed wants a number; it computes nothing but throughput from it


class Zero(Strategy):
    """ZeRO 1, 2 or 3, as the launcher's environment says."""

    name = "zero"
    wrapped: Any  # DeepSpeed's engine

    def _wrap(
        self, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
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
        """DeepSpeed must know before the forward pass whether gradients are exchanged after it."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Through DeepSpeed's engine, which reduces gradients to the rank that has their part."""
        self.wrapped.backward(loss)

    def step(self, step: int, judge: Callable[[Tensor], Verdict]) -> Verdict:
        """DeepSpeed calls the optimizer once for each part, and not at all when the gradient is not finite."""
        self._at(step)
        self._judge, self._verdict = judge, None
        self.wrapped.step()
        if self._verdict is None:
            self._verdict = judge(torch.full((), torch.inf, device=self.device))
            self._average([{"params": self._held()}])
        return self._verdict

    def _decide(self) -> None:
        """Before the first part is moved, when DeepSpeed knows the norm of all of them."""
        if self._verdict is None:
            assert self._judge is not None
            self._verdict = self._judge(torch.as_tensor(self.zero._global_grad_norm, device=self.device))
            self._tell(self._verdict)

    def _held(self) -> list[Tensor]:
        parts = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        return list(parts)

    def _replicated(self) -> dict[str, Tensor]:
        return super()._replicated() if self.stage < 3 else dict(self.model.named_buffers())

    def _link(self) -> None:
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _full(self, parameter: Tensor, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is None:
            full: Tensor = safe_get_full_fp32_param(parameter)
        else:
            full = safe_get_full_optimizer_state(parameter, key)
        return full.view(self._shape(parameter))

    def _put(self, parameter: Tensor, key: str | None, value: Tensor) -> None:
        if self.stage == 3:
            part = self.zero.get_local_fp32_param(parameter, key)  # the last one is padded
            start = self.accelerator.process_index * part.numel()
            own = value.flatten()[start : start + part.numel()].to(part)
            whole = torch.cat([own, own.new_zeros(part.numel() - own.numel())])
            self.zero.set_local_hp_param(whole, parameter, key)
        else:
            known: Any = parameter  # DeepSpeed has given it methods
            known.set_full_hp_param(value.to(self.device), key)
        if key is None:
            self._show(parameter, value)

    def _show(self, parameter: Tensor, value: Tensor) -> None:
        """The weights that the forward pass uses; the optimizer's own part stays what it is."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.data.copy_(value.view(self._shape(parameter)))

    @torch.no_grad()
    def _swap(self, *, to_average: bool) -> None:
        """The weights come from the optimizer's own parts, and go back to them."""
        for parameter in self.model.parameters():
            self._show(parameter, self._full(parameter, AVERAGE if to_average else None))

    @staticmethod
    def _shape(parameter: Tensor) -> torch.Size:
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape
