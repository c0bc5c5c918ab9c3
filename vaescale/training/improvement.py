"""Whether a held-out metric still improves: what ends training early, and what lowers the learning rate on a plateau.

An `Improvement` is a fold over the evaluations in training. It is saved with each checkpoint, which is written before the evaluation of
its step; on resuming, the row of that step is added where metrics.jsonl has it. A resumed run therefore decides as one that never
stopped, and each rank decides alike, since all have the metrics of all images.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vaescale.training.config import EarlyStoppingConfig, OptimizerConfig, PlateauConfig

PLATEAU, EARLY_STOPPING = "plateau", "early_stopping"  # keys of state.json


class Improvement(NamedTuple):
    """The smallest value so far, the evaluations since, how often the patience ended, and the step of the last evaluation."""

    best: float = math.inf
    waited: int = 0
    ended: int = 0
    step: int = -1

    def after(self, step: int, value: float, *, patience: float, least: float) -> "Improvement":
        """The state after an evaluation. A value that is not lower than the best one by more than `least` waits; so does NaN.

        When it has waited `patience` evaluations, `ended` is one more and the wait begins anew.
        """
        if value < self.best - least:
            return Improvement(value, 0, self.ended, step)
        waited = self.waited + 1
        if waited < patience:
            return self._replace(waited=waited, step=step)
        return self._replace(waited=0, ended=self.ended + 1, step=step)

    def to_json(self) -> dict[str, Any]:
        """Plain values for state.json, which has no Inf."""
        return self._asdict() | {"best": self.best if math.isfinite(self.best) else None}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Improvement":
        """The state that `to_json` saved."""
        best = saved.get("best")
        return cls(**{**saved, "best": math.inf if best is None else float(best)})


class Watched:
    """The held-out metrics that a recipe watches. All ranks keep one, and call it alike."""

    def __init__(self, early_stopping: EarlyStoppingConfig | None, plateau: PlateauConfig | None) -> None:
        configs: dict[str, EarlyStoppingConfig | PlateauConfig | None] = {
            EARLY_STOPPING: early_stopping,
            PLATEAU: plateau,
        }
        self._configs = {name: config for name, config in configs.items() if config is not None}
        self._states = dict.fromkeys(self._configs, Improvement())
        self._plateau = plateau

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that are watched."""
        return [config.metric for config in self._configs.values()]

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an evaluation, unless it was added before."""
        for name, config in self._configs.items():
            state = self._states[name]
            if step > state.step:
                value = metrics.get(config.metric, math.nan)
                # Early stopping waits on, so that a run may go on with more patience.
                patience = config.patience if name == PLATEAU else math.inf
                self._states[name] = state.after(step, value, patience=patience, least=config.min_delta)

    @property
    def has_stalled(self) -> bool:
        """Whether training is to end."""
        config = self._configs.get(EARLY_STOPPING)
        return config is not None and self._states[EARLY_STOPPING].waited >= config.patience

    def lr_factor(self, final_fraction: float) -> float:
        """The factor of the learning rate after the plateaus so far, at least `final_fraction`; 1 without that schedule."""
        if self._plateau is None:
            return 1.0
        return max(final_fraction, self._plateau.factor ** self._states[PLATEAU].ended)

    def state(self) -> dict[str, Any]:
        """What state.json of a checkpoint keeps; {} where nothing is watched."""
        return {name: state.to_json() for name, state in self._states.items()}

    def resume(self, saved: Mapping[str, Any], step: int, rows: Iterable[Mapping[str, float]]) -> None:
        """Continue from the state of a checkpoint of this step, and the row of its evaluation, if it was measured.

        What a checkpoint does not have, because the recipe was changed, begins anew.
        """
        for name in self._states:
            self._states[name] = Improvement.from_json(saved[name]) if name in saved else Improvement()
        for row in rows:
            if row["step"] == step and any(name.startswith("val/") for name in row):
                self.add(step, row)


def watched(early_stopping: EarlyStoppingConfig | None, optimizer: OptimizerConfig) -> Watched:
    """What a recipe watches."""
    return Watched(early_stopping, optimizer.plateau_or_default)
