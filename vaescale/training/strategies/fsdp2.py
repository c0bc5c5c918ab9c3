"""FSDP2: weights, gradients and optimizer state in one part on each rank, as torch's `fully_shard` keeps them.

Zhao et al. 2023, "PyTorch FSDP: experiences on scaling fully sharded data parallel". torch is called directly: accelerate
falls back to DDP on a CPU without a word, and `fully_shard` works there, over gloo.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vaescale.errors import UserError
from vaescale.training.strategies.base import Strategy

SMALLEST_BLOCK = 1 << 14  # parameters; a gathering of fewer costs more than it saves


class FullyShard(Strategy):
    """Each of the network's blocks is gathered when it is needed; what is outside of them, all along."""

    name = "fsdp2"

    def _wrap(
        self, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.model.spectral is not None:
            raise UserError(
                "objective.spectral reads weights beside their layers' own calls, where FSDP2 has them in parts; take "
                "recipes/backends/ddp.yaml or zero2.yaml"
            )
        mesh = init_device_mesh(self.device.type, (self.accelerator.num_processes,))
        for block in list(blocks(self.model)):
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        return self.model, build_optimizer(self.model)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last one of a step."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def _replicated(self) -> dict[str, Tensor]:
        return dict(self.model.named_buffers())

    def _grad_norm(self) -> Tensor:
        norm = super()._grad_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _full(self, parameter: Tensor, key: str | None) -> Tensor:
        part = super()._full(parameter, key)
        return part.full_tensor() if isinstance(part, DTensor) else part

    def _put(self, parameter: Tensor, key: str | None, value: Tensor) -> None:
        part = super()._full(parameter, key)
        if isinstance(part, DTensor):
            value = value.to(part.device)
            own = distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)
            value = own.to_local()
        self._local(part).copy_(value)

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `state` gave."""
        super().load(state)
        self._forget()

    def _swap(self, *, to_average: bool) -> None:
        self._forget()
        super()._swap(to_average=to_average)

    @staticmethod
    def _local(tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _forget(self) -> None:
        """Let go of gathered weights: torch would use them again, though the parts have changed since."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts that are called by themselves and large enough to be gathered by themselves."""
    for child in module.children():
        if type(child).forward is nn.Module.forward or isinstance(child, nn.Sequential):
            yield from blocks(child)
        elif sum(parameter.numel() for parameter in child.parameters()) >= SMALLEST_BLOCK:
            yield child
