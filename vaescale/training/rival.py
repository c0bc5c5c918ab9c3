"""The second player of a run: discriminators with an optimizer, a schedule and a part of the checkpoint of their own.

They are small, so each rank holds them whole, in every layout of the autoencoder, and DDP averages their gradients. A step in which they
play has this order:

1. the autoencoder's loss, which sees the discriminators' logits with their weights as constants, and its gradient;
2. the discriminators' loss of what the autoencoder showed, and its gradient; `steps_per_step` times, the last one without an update yet;
3. one verdict on both gradients, and with it either both updates or none.

Both gradients are therefore those of the weights before the step, and a step of NaN changes neither player.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vaescale import comm, noise
from vaescale.adversaries.config import PlayerConfig
from vaescale.adversaries.discriminators import Discriminators, Judged
from vaescale.models.shown import Shown
from vaescale.runs.checkpoint import OPTIONAL, Checkpoint
from vaescale.training.averages import MAIN, Average
from vaescale.training.config import OptimizerConfig
from vaescale.training.launch import data_parallel_options
from vaescale.training.optimizer import build_optimizer
from vaescale.training.strategies.base import State, Strategy, Verdict

if TYPE_CHECKING:
    from accelerate import Accelerator

FILES = dict(zip(("model", "optimizer", MAIN), OPTIONAL, strict=True))
"""The names of its parts of a checkpoint, by what a strategy calls them."""


class Played(NamedTuple):
    """A step's gradients of the discriminators. faults []: 0, or NaN where a loss or gradient was NaN or Inf; grad_norm []; figures: of
    Judged, means over the updates and micro-batches.
    """

    faults: Tensor
    grad_norm: Tensor
    figures: Tensor


class Rival(Strategy):
    """The discriminators on this rank, and their optimizer."""

    model: Discriminators  # type: ignore[assignment]

    def __init__(
        self, accelerator: "Accelerator", discriminators: Discriminators, optimizer: OptimizerConfig
    ) -> None:
        """Wrap the discriminators. optimizer: from `optimizer_of`."""
        self.config = optimizer
        build = partial(build_optimizer, config=optimizer)
        decay = discriminators.config.ema_decay
        averages = {} if decay is None else {MAIN: Average(decay)}
        super().__init__(accelerator, discriminators, build, averages=averages)  # type: ignore[arg-type]

    @property
    def player(self) -> PlayerConfig:
        """The recipe's section."""
        return self.model.config

    def play(self, seen: Sequence[tuple[Shown, noise.Stream]]) -> Played:
        """Compute the gradient of a step's last update, and make those before it. seen: what each micro-batch showed, as constants.

        `finish` must follow. All ranks call it.
        """
        self._before = [(tensor, tensor.detach().clone()) for tensor in self._changing()]
        self._at(seen[0][1].step - self.player.start_step)
        faults, figures = torch.zeros((), device=self.device), []
        one, updates = torch.ones((), device=self.device), self.player.steps_per_step
        for update in range(updates):
            for number, (shown, stream) in enumerate(seen, start=1):
                with self.micro_batch(last=number == len(seen)):
                    judged: Judged = self.wrapped(shown, stream, update)
                    self.backward(judged.loss / len(seen))
                figures.append(judged.figures)
                faults = faults + (judged.loss.detach() - judged.loss.detach())  # 0, or NaN of NaN and Inf
            norm = self._grad_norm()
            faults = faults + (norm - norm)
            if update + 1 < updates:
                self._move(Verdict(norm, one, (faults != 0).float()))
        return Played(faults, norm, torch.stack(figures).mean(0))

    def finish(self, played: Played, verdict: Verdict) -> None:
        """Make the last update, or, where the verdict skips the step, undo what the step changed."""
        one = torch.ones_like(played.grad_norm)
        self._move(Verdict(played.grad_norm, one, verdict.found_inf))
        with torch.no_grad():
            for tensor, before in self._before:
                tensor.copy_(torch.where(verdict.found_inf > 0, before, tensor))
        self._before = []

    def state(self) -> State:
        """`Strategy.state` under the names of FILES."""
        return {FILES[part]: tensors for part, tensors in super().state().items()}

    def restore(self, saved: Checkpoint) -> None:
        """Load a checkpoint that has the discriminators, on every rank. An average that it does not have begins with the weights."""
        files = {part: file if saved.has(file) else FILES["model"] for part, file in FILES.items()}
        self.load({part: saved.tensors(file) for part, file in files.items()})

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch. Gradients are exchanged in an update's last one."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        context: AbstractContextManager[Any] = self.wrapped.no_sync()
        return context

    def _wrap(
        self, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        # Not accelerate's: its DDP is the autoencoder's layout, which may be another.
        optimizer = build_optimizer(self.model)
        if comm.world_size() == 1:
            return self.model, optimizer
        devices = [self.device] if self.device.type == "cuda" else None
        options: dict[str, Any] = {"device_ids": devices, **data_parallel_options()}
        return DistributedDataParallel(self.model, **options), optimizer

    def _move(self, verdict: Verdict) -> None:
        self._hand_over(verdict)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _changing(self) -> list[Tensor]:
        """What a step may change although its verdict skips it: buffers and averages, and with several updates weights and moments."""
        tensors = list(self.model.buffers())
        tensors += [self.optimizer.state[held][name] for name in self._kinds for held in self._held()]
        if self.player.steps_per_step > 1:
            tensors += self._held()
            tensors += [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return tensors


def optimizer_of(player: PlayerConfig, autoencoder: OptimizerConfig) -> OptimizerConfig:
    """The discriminators' optimizer: Adam without weight decay, whose schedule begins when they do."""
    return OptimizerConfig(
        kind="adam",
        lr=player.lr or autoencoder.lr,
        betas=player.betas,
        schedule=player.schedule,
        warmup_steps=player.warmup_steps,
        schedule_start=player.start_step,
    )
