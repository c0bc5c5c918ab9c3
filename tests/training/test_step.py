"""The step: gradients over micro-batches, refusal of non-finite numbers."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from vaescale.data.batch import Batch
from vaescale.errors import TrainingStopped
from vaescale.objectives.elbo import ElboConfig
from vaescale.recipe import Recipe
from vaescale.run import build_model
from vaescale.training.step import refuse_non_finite, step_metrics, train_step


def batches(parts: int, count: int = 12) -> list[Batch]:
    images = torch.randint(
        0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    whole = (images, torch.zeros(count), torch.arange(count), torch.ones(count, dtype=torch.bool))
    return [Batch(*fields) for fields in zip(*(field.chunk(parts) for field in whole), strict=True)]


def one_step(recipe: Recipe, parts: int, **options):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    model = build_model(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    defaults = {"objective": ElboConfig(), "precision": "fp32", "seed": 0, "step": 3, "clip_norm": None}
    result = train_step(accelerator, prepared, optimizer, batches(parts), **(defaults | options))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return model, result, gradients


def test_accumulation_gives_the_same_gradient_at_a_fixed_sigma(recipe_content) -> None:
    recipe = Recipe.model_validate(recipe_content | {"likelihood": {"kind": "gaussian", "sigma": 0.5}})
    _, whole, expected = one_step(recipe, 1)
    for parts in (2, 3, 4):
        model, result, gradients = one_step(recipe, parts)
        assert result.global_batch == 12
        assert step_metrics(result, model, beta=1.0) == pytest.approx(
            step_metrics(whole, model, beta=1.0), rel=1e-4
        )
        for gradient, value in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, value, rtol=1e-3, atol=1e-4)


def test_the_optimal_sigma_is_updated_once_from_all_micro_batches(recipe_content) -> None:
    recipe = Recipe.model_validate(recipe_content)
    whole, result, _ = one_step(recipe, 1)
    parts, _, _ = one_step(recipe, 3)
    assert float(whole.likelihood.sigma) == pytest.approx(float(parts.likelihood.sigma), rel=1e-6)
    mse = step_metrics(result, whole, beta=1.0)["train/mse"]
    assert float(whole.likelihood.sigma) == pytest.approx(math.sqrt(mse), rel=1e-6)


def test_metrics_are_the_step_s_means(recipe_content) -> None:
    model, result, gradients = one_step(Recipe.model_validate(recipe_content), 1)
    metrics = step_metrics(result, model, beta=0.5)
    assert metrics["train/neg_elbo_nats"] == pytest.approx(
        metrics["train/kl_nats"] - metrics["train/log_px_nats"]
    )
    assert metrics["train/loss_nats"] == pytest.approx(
        0.5 * metrics["train/kl_nats"] - metrics["train/log_px_nats"]
    )
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_clipping_scales_the_gradient_and_reports_the_norm_before(recipe_content) -> None:
    recipe = Recipe.model_validate(recipe_content)
    _, free, _ = one_step(recipe, 1)
    _, clipped, gradients = one_step(recipe, 1, clip_norm=0.1)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert norm == pytest.approx(0.1, rel=1e-3)
    assert float(clipped.grad_norm) == pytest.approx(float(free.grad_norm))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_metrics_stop_training(value: float) -> None:
    refuse_non_finite({"train/mse": 1.0}, 3)
    with pytest.raises(TrainingStopped, match=r"train/mse is .* at step 3; lower optimizer.lr"):
        refuse_non_finite({"train/mse": value}, 3)
