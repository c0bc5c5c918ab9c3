"""Verbs that only read recipes and results start without importing torch, which takes seconds."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CODE = """
import sys
from vaescale.cli import main
for words in {verbs!r}:
    code = main(words)
    sys.stderr.write(f"\\nVERB {{words[0]}}: exit code {{code}}, torch {{'torch' in sys.modules}}\\n")
"""


def run_verbs(folder: Path, *verbs: list[str]) -> list[str]:
    """Run verbs one after another in one new process. Returns a line for each: its exit code, and whether torch is imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(verbs=verbs)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [line.removeprefix("VERB ") for line in done.stderr.splitlines() if line.startswith("VERB ")]


@pytest.fixture
def two_runs(tmp_path: Path, recipe_content: dict[str, Any]) -> Path:
    """A folder with the recipe and two run folders as training leaves them, without weights."""
    for seed in (0, 1):
        run = tmp_path / "runs" / f"tiny-{seed}"
        run.mkdir(parents=True)
        content = recipe_content | {"name": run.name, "run_dir": str(run), "seed": seed}
        content["tracking"] = {"mlflow": "sqlite:///mlflow.db", "experiment": "e"}
        (run / "recipe.yaml").write_text(yaml.safe_dump(content))
        rows = [f'{{"step": {step}, "time": 1.0, "val/neg_elbo_nats": {-seed}.5}}\n' for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(rows))
        (run / "evaluation").mkdir()
        (run / "evaluation" / "val.json").write_text('{"metrics": {}}')
    return tmp_path


def test_verbs_that_read_recipes_and_results_import_no_torch(two_runs: Path) -> None:
    store = ["--experiment", "e", "--store", "sqlite:///mlflow.db"]
    lines = run_verbs(
        two_runs,
        ["sweep", "runs/tiny-0/recipe.yaml", "seed=0,1", "--dry-run"],
        ["sync", "runs/tiny-0"],
        ["sync", "runs/tiny-1"],
        ["compare-runs", "runs/tiny-0", "runs/tiny-1"],
        ["compare-runs", *store],
    )
    verbs = ("sweep", "sync", "sync", "compare-runs", "compare-runs")
    assert lines == [f"{verb}: exit code 0, torch False" for verb in verbs]
