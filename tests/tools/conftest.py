"""A run that the verbs after training can be called on."""

import shutil
from pathlib import Path

import pytest

from vaescale.aggregate import scatter


@pytest.fixture(autouse=True)
def few_points_in_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    """A t-SNE of all the digits takes seconds, each time that latents are drawn."""
    monkeypatch.setattr(scatter, "MOST", 120)


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a trained run, as if `vaescale train` had made it in its place."""
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    recipe = (folder / "recipe.yaml").read_text()
    assert str(trained_run) in recipe
    (folder / "recipe.yaml").write_text(recipe.replace(str(trained_run), str(folder)))
    return folder
