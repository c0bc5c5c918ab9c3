"""FSDP2: weights, gradients and optimizer state partitioned over the ranks by torch's `fully_shard`.

Zhao et al. 2023, "PyTorch FSDP: experiences on scaling fully sharded data parallel". torch is called directly: accelerate
silently falls back to DDP on a CPU, where `fully_shard` works over gloo.
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
from vaescale.training.strategies.base import Strategy, refuse_learned_codebook

SMALLEST_BLOCK = 1 << 14  # parameters; to gather fewer costs more than it saves


class FullyShard(Strategy):
    """The layout FSDP2: a block of the network is gathered when it runs, and other parameters stay gathered."""

    name = "fsdp2"

    def _wrap(
        self, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.model.spectral is not None:
            raise UserError(
                "objective.spectral reads weights outside of their layers' calls, where FSDP2 partitions them; take "
                "recipes/backends/ddp.yaml or zero2.yaml"
            )
        refuse_learned_codebook(self.model, "FSDP2")
        mesh = init_device_mesh(self.device.type, (self.accelerator.num_processes,))
        for block in list(blocks(self.model)):
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        return self.model, build_optimizer(self.model)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch. Gradients are exchanged in a step's last one."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def _replicated(self) -> dict[str, Tensor]:
        return dict(self.model.named_buffers())

    def _grad_norm(self) -> Tensor:
        norm = super()._grad_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _full(self, parameter: Tensor, key: str | None) -> Tensor:
        tensor = super()._full(parameter, key)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _put(self, parameter: Tensor, key: str | None, value: Tensor) -> None:
        tensor = super()._full(parameter, key)
        if isinstance(tensor, DTensor):
            value = value.to(tensor.device)
            value = distribute_tensor(
                value, tensor.device_mesh, tensor.placements, src_data_rank=None
            ).to_local()
        self._local(tensor).copy_(value)

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what `state` returned in any layout. All ranks call it."""
        super().load(state)
        self._forget()

    def _swap(self, *, to_average: bool) -> None:
        self._forget()
        super()._swap(to_average=to_average)

    @staticmethod
    def _local(tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _forget(self) -> None:
        """Drop gathered weights, which torch would use again although the partitions have changed."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with a forward of their own that are large enough to be gathered separately."""
    for child in module.children():
        if type(child).forward is nn.Module.forward or isinstance(child, nn.Sequential):
            yield from blocks(child)
        elif sum(parameter.numel() for parameter in child.parameters()) >= SMALLEST_BLOCK:
            yield child
