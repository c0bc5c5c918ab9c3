"""The study of hybrids, and how it counts modes."""

import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tools.studies import hybrids, modes, runs
from vaescale.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SHORT = ("training.steps=4", "data.image_size=8")
ALLOWED = {
    "adversarial": {"objective"},
    "aae": {"objective", "posterior"},
    **{name: {"network", "posterior"} for name in ("vq_vae", "fsq")},
    "vae_gan": {"objective", "optimizer"},
    **{name: {"objective", "optimizer", "posterior"} for name in ("alpha_gan", "veegan")},
}


def test_modes_of_labels() -> None:
    """KL against the sum by hand."""
    found = modes.of_labels(torch.tensor([0, 0, 0, 5, 5, 9]), 10)
    by_hand = sum(share * math.log(10 * share) for share in (1 / 2, 1 / 3, 1 / 6))
    assert found[:3] == (3, 10, 6)
    assert found.kl_nats == pytest.approx(by_hand, abs=1e-12)
    assert modes.of_labels(torch.arange(10), 10).kl_nats == pytest.approx(0, abs=1e-12)


def test_the_mode_of_a_stack_is_its_channels_classes() -> None:
    def classify(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (1, 4, 4)
        return torch.nn.functional.one_hot((10 * images.amax((1, 2, 3))).long(), 10).float()

    digits = torch.tensor([[7, 3, 1], [0, 0, 9]])
    images = ((digits + 0.5) / 10)[:, :, None, None].expand(2, 3, 4, 4)
    assert modes.stacked(images, classify).tolist() == [731, 9]  # type: ignore[arg-type]


def test_the_recipes_differ_in_what_they_are_about_alone() -> None:
    paths = {path.stem: path for path in (ROOT / "recipes/hybrids").glob("*.yaml") if path.stem != "base"}
    assert paths.keys() == set(hybrids.KINDS)
    base = load_recipe(paths["optimal"]).identity()
    for name, path in paths.items():
        identity = load_recipe(path).identity()
        assert {key for key in base if base[key] != identity[key]} <= ALLOWED.get(name, set()), name


def test_a_spread_is_half_the_range() -> None:
    assert hybrids.spread([1.0, 2.0, 4.0], 1) == "2.3 +- 1.5"
    assert hybrids.spread([1.0], 2) == "1.00"
    assert hybrids.spread([1.0, None], 2) == ""


@pytest.fixture
def study(
    vaescale: Callable[..., Any],
    tmp_path: Path,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., tuple[list[str], str]]:
    """Runs the study in an empty folder and in this process, its verbs too. Returns the verbs that it called, and its table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    classes = ("train-features", digits / "train", "--out", "features", "--steps", 2, "--width", 4)
    assert vaescale(*classes).code == 0
    called: list[str] = []

    def call(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "vaescale"]
        called.append(command[3])
        return subprocess.CompletedProcess(command, vaescale(*command[3:]).code)

    def run(*words: str) -> tuple[list[str], str]:
        called.clear()
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["hybrids.py", *words, "--no-mlflow", "--components", "2", *SHORT])
        hybrids.main()
        return called, capfd.readouterr().out

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=call))
    return run


@pytest.mark.slow
def test_the_study_runs(study: Callable[..., tuple[list[str], str]], tmp_path: Path, digits: Path) -> None:
    (tmp_path / "data/mnist").mkdir(parents=True)
    for split, folder in (("train", "train"), ("test", "val")):
        (tmp_path / "data/mnist" / split).symlink_to(digits / folder)
    words = ("mnist", "--only", "optimal,fsq", "--seeds", "0", "--features", "features")
    called, printed = study(*words, "--prior-steps", "20", "--count", "100")
    assert called == ["train", "fit-gmm", "evaluate", "quality", "train", "fit-prior", "evaluate", "quality"]
    assert "| optimal | mixture of 2 |" in printed
    assert "| fsq | autoregressive prior |" in printed
    assert study(*words) == ([], printed), "the second time, runs and results are used again"
    with pytest.raises(SystemExit):
        study("mnist", "--only", "linear")
    (out,) = (tmp_path / "runs").glob("hybrids-mnist-training*")
    assert {path.name for path in out.iterdir()} == {"table.md", "samples.png"}


@pytest.mark.slow
def test_the_study_counts_modes(
    study: Callable[..., tuple[list[str], str]], vaescale: Callable[..., Any], tmp_path: Path
) -> None:
    source, generator = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    for split, count in (("train", 200), ("t10k", 20)):
        arrays = {"images-idx3": generator.integers(256, size=(count, 8, 8), dtype=np.uint8)}
        arrays["labels-idx1"] = np.arange(count, dtype=np.uint8) % 10
        for name, values in arrays.items():
            head = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
            (source / f"{split}-{name}-ubyte").write_bytes(head + values.tobytes())
    assert vaescale("make-shards", f"stacked:{source}", "data/stacked_mnist").code == 0
    words = ("--only", "optimal", "--seeds", "0", "--digits", "features", "--mode-count", "300")
    _, printed = study("stacked_mnist", *words)
    assert "| held-out images | 20 |" in printed
    assert "| optimal | prior | 300 |" in printed
    assert " of 1000 |" in printed
