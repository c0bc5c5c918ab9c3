"""Fixtures: the digits as shards, a small recipe over them, and verbs run in this process."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

from tests.blank_figures import true_curves, white_curves
from vaescale.data.making.items import Item
from vaescale.data.making.sources import open_source
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.models.vae import Terms
from vaescale.system import collector

os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).parents[1]


# These take longest: they begin first, so that two workers end together. Those that start many processes alternate with others.
LONGEST = (
    "distributed/test_any_number_of_devices.py",
    "tools/test_decoders.py",
    "tools/test_judging_verbs.py",
    "networks/test_every_network.py",
    "faults/test_processes.py",
    "tools/test_verbs.py",
    "networks/test_linear.py",
    "commands/test_train.py",
    "tools/test_quickstart.py",
    "data/test_storage.py",
    "distributed/test_pods.py",
    "tools/test_bench.py",
    "faults/test_mlflow_server.py",
    "distributed/test_one_curve.py",
    "distributed/test_launches.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Pause Python's garbage collector while the tests are collected: a third of that time went to it, and it freed nothing."""
    if not config.getoption("numprocesses", default=None):  # or the workers collect the tests
        collector.pause_until_start()


def pytest_collection_finish() -> None:
    """Let the garbage collector work again."""
    collector.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files: the longest first, then those that start processes of their own evenly among the others, so that two
    workers seldom share the cores with several more.
    """
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    first = {f"tests/{name}": float(number) for number, name in enumerate(LONGEST, start=-len(LONGEST))}
    several = [
        name for name, tests in files.items() if any(t.get_closest_marker("distributed") for t in tests)
    ]
    alone = [name for name in files if name not in several]
    place = {name: number / len(group) for group in (several, alone) for number, name in enumerate(group)}
    items[:] = [
        item for name in sorted(files, key=lambda name: first.get(name, place[name])) for item in files[name]
    ]


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """A bench takes all cores. The tests after it in the same process must not: beside another worker, each would wait for both."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def curves_are_white() -> Iterator[None]:
    """Half of a tiny training is the drawing of its curves: see tests/blank_figures.py."""
    with white_curves():
        yield


@pytest.fixture
def drawn_curves() -> Iterator[None]:
    """The trainings of this test draw their curves in full."""
    with true_curves():
        yield


class Outcome(NamedTuple):
    """What a verb printed and returned."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def assert_refused(self, code: int, *words: str) -> None:
        """One sentence on stderr with all the words, nothing on stdout, no traceback."""
        assert self.code == code, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("vaescale "), last
        for word in words:
            assert word in last


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits' train and val shards. Read only."""
    folder = tmp_path_factory.mktemp("digits")
    for name, split in open_source("digits").splits.items():
        write_shards(split().items, folder / name, Making(shard_samples=500))
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs, to be copied: a new one takes seconds to create its tables. Read only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow and SQLAlchemy warn of themselves
        from mlflow import MlflowClient

        path = tmp_path_factory.mktemp("store") / "mlflow.db"
        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def recipe_content(digits: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe that trains in a second. Change what you like."""
    return tiny_recipe(digits, tmp_path / "run")


def tiny_recipe(digits: Path, run: Path) -> dict[str, Any]:
    """Twelve steps of a small convolutional network on the digits, with two evaluations and two checkpoints."""
    return {
        "name": "tiny",
        "run_dir": str(run),
        "data": {
            "train": str(digits / "train"),
            "val": str(digits / "val"),
            "image_size": 8,
            "global_batch": 64,
            "cache": "memory",
        },
        "network": {"kind": "conv", "latent_dim": 4, "widths": [8, 16]},
        "likelihood": {"kind": "gaussian", "sigma": "optimal"},
        "optimizer": {"kind": "adamw", "lr": 2e-3},
        "training": {
            "steps": 12,
            "precision": "fp32",
            "log_every": 1,
            "evaluate_every": 6,
            "checkpoint_every": 6,
        },
        "tracking": {"mlflow": None},
    }


@pytest.fixture(scope="session")
def trained_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `recipe_content`, trained once. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(digits, folder / "run"), sort_keys=False))
    assert run_verb("train", recipe) == 0
    return folder / "run"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Writes a recipe and returns its path."""

    def write(content: dict[str, Any], name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def vaescale(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `vaescale VERB ...` in this process."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = run_verb(*words)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def run_verb(*words: object) -> int:
    """`vaescale WORDS` in this process. Returns the exit code."""
    from accelerate.state import AcceleratorState, GradientState

    from vaescale.cli import main

    # One process of a person makes one Accelerator; here many tests share the process.
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="session")
def make_items() -> Callable[..., list[Item]]:
    """Random images of one shape, with classes 0 to 2."""

    def make(count: int, *, shape: tuple[int, int, int] = (8, 8, 1), seed: int = 0) -> list[Item]:
        images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
        return [Item(f"{number:05d}", image, number % 3) for number, image in enumerate(images)]

    return make


@pytest.fixture
def make_terms() -> Callable[..., Terms]:
    """A model's terms for B images: those that are given, and zeros."""

    def make(**fields: torch.Tensor) -> Terms:
        given = next(iter(fields.values()))
        widths = {"log_px": (), "squared_error": (), "variance": (), "log_weights": (0,)}
        zeros = {
            name: given.new_zeros(len(given), *widths.get(name, (1,)))
            for name in Terms._fields
            if name != "shown"
        }
        return Terms(**{**zeros, **fields})

    return make
