"""Whole trainings on a GPU: their curves against the CPU's, stops and resumes, compilation, memory, and no waiting."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.test_train import numbers
from tests.conftest import ROOT
from tests.gpu.conftest import (
    NEEDS_GPU,
    ON_GPU,
    assert_same_curve,
    column,
    deterministic,
    quiet,
    relative_error,
    verb,
)
from vaescale import noise
from vaescale.recipe import load_recipe
from vaescale.runs.folder import read_metrics
from vaescale.trained import build_model
from vaescale.training import guard, loop
from vaescale.training import launch as backends
from vaescale.training.memory import estimate
from vaescale.training.optimizer import build_optimizer
from vaescale.training.recorder import Recorder

pytestmark = NEEDS_GPU
# What a run of 60 steps may differ by from the CPU's in fp32, where the training loss falls from 39 to -18 nats: nats of each
# step, the relative sigma of each step, nats and relative sigma of the two evaluations. On the CPU, channels_last differs by 2e-6
# nats, bf16 by 1.6e-2; TF32 has three bits more than bf16.
FP32 = (1e-3, 1e-5, 5e-4, 1e-5)
CURVES = {"fp32": FP32, "tf32": (0.1, 1e-3, 0.05, 1e-3), "bf16": (0.3, 3e-3, 0.1, 2e-3)}
# The first scale of a float16 loss overflows in this recipe and skips steps of the warm-up: the curve is behind, and catches up.
SKIPPED, BEHIND_NATS = 12, 3.0


def assert_close_runs(run: Path, reference: Path, bounds: tuple[float, float, float, float]) -> None:
    """The curves of loss, sigma, learning rate and evaluation."""
    nats, sigma, val_nats, val_sigma = bounds
    assert_same_curve(run, reference, "train/neg_elbo_nats", rtol=0, atol=nats)
    assert_same_curve(run, reference, "train/sigma", rtol=sigma, atol=0)
    assert_same_curve(run, reference, "train/lr", rtol=0, atol=0)
    assert_same_curve(run, reference, "train/skipped_steps", rtol=0, atol=0)
    assert_same_curve(run, reference, "val/neg_elbo_nats", rtol=0, atol=val_nats)
    assert_same_curve(run, reference, "val/sigma", rtol=val_sigma, atol=0)
    assert_same_curve(run, reference, "val/images", rtol=0, atol=0)


@pytest.mark.parametrize("precision", CURVES)
def test_a_curve_is_the_cpu_s(precision: str, trained) -> None:
    reference = trained("cpu")
    losses = column(reference, "train/neg_elbo_nats")
    assert losses[60] < losses[1] - 20, "it learns"
    run = trained("gpu", f"training.precision={precision}")
    assert_close_runs(run, reference, CURVES[precision])
    if precision == "bf16":
        assert (
            max(abs(value - losses[step]) for step, value in column(run, "train/neg_elbo_nats").items())
            > 2e-3
        )
    else:  # the first step has no history of rounding
        assert losses[1] == pytest.approx(
            column(run, "train/neg_elbo_nats")[1], rel=1e-5 if precision == "fp32" else 3e-3
        )


def assert_close_in_float16(run: Path, reference: Path) -> None:
    """The end of the curve, and a scale that has fallen by one half for each skipped step."""
    scales, skipped = (column(run, f"train/{name}") for name in ("loss_scale", "skipped_steps"))
    assert 0 < skipped[60] <= SKIPPED
    assert all(scales[step] == 2.0 ** (16 - skipped[step]) for step in scales)
    for name in ("train/neg_elbo_nats", "val/neg_elbo_nats"):
        assert column(run, name)[60] == pytest.approx(column(reference, name)[60], abs=BEHIND_NATS)


def test_a_curve_in_float16_ends_where_the_cpu_s_does(trained) -> None:
    run, reference = trained("gpu", "training.precision=fp16"), trained("cpu")
    assert_close_in_float16(run, reference)
    losses = (column(one, "train/neg_elbo_nats")[1] for one in (run, reference))
    assert next(losses) == pytest.approx(next(losses), rel=3e-3)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("ladder", ()),
        ("iwae", ()),
        ("resnet", ()),
        ("two_stage", ("likelihood.handover.at_step=8",)),
        ("wae_mmd", ()),
    ],
)
def test_the_curve_of_another_recipe_is_the_cpu_s(recipe: str, more: tuple[str, ...], trained) -> None:
    """Fifteen steps in fp32, each loss within 0.1% and a hundredth of a nat, all pieces and the gradient's norm within 1%."""
    words = ("data.global_batch=32", "training.evaluate_every=15", "training.checkpoint_every=15", *more)
    run, reference = (trained(place, *words, recipe=recipe, steps=15) for place in ("gpu", "cpu"))
    rows = [row for row in read_metrics(reference) if "train/loss_nats" in row]
    names = {name for name in rows[-1] if name.startswith(("train/", "val/"))}
    assert {"train/loss_nats", "train/grad_norm"} <= names
    assert_same_curve(run, reference, "train/loss_nats", rtol=1e-3, atol=1e-2)
    for name in sorted(names - {"train/active_units", "val/active_units"}):
        assert_same_curve(run, reference, name, rtol=1e-2, atol=2e-2)


