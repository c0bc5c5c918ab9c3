"""A run that the verbs after training can be called on."""

from pathlib import Path

import pytest


@pytest.fixture
def run(vaescale, recipe_file, recipe_content) -> Path:
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    return Path(recipe_content["run_dir"])
