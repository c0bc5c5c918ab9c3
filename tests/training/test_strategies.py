"""What every layout shares, in one process: the average, the state by name, the comparison of replicas."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from tests.ranks import on_ranks
from vaescale.errors import TrainingStopped
from vaescale.models.vae import VAE
from vaescale.recipe import Recipe
from vaescale.trained import build_model
from vaescale.training.averages import Average, averages_of
from vaescale.training.config import OptimizerConfig
from vaescale.training.launch import data_parallel_options
from vaescale.training.optimizer import build_optimizer
from vaescale.training.strategies import Strategy
from vaescale.training.strategies.base import Verdict, fingerprint

ONE, ZERO = torch.ones(()), torch.zeros(())


@pytest.fixture
def strategy(recipe_content) -> Strategy:
    return make(Recipe.model_validate(recipe_content), ema_decay=0.9)


def make(
    recipe: Recipe,
    *,
    ema_decay: float = 0,
    model: VAE | None = None,
    averages: dict[str, Average] | None = None,
) -> Strategy:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    build = partial(build_optimizer, config=OptimizerConfig(lr=0.1, weight_decay=0.1))
    averages = averages or ({"ema": Average(ema_decay)} if ema_decay else {})
    return Strategy(Accelerator(cpu=True), model or build_model(recipe), build, averages=averages)


def step(strategy: Strategy, number: int, *, scale: Tensor = ONE, skip: Tensor = ZERO) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    for parameter in strategy.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    norms: list[Tensor] = []

    def judge(norm: Tensor) -> Verdict:
        norms.append(norm)
        return Verdict(norm, scale, skip)

    strategy.step(number, judge)
    return norms[0]


def test_the_average_is_the_recursion_s(strategy: Strategy) -> None:
    expected = [parameter.detach().clone() for parameter in strategy.model.parameters()]
    for number in range(30):
        step(strategy, number, skip=ONE if number == 7 else ZERO)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = [
            decay * old + (1 - decay) * new.detach()
            for old, new in zip(expected, strategy.model.parameters(), strict=True)
        ]
    before = [parameter.detach().clone() for parameter in strategy.model.parameters()]
    with strategy.averaged():
        for average, value in zip(strategy.model.parameters(), expected, strict=True):
            torch.testing.assert_close(average.detach(), value)
    assert all(map(torch.equal, before, strategy.model.parameters()))
    averages = strategy.state()["ema"]
    for (name, _), value in zip(strategy.model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(averages[name], value)
    running = "likelihood.state.running"
    assert torch.equal(averages[running], strategy.model.get_buffer(running)), "buffers are averages already"


def test_several_averages_are_kept_apart(recipe_content) -> None:
    """A shorter one and a power function beside the main one; evaluation takes the main one."""
    content = {**recipe_content, "training": {**recipe_content["training"], "ema_decay": 0.9}}
    content["training"] |= {"ema_more": [0.5], "ema_sigma_rel": [0.1]}
    recipe = Recipe.model_validate(content)
    kinds = averages_of(recipe.training)
    assert list(kinds) == ["ema", "ema-0.5", "ema-sigma-0.1"]
    own = make(recipe, averages=kinds)
    history = [{name: value.clone() for name, value in own.model.state_dict().items()}]
    for number in range(20):
        step(own, number)
        history.append({name: value.clone() for name, value in own.model.state_dict().items()})
    state = own.state()
    name = "network.encoder.0.0.weight"
    for kind, average in kinds.items():
        factors = torch.as_tensor(average.profile(20), dtype=torch.float32)
        expected = sum(factor * weights[name] for factor, weights in zip(factors, history, strict=True))
        torch.testing.assert_close(state[kind][name], expected)
    with own.averaged():
        assert torch.equal(dict(own.model.named_parameters())[name], state["ema"][name])
    other = make(recipe, averages=kinds)
    other.load(state)
    again = other.state()
    assert all(torch.equal(again[kind][name], state[kind][name]) for kind in kinds)


def test_statistics_of_batch_norm_are_averaged_with_the_weights(recipe_content) -> None:
    recipe_content["network"]["norm"] = "batch"
    own = make(Recipe.model_validate(recipe_content), ema_decay=0.9)
    buffers = {name: each for name, each in own.model.named_buffers() if "running_" in name}
    assert len(buffers) == 2 * 4, "of two layers in the encoder and two in the decoder"
    expected = {name: buffer.clone() for name, buffer in buffers.items()}
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        for buffer in buffers.values():
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
        step(own, number)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = {name: decay * old + (1 - decay) * buffers[name] for name, old in expected.items()}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with own.averaged():
        for name, value in expected.items():
            torch.testing.assert_close(buffers[name], value)
    assert all(torch.equal(before[name], buffers[name]) for name in before)
    state = own.state()
    for name, value in expected.items():
        torch.testing.assert_close(state["ema"][name], value)
        assert torch.equal(state["model"][name], before[name])


def test_without_an_average_the_weights_are_the_weights(recipe_content) -> None:
    strategy = make(Recipe.model_validate(recipe_content), ema_decay=0)
    step(strategy, 0)
    before = [parameter.detach().clone() for parameter in strategy.model.parameters()]
    with strategy.averaged():
        assert all(map(torch.equal, before, strategy.model.parameters()))
    assert strategy.state().keys() == {"model", "optimizer"}


def test_clipping_and_scaling_are_torch_s(recipe_content) -> None:
    """Two steps, against torch's own optimizer with clip_grad_norm_."""
    strategy = make(Recipe.model_validate(recipe_content), ema_decay=0)
    reference = build_model(Recipe.model_validate(recipe_content))
    optimizer = torch.optim.AdamW(
        [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups(reference)],
        lr=0.1,
    )
    for number in range(2):
        norm = step(strategy, number, scale=torch.tensor(50.0))
        generator = torch.Generator().manual_seed(number)
        for parameter in reference.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        total = torch.nn.utils.clip_grad_norm_(reference.parameters(), float(norm) / 50)
        assert float(norm) == pytest.approx(float(total))
        optimizer.step()
    for own, other in zip(strategy.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def groups(model: torch.nn.Module) -> list[dict]:
    return build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.1)).param_groups