def test_a_loss_scale_rises_and_falls(
    words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained
) -> None:
    """Doubled every other step, it reaches the overflow of float16 soon; each overflow skips a step and halves it."""
    monkeypatch.setattr(guard, "GROWTH_STEPS", 2)
    assert verb("gpu", *words(tmp_path / "run", "training.precision=fp16")) == 0
    scales, skipped = (column(tmp_path / "run", f"train/{name}") for name in ("loss_scale", "skipped_steps"))
    steps = range(2, 61)
    assert any(scales[step] == 2 * scales[step - 1] for step in steps)
    falls = [step for step in steps if scales[step] == scales[step - 1] / 2]
    assert len(falls) >= 2
    assert falls == [step for step in steps if skipped[step] == skipped[step - 1] + 1]
    losses, reference = (column(run, "train/neg_elbo_nats") for run in (tmp_path / "run", trained("cpu")))
    assert losses[60] < reference[60] + 15, "the other steps train"


def test_the_averaged_weights_of_a_gpu_are_the_cpu_s(trained) -> None:
    """All checkpointed tensors after 30 steps in fp32, by the norm of their difference."""
    run, reference = trained("gpu"), trained("cpu")
    for name, bound in (("model", 2e-3), ("ema", 2e-3), ("optimizer", 2e-2)):
        found, expected = (
            load_file(folder / "checkpoints" / "step-000000030" / f"{name}.safetensors")
            for folder in (run, reference)
        )
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key].dtype == expected[key].dtype
            assert relative_error(found[key], expected[key], floor=1e-4) < bound, (name, key)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Act once after the row of a step is written."""
    real = Recorder.log

    def log(self: Recorder, done: int, metrics: dict[str, float]) -> None:
        real(self, done, metrics)
        if done == step:
            act()

    monkeypatch.setattr(Recorder, "log", log)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("first", "then"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_a_run_moves_between_cpu_and_gpu(
    first: str, then: str, words, trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 40 on one device and continued from the checkpoint of step 30 on the other, it has the CPU's curve."""
    with monkeypatch.context() as patch:
        stop_at(40, patch, interrupt)
        assert verb(first, *words(tmp_path / "run")) == 130
    assert verb(then, *words(tmp_path / "run")) == 0
    assert_close_runs(tmp_path / "run", trained("cpu"), FP32)
    optimizer = load_file(tmp_path / "run" / "checkpoints" / "step-000000060" / "optimizer.safetensors")
    assert {float(value) for key, value in optimizer.items() if key.endswith("/step")} == {60.0}


