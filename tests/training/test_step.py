"""The step: gradients over micro-batches, refusal of non-finite numbers."""

import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from vaescale.data.batch import Batch
from vaescale.recipe import Recipe
from vaescale.trained import build_model
from vaescale.training.guard import Guard
from vaescale.training.step import step_metrics, train_step
from vaescale.training.strategies import Strategy


def batches(parts: int, count: int = 12) -> list[Batch]:
    images = torch.randint(
        0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    whole = (images, torch.zeros(count), torch.arange(count), torch.ones(count, dtype=torch.bool))
    return [Batch(*fields) for fields in zip(*(field.chunk(parts) for field in whole), strict=True)]


def one_step(recipe: Recipe, parts: int, *, lr: float = 0.0, damage=None, clip_norm=None, precision="fp32"):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model = build_model(recipe)

    def build(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=lr, fused=True)

    strategy = Strategy(Accelerator(cpu=True), model, build, averages={})
    if damage:
        damage(model)
    guard = Guard(
        skip_factor=None,
        clip_norm=clip_norm,
        max_non_finite=10,
        scaled=precision == "fp16",
        device=torch.device("cpu"),
    )
    gradients = []
    guard.state.scale.value.fill_(64.0 if precision == "fp16" else 1.0)
    strategy.optimizer.register_step_post_hook(
        lambda *_: gradients.extend(parameter.grad.clone() for parameter in model.parameters())
    )
    result = train_step(
        strategy,
        batches(parts),
        objective=recipe.objective.implement(model),
        judge=partial(guard.judge, step=3),
        scale=guard.scale,
        precision=precision,
        seed=0,
        step=3,
    )
    return model, result, gradients


def test_accumulation_gives_the_same_gradient_at_a_fixed_sigma(recipe_content) -> None:
    recipe = Recipe.model_validate(recipe_content | {"likelihood": {"kind": "gaussian", "sigma": 0.5}})
    _, whole, expected = one_step(recipe, 1)
    for parts in (2, 3, 4):
        model, result, gradients = one_step(recipe, parts)
        assert result.global_batch == 12
        assert step_metrics(result, model) == pytest.approx(step_metrics(whole, model), rel=1e-4)
        for gradient, value in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, value, rtol=1e-3, atol=1e-4)


def test_the_optimal_sigma_is_updated_once_from_all_micro_batches(recipe_content) -> None:
    recipe = Recipe.model_validate(recipe_content)
    whole, result, _ = one_step(recipe, 1)
    parts, _, _ = one_step(recipe, 3)
    assert float(whole.likelihood.sigma) == pytest.approx(float(parts.likelihood.sigma), rel=1e-6)
    mse = step_metrics(result, whole)["train/mse"]
    assert float(whole.likelihood.sigma) == pytest.approx(math.sqrt(mse), rel=1e-6)


def test_metrics_are_the_step_s_means(recipe_content) -> None:
    recipe = Recipe.model_validate(recipe_content | {"objective": {"beta": 0.5}})
    model, result, gradients = one_step(recipe, 1)
    metrics = step_metrics(result, model)
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


def test_a_step_with_nan_moves_nothing(recipe_content) -> None:
    recipe = Recipe.model_validate(recipe_content)
    fresh = build_model(recipe)

    def damage(model) -> None:
        model.network.decoder[-1].weight.register_hook(lambda gradient: gradient * math.nan)

    model, result, _ = one_step(recipe, 2, lr=0.1, damage=damage)
    assert not torch.isfinite(result.grad_norm)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))
    moved, _, _ = one_step(recipe, 2, lr=0.1)
    assert not any(map(torch.equal, moved.network.decoder.parameters(), fresh.network.decoder.parameters()))


def test_a_scaled_loss_gives_the_same_step(recipe_content) -> None:
    """The optimizer divides the scale out again."""
    recipe = Recipe.model_validate(recipe_content)
    _, plain, expected = one_step(recipe, 2)
    _, scaled, gradients = one_step(recipe, 2, precision="fp16")
    assert float(scaled.grad_norm) == pytest.approx(float(plain.grad_norm), rel=1e-2)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=5e-2, atol=1e-2 * float(plain.grad_norm))


@pytest.mark.parametrize("sound", [True, False])
def test_a_step_of_nan_changes_no_codebook(recipe_content, sound: bool) -> None:
    """The encoder is sound and the decoder returns NaN: the codes of the step are known and must not be used."""
    network = {"kind": "conv", "latent_dim": 2, "widths": [8], "latent_map": True}
    posterior = {"kind": "quantized", "codes": 4, "start_step": 4}
    recipe = Recipe.model_validate(recipe_content | {"network": network, "posterior": posterior})

    def damage(model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(reversed([*model.network.decoder.parameters()])).fill_(torch.nan)

    model, _, _ = one_step(recipe, 3, damage=None if sound else damage)
    assert float(model.quantizer.ready) == sound
    assert bool(model.quantizer.vectors.any()) == sound
    assert float(model.quantizer.counts.sum()) == (12 * 16 if sound else 0)
