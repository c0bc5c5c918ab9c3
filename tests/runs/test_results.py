"""A result is saved once: JSON, finite metrics, a section of the summary, the pictures, and MLflow."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from vaescale.errors import UserError
from vaescale.runs import results
from vaescale.runs.tracking import TrackingConfig


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The files that the folder holds at each push."""
    seen: list[set[str]] = []

    def push(folder: Path, config: TrackingConfig) -> None:
        seen.append({path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()})

    monkeypatch.setattr(results, "push", push)
    return seen


def test_a_result_is_written_and_then_sent(tmp_path: Path, pushed: list[set[str]]) -> None:
    results.save_result(
        tmp_path,
        "evaluation/new.json",
        {"metrics": {"a": 1.0}},
        step=7,
        metrics={"evaluation/new/a": 1.0, "evaluation/new/b": math.nan, "evaluation/new/c": math.inf},
        tracking=TrackingConfig(mlflow=None),
        summary={"new": {"a": 1.0}},
    )
    assert json.loads((tmp_path / "evaluation" / "new.json").read_text()) == {"metrics": {"a": 1.0}}
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row.pop("time") > 0
    assert row == {"step": 7, "evaluation/new/a": 1.0}, "NaN and Inf are left out"
    assert json.loads((tmp_path / "summary.json").read_text()) == {"new": {"a": 1.0}}
    assert pushed == [{"evaluation/new.json", "metrics.jsonl", "summary.json"}]


def test_a_summary_keeps_its_other_sections(tmp_path: Path, pushed: list[set[str]]) -> None:
    (tmp_path / "summary.json").write_text('{"train": {"step": 3}}')
    results.save_result(
        tmp_path, "x.json", {}, step=3, metrics={}, tracking=TrackingConfig(mlflow=None), summary={"gmm": {}}
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == {"train": {"step": 3}, "gmm": {}}
    assert len(pushed) == 1


def test_a_caller_that_holds_a_lock_sends_later(tmp_path: Path, pushed: list[set[str]]) -> None:
    results.save_result(
        tmp_path, "x.json", {"a": 1}, step=3, metrics={}, tracking=TrackingConfig(mlflow=None), send=False
    )
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert pushed == []


def test_pictures_are_drawn_after_the_result_is_written_and_sent_with_it(
    tmp_path: Path, pushed: list[set[str]]
) -> None:
    def save(name: str, draw: Callable[[], object]) -> None:
        results.save_result(
            tmp_path,
            name,
            {"a": 1},
            step=3,
            metrics={},
            tracking=TrackingConfig(mlflow=None),
            draw=draw,
        )

    save("x.json", (tmp_path / "picture.png").touch)
    assert {"x.json", "picture.png"} <= pushed[-1]

    def fail() -> None:
        raise UserError("it cannot be drawn")

    with pytest.raises(UserError):
        save("y.json", fail)
    assert json.loads((tmp_path / "y.json").read_text()) == {"a": 1}
    assert len(pushed) == 1
