"""NaN in the loss: skipped, its images written down, and too many of them a way back or a clear stop."""

import json
import math
from pathlib import Path

import pytest

from vaescale.objectives.elbo import Elbo
from vaescale.runs.folder import read_metrics


@pytest.fixture
def spoil(monkeypatch):
    """Makes the loss NaN in so many calls, from call `first` on; calls are counted over rollbacks."""

    def make(first: int, count: int, real=Elbo.__call__) -> list[int]:
        calls = [0]

        def spoilt(self, terms, stream):
            calls[0] += 1
            loss, pieces = real(self, terms, stream)
            return (loss * math.nan if first <= calls[0] < first + count else loss), pieces

        monkeypatch.setattr(Elbo, "__call__", spoilt)
        return calls

    return make


def rows(run: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "train/mse" in row]


def test_one_nan_is_skipped_and_its_images_are_written_down(
    vaescale, recipe_file, recipe_content, spoil
) -> None:
    spoil(first=5, count=1)
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    assert [row["train/skipped_steps"] for row in rows(recipe_content["run_dir"])] == [0] * 4 + [1] * 8
    (line,) = (Path(recipe_content["run_dir"]) / "non_finite.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told["step"] == 4
    assert len(told["keys"]) == len(set(told["keys"])) == recipe_content["data"]["global_batch"]
    assert all(key.startswith("shard-00000") and ".tar:" in key for key in told["keys"])
    assert "NaN or Inf at step 4" in outcome.err


def test_too_many_stop_clearly(vaescale, recipe_file, recipe_content, spoil) -> None:
    spoil(first=8, count=100)
    recipe_content["training"]["max_non_finite"] = 3
    outcome = vaescale("train", recipe_file(recipe_content))
    outcome.assert_refused(4, "NaN or Inf for 3 steps at step 10", "lower optimizer.lr")


def test_too_many_lead_back_to_the_last_checkpoint(vaescale, recipe_file, recipe_content, spoil) -> None:
    spoil(first=8, count=3)
    recipe_content["training"] |= {"max_non_finite": 3, "max_rollbacks": 1}
    recipe_content["optimizer"]["schedule"] = "constant"
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    assert "going back to step 6 with 0.5 of the learning rate" in outcome.err
    counted = [
        int(row["step"]) for row in read_metrics(Path(recipe_content["run_dir"])) if "train/mse" in row
    ]
    assert counted == list(range(1, 13)), "what it went back over does not count"
    steps = [(row["step"], row["train/lr"]) for row in rows(recipe_content["run_dir"])]
    assert steps[:7] == [(step, 2e-3) for step in range(1, 8)]
    assert steps[-6:] == [(step, 1e-3) for step in range(7, 13)]
    # The lower rate is part of the run: who goes on from its checkpoint has it, too.
    state = json.loads(
        (Path(recipe_content["run_dir"]) / "checkpoints/step-000000012/state.json").read_text()
    )
    assert state["lr_factor"] == 0.5


def test_going_back_is_bounded_and_needs_a_checkpoint(
    vaescale, recipe_file, recipe_content, spoil, tmp_path
) -> None:
    recipe_content["training"] |= {"max_non_finite": 3, "max_rollbacks": 2}
    spoil(first=8, count=100)
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.err.count("going back to step 6") == 2
    assert "with 0.5 of the learning rate" in outcome.err
    assert "with 0.25 of the learning rate" in outcome.err, "the same again would end the same way"
    outcome.assert_refused(4, "NaN or Inf for 3 steps")
    spoil(first=1, count=100)
    outcome = vaescale("train", recipe_file(recipe_content), f"run_dir={tmp_path}/other")
    outcome.assert_refused(4, "NaN or Inf for 3 steps at step 3")
