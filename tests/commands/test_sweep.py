"""Variants of a recipe: which there are, what they are called, and what submits them."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.conftest import Outcome
from tests.launching import ROOT
from vaescale.commands import sweep as sweeping
from vaescale.commands.sweep import Variant, _starter, split_values, variants
from vaescale.errors import UserError
from vaescale.runs.cluster_jobs import TABLE, cluster_files
from vaescale.runs.folder import update_summary


def test_every_combination_once() -> None:
    found = variants(["likelihood.sigma=optimal,0.3", "seed=0,1", "training.steps=5"], "digits")
    assert [one.name for one in found] == [
        "digits-sigma-optimal-seed-0",
        "digits-sigma-optimal-seed-1",
        "digits-sigma-0.3-seed-0",
        "digits-sigma-0.3-seed-1",
    ]
    assert found[3].overrides == [
        "likelihood.sigma=0.3",
        "seed=1",
        "training.steps=5",
        "name=digits-sigma-0.3-seed-1",
    ]


def test_commas_within_brackets_do_not_part() -> None:
    assert split_values("[1,2],[3]") == ["[1,2]", "[3]"]
    assert split_values("{a: 1, b: 2}, 'x,y'") == ["{a: 1, b: 2}", "'x,y'"]
    for wrong in ("[1,2", "a,,b", "a,", "'a"):
        with pytest.raises(UserError, match="list of values"):
            split_values(wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr"], "is not key=a,b,c"),
        (["name=a,b"], "set for each variant"),
        (["seed=1", "training.steps=5"], "nothing to vary"),
        (["seed=1,1"], "would both be named"),
        ([f"seed={','.join(map(str, range(1001)))}"], "more than 1000"),
    ],
)
def test_what_is_no_sweep_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        variants(words, "x")


def test_a_password_is_no_name() -> None:
    found = variants(["data.train=https://me:word@host/a,https://me:word@host/b"], "x")
    assert all("word" not in one.name for one in found)


def test_ctrl_c_waits_for_the_training_to_save(tmp_path: Path) -> None:
    """As a terminal sends it, to parent and child at once; SIGTERM goes to the parent alone."""
    child = (
        "import signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    open('saved', 'w').close()\n"
        "    sys.exit(75)\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, save)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(60)\n"
    )
    parent = f"import sys; from vaescale.commands.sweep import _Signals\nwith _Signals() as signals: sys.exit(signals.ended([sys.executable, '-c', {child!r}]))"
    for number, whole_group in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        for name in ("ready", "saved"):
            (tmp_path / name).unlink(missing_ok=True)
        started = subprocess.Popen(
            [sys.executable, "-c", parent],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        (os.killpg if whole_group else os.kill)(started.pid, number)
        assert started.wait(30) == 75
        assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_sweep_that_is_terminated_ends_with_75_and_counts_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_trained: bool
) -> None:
    """The signal meets the first of two variants, whose process ends by it: after its last step, or before."""
    recipes = [
        SimpleNamespace(run_dir=str(tmp_path / name), training=SimpleNamespace(steps=6)) for name in "ab"
    ]
    started: list[list[str]] = []

    def ended(self: sweeping._Signals, command: list[str]) -> int:
        started.append(command)
        if is_trained:
            update_summary(tmp_path / "a", "train", {"step": 6})
        os.kill(os.getpid(), signal.SIGTERM)
        return -signal.SIGTERM

    monkeypatch.setattr(sweeping._Signals, "ended", ended)
    (tmp_path / "a").mkdir()
    handler = signal.getsignal(signal.SIGTERM)
    codes = sweeping.train_all(Path("r.yaml"), [Variant("a", []), Variant("b", [])], recipes, launch=())
    assert codes == [0 if is_trained else 75, 75]
    assert len(started) == 1
    assert signal.getsignal(signal.SIGTERM) is handler


def files_of(
    kind: str, name: str, launch: str = "vaescale launch --processes 1"
) -> tuple[list[Variant], dict[str, str]]:
    """Two variants, one with a value that a shell would expand, and what submits them."""
    own = variants(["network.widths=[8,16],[4]", "objective.words=$(echo expanded)"], "x")
    places = [f"runs/{one.name}" for one in own]
    return own, cluster_files(
        kind,
        Path("recipes/my recipe.yaml"),
        [one.overrides for one in own],
        places,
        name=name,
        launch=launch,
        image="registry/vaescale:1",
    )


def submitted(folder: Path, script: str, *, code: int = 0, state: str = "RUNNING", restarts: str = "") -> int:
    """Run task 1 of a job array. srun ends with `code`, squeue prints `state`; what they are told is in files."""
    programs = {"srun": f'printf "%s\\n" "$@" > srun; exit {code}', "squeue": f"echo {state}"}
    programs["scontrol"] = 'echo "$@" > scontrol'
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "scontrol").unlink(missing_ok=True)
    for name, words in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{words}\n")
        (folder / "bin" / name).chmod(0o755)
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={"PATH": f"{folder}/bin:/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode


def test_a_slurm_array_trains_each_variant_and_runs_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vaescale: Callable[..., Outcome]
) -> None:
    own, files = files_of("slurm", "x-sweep")
    (tmp_path / "runs" / "x-sweep").mkdir(parents=True)
    (tmp_path / "runs" / "x-sweep" / "variants.txt").write_text(files["variants.txt"])
    assert "#SBATCH --array=0-1\n" in files["sweep.sbatch"]
    assert submitted(tmp_path, files["sweep.sbatch"]) == 0
    option, program, *words = (tmp_path / "srun").read_text().splitlines()
    assert (option, program) == ("--kill-on-bad-exit=1", "vaescale")
    monkeypatch.chdir(tmp_path)
    for number, variant in enumerate(own):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        started = shlex.split(vaescale(words[0], "--dry-run", "--json", *words[1:]).json["command"])
        assert started[1:] == ["-m", "vaescale", "train", "recipes/my recipe.yaml", *variant.overrides]


def test_a_saved_task_is_requeued_unless_slurm_has_ended_it(tmp_path: Path) -> None:
    script = files_of("slurm", "x")[1]["sweep.sbatch"]
    for code, state, restarts, requeued in (
        (75, "RUNNING", "", True),
        (75, "RUNNING", "99", True),
        (75, "RUNNING", "100", False),
        (75, "COMPLETING", "", False),
        (1, "RUNNING", "", False),
        (0, "RUNNING", "", False),
    ):
        assert submitted(tmp_path, script, code=code, state=state, restarts=restarts) == code
        assert (tmp_path / "scontrol").exists() == requeued, (code, state, restarts)
        assert not requeued or (tmp_path / "scontrol").read_text() == "requeue 7_1\n"


def test_a_kubernetes_job_has_one_index_for_each_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vaescale: Callable[..., Outcome]
) -> None:
    own, files = files_of("kubernetes", "X_sweep", "vaescale launch --processes 1")
    table, job = yaml.safe_load_all(files["sweep.yaml"])
    assert job["spec"]["completions"] == 2
    assert job["metadata"]["name"] == table["metadata"]["name"] == "x-sweep"
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry/vaescale:1"
    (tmp_path / "variants.txt").write_text(table["data"]["variants.txt"])
    words = [str(tmp_path / "variants.txt") if word == TABLE else word for word in container["args"]]
    for number, variant in enumerate(own):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(number))
        started = shlex.split(vaescale(words[0], "--dry-run", "--json", *words[1:]).json["command"])
        assert started[1:] == ["-m", "vaescale", "train", "recipes/my recipe.yaml", *variant.overrides]
    for wrong in ("2", "-1", ""):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", wrong)
        vaescale(*words).assert_refused(2, "JOB_COMPLETION_INDEX", "number of lines", "=2")
    monkeypatch.delenv("JOB_COMPLETION_INDEX")
    vaescale(*words).assert_refused(2, "number of this task")


@pytest.mark.parametrize("name", ["X" * 80, "-_-", "täglich", "a.b_c-"])
def test_the_names_are_ones_that_kubernetes_takes(name: str) -> None:
    job = list(yaml.safe_load_all(files_of("kubernetes", name, "vaescale launch")[1]["sweep.yaml"]))[1]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,55}[a-z0-9])?", job["metadata"]["name"])


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_a_sweep_on_a_cluster_is_started_by_launch(kind: str) -> None:
    with pytest.raises(UserError, match="must begin with `vaescale launch`"):
        files_of(kind, "x", "accelerate launch")


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ("", ["-m", "vaescale", "train"]),
        ("vaescale launch --processes 2", ["-m", "vaescale", "launch", "--processes", "2"]),
        ("accelerate launch --cpu", ["-m", "accelerate.commands.launch", "--cpu", "-m", "vaescale", "train"]),
    ],
)
def test_what_starts_a_run_here(launch: str, words: list[str]) -> None:
    assert _starter(shlex.split(launch)) == [sys.executable, *words]
    assert _starter(["torchrun"]) == ["torchrun", "-m", "vaescale", "train"]


def test_a_sweep_ends_with_numbers_and_with_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    from vaescale.tools.sweep import show

    variants = [
        {"name": f"s-lr-{value}", "run_dir": "r", "overrides": [f"lr={value}", "name=n"], "exit_code": code}
        for value, code in ((1, 0), (2, 3))
    ]
    best = [{"name": "s-lr-1", "place": "r", "val/neg_elbo_nats": -1.5, "step": 20, "lr": 1}]
    show(
        {
            "sweep": "s-sweep",
            "variants": variants,
            "folder": "runs/s-sweep",
            "sorted_by": "val/neg_elbo_nats",
            "best_first": best,
            "warnings": ["a warning"],
        }
    )
    printed = capsys.readouterr().out
    assert "s-lr-2  lr=2   exit code 3" in printed
    assert [line.split() for line in printed.splitlines()[-4:]] == [
        ["val/"],
        ["run", "neg_elbo_nats", "step", "lr"],
        ["s-lr-1", "-1.5", "20", "1"],
        ["a", "warning"],
    ]
    show({"sweep": "s-sweep", "variants": variants, "folder": "runs/s-sweep"})
    assert "s-lr-1  lr=1" in capsys.readouterr().out, "without numbers, each variant"
