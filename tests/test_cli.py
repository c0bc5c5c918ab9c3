"""The front door: help, versions, usage errors, and nothing heavy imported for them."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vaescale import cli
from vaescale.cli import VERBS
from vaescale.errors import Preempted
from vaescale.system import exit_codes

HEAVY = ("torch", "accelerate", "mlflow", "deepspeed", "sklearn", "matplotlib", "numpy", "pydantic", "rich")


def imported_by(*words: str) -> set[str]:
    code = (
        "import sys\nfrom vaescale.cli import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "words", [("--help",), ("train", "--help"), ("evaluate", "--help"), ("fit-gmm", "--help")]
)
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    loaded = imported_by(*words)
    assert "vaescale.cli" in loaded
    assert not loaded.intersection(HEAVY)


def test_help_names_every_verb(vaescale) -> None:
    outcome = vaescale("--help")
    assert outcome.code == 0
    for verb in VERBS:
        assert verb in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_tool_that_explains_itself(vaescale, verb: str) -> None:
    tool = Path(__file__).parents[1] / "tools" / f"{verb.replace('-', '_')}.py"
    assert tool.is_file()
    outcome = vaescale(verb, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: vaescale {verb}")
    assert "--json" in outcome.out


def test_a_mistyped_verb_is_answered_with_the_nearest(vaescale) -> None:
    outcome = vaescale("trian", "recipes/digits/optimal.yaml")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("vaescale: unknown verb 'trian'; did you mean train?")


def test_every_tool_is_a_verb() -> None:
    tools = {path.stem.replace("_", "-") for path in (Path(__file__).parents[1] / "tools").glob("[a-z]*.py")}
    assert tools == set(VERBS)


@pytest.mark.parametrize(
    "words", [(), ("trian",), ("train",), ("train", "--nonsense"), ("evaluate", "a", "b")]
)
def test_usage_errors_are_one_line(vaescale, words: tuple[str, ...]) -> None:
    outcome = vaescale(*words)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert "--help" in outcome.err


@pytest.mark.parametrize("words", [("sample", "runs/x", "--count", 0), ("sample", "runs/none")])
def test_of_several_processes_the_first_tells_of_an_error(
    vaescale, monkeypatch, words: tuple[str, ...]
) -> None:
    """The others give it time: a launcher ends the first one as soon as another has failed."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(cli, "_processes", lambda: 1)  # two would end the process of this test
    monkeypatch.setenv("RANK", "0")
    first = vaescale(*words)
    assert (first.code, waits) == (2, [])
    monkeypatch.setenv("RANK", "1")
    other = vaescale(*words)
    assert (other.code, waits) == (2, [cli.FIRST_SPEAKS_SECONDS])
    assert other.err == first.err.replace("vaescale sample: ", "vaescale sample: rank 1: ")


@pytest.mark.parametrize(("verb", "code"), [("launch", 0), ("export", 2)])
def test_launch_joins_the_ranks_of_another_launcher(monkeypatch, capfd, verb: str, code: int) -> None:
    """`torchrun -m vaescale launch RECIPE`: each of its processes is a rank. Other verbs for one process are refused."""
    from vaescale.tools import export, launch

    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)
    tool = {"launch": launch, "export": export}[verb]
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    words = {"launch": ["--dry-run", "recipe.yaml"], "export": ["runs/x", "out"]}[verb]
    assert cli._call(tool, verb, argparse.Namespace(**vars(parser.parse_args(words)), json=True)) == code
    captured = capfd.readouterr()
    if verb == "launch":
        assert json.loads(captured.out)["understood"].endswith("rank 0 of 2 on node 0 of 1")
        assert json.loads(captured.out)["command"].endswith("-m vaescale train recipe.yaml")
    else:
        assert "runs on one process" in captured.err


