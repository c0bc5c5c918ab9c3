"""What the tests on a GPU share: the device, exact float32 products, and runs of verbs on the GPU and on the CPU.

VAESCALE_TEST_DEVICE=cpu rehearses them on a machine without a GPU: both sides of each comparison are then the CPU.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT, run_verb
from vaescale.runs.folder import read_metrics
from vaescale.training import launch as backends

DEVICE = torch.device(os.environ.get("VAESCALE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# cuBLAS reads it once; deterministic algorithms need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
Train = Callable[..., Path]


@pytest.fixture
def device() -> torch.device:
    """Where the code under test computes."""
    return DEVICE


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 products in float32 at the start of each test, and torch's settings as before at its end."""
    with backends.precision_of_evaluation():
        yield


@contextmanager
def without_gpu() -> Iterator[None]:
    """Within the block, verbs find no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("ACCELERATE_USE_CPU", "true")  # the launch sets it too, and it must not stay
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """Torch's deterministic algorithms within the block; an operation that has none raises."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def verb(place: str, *words: object) -> int:
    """`vaescale WORDS` in this process, on the `cpu` or the `gpu`. Returns the exit code; signal handlers stay as they were."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with without_gpu() if place == "cpu" else nullcontext():
            return run_verb(*words)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def words(digits: Path) -> Callable[..., list[str]]:
    """The words of `vaescale train` for a short run of a digits recipe in fp32, into a run folder; later words win."""

    def of(run: Path, *more: str, recipe: str = "optimal", steps: int = 60) -> list[str]:
        return [
            "train",
            str(ROOT / "recipes" / "digits" / f"{recipe}.yaml"),
            f"run_dir={run}",
            f"data.train={digits / 'train'}",
            f"data.val={digits / 'val'}",
            "tracking.mlflow=null",
            f"training.steps={steps}",
            "training.precision=fp32",
            "training.log_every=1",
            "training.evaluate_every=30",
            "training.checkpoint_every=30",
            "optimizer.warmup_steps=10",
            *more,
        ]

    return of


@pytest.fixture(scope="session")
def trained(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """trained(place, *overrides, recipe=..., steps=...): the folder of a run, trained once for the same arguments. Read only."""
    runs: dict[Any, Path] = {}

    def get(place: str, *more: str, **keys: Any) -> Path:
        key = (place, more, tuple(sorted(keys.items())))
        if key not in runs:
            run = tmp_path_factory.mktemp("runs") / "run"
            with backends.precision_of_evaluation():
                assert verb(place, *words(run, *more, **keys)) == 0
            runs[key] = run
        return runs[key]

    return get


def column(run: Path, name: str) -> dict[int, float]:
    """A metric of a run by step, the last row of a replayed step alone."""
    return {int(row["step"]): row[name] for row in read_metrics(run) if name in row}


def assert_same_curve(run: Path, reference: Path, name: str, *, rtol: float, atol: float) -> None:
    """The same steps, and each value within atol + rtol |reference|."""
    found, expected = column(run, name), column(reference, name)
    assert found.keys() == expected.keys(), name
    assert expected, name
    gaps = {s: abs(found[s] - expected[s]) - atol - rtol * abs(expected[s]) for s in expected}
    worst = max(gaps, key=lambda step: gaps[step])
    assert gaps[worst] <= 0, (name, worst, found[worst], expected[worst])


def relative_error(value: Tensor, reference: Tensor, *, floor: float = 0.0) -> float:
    """|value - reference| / (|reference| + floor), in float64 on the CPU, of whole tensors."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    assert value.shape == reference.shape
    return float((value - reference).norm() / (reference.norm() + floor))


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings of torch's compiler, exporter and debug modes about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
