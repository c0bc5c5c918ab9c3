"""What a launcher starts: the doctor's exchange, and layouts that a recipe cannot have."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, finished, make_project, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    return make_project(tmp_path_factory.mktemp("launches"), digits)


def test_the_doctor_tries_the_processes() -> None:
    launcher = ["vaescale", "launch", "--processes", "2", "--backend", "fsdp2"]
    words = ["doctor", "--seconds", "0.5", "--json"]
    done = finished([sys.executable, "-m", *launcher, *words], ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["layout"], found["world_size"], found["backend"]) == ("fsdp2", 2, "gloo")
    assert "all-reduces of 16 MiB" in found["exchange"]
    assert "WRONG" not in found["exchange"]
    assert found["bus_gigabytes_per_second"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("objective.spectral=0.1", "objective.spectral reads weights outside of their layers' calls"),
        ("training.compile=true", "training.compile does not work with fsdp2"),
    ],
)
def test_what_parts_do_not_go_with_is_refused(project: Path, words: str, sentence: str) -> None:
    outcome = train(project, words, f"run_dir={project}/{words[:12]}", backend="fsdp2")
    assert outcome.returncode != 0
    assert outcome.stderr.count(sentence) == 1, outcome.stderr
    assert "Error: vaescale" not in outcome.stderr


def test_deepspeed_leaves_stdout_to_the_result(project: Path) -> None:
    needs = ("deepspeed", "transformers")
    for package in needs:
        pytest.importorskip(package, reason=f"{package} is not installed (pip install 'vaescale[deepspeed]')")
    outcome = train(project, "training.steps=3", f"run_dir={project}/json", "--json", backend="zero3_offload")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["step"] == 3
    assert "built successfully" not in outcome.stderr, (
        "DeepSpeed compiled an operator that training does not use"
    )
    assert "355,361 parameters" in outcome.stderr, "the layout's share of the weights, or none, was counted"
    said = re.sub(
        r".*UserWarning: Port `29500`.*\n *warnings.warn\(\n", "", outcome.stderr
    )  # of another test's
    assert "Warning" not in said