def test_a_skipped_step_moves_neither_weights_nor_moments(strategy: Strategy) -> None:
    step(strategy, 0)
    before = strategy.state()
    step(strategy, 1, skip=ONE, scale=torch.tensor(2.0))
    after = strategy.state()
    for group in ("model", "optimizer"):
        assert all(torch.equal(before[group][name], after[group][name]) for name in before[group]), group


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_what_was_saved_goes_on_bit_for_bit(recipe_content, norm: str) -> None:
    recipe_content["network"]["norm"] = norm
    recipe = Recipe.model_validate(recipe_content)
    whole = make(recipe, ema_decay=0.9)
    for number in range(3):
        step(whole, number)
    saved = whole.state()
    parts = make(recipe, ema_decay=0.9)
    step(parts, 77)
    parts.load(saved)
    for number in range(3, 6):
        step(whole, number)
        step(parts, number)
    one, other = whole.state(), parts.state()
    assert one.keys() == other.keys() == {"model", "optimizer", "ema"}
    for group in one:
        assert one[group].keys() == other[group].keys()
        assert all(torch.equal(one[group][name], other[group][name]) for name in one[group]), group


def test_a_saved_state_is_a_copy(strategy: Strategy) -> None:
    saved = strategy.state()
    kept = {group: {name: value.clone() for name, value in saved[group].items()} for group in saved}
    step(strategy, 0)
    for group in saved:
        assert all(torch.equal(saved[group][name], kept[group][name]) for name in saved[group]), group


def test_a_fingerprint_changes_with_every_bit() -> None:
    values = torch.randn(64)
    seen = {fingerprint(values)}
    for place in range(64):
        for bit in range(32):
            other = values.clone()
            other.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
            seen.add(fingerprint(other))
    assert len(seen) == 64 * 32 + 1
    assert fingerprint(values) == fingerprint(values.clone())
    assert fingerprint(values.flip(0)) != fingerprint(values)


def compare(rank: int, ranks: int) -> Tensor:
    from types import SimpleNamespace

    weights = {"a": torch.ones(3), "b": torch.arange(4.0)}
    replicas = SimpleNamespace(_replicated=lambda: weights)
    Strategy.compare_replicas(replicas)
    if rank == 1:
        weights["b"].view(torch.int32)[2] ^= 1
    with pytest.raises(TrainingStopped, match="rank 1's weights differ from rank 0's in b and 0 more"):
        Strategy.compare_replicas(replicas)
    return torch.ones(())


class OfTorch211:
    """The names of DistributedDataParallel's options in torch 2.11."""

    def __init__(self, module: object, *, broadcast_buffers=True, gradient_as_bucket_view=False) -> None: ...


def test_buffers_are_not_sent_whatever_torch_calls_that(monkeypatch: pytest.MonkeyPatch) -> None:
    options = data_parallel_options()
    assert options.keys() <= inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters.keys()
    assert sorted(options.values()) == [False, True]
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", OfTorch211)
    assert data_parallel_options() == {"broadcast_buffers": False, "gradient_as_bucket_view": True}


@pytest.mark.distributed
@pytest.mark.slow
def test_a_flipped_bit_on_one_rank_stops_all(tmp_path: Path) -> None:
    assert all(on_ranks(tmp_path, compare))