@pytest.mark.parametrize(("launched", "waits"), [(True, []), (False, [cli.FIRST_SPEAKS_SECONDS])])
def test_after_a_preemption_no_rank_waits_for_another_under_our_launcher(
    monkeypatch, tmp_path: Path, launched: bool, waits: list[float]
) -> None:
    """A cluster's grace period is short, and `vaescale launch` lets each rank end by itself. torch's launcher does not."""
    from vaescale.tools import train

    def stop(_: object) -> None:
        raise Preempted("asked to stop after step 3")

    waited: list[float] = []
    monkeypatch.setattr(train, "run", stop)
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    if launched:
        monkeypatch.setenv(exit_codes.FOLDER, str(tmp_path))
    assert cli._call(train, "train", argparse.Namespace(json=False)) == 75
    assert waited == waits


def test_a_launcher_s_restarts_do_not_repeat_a_refusal(vaescale, tmp_path, monkeypatch) -> None:
    """torchrun --max_restarts 2 starts the ranks three times, whatever their exit code."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    said = []
    for attempt in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        outcome = vaescale("train", tmp_path / "nowhere.yaml")
        assert outcome.code == 2
        said.append(outcome.err)
    assert "nowhere.yaml does not exist" in said[0]
    assert said[1:] == ["", ""]
    (note,) = tmp_path.iterdir()
    note.rename(tmp_path / f"vaescale-refused-{os.getuid()}-0-1")  # of a launcher that has ended
    assert "does not exist" in vaescale("train", tmp_path / "nowhere.yaml").err
    assert list(tmp_path.iterdir()) == [note]


def test_a_full_disk_is_one_sentence(vaescale, monkeypatch) -> None:
    from vaescale.tools import doctor

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor, "run", full)
    outcome = vaescale("doctor")
    assert outcome.code == 4
    assert (
        outcome.err == "vaescale doctor: No space left on device; make room and run the same command again\n"
    )


@pytest.mark.parametrize("shared", [False, True])
def test_data_that_one_rank_alone_cannot_read_is_told_by_that_rank(monkeypatch, capfd, shared: bool) -> None:
    """Rank 0 knows nothing of it; what all ranks raise together rank 0 tells first."""
    from vaescale.tools import evaluate

    from vaescale import comm
    from vaescale.errors import DataError

    def fail(_: object) -> None:
        fault = DataError("val-000001.tar is not there")
        raise comm.known_to_all(fault) if shared else fault

    monkeypatch.setattr(evaluate, "run", fail)
    monkeypatch.setattr(comm, "world_size", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for rank, words in (
        ("0", "vaescale evaluate: val-000001.tar is not there\n"),
        ("1", "vaescale evaluate: rank 1: val-000001.tar is not there\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        assert cli._call(evaluate, "evaluate", argparse.Namespace(json=False)) == 3
        assert capfd.readouterr().err == words
    assert waits == [cli.FIRST_SPEAKS_SECONDS] * shared


def test_optional_words_are_not_called_required(vaescale) -> None:
    assert "KEY=VALUE" not in vaescale("train").err


def test_tools_run_by_themselves() -> None:
    tool = Path(__file__).parents[1] / "tools" / "make_shards.py"
    done = subprocess.run([sys.executable, str(tool), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: vaescale make-shards")


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_ends_after_its_exit_handlers_and_before_the_shutdown(code: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import atexit, logging, sys
from vaescale import cli

class Module:
    def __del__(self):
        print("taken apart")

def main():
    global kept
    kept = Module()
    atexit.register(print, "handler")
    logging.getLogger().addHandler(logging.handlers.MemoryHandler(10, target=logging.StreamHandler(sys.stdout)))
    logging.getLogger().warning("kept in memory")
    print("done")
    return {code}

import logging.handlers
cli.main = main
sys.exit(cli.program())
"""
    )
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code
    assert done.stdout.splitlines() == ["done", "handler", "kept in memory"], done.stderr


def test_a_program_that_raises_ends_as_python_does(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom vaescale import cli\ncli.main = lambda: sys.exit(2)\ncli.program()\n"
    )
    assert subprocess.run([sys.executable, str(program)], check=False, timeout=60).returncode == 2
