"""Verbs that only read recipes and results start without importing torch, and others without its compiler: each takes a second."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

METRIC = "foreign/realism"  # no name of vaescale's
CODE = """
import sys
from vaescale.cli import main
for words in {verbs!r}:
    code = main(words)
    sys.stderr.write(f"\\nVERB {{words[0]}}: exit code {{code}}, torch {{'torch' in sys.modules}}\\n")
"""


def run_verbs(folder: Path, *verbs: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Run verbs one after another in one new process. Returns a line for each, with its exit code and whether torch is
    imported, and the results.
    """
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(verbs=verbs)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = [line.removeprefix("VERB ") for line in done.stderr.splitlines() if line.startswith("VERB ")]
    return lines, [json.loads(line) for line in done.stdout.splitlines()]


def test_no_verb_imports_torch_s_compiler() -> None:
    """Training on one process does without, too: `tests/test_optional_packages.py`."""
    verbs = ("evaluate", "sample", "fit_gmm", "latents", "encode", "quality", "export", "train")
    code = f"import sys\nfrom vaescale.commands import {', '.join(verbs)}\nassert 'torch' in sys.modules\n"
    code += "assert 'torch._dynamo' not in sys.modules, 'imported with the verbs'\n"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


@pytest.fixture
def two_runs(tmp_path: Path, recipe_content: dict[str, Any]) -> Path:
    """A folder with the recipe and two run folders as training leaves them, without weights."""
    for seed in (0, 1):
        run = tmp_path / "runs" / f"tiny-{seed}"
        run.mkdir(parents=True)
        content = recipe_content | {"name": run.name, "run_dir": str(run), "seed": seed}
        content["tracking"] = {"mlflow": "sqlite:///mlflow.db", "experiment": "e"}
        (run / "recipe.yaml").write_text(yaml.safe_dump(content))
        rows = [
            {"step": step, "time": 1.0, "val/neg_elbo_nats": -seed - 0.5, METRIC: seed} for step in (1, 2)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "evaluation").mkdir()
        (run / "evaluation" / "foreign.json").write_text(json.dumps({"more_is_better": [METRIC]}))
    return tmp_path


def test_verbs_that_read_recipes_and_results_import_no_torch(two_runs: Path) -> None:
    store = ["--experiment", "e", "--store", "sqlite:///mlflow.db"]
    sort = ["--sort", METRIC, "--json"]
    lines, results = run_verbs(
        two_runs,
        ["sweep", "runs/tiny-0/recipe.yaml", "seed=0,1", "--dry-run", "--json"],
        ["launch", "--dry-run", "--json", "--processes", "2", "runs/tiny-0/recipe.yaml"],
        ["sync", "runs/tiny-0", "--json"],
        ["sync", "runs/tiny-1", "--json"],
        ["compare-runs", "runs/tiny-0", "runs/tiny-1", *sort],
        ["compare-runs", *store, *sort],
    )
    verbs = ("sweep", "launch", "sync", "sync", "compare-runs", "compare-runs")
    assert lines == [f"{verb}: exit code 0, torch False" for verb in verbs]
    for result in results[-2:]:
        names = [run["name"] for run in result["runs"]]
        assert names == ["tiny-1", "tiny-0"], "the results say that more of the metric is better"


def test_a_wrong_recipe_is_answered_before_torch_is_imported(two_runs: Path) -> None:
    lines, _ = run_verbs(two_runs, ["train", "runs/tiny-0/recipe.yaml", "seeed=1"])
    assert lines == ["train: exit code 2, torch False"]
