"""How many ATen operations a step takes: upper bounds, about 3% above the counts of torch 2.13 on a CPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from tools.bench import operations
from vaescale.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
NARROW = ["network.width=8", "network.latent_dim=2"]  # the counts are those of the recipe's own width
BOUNDS = {
    "cifar10/ladder_bounded": (8900, NARROW),
    "mnist/ladder": (2620, [*NARROW, "network.widths={}"]),
    "cifar10/conv": (390, []),  # 340 where gradients of weights are no products
    "digits/optimal": (290, []),
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", BOUNDS)
def test_a_step_takes_few_operations(name: str) -> None:
    bound, overrides = BOUNDS[name]
    step = operations.count(load_recipe(RECIPES / f"{name}.yaml", overrides))
    assert bound / 2 < step.operations.total() <= bound, operations.table(step, step)
    assert {"backward", "network", "noise", "guard", "optimizer"} <= set(step.operations)
    assert not {"column sums", "errors and variances", "metrics"} & set(step.operations)


def test_a_logged_step_has_its_metrics() -> None:
    recipe = load_recipe(RECIPES / "digits/optimal.yaml", [])
    step, logged = (operations.count(recipe, logged=logged) for logged in (False, True))
    assert {"column sums", "errors and variances", "metrics"} <= set(logged.operations)
    assert logged.operations["backward"] == step.operations["backward"]
    assert sum(logged.kernels.values()) < sum(logged.operations.values())
