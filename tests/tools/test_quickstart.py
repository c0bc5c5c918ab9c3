"""The quickstart, whole, with real processes, in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_quickstart_end_to_end_and_again(vaescale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vaescale", "quickstart", "--json"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")} | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result, words = json.loads(done.stdout), done.stderr
    assert words.count("== ") == 6
    assert result["recipe"] == "vaescale:digits/optimal"
    run = tmp_path / result["run"]
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    metrics = result["metrics"]
    assert -60 < metrics["neg_elbo_nats"] < -35
    assert 6 < metrics["bits_per_dim"] < 7.3
    assert 0.05 < metrics["sigma"] < 0.1
    assert metrics["active_units"] >= 10
    gmm = result["gmm"]
    assert gmm["val_nats"] > gmm["prior_val_nats"] + 1
    assert gmm["components"] == 10
    distances = {row["of"]: row["frechet"] for row in result["quality"] if row["decode"] == "mean"}
    assert distances["mixture of 10"] < 0.7 * distances["prior"]
    assert [Path(path).name for path in result["figures"]] == [
        "calibration.png",
        "curves.png",
        "mixture_selection.png",
        "quality-pixels-pictures.png",
        "quality-pixels.png",
        "reconstructions.png",
        "samples.png",
    ]
    for path in result["figures"]:
        with Image.open(tmp_path / path) as image:
            assert image.width > 500
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    for path in run.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=pytest.fail)  # NaN and Inf are no JSON

    # Once more, in this process: it says which commands it would start.
    monkeypatch.chdir(tmp_path)
    started: list[str] = []

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "vaescale"]
        started.append(command[3])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)
    again = vaescale("quickstart", "--json")
    assert again.err.count("the results exist") == 6
    assert started == []
    assert {k: v for k, v in again.json.items() if k != "seconds"} == {
        k: v for k, v in result.items() if k != "seconds"
    }

    # What another command left in its place is not taken for the quickstart's own.
    mixture = json.loads((run / "gmm" / "mixture.json").read_text())
    (run / "gmm" / "mixture.json").write_text(json.dumps(mixture | {"step": 2}))
    (run / "figures" / "reconstructions.png").unlink()
    mended = vaescale("quickstart", "--json")
    assert mended.err.count("the results exist") == 2, "the shards and the training"
    assert started == ["evaluate", "fit-gmm", "sample", "quality"]


@pytest.mark.parametrize("in_project", [True, False])
def test_it_takes_the_project_s_files_or_those_that_ship(
    vaescale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_project: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if in_project:
        for name in ("digits", "backends"):
            shutil.copytree(ROOT / "recipes" / name, tmp_path / "recipes" / name)

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert all(Path(word).is_file() for word in command if word.endswith(".yaml"))
        return subprocess.CompletedProcess(command, 2 if "train" in command else 0)

    monkeypatch.setattr(subprocess, "run", start)
    outcome = vaescale("quickstart")
    backends, recipe = ROOT / "recipes/backends", "vaescale:digits/optimal"
    if in_project:
        backends, recipe = Path("recipes/backends"), "recipes/digits/optimal.yaml"
    launcher = f"accelerate launch --config_file {backends}/cpu2.yaml"
    assert f"$ {launcher} -m vaescale train {recipe} --expect-processes 2\n" in outcome.err
    assert outcome.code == 2
