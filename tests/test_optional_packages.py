"""Training needs few packages and no compiler, and what misses another one says in a sentence how to install it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vaescale.errors import UserError
from vaescale.runs import stores, tracking
from vaescale.system.packages import OPTIONAL, OTHERS, TRAINING, missing_package, module_of

# fsspec comes with torch, which imports it; pandas and pyarrow come with the packages that training does not need.
ABSENT = sorted({module_of(name) for name in (*OPTIONAL, *OTHERS)} - {"fsspec"} | {"pandas", "pyarrow"})
CODE = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))  # importing one of these fails, as if it were not installed
from vaescale.cli import main
for words in {verbs!r}:
    code = main(words)
    sys.stderr.write(f"VERB {{words[0]}} {{code}}\\n")
"""


def test_a_run_without_a_store_needs_no_optional_package_and_no_compiler(
    tmp_path: Path, recipe_content: dict[str, Any]
) -> None:
    recipe_content["tracking"] = {"mlflow": None}
    recipe_content["training"] |= {"steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    run = tmp_path / "run"
    verbs = [
        ["train", str(tmp_path / "recipe.yaml")],
        ["fit-gmm", str(run)],
        ["make-shards", "hf:nobody/nothing", str(tmp_path / "data")],
        ["compare-runs", "--experiment", "e", "--store", "http://127.0.0.1:9"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(absent=[*ABSENT, "torch._dynamo"], verbs=verbs)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    codes = [line for line in done.stderr.splitlines() if line.startswith("VERB")]
    assert codes == ["VERB train 0", "VERB fit-gmm 2", "VERB make-shards 2", "VERB compare-runs 2"], (
        done.stderr
    )
    assert json.loads((run / "summary.json").read_text())["val"]["step"] == 2
    for package in ("webdataset", "datasets"):
        assert f"{package} is not installed; pip install {package}\n" in done.stderr
    assert "MLflow is not installed; pip install mlflow" in done.stderr


def test_a_store_without_mlflow_is_said_once_and_the_status_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = tracking.TrackingConfig(mlflow=f"sqlite:///{tmp_path}/mlflow.db")
    with tracking.Drain(tmp_path, config, shown=True, every_seconds=0.01):
        said = capsys.readouterr().err
        assert f"pip install mlflow, then `vaescale sync {tmp_path}`" in " ".join(said.split())
    assert capsys.readouterr().err == "", "it was said before"
    state = json.loads((tmp_path / "mlflow.json").read_text())
    assert (state["status"], state["status_sent"]) == ("FINISHED", False)
    with pytest.raises(UserError, match="MLflow is not installed; pip install mlflow"):
        tracking.sync(tmp_path, config)
    assert not stores.is_installed()


def test_only_what_is_not_installed_is_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_package(ModuleNotFoundError(name="sklearn.nothing")) is None, "scikit-learn is there"
    assert missing_package(ModuleNotFoundError(name="vaescale.nothing")) is None
    assert missing_package(ModuleNotFoundError()) is None
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert missing_package(ModuleNotFoundError(name="sklearn.mixture")) == "scikit-learn"


def test_the_lists_of_packages_are_those_of_setup() -> None:
    words = (Path(__file__).parents[1] / "setup.py").read_text().split('"')
    for package in (*TRAINING, *OTHERS, *OPTIONAL):
        assert any(word.startswith((f"{package}>", f"{package}[")) for word in words), package
