"""The contract of training layouts, and the layout DDP: weights, gradients and optimizer state are copied to each rank.

The loop knows only this contract; `zero.py` and `fsdp2.py` implement it with partitioned state. Every layout saves the same:
full tensors by name. A run can therefore continue under another layout, or on another number of ranks.

The optimizer is torch's own in all layouts. For each tensor that it updates, its state holds Adam's moments and the average of
the weights, so that the average is partitioned as the moments are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vaescale import comm
from vaescale.errors import TrainingStopped, UserError
from vaescale.models.vae import VAE, Terms
from vaescale.system import heartbeat
from vaescale.system.uncompiled import parallel_uncompiled
from vaescale.training.averages import MAIN, Average
from vaescale.training.gradient_norm import total_norm
from vaescale.training.half_weights import HalfWeights
from vaescale.training.optimizer import OPTIMIZERS

if TYPE_CHECKING:
    from accelerate import Accelerator

CHUNK = 1 << 22  # bytes that are fingerprinted at a time
State = dict[str, dict[str, Tensor]]


class Verdict(NamedTuple):
    """The ranks' decision on a step: float32 [] each, on the device.

    grad_norm: of the unscaled gradient, before clipping. The optimizer divides the gradient by grad_scale, and updates nothing
    where found_inf is 1.
    """

    grad_norm: Tensor
    grad_scale: Tensor
    found_inf: Tensor


class Strategy:
    """One process, or the same weights on each of several, their gradients averaged by DDP."""

    name = "ddp"
    optimizers = OPTIMIZERS

    def __init__(
        self,
        accelerator: "Accelerator",
        model: VAE,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        averages: Mapping[str, Average],
    ) -> None:
        """Wrap the model and build its optimizer. averages: of the weights, by name; evaluation takes `ema`, if there is one."""
        self.accelerator, self.model, self.device = accelerator, model, accelerator.device
        self._kinds = dict(averages)
        self._moves = dict.fromkeys(averages, 0.0)
        self.wrapped, self.optimizer = self._wrap(build_optimizer)
        for tensor in self._held():
            self.optimizer.state[tensor] = self._fresh_state(tensor)
        self._averages = {name: self._fresh_averages() for name in averages}
        self._link()
        self.optimizer.register_step_post_hook(lambda *_: self._average(self.optimizer.param_groups))

    # The step.

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch's forward and backward pass. Gradients are exchanged in a step's last one."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def forward(self, *arguments: Any) -> Terms:
        """Call the model's forward through the wrapper."""
        terms: Terms = self.wrapped(*arguments)
        return terms

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient to the gradient of the step."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, step: int, judge: Callable[[Tensor], Verdict]) -> Verdict:
        """Update the weights according to the verdict on the gradient's norm, then their average. All ranks call it."""
        self._at(step)
        verdict = judge(self._grad_norm())
        self._hand_over(verdict)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._end(verdict)
        return verdict

    # The state.

    def state(self) -> State:
        """Full tensors by name, copied to the main process's memory: `model`, `optimizer` and the averages of the weights.

        Other processes get empty mappings. All ranks call it.
        """
        parameters = dict(self.model.named_parameters())
        state: State = {"model": {}, "optimizer": {}}
        state |= {average: {} for average in self._kinds}
        for name, value in self.model.state_dict().items():
            if name not in parameters:
                self._keep(state, value, "model", name=name)
                for average, buffers in self._averages.items():
                    self._keep(state, buffers.get(name, value), average, name=name)
                continue
            parameter = parameters[name]
            if not parameter.requires_grad:
                self._keep(state, self._full(parameter, None), "model", *self._kinds, name=name)
                continue
            self._keep(state, self._full(parameter, None), "model", name=name)
            for average in self._kinds:
                self._keep(state, self._full(parameter, average), average, name=name)
            for key in self._moments():
                self._keep(state, self._full(parameter, key), "optimizer", name=f"{name}/{key}")
            self._keep(state, self._steps(), "optimizer", name=f"{name}/step")
        return state

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what `state` returned in any layout. All ranks call it, with the same full tensors."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in state["model"]:
                    buffer.copy_(state["model"][name])
                for average, buffers in self._averages.items():
                    if name in buffers:
                        buffers[name].copy_(state[average][name])
            for name, parameter in self.model.named_parameters():
                self._put(parameter, None, state["model"][name])
                if not parameter.requires_grad:
                    continue
                for average in self._kinds:
                    self._put(parameter, average, state[average][name])
                for key in self._moments():
                    self._put(parameter, key, state["optimizer"][f"{name}/{key}"])
            if self._moments():
                steps = next(value for name, value in state["optimizer"].items() if name.endswith("/step"))
                for tensor in self._held():
                    self.optimizer.state[tensor]["step"].copy_(steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the main average of the weights within the block, if there is one. All ranks enter it.

        An exception in the block leaves them in place: the other ranks may be in another collective, so the process has to
        end.
        """
        if MAIN in self._kinds:
            self._swap(to_average=True)
            self._swap_buffers()
        yield
        if MAIN in self._kinds:
            self._swap(to_average=False)
            self._swap_buffers()

    def compare_replicas(self) -> None:
        """Raise TrainingStopped when replicated tensors are not bit-equal on all ranks. All ranks call it."""
        local = {name: fingerprint(value) for name, value in self._replicated().items()}
        prints = comm.gather_object(local)
        by_rank = {rank: [n for n in local if other[n] != prints[0][n]] for rank, other in enumerate(prints)}
        if differing := {rank: names for rank, names in by_rank.items() if names}:
            rank, names = next(iter(differing.items()))
            others = f", and so do {len(differing) - 1} more ranks'" if len(differing) > 1 else ""
            raise TrainingStopped(
                f"rank {rank}'s weights differ from rank 0's in {names[0]} and {len(names) - 1} more{others}; suspect that "
                f"machine's memory or GPU, and run the same command again: it continues from the last checkpoint"
            )

    # What a layout overrides.

    def _wrap(
        self, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap the model for the forward pass, and build the optimizer of the tensors that this rank holds."""
        optimizer = build_optimizer(self.model)
        is_compiled = self.model._compiled_call_impl is not None
        if not is_compiled:  # a compiled graph fuses the conversions
            HalfWeights(self.model, self.model.network, optimizer)
        with nullcontext() if is_compiled else parallel_uncompiled():
            # Told to place the model, accelerate need not import distributed tensors to see whether it is one.
            wrapped: nn.Module = self.accelerator.prepare_model(self.model, device_placement=True)
        return wrapped, optimizer

    def _held(self) -> list[Tensor]:
        """The tensors that the optimizer updates on this rank."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _replicated(self) -> dict[str, Tensor]:
        """The tensors of which every rank holds a copy: buffers and, in this layout, weights."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _link(self) -> None:
        """Run after the optimizer's state was created; a hook for layouts."""

    def _grad_norm(self) -> Tensor:
        """The norm of the global gradient, neither unscaled nor clipped."""
        gradients = [tensor.grad for tensor in self._held() if tensor.grad is not None]
        return total_norm(gradients)

    def _full(self, parameter: Tensor, key: str | None) -> Tensor:
        """The full tensor of a parameter, or of one of its states in the optimizer, gathered from all ranks."""
        return parameter if key is None else self.optimizer.state[parameter][key]

    def _put(self, parameter: Tensor, key: str | None, value: Tensor) -> None:
        """Store this rank's part of a full tensor, the counterpart of `_full`."""
        self._full(parameter, key).copy_(value)

    @torch.no_grad()
    def _swap(self, *, to_average: bool) -> None:  # noqa: ARG002
        """Exchange weights and averages, one tensor at a time: memory may have no room for a third copy."""
        for tensor in self._held():
            weight, average = self._local(tensor), self._local(self.optimizer.state[tensor][MAIN])
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)

    @staticmethod
    def _local(tensor: Tensor) -> Tensor:
        """This rank's values of a tensor."""
        return tensor

    # Common to all layouts.

    def _fresh_state(self, tensor: Tensor) -> dict[str, Tensor]:
        """Adam's initial state and the averages, so that a checkpoint can be loaded before the first step."""
        state = {}
        if isinstance(self.optimizer, torch.optim.Adam):  # AdamW is one
            state["step"] = torch.zeros((), device=tensor.device)
            state |= {key: torch.zeros_like(tensor, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        return state | {average: tensor.detach().clone() for average in self._kinds}

    def _fresh_averages(self) -> dict[str, Tensor]:
        """The buffers that are averaged together with the weights, such as the running statistics of BatchNorm, by name."""
        names = averaged_buffers(self.model)
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers() if name in names}

    @torch.no_grad()
    def _swap_buffers(self) -> None:
        buffers = dict(self.model.named_buffers())
        for name, average in self._averages[MAIN].items():
            before = buffers[name].clone()
            buffers[name].copy_(average)
            average.copy_(before)

    def _moments(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") if isinstance(self.optimizer, torch.optim.Adam) else ()

    def _steps(self) -> Tensor:
        held = self._held()
        return self.optimizer.state[held[0]].get("step", torch.zeros(())) if held else torch.zeros(())

    def _at(self, step: int) -> None:
        """Set how far the averages move at a step."""
        self._moves = {name: average.weight(step) for name, average in self._kinds.items()}

    @torch.no_grad()
    def _average(self, groups: list[dict[str, Any]]) -> None:
        """Move the averages towards the weights."""
        tensors = [tensor for group in groups for tensor in group["params"]]
        for name, move in self._moves.items() if tensors else ():
            averages = [self.optimizer.state[tensor][name] for tensor in tensors]
            torch._foreach_lerp_(averages, tensors, move)

    def _end(self, verdict: Verdict) -> None:
        """Update the model's own state, then the averages of its buffers."""
        self.model.end_step(verdict.found_inf)
        self._average_buffers()

    @torch.no_grad()
    def _average_buffers(self) -> None:
        """Move the averages of buffers towards the buffers, once in each step."""
        buffers = dict(self.model.named_buffers()) if any(self._averages.values()) else {}
        for average, own in self._averages.items():
            if own:
                torch._foreach_lerp_([*own.values()], [buffers[name] for name in own], self._moves[average])

    def _hand_over(self, verdict: Verdict) -> None:
        """Hand the verdict to the fused optimizer, which reads it on the device, so that the host does not wait."""
        held = self._held()
        device = held[0].device if held else self.device
        self.optimizer.grad_scale = verdict.grad_scale.to(device)  # type: ignore[attr-defined]
        self.optimizer.found_inf = verdict.found_inf.to(device)  # type: ignore[attr-defined]

    @staticmethod
    def _keep(state: State, value: Tensor, *groups: str, name: str) -> None:
        heartbeat.beat("collecting a checkpoint")
        if comm.is_main():
            for group in groups:
                if group in state:
                    copy = torch.empty(value.shape, dtype=value.dtype)
                    state[group][name] = copy.copy_(value.detach())


def refuse_learned_codebook(model: VAE, layout: str) -> None:
    """Raise UserError for a codebook that is a parameter, for layouts that partition what k-means and restarts would set."""
    if any(name.startswith("quantizer.") for name, _ in model.named_parameters()):
        raise UserError(
            f"posterior.codebook (='gradient') restarts codes in the weights, which {layout} partitions; take posterior.codebook: "
            "ema, or recipes/backends/ddp.yaml"
        )


def averaged_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers that are averaged together with the weights."""
    return {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name in getattr(module, "averaged_buffers", ())
    }


def fingerprint(tensor: Tensor) -> int:
    """A checksum that changes with each bit of a tensor: the sum of its bytes, each times an odd number of its index."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK].long()
        total += (chunk * (2 * torch.arange(start, start + len(chunk), device=data.device) + 1)).sum()
    return int(total)