@pytest.mark.parametrize("how", ["interrupted", "preempted"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resuming_on_a_gpu_is_bit_equal_with_deterministic_algorithms(
    how: str, precision: str, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the CPU: the same rows and the same weights as of a run that never stopped, after Ctrl-C and after SIGTERM (75)."""
    more = (f"training.precision={precision}", "training.evaluate_every=6", "training.checkpoint_every=6")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    act = interrupt if how == "interrupted" else lambda: os.kill(os.getpid(), signal.SIGTERM)
    with deterministic():
        assert verb("gpu", *words(straight, *more, steps=12)) == 0
        with monkeypatch.context() as patch:
            stop_at(9, patch, act)
            code = verb("gpu", *words(stopped, *more, steps=12))
        assert code == (130 if how == "interrupted" else 75)
        assert verb("gpu", *words(stopped, *more, steps=12)) == 0
    assert numbers(straight) == numbers(stopped)
    for name in ("model", "optimizer", "ema", "guard"):
        a, b = (
            load_file(run / "checkpoints" / "step-000000012" / f"{name}.safetensors")
            for run in (straight, stopped)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_resuming_on_a_gpu_stays_close_without_them(words, trained, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(40, patch, interrupt)
        assert verb("gpu", *words(tmp_path / "run")) == 130
    assert verb("gpu", *words(tmp_path / "run")) == 0
    assert_close_runs(tmp_path / "run", trained("gpu", "training.precision=fp32"), FP32)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_channels_last_leaves_the_curve(accumulation: int, trained) -> None:
    words = ("training.channels_last=true", f"training.accumulation={accumulation}")
    reference = trained("cpu", *words[1:] if accumulation > 1 else ())
    assert_close_runs(trained("gpu", *words), reference, FP32)


COMPILED: dict[str, tuple[str, ...]] = {
    "optimal": ("network.widths=[16,32]",),
    "ladder": ("network.width=16", "network.encoder=[8x1,8d8,1x1]", "network.decoder=[1x1,8m1]"),
}


@pytest.mark.parametrize("recipe", COMPILED)
def test_a_compiled_model_has_the_same_curve(recipe: str, trained) -> None:
    """Six steps of fp32, compiled by Inductor for this GPU: 0.1% of each loss."""
    words = (
        *COMPILED[recipe],
        "data.global_batch=32",
        "training.evaluate_every=6",
        "training.checkpoint_every=6",
    )
    reference = trained("cpu", *words, recipe=recipe, steps=6)
    with quiet():
        torch._dynamo.reset()
        run = trained("gpu", *words, "training.compile=true", recipe=recipe, steps=6)
    assert_same_curve(run, reference, "train/loss_nats", rtol=1e-3, atol=1e-2)
    assert_same_curve(run, reference, "train/grad_norm", rtol=1e-2, atol=1e-2)
    assert_same_curve(run, reference, "val/neg_elbo_nats", rtol=1e-3, atol=1e-2)


NO_WAITING: dict[str, tuple[str, tuple[str, ...]]] = {
    "conv": ("optimal", ()),
    "fp16": ("optimal", ("training.precision=fp16", "optimizer.skip_factor=10")),
    "accumulated, channels last": (
        "optimal",
        ("training.accumulation=2", "training.channels_last=true", "training.precision=bf16"),
    ),
    "per pixel, running": ("optimal_per_pixel", ("likelihood.sigma_source=running",)),
    "ladder": ("ladder", ("training.precision=bf16",)),
    "checkpointed ladder": ("ladder", ("network.checkpointing=true", "objective.spectral=0.1")),
    "balanced ladder": ("ladder", ("objective.balancing=always",)),
    "resnet": ("resnet", ()),
    "iwae": ("iwae", ()),
    "handover": ("two_stage", ("likelihood.handover.at_step=4",)),
    "mmd": ("wae_mmd", ()),
    "dip": ("dip", ()),
    "free bits": ("free_bits", ()),
    "mixture": ("discretized_logistic_mixture", ()),
    "categorical": ("categorical", ()),
    "bitwise": ("bitwise", ()),
    "structured": ("structured", ()),
    "student": ("student_t", ()),
    "continuous Bernoulli": ("continuous_bernoulli", ()),
    "Bernoulli": ("bernoulli", ()),
    "batch norm": ("optimal", ("network.norm=batch",)),
    "dequantized": ("optimal", ("likelihood.dequantize=true",)),
    "flipped": ("optimal", ("data.flip=true",)),
}


@pytest.mark.skipif(not ON_GPU, reason="only a GPU makes the host wait")
@pytest.mark.parametrize("case", NO_WAITING)
def test_a_step_never_makes_the_host_wait(
    case: str, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on, between two rows of metrics, a synchronizing call of torch raises."""
    recipe, more = NO_WAITING[case]
    steps, rows = list[int](), list[int]()
    step, metrics = loop.train_step, loop.step_metrics

    def watched(*arguments: Any, **keys: Any) -> Any:
        if steps:
            with quiet():  # "a prototype"
                torch.cuda.set_sync_debug_mode("error")
        steps.append(keys["step"])
        return step(*arguments, **keys)

    def due(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        rows.append(steps[-1])
        return metrics(*arguments)

    monkeypatch.setattr(loop, "train_step", watched)
    monkeypatch.setattr(loop, "step_metrics", due)
    every = ("training.log_every=6", "training.evaluate_every=12", "training.checkpoint_every=12")
    try:
        code = verb(
            "gpu", *words(tmp_path / "run", "data.global_batch=32", *every, *more, recipe=recipe, steps=12)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert code == 0
    assert steps == list(range(12))
    assert rows == [5, 11]


@pytest.mark.skipif(not ON_GPU, reason="only a GPU's memory is counted")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("images", [16, 128])
def test_the_memory_estimate_is_near_the_peak(
    precision: Any, images: int, checkpointing: bool, words, tmp_path: Path, device: torch.device
) -> None:
    """The printed estimate excludes temporary workspace: the peak of three real steps is between it and 1.6 times it."""
    network = [
        f"network.checkpointing={str(checkpointing).lower()}",
        "network.latent_dim=4",
        "network.width=128",
    ]
    overrides = [word for word in words(tmp_path / "run", *network, recipe="ladder") if "=" in word]
    recipe = load_recipe(ROOT / "recipes" / "digits" / "ladder.yaml", overrides)
    model = build_model(recipe).to(device).train()
    estimated = estimate(model, images=images, averages=0, precision=precision)
    optimizer = build_optimizer(model, recipe.optimizer)
    objective = recipe.objective.implement(model)
    batch = torch.randint(0, 256, (images, 1, 8, 8), dtype=torch.uint8, device=device)
    slots, mask = torch.arange(images, device=device), torch.ones(images, dtype=torch.bool, device=device)
    for step in range(3):
        if step == 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            held = sum(p.numel() * p.element_size() for p in model.parameters()) * 3
            assert before >= held
        stream = noise.Stream(0, step, slots)
        terms = model(batch, stream, mask, 0, False, torch.bfloat16 if precision == "bf16" else None)
        objective(terms, stream)[0].backward()
        model.likelihood.end_step()
        optimizer.step()
        optimizer.zero_grad()
    others = before - held  # what other tests left, this batch and cuBLAS's workspace
    peak = torch.cuda.max_memory_allocated() - others
    assert 0.9 < peak / estimated["peak"] < 1.6, (peak, estimated)


def test_the_peak_that_a_run_logs_is_the_device_s(trained) -> None:
    run = trained("gpu", "training.precision=fp32")
    logged = column(run, "perf/memory_bytes")[60]
    parameters = json.loads((run / "run.json").read_text()).get("parameters")
    assert parameters is None or logged > 4 * 4 * parameters
    assert not ON_GPU or 4e6 < logged <= torch.cuda.max_memory_allocated() + 1e9


def test_tf32_ends_with_the_run(words, tmp_path: Path) -> None:
    """A verb in the same process after a run in TF32 computes in float32 again."""
    from vaescale.trained import open_trained

    assert verb("gpu", *words(tmp_path / "run", "training.precision=tf32", steps=2)) == 0
    backends.set_precision("tf32")
    open_trained(tmp_path / "run")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    shutil.rmtree(tmp_path / "run")
