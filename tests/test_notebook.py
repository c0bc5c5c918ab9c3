"""The notebook of the documentation runs from top to bottom, as a script."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs/python.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(sources) > 5
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), "without outputs"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)  # noqa: S102
    assert (tmp_path / "runs/notebook/evaluation/val.json").is_file()
