"""Starts that are refused or cut short: the run folder stays as it was, and nothing that was saved is lost."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.test_train import numbers
from vaescale import trained
from vaescale.data.batch import Batch
from vaescale.errors import UserError
from vaescale.runs import checkpoint

TRAIN = "vaescale.commands.train"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_start_changes_nothing(vaescale, recipe_file, recipe_content, monkeypatch) -> None:
    path, run = recipe_file(recipe_content), Path(recipe_content["run_dir"])
    assert vaescale("train", path).code == 0
    before = contents(run)
    for allow in ((), ("--allow-changes",)):
        outcome = vaescale("train", path, "network.latent_dim=5", *allow)
        outcome.assert_refused(
            2, "whose weights do not fit", "network.latent_dim: 4 -> 5", "choose another name or run_dir"
        )
        assert "--allow-changes" not in outcome.err.splitlines()[-1]
    more = ("training.steps=20", "--allow-changes")
    best = vaescale("train", path, *more, "training.keep_best=val/nothing")
    best.assert_refused(2, "training.keep_best is 'val/nothing'", "val/neg_elbo_nats")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 100))
        vaescale("train", path, *more).assert_refused(4, "make room")
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise UserError("this layout cannot train it; choose another one")

        patch.setattr(f"{TRAIN}.lay_out", refuse)
        vaescale("train", path, *more).assert_refused(2, "choose another one")
    fewer = vaescale("train", path, "training.steps=6", "--allow-changes")
    assert "is trained to step 6 already" in fewer.err
    at_12 = f"from step 12, with the checkpoint {run}/checkpoints/step-000000012 with"
    for words, *said in (
        ((), f"no more: {run} is trained to step 12 already"),
        (more[:1], f"refused: run_dir {run} holds a run of another recipe", "training.steps: 12 -> 20"),
        (more, at_12, "training.steps: 12 -> 20"),
    ):
        starts = vaescale("train", path, *words, "--dry-run", "--json").json["plan"]["starts"]
        assert starts.startswith(said[0])
        assert said[-1] in starts
    assert contents(run) == before
    assert vaescale("train", path, *more).code == 0


@pytest.mark.parametrize("evaluation", [1, 2])
def test_an_evaluation_that_was_cut_is_made_up_for(
    vaescale, recipe_file, recipe_content, monkeypatch, evaluation: int
) -> None:
    """The checkpoint comes first, a signal ends the evaluation between two batches, and the same command makes it again."""
    path, run = recipe_file(recipe_content), Path(recipe_content["run_dir"])
    monkeypatch.setattr(trained, "EVALUATION_BATCH", 100)
    evaluations, batches = 0, list[int]()
    whole = trained.in_order

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Batch]:
        nonlocal evaluations
        evaluations += 1
        for number, batch in enumerate(whole(*arguments, **options)):
            if evaluations == evaluation:
                batches.append(number)
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(f"{TRAIN}.in_order", interrupted)
        stopped = vaescale("train", path)
    step = 6 * evaluation
    stopped.assert_refused(75, f"asked to stop after step {step}; the same command continues from there")
    assert batches == [0], "of four"
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert newest.step == step
    assert not any(row["step"] == step and "val/mse" in row for row in numbers(run))
    assert vaescale("train", path).code == 0
    other = Path(f"{run}-undisturbed")
    assert vaescale("train", path, f"run_dir={other}").code == 0
    assert numbers(run) == numbers(other)
