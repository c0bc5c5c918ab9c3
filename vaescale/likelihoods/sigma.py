"""The standard deviation of p(x|z): fixed, learned, predicted from z, or its maximum-likelihood value over the batch.

Legend: error e = x - mean(z); each family sets the power m of |e| and the factor f:

    sigma*_g = f * (sum over images and the values of group g of |e|^m / their number)^(1/m)

    Gaussian  m = 2, f = 1         Rybkin, Daniilidis & Levine 2021; Lin, Roberts & Jaques 2019 (one group)
    Laplace   m = 1, f = sqrt(2)   its scale is the mean absolute error, its standard deviation sqrt(2) times that

`optimal` has one group, `optimal_per_channel` one for each channel, `optimal_per_pixel` one for each value. The sums run over
the global batch: one all-reduce of (number, sums) in float64.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vaescale import comm
from vaescale.likelihoods.config import MOST_HORIZON_STEPS, OPTIMAL, Handover, LocationScaleConfig

FLOOR_SHARPNESS = 4.0


class WideState(nn.Module):
    """A module whose buffers keep their precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WideState":
        # `.bfloat16()` and `.half()`, which sharding backends call on whole models, must not change the state.
        state = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in state.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self


class SigmaState(WideState):
    """The state of log sigma for training and evaluation, which checkpoints save.

    Training takes the batch's optimal sigma (`sigma_source: batch`) or the running one; evaluation the running one.
    `optimal_per_image` reads x itself in both, which gives no bound for unseen images; draws from the prior use the
    running global sigma.

    The global batch holds all images of an optimizer step on all ranks. With gradient accumulation each micro-batch uses
    its own sigma in the loss (batch) or all use the running one; the state is updated once, from their sum.

    The gradient through an optimal sigma is zero, since sigma is the argmax: `stop` drops it and `keep` computes it,
    at the cost of a second collective in the backward pass. Without it the mean of the ranks' gradients is the
    single-process gradient. During the ramp of a handover sigma is not the argmax: there `stop` treats its global part as a
    constant.

    `running` float64 [1 + groups]: exponential averages of the number of values in a group and of each group's sum.
    Their ratio needs no bias correction, since all start at zero with the same weights. Equal on all ranks; sums that
    are not finite are skipped. `stage` float64 [5] is the state of the handover: steps done, the step at which it begins
    (inf if unknown), log sigma of the last whole window of steps, and the number of values and the sum of the present window.
    """

    running: Tensor
    stage: Tensor

    def __init__(
        self, config: LocationScaleConfig, *, image_shape: tuple[int, int, int], power: int, factor: float
    ) -> None:
        super().__init__()
        self.config, self.power, self.factor = config, power, factor
        channels = image_shape[0]
        self.group_shape = {"optimal_per_pixel": image_shape, "optimal_per_channel": (channels, 1, 1)}.get(
            str(config.sigma), (1, 1, 1)
        )
        self._folded = [dim for dim, size in enumerate(self.group_shape, start=1) if size == 1]
        groups = math.prod(self.group_shape)
        self._values_per_group = float(math.prod(image_shape) // groups)
        has_state = config.sigma in OPTIMAL or config.handover is not None
        self.register_buffer("running", torch.zeros(1 + groups, dtype=torch.float64), persistent=has_state)
        if config.sigma == "shared":
            self.log_shared = nn.Parameter(torch.full((1,), math.log(config.initial_sigma)))
        if config.handover:
            start = float(config.handover.at_step or math.inf)
            self.register_buffer("stage", torch.tensor([0.0, start, math.inf, 0, 0], dtype=torch.float64))
        self._horizon = config.horizon_steps or MOST_HORIZON_STEPS
        self._pending: list[Callable[[], Tensor]] = []
        self._is_held = False
        self._observed: Tensor | None = None

    @property
    def collects(self) -> bool:
        """Whether a forward pass in training collects sums."""
        return self.config.sigma in OPTIMAL or self.config.handover is not None

    @property
    def predicts(self) -> bool:
        """Whether sigma is predicted, so that the decoder returns one more value for each mean."""
        return self.config.sigma == "predicted"

    def log_sigma(self, powered: Tensor, raw: Tensor | None, mask: Tensor) -> Tensor:
        """log sigma for log_prob, broadcastable to [B, C, H, W]. powered: |e|^m; raw: the decoder's raw log sigma, or None."""
        config = self.config
        if self._observed is not None and not self.training:
            self._observed = self._observed + self._share(powered, mask)
        if self._is_held:
            return self._held_log_sigma(raw).to(powered)
        if config.sigma == "optimal_per_image":
            self._collect(powered, mask)
            return self._log_optimal(self._taken(powered).flatten(1).mean(1).view(-1, 1, 1, 1))
        batch = self._collect(powered, mask) if self.collects else None
        if batch is None:
            return self.evaluation_log_sigma(raw).to(powered)
        log_optimal = self._log_optimal(_ratio(batch)).view(1, *self.group_shape).to(powered)
        return log_optimal if raw is None else self._handed_over(log_optimal, raw)

    def evaluation_log_sigma(self, raw: Tensor | None) -> Tensor:
        """log sigma without x: for evaluation, and for samples. Broadcastable to [B, C, H, W]."""
        config = self.config
        if config.sigma in OPTIMAL or config.handover:
            log_running = self._log_running().view(1, *self.group_shape)
            return self._handed_over(log_running.to(raw), raw) if raw is not None else log_running
        if raw is not None:
            return self._log_predicted(raw)
        if config.sigma == "shared":
            return floored(wide(self.log_shared), config.sigma_floor).view(1, 1, 1, 1)
        return torch.full_like(self.running[:1], math.log(float(config.sigma))).view(1, 1, 1, 1)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block, in training, log sigma is the one that the loss has just used, as a constant, and nothing is collected."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    @contextmanager
    def observed(self) -> Iterator[Callable[[], Tensor]]:
        """Within the block, in evaluation, sum up what log_prob sees. Yields a function that returns this rank's (number, sums), float64
        [1 + groups].
        """
        self._observed = torch.zeros_like(self.running)
        try:
            yield self._observed_sums
        finally:
            self._observed = None

    def _observed_sums(self) -> Tensor:
        assert self._observed is not None
        return self._observed

    def refit(self, sums: Tensor) -> None:
        """Take the maximum-likelihood sigma of observed images in place of the running one. sums: float64 [1 + groups]."""
        self.running.copy_(sums)

    def gap_nats(self, sums: Tensor) -> Tensor:
        """How much higher the mean log p(x|z) of some images would be with their own maximum-likelihood sigma, in nats per image, [].

        sums: their (number, sums), float64 [1 + groups]. At least 0: of a group's n values with the mean m-th power a and the optimum
        sigma*, n (log(sigma / sigma*) + f^m a / m (sigma^-m - sigma*^-m)).
        """
        power, mean_power = self.power, _ratio(sums)
        best, now = self._log_optimal(mean_power), self.evaluation_log_sigma(None).detach().double().flatten()
        scaled = self.factor**power * mean_power / power
        return (
            self._values_per_group
            * (now - best + scaled * ((-power * now).exp() - (-power * best).exp())).sum()
        )

    def _held_log_sigma(self, raw: Tensor | None) -> Tensor:
        if not (self.collects and self.config.sigma_source == "batch"):
            log_sigma = self.evaluation_log_sigma(raw)
            return log_sigma.detach() if raw is None else log_sigma
        log_optimal = self._log_optimal(_ratio(self._pending[-1]())).view(1, *self.group_shape)
        return log_optimal if raw is None else self._handed_over(log_optimal.to(raw), raw)

    def end_step(self) -> None:
        """Add the sums of all micro-batches of this optimizer step to the running averages."""
        if not (pending := self.take_sums()):
            return
        collected = pending[0] if len(pending) == 1 else torch.stack(pending).sum(0)
        finite = (collected - collected == 0).all()  # no NaN and no Inf
        averaged = self.running.lerp(collected, 1 / self._horizon)
        self.running.copy_(torch.where(finite, averaged, self.running))
        if self.config.handover:
            self._advance_stage(self.config.handover, torch.where(finite, collected, 0.0))

    def take_sums(self) -> list[Tensor]:
        """Remove and return (number, sums) of each micro-batch of this step, float64 [1 + groups] each."""
        pending, self._pending = self._pending, []
        return [wait() for wait in pending]

    def put_sums(self, sums: list[Tensor]) -> None:
        """Add what `take_sums` returned."""
        self._pending += [lambda each=each: each for each in sums]  # type: ignore[misc]

    @property
    def sigma(self) -> Tensor | None:
        """The root mean square of sigma over the groups, float64 []; None when it depends on z."""
        if self.predicts:
            return None
        return self.evaluation_log_sigma(None).detach().double().mul(2).exp().mean().sqrt()

    def fitted(self, sums: Tensor) -> Tensor:
        """The root mean square over the groups of the maximum-likelihood sigma of some images, float64 [].

        sums: their (number, sums), float64 [1 + groups].
        """
        return self._log_optimal(_ratio(sums)).mul(2).exp().mean().sqrt()

    @property
    def handed_over(self) -> Tensor | None:
        """The progress of the handover, float64 []: 0 before it, 1 after its ramp; None without a handover."""
        if self.config.handover is None:
            return None
        return ((self.stage[0] + 1 - self.stage[1]) / self.config.handover.ramp_steps).clamp(0, 1)

    def _collect(self, powered: Tensor, mask: Tensor) -> Tensor | None:
        """In training, keep (number, sums) for the state. Returns those of the global batch, float64 [1 + groups], if the loss
        needs them.
        """
        if not self.training:
            return None
        share = self._share(self._taken(powered), mask)
        if self.config.sigma_source == "running" or self.config.sigma == "optimal_per_image":
            self._pending.append(
                comm.start_sum(share)
            )  # overlaps the backward pass, because the loss does not need it
            return None
        keeps_gradient = self.config.sigma_gradient == "keep"
        pooled = comm.all_reduce_sum_with_gradient(share) if keeps_gradient else comm.all_reduce_sum(share)
        self._pending.append(pooled.detach().clone)
        return pooled

    def _share(self, powered: Tensor, mask: Tensor) -> Tensor:
        """(number, sums) of this rank's images, float64 [1 + groups]. For one group the kept sums are [B, 1, 1, 1], and their sum over
        images is in float64.
        """
        folded = powered.sum(self._folded, keepdim=True) if self._folded else powered
        sums = torch.where(mask.view(-1, 1, 1, 1), folded, 0.0).sum(0, dtype=torch.float64).flatten()
        number = mask.sum(dtype=torch.float64) * self._values_per_group
        return torch.cat([number[None], sums])

    def _taken(self, powered: Tensor) -> Tensor:
        return powered if self.config.sigma_gradient == "keep" else powered.detach()

    def _log_optimal(self, mean_power: Tensor) -> Tensor:
        # A hard floor is the maximum-likelihood sigma under the constraint sigma >= floor and leaves every other sigma
        # alone. The reference code's soft clip (-6 + softplus(log_sigma + 6)) inflates sigma by 1.8% at log sigma = -2
        # and by 13.5% at -4. Clamping before the logarithm keeps the gradient finite at an error of zero.
        lowest = (self.config.sigma_floor / self.factor) ** self.power
        return math.log(self.factor) + mean_power.clamp_min(lowest).log() / self.power

    def _log_running(self) -> Tensor:
        before_the_first_step = math.log(self.config.initial_sigma)
        log_optimal = self._log_optimal(_ratio(self.running))
        return torch.where(self.running[0] > 0, log_optimal, before_the_first_step)

    def _log_predicted(self, raw: Tensor) -> Tensor:
        return floored(math.log(self.config.initial_sigma) + raw, self.config.sigma_floor)

    def _handed_over(self, log_global: Tensor, raw: Tensor) -> Tensor:
        weight = self.handed_over
        assert weight is not None
        return torch.lerp(log_global.expand_as(raw), self._log_predicted(raw), weight.to(raw))

    def _advance_stage(self, handover: Handover, collected: Tensor) -> None:
        steps, start, last = self.stage[:3].unbind()
        steps, window = steps + 1, self.stage[3:] + collected
        if handover.when_settled is not None:
            # Not the running average: its tail would hide for hundreds of steps that sigma is constant.
            ends = steps.remainder(round(self._horizon)) == 0
            now = self._log_optimal(_ratio(window)).squeeze()
            settled = ends & ((now - last).abs() < math.log1p(handover.when_settled))
            start = torch.where(settled & torch.isinf(start), steps, start)
            last, window = torch.where(ends, now, last), torch.where(ends, 0.0, window)
        self.stage.copy_(torch.cat([torch.stack([steps, start, last]), window]))


def wide(tensor: Tensor) -> Tensor:
    """Convert to float32, or keep float64: log-probabilities are never computed in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def floored(log_sigma: Tensor, floor: float) -> Tensor:
    """Apply a smooth floor: log of (sigma^4 + floor^4)^(1/4), whose gradient does not vanish at the floor.

    It inflates sigma by 0.0025% at ten times the floor. (The reference sigma-VAE code's soft clip,
    -6 + softplus(log_sigma + 6), inflates it by 13.5% at log sigma = -4, which is 7.4 times its floor.)
    """
    log_floor = math.log(floor)
    return log_floor + softplus(log_sigma - log_floor, beta=FLOOR_SHARPNESS)


def weighted_sum(per_value: Tensor, log_weight: Tensor) -> Tensor:
    """The sum over an image's values of per_value * exp(log_weight), [B]. log_weight broadcasts to [B, C, H, W]."""
    if math.prod(log_weight.shape[1:]) == 1:  # one weight per image: reduce first
        return per_value.flatten(1).sum(1) * torch.exp(log_weight).flatten()
    return (per_value * torch.exp(log_weight)).flatten(1).sum(1)


def constant_sum(value: Tensor, dimensions: int) -> Tensor:
    """The sum over `dimensions` values of a tensor broadcastable to [B, C, H, W]. Returns [B] or [1]."""
    return value.flatten(1).mean(1) * dimensions


def _ratio(sums: Tensor) -> Tensor:
    return sums[1:] / sums[0].clamp_min(1e-30)  # a batch of padding alone has no values
