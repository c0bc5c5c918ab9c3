"""`vaescale launch`: what it starts for each world, and the signals and exit codes of what it started."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, children
from vaescale.commands import ALONE, DISTRIBUTED
from vaescale.commands import launch as launching
from vaescale.commands.launch import layout_variables, plan
from vaescale.errors import UserError
from vaescale.system.world import World

RECIPE = "recipes/digits/optimal.yaml"
CALL = ["train", RECIPE]
RANK = World("a cluster", rank=1, size=4, local_rank=1, local_size=2, address="first", port=2345)


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of launchers or threads, and no GPU."""
    for name in (
        *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK"),
        *("ACCELERATE_USE_CPU", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launching, "num_gpus", lambda: 0)


def words_after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_one_process_takes_the_place_of_this_one() -> None:
    start = plan(World("this machine"), CALL)
    assert start.command == [sys.executable, "-m", "vaescale", *CALL]
    assert (start.replaces, start.place, start.variables) == (True, None, {})


def test_several_ranks_of_one_node_need_no_fixed_port() -> None:
    start = plan(World("this machine"), CALL, processes=2)
    assert words_after(start.command, "--num_processes") == "2"
    assert words_after(start.command, "--num_machines") == "1"
    assert words_after(start.command, "--main_process_port") == "0"
    assert words_after(start.command, "--config_file").endswith("recipes/backends/cpu2.yaml")
    assert start.variables["ACCELERATE_USE_CPU"] == "true"
    assert not start.replaces


def test_a_node_of_several_meets_the_others() -> None:
    world = World(
        "a cluster", node=1, nodes=3, processes=2, address="first", port=2345, hosts=("first", "b", "c")
    )
    start = plan(world, CALL, backend="zero2")
    assert words_after(start.command, "--num_processes") == "6"
    assert words_after(start.command, "--machine_rank") == "1"
    assert words_after(start.command, "--main_process_ip") == "first"
    assert words_after(start.command, "--main_process_port") == "2345"
    # accelerate's own choice starts the other machines over SSH.
    assert words_after(start.command, "--deepspeed_multinode_launcher") == "standard"
    assert start.place is not None
    assert (start.place.number, start.place.total, start.place.named(2)) == (1, 3, "node 2 (c)")


def test_nodes_may_have_different_numbers_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank here and three on the other node share a batch of 128, which six could not."""
    monkeypatch.chdir(ROOT)
    world = World("a cluster", node=1, nodes=2, address="first")
    start = plan(world, CALL, processes=3)
    assert (start.ranks, start.place is None) == (3, False)
    launching._refuse_a_wrong_recipe(CALL, start)
    with pytest.raises(UserError, match="cannot be shared equally by 3 processes"):
        launching._refuse_a_wrong_recipe(CALL, plan(World("this machine"), CALL, processes=3))


def test_srun_gets_the_options_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    world = World("Slurm job 7", nodes=2, srun=True)
    start = plan(world._replace(address="first", port=2345), CALL, processes=2, backend="zero2", wait=20)
    assert start.command[0] == "srun"
    options = [
        "--processes",
        "2",
        "--backend",
        "zero2",
        "--address",
        "first",
        "--port",
        "2345",
        "--wait",
        "20",
    ]
    assert start.command[start.command.index("launch") :] == ["launch", *options, *CALL]
    plain = plan(world, CALL).command
    assert plain[plain.index("launch") :] == ["launch", "--wait", "300", *CALL]


def test_gpus_are_counted_and_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "num_gpus", lambda: 4)
    start = plan(World("this machine"), CALL)
    assert words_after(start.command, "--num_processes") == "4"
    assert words_after(start.command, "--config_file").endswith("recipes/backends/ddp.yaml")
    assert "ACCELERATE_USE_CPU" not in start.variables
    with pytest.raises(UserError, match="this node has 4 GPUs for 5 processes; pass --processes 4"):
        plan(World("this machine"), CALL, processes=5)


def test_a_task_that_is_a_rank_tells_torch() -> None:
    start = plan(RANK, CALL, wait=20)
    assert start.command == [sys.executable, "-m", "vaescale", *CALL]
    assert start.replaces
    told = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    told |= {"MASTER_ADDR": "first", "MASTER_PORT": "2345", "VAESCALE_WAIT_SECONDS": "20"}
    assert told.items() <= start.variables.items()
    with pytest.raises(UserError, match="--processes 3 does not apply: a cluster started 2 on this node"):
        plan(RANK, CALL, processes=3)


def test_a_gpu_of_its_own_is_number_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert plan(RANK, CALL).variables["LOCAL_RANK"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert plan(RANK, CALL).variables["LOCAL_RANK"] == "1"


def test_a_joined_rank_keeps_its_variables() -> None:
    start = plan(RANK._replace(joined=True), CALL)
    assert "RANK" not in start.variables


@pytest.mark.parametrize(
    ("backend", "variables"),
    [
        ("ddp", {}),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        (
            "zero3_offload",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
            },
        ),
    ],
)
def test_layouts_reach_tasks_as_accelerate_s_variables(backend: str, variables: dict[str, str]) -> None:
    assert layout_variables(backend) == variables


def test_a_layout_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2, gradient_clipping: 1.0}\n"
    )
    with pytest.raises(UserError, match=r"deepspeed_config\.gradient_clipping cannot be passed to tasks"):
        layout_variables(str(file))
    file.write_text("just words")
    with pytest.raises(UserError, match="is not a YAML file of accelerate's"):
        layout_variables(str(file))
    with pytest.raises(UserError, match=r"'zero22' is neither a file nor one of .*; did you mean zero2\?"):
        layout_variables("zero22")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "a recipe or a verb is missing"),
        (("sweep", RECIPE), "sweep runs on one process; type `vaescale sweep"),
        (("launch", RECIPE), "launch runs on one process"),
        (("recipes/digits/none.yaml",), "does not exist"),
        ((RECIPE, "optimizer.lrr=1"), "unknown key optimizer.lrr"),
        (("--nodes", 2, RECIPE), "no variable tells the address of node 0"),
        (("--backend", "zero22", "--processes", 2, RECIPE), "did you mean zero2?"),
        (("--processes", 3, RECIPE), "cannot be shared equally by 3 processes x training.accumulation 1"),
        (
            ("--nodes", 2, "--address", "first", "--processes", 1000, RECIPE),
            "cannot be shared equally by 1000 processes",
        ),
        (("evalute", "runs/x"), "'evalute' is neither a recipe nor a verb; did you mean evaluate?"),
        (("--", "sweep", RECIPE), "sweep runs on one process"),
        ((RECIPE, "--nodes", 2), "--nodes is an option of launch"),
        ((RECIPE, "--backend=zero2"), "--backend=zero2 is an option of launch"),
    ],
)
def test_wrong_words_are_refused_before_anything_starts(
    vaescale, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], sentence: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(os, "execvpe", None)
    vaescale("launch", "--node", 0, *words).assert_refused(2, sentence)


def test_a_shell_without_srun_is_told(vaescale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "execvpe", None)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    vaescale("launch", RECIPE).assert_refused(
        2, "srun is not on PATH; unset SLURM_JOB_ID to use this machine"
    )


def test_every_verb_runs_on_several_processes_or_on_one() -> None:
    from vaescale.cli import VERBS

    assert {*ALONE, *DISTRIBUTED} == set(VERBS)
    assert not {*ALONE} & {*DISTRIBUTED}


def test_a_dry_run_shows_the_command(vaescale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    outcome = vaescale("launch", "--dry-run", "--json", "--processes", 2, RECIPE, "seed=3", "--allow-changes")
    assert outcome.code == 0, outcome.err
    assert outcome.json["understood"] == "this machine: one node"
    assert outcome.json["command"].endswith(f"-m vaescale train {RECIPE} seed=3 --allow-changes")
    shown = vaescale("launch", "--dry-run", "evaluate", "runs/x", "--json")
    assert shown.out.startswith("vaescale launch\n  understood  this machine: one node\n")
    assert "-m vaescale evaluate runs/x --json" in shown.out


RANK_PROGRAM = """
import signal, sys, time
from pathlib import Path
from vaescale.system.exit_codes import leave
from vaescale.system.host import take_signals
ready = Path(sys.argv[1])
def stop(number, frame):
    ready.with_name("got").write_text(str(int(number)))
    sys.exit(leave(75))
signal.signal(signal.SIGTERM, stop)
take_signals()
ready.touch()
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-c", *sys.argv[1:]]).wait())
"""
SUPERVISOR = """
import os, sys
from vaescale.commands.launch import _supervise
sys.exit(_supervise([sys.executable, "-c", *sys.argv[1:]], dict(os.environ)))
"""


@pytest.mark.parametrize("send", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_arrive_as_sigterm_and_the_code_of_training_comes_out(
    tmp_path: Path, send: signal.Signals
) -> None:
    """Sent to every process of the job, as clusters do; the launcher between, which would die of them, gets none."""
    ready = tmp_path / "ready"
    command = [sys.executable, "-c", SUPERVISOR, LAUNCHER, RANK_PROGRAM, str(ready)]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as supervisor:
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (launcher,) = children(supervisor.pid)
        os.kill(launcher, send)
        supervisor.send_signal(send)
        assert supervisor.wait(30) == 75
    assert (tmp_path / "got").read_text() == str(int(signal.SIGTERM))


def test_exit_codes_of_what_leaves_none() -> None:
    environment = dict(os.environ)
    assert launching._supervise([sys.executable, "-c", "raise SystemExit(3)"], environment) == 3
    assert launching._supervise([sys.executable, "-c", "pass"], environment) == 0
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert launching._supervise(killed, environment) == 137


def leaves(monkeypatch: pytest.MonkeyPatch, codes: Sequence[int], *, ends_with: int, asked: bool) -> None:
    """Replace the launcher by one whose ranks leave some codes, and which was or was not asked to stop."""

    class Launcher:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert command == ["launcher"]
            for rank, code in enumerate(codes):
                Path(env["VAESCALE_EXIT_CODES"], str(rank)).write_text(str(code))

        def __enter__(self) -> "Launcher":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self) -> int:
            return ends_with

    @contextmanager
    def forwarding(_: object, event: threading.Event) -> Iterator[None]:
        if asked:
            event.set()
        yield

    monkeypatch.setattr(launching.subprocess, "Popen", Launcher)
    monkeypatch.setattr(launching, "_forwarding", forwarding)


@pytest.mark.parametrize(
    ("codes", "ends_with", "asked", "code"),
    [
        ([75, 75], 0, True, 75),
        ([2], 2, False, 2),  # one failed, and torch's launcher stopped the other one early
        ([], 1, False, 1),  # one ended with a traceback, likewise
        ([], 137, False, 137),
        ([2], 2, True, 2),
        ([], -9, True, 75),  # before any rank had started
        ([], 143, True, 75),
        ([], 143, False, 143),
        ([], 0, True, 0),
        ([143, 143], 143, True, 143),
    ],
)
def test_a_preemption_hides_no_failure(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], ends_with: int, asked: bool, code: int
) -> None:
    leaves(monkeypatch, codes, ends_with=ends_with, asked=asked)
    assert launching._supervise(["launcher"], {}, early=75) == code


def test_a_verb_that_does_not_train_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    leaves(monkeypatch, [], ends_with=-9, asked=True)
    assert launching._supervise(["launcher"], {}) == 143
    assert capfd.readouterr().err == ""
    assert launching._supervise(["launcher"], {}, early=75) == 75
    assert "the same command starts again" in capfd.readouterr().err
