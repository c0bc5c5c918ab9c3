"""The first promise over every layout: the same curve on 1, 2 and 4 processes, whole or in parts, stopped or not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import RECIPE, Command, checkpoints, curve, make_project, several, train, train_until

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, SHORT = 40, 12  # of the runs that others are compared with, and of those that are compared alone
OPTIONS = (
    f"training.steps={STEPS}",
    "training.precision=fp32",
    "training.log_every=1",
    "data.global_batch=32",
    # The rate at a step does not depend on the number of steps, and a short run has the whole one, too.
    *("optimizer.schedule=constant", "optimizer.warmup_steps=5"),
)
ACCUMULATION = (1, 2)
LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero3_offload")
# Four processes take turns on two cores: there, one case of each way to lay out weights and gradients is enough.
CASES = [(layout, 2, accumulation) for layout in LAYOUTS for accumulation in ACCUMULATION]
CASES += [("ddp", 4, 2), ("zero2", 4, 2), ("zero3", 4, 1), ("fsdp2", 4, 1)]
BACKENDS = {"cpu2": "ddp", "zero3": "zero3", "fsdp2": "fsdp2"}
WHOLE = [("ddp", 1, accumulation) for accumulation in ACCUMULATION] + [(n, 2, 1) for n in BACKENDS.values()]


def needs(backend: str) -> None:
    if backend.startswith("zero"):
        for package in ("deepspeed", "transformers"):
            pytest.importorskip(
                package, reason=f"{package} is not installed (pip install 'vaescale[deepspeed]')"
            )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """With `runs/LAYOUT-PROCESSES-ACCUMULATION` of all of them; `runs/ddp-1-ACCUMULATION` had one process."""
    needs("zero")
    folder = make_project(tmp_path_factory.mktemp("project"), digits)
    for processes in (1, 2, 4):
        cases = [case for case in dict.fromkeys((*WHOLE, *CASES)) if case[1] == processes]
        several(folder, [training(*case) for case in cases], processes=processes)
    return folder


def training(layout: str, processes: int, accumulation: int) -> Command:
    run = f"runs/{layout}-{processes}-{accumulation}"
    steps = STEPS if (layout, processes, accumulation) in WHOLE else SHORT
    words = [*OPTIONS, f"training.accumulation={accumulation}", f"training.steps={steps}"]
    return Command(layout, ["train", RECIPE, "tracking.mlflow=null", *words, f"run_dir={run}"])


def assert_same_curve(one: Path, other: Path, *, steps: int = STEPS, rel: float = 1e-4) -> None:
    rows = list(zip(curve(one)[:steps], curve(other), strict=True))
    assert len(rows) == steps
    for a, b in rows:
        for metric in ("train/neg_elbo_nats", "train/sigma", "train/kl_nats", "train/grad_norm"):
            assert b[metric] == pytest.approx(a[metric], rel=rel), (a["step"], metric)


@pytest.mark.parametrize(("layout", "processes", "accumulation"), CASES)
def test_every_layout_gives_the_same_curve(
    project: Path, layout: str, processes: int, accumulation: int
) -> None:
    run = project / f"runs/{layout}-{processes}-{accumulation}"
    steps = STEPS if (layout, processes, accumulation) in WHOLE else SHORT
    assert_same_curve(project / f"runs/ddp-1-{accumulation}", run, steps=steps)
    tags = json.loads((run / "run.json").read_text())
    assert (tags["layout"], tags["world_size"]) == (layout.removesuffix("_offload"), processes)


@pytest.fixture(scope="module")
def resumed(project: Path) -> Path:
    """With `runs/parts-BACKEND`: launched, stopped as a cluster does it, and trained to the end in new processes."""
    for backend in BACKENDS:
        parts = project / f"runs/parts-{backend}"
        code, words = train_until(project, parts, 12, *OPTIONS, backend=backend)
        assert "saving after this step" in words, words
        assert code != 0
        (saved,) = checkpoints(parts)
        assert 12 <= int(saved.removeprefix("step-")) < STEPS, words
    options = ["train", RECIPE, "tracking.mlflow=null", *OPTIONS]
    several(
        project,
        [
            Command(layout, [*options, f"run_dir={project}/runs/parts-{backend}"])
            for backend, layout in BACKENDS.items()
        ],
        processes=2,
    )
    return project


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_one_number_resuming_is_bit_equal(resumed: Path, backend: str) -> None:
    """Weights, averages, moments, sigma and every metric, after a stop that the cluster asked for."""
    whole, parts = resumed / f"runs/{BACKENDS[backend]}-2-1", resumed / f"runs/parts-{backend}"
    for a, b in zip(curve(whole), curve(parts), strict=True):
        metrics = [name for name in a if name.startswith("train/")]
        assert {name: a[name] for name in metrics} == {name: b[name] for name in metrics}
    for name in ("model", "ema", "optimizer", "guard"):
        one, other = (
            load_file(run / f"checkpoints/step-{STEPS:09d}" / f"{name}.safetensors") for run in (whole, parts)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_one_run_over_every_layout_is_the_run_that_never_stopped(project: Path) -> None:
    """1 -> ZeRO-3 on 2 -> FSDP2 on 4 -> DDP on 2, each leg ended by a signal."""
    run, options = project / "runs/legs", (*OPTIONS, "training.accumulation=2")
    legs = [(None, None, 8), ("zero3", 2, 16), ("fsdp2", 4, 24)]
    for backend, processes, rows in legs:
        code, words = train_until(project, run, rows, *options, backend=backend, processes=processes)
        assert code == 75 if backend is None else code != 0, words
        assert rows <= len(curve(run)) < STEPS, words
        assert int(checkpoints(run)[-1].removeprefix("step-")) == len(curve(run)), "no step was lost"
    outcome = train(project, *options, f"run_dir={run}", backend="cpu2")
    assert outcome.returncode == 0, outcome.stderr
    assert_same_curve(project / "runs/ddp-1-2", run)
