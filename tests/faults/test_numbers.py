"""NaN in the loss: skipped, its images written down, and too many of them a way back or a clear stop."""

import json
import math
from pathlib import Path

import pytest

from vaescale.objectives.elbo import Elbo
from vaescale.runs.folder import read_metrics


@pytest.fixture
def spoil(monkeypatch):
    """Makes the loss NaN in so many calls, from call `first` on, and in those of `also`; calls are counted over rollbacks."""

    def make(first: int, count: int, also: tuple[int, ...] = (), real=Elbo.__call__) -> list[int]:
        calls = [0]

        def spoilt(self, terms, stream):
            calls[0] += 1
            loss, pieces = real(self, terms, stream)
            is_spoilt = first <= calls[0] < first + count or calls[0] in also
            return (loss * math.nan if is_spoilt else loss), pieces

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
    outcome.assert_refused(4, "NaN or Inf for 3 steps at step 3", "has no checkpoint to return to yet")


def named(run: str) -> list[int]:
    """The steps in non_finite.jsonl."""
    return [json.loads(line)["step"] for line in (Path(run) / "non_finite.jsonl").read_text().splitlines()]


RARELY = {"log_every": 12, "evaluate_every": 12, "checkpoint_every": 12}


def test_each_step_of_nan_is_named_between_log_lines_too(
    vaescale, recipe_file, recipe_content, spoil
) -> None:
    spoil(first=3, count=2, also=(7, 12))
    recipe_content["training"] |= RARELY
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    run = recipe_content["run_dir"]
    assert named(run) == [2, 3, 6, 11], "the last step, too"
    keys = [json.loads(line)["keys"] for line in (Path(run) / "non_finite.jsonl").read_text().splitlines()]
    assert len({tuple(key) for key in keys}) == 4
    assert all(f"NaN or Inf at step {step};" in outcome.err for step in named(run))


def test_too_many_stop_between_log_lines_too(vaescale, recipe_file, recipe_content, spoil) -> None:
    calls = spoil(first=3, count=4)
    recipe_content["training"] |= {**RARELY, "max_non_finite": 3}
    outcome = vaescale("train", recipe_file(recipe_content))
    outcome.assert_refused(4, "NaN or Inf for 3 steps at step 5", "max_non_finite is 3")
    assert calls[0] == 6, "the host learns of a step while the next one runs"
    assert named(recipe_content["run_dir"]) == [2, 3, 4, 5]


def test_steps_that_are_replayed_are_named_once(
    vaescale, recipe_file, recipe_content, spoil, monkeypatch
) -> None:
    """Stopped after step 9 and resumed from step 6, step 7 is NaN again."""
    from vaescale.training.recorder import Recorder

    recipe, real = recipe_file(recipe_content), Recorder.log

    def stop_at_nine(self, done, metrics):
        real(self, done, metrics)
        if done == 9:
            raise KeyboardInterrupt

    spoil(first=8, count=1)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "log", stop_at_nine)
        assert vaescale("train", recipe).code == 130
    path = Path(recipe_content["run_dir"]) / "non_finite.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "ke')  # as a crash leaves it
    spoil(first=2, count=1, also=(5,))
    assert vaescale("train", recipe).code == 0
    lines = path.read_text().splitlines()
    assert lines.pop(1) == '{"step": 8, "ke'
    assert [json.loads(line)["step"] for line in lines] == [7, 10]


def test_overflows_of_fp16_are_no_faults(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["training"] |= {**RARELY, "precision": "fp16", "max_non_finite": 2}
    recipe_content["likelihood"] = {"kind": "gaussian", "sigma": 1e-4}  # gradients of 1e8 and more
    recipe_content["optimizer"] = {"kind": "adamw", "lr": 1e-6}
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    (row,) = rows(recipe_content["run_dir"])
    assert row["train/skipped_steps"] > 2
    assert row["train/loss_scale"] < 2.0**15
    assert not (Path(recipe_content["run_dir"]) / "non_finite.jsonl").exists()
