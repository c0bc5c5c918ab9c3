"""Passes replayed as CUDA graphs: the same losses, weights and states, bit for bit, as passes that are not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.conftest import NEEDS_GPU, column, deterministic, quiet, verb
from vaescale.models.vae import VAE

pytestmark = NEEDS_GPU
WORDS = (
    "data.global_batch=64",
    "training.evaluate_every=10",
    "training.checkpoint_every=10",
    "training.precision=bf16",
)
CASES = {
    "optimal": (),
    "optimal_per_pixel": (),
    "predicted": (),
    "structured": (),
    "bernoulli": (),  # binarizes with noise of its own
    "ladder": (),
    "ladder, recomputed": ("network.checkpointing=true",),
    "resnet": ("training.channels_last=true",),
    "iwae": (),
    "two_stage": ("likelihood.handover.at_step=8",),
    "wae_mmd": (),
    "optimal, batch norm": ("network.norm=batch",),
    "optimal, spectral": ("objective.spectral=0.1",),
    "optimal, running": ("likelihood.sigma_source=running",),
    "optimal, fp16": ("training.precision=fp16",),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_passes_have_the_same_bits(
    case: str, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, runs = case.partition(",")[0], {}
    with deterministic():
        for graphs in ("true", "false"):
            run = tmp_path / graphs
            given = words(
                run, *WORDS, *CASES[case], f"training.cuda_graphs={graphs}", recipe=recipe, steps=20
            )
            assert verb("gpu", *given) == 0
            runs[graphs] = run
            said = capsys.readouterr().err
            assert ("each step's passes are replayed as CUDA graphs" in said) is (graphs == "true"), said
    for name in ("train/loss_nats", "train/grad_norm", "train/kl_nats", "val/neg_elbo_nats"):
        assert column(runs["true"], name) == column(runs["false"], name), name
    saved = [load_file(run / "checkpoints" / "step-000000020" / "model.safetensors") for run in runs.values()]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])


def test_a_run_continues_with_graphs_or_without(words, tmp_path: Path) -> None:
    """The key changes no numbers, so a run may continue with another value, to the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with deterministic():
        assert verb("gpu", *words(whole, *WORDS, steps=20)) == 0
        shutil.copytree(whole, parts)
        shutil.rmtree(parts / "checkpoints" / "step-000000020")
        (parts / "summary.json").unlink()
        assert verb("gpu", *words(parts, *WORDS, "training.cuda_graphs=false", steps=20)) == 0
    saved = [
        load_file(run / "checkpoints" / "step-000000020" / "model.safetensors") for run in (whole, parts)
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("training.accumulation=2",), "training.accumulation is more than 1"),
        (("training.compile=true",), "training.compile is true"),
    ],
)
def test_it_says_why_passes_are_not_replayed(
    options: tuple[str, ...], why: str, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quiet():
        assert verb("gpu", *words(tmp_path / "run", *WORDS, *options, steps=2)) == 0
    assert f"each step's passes are not replayed as CUDA graphs: {why}" in capsys.readouterr().err


def test_a_model_that_waits_for_the_gpu_trains_without_graphs(
    words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = VAE.target

    def waiting(self, images, stream):
        float(images.float().sum())
        return target(self, images, stream)

    monkeypatch.setattr(VAE, "target", waiting)
    assert verb("gpu", *words(tmp_path / "run", *WORDS, steps=10)) == 0
    said = capsys.readouterr().err
    assert "each step's passes are not replayed as CUDA graphs: " in said
    assert "CUDA error: operation" in said
    assert len(column(tmp_path / "run", "train/loss_nats")) == 10
