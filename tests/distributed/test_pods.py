"""Two pods of a TrainJob, as network namespaces of this machine with the variables that Kubeflow Trainer injects: one run over
both under `vaescale launch`. A pod is missing, cut off, killed, preempted; each time the run goes on to the same end.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launching import RECIPE, checkpoints, curve, environment, make_project, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WATCHDOG_SECONDS = 6
STEPS = 100
OPTIONS = (
    "training.precision=fp32",
    "training.log_every=1",
    "training.checkpoint_every=20",
    f"training.steps={STEPS}",
    f"training.watchdog_seconds={WATCHDOG_SECONDS}",
    "tracking.mlflow=null",
)
ON_DEMAND = "VAESCALE_POD_TESTS"
NETNS = Path("/etc/netns")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Pods:
    """Pods 0 and 1 of the TrainJob `digits`, with a cable between them and each other's names."""

    def __init__(self, folder: Path) -> None:
        own = os.getpid() % 10000
        self.folder, self.run = folder, folder / "run"
        self.names = [f"vs{own}a", f"vs{own}b"]
        self.devices = [f"vs{own}x", f"vs{own}y"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.logs = [folder / f"pod{number}.log" for number in (0, 1)]
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Pods":
        hosts = "".join(
            f"{address} digits-node-0-{number}.digits\n" for number, address in enumerate(self.addresses)
        )
        for name in self.names:
            ip("netns", "add", name)
            (NETNS / name).mkdir(parents=True)
            (NETNS / name / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
            ip("link", "set", device, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for number in (0, 1):
            self.kill(number)
        for process in self.started:
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(NETNS / name, ignore_errors=True)
        with suppress(OSError):
            NETNS.rmdir()  # if it was made here

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "up")

    def kill(self, number: int) -> None:
        """All processes of a pod at once."""
        pids = subprocess.run(
            ["ip", "netns", "pids", self.names[number]], check=False, capture_output=True, text=True
        )
        for pid in pids.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def start(self, number: int) -> "subprocess.Popen[bytes]":
        """What the cluster starts in a pod."""
        variables = {
            "KUBERNETES_SERVICE_HOST": "10.96.0.1",
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "1",
            "PET_NODE_RANK": str(number),
            "PET_MASTER_ADDR": "digits-node-0-0.digits",
            "PET_MASTER_PORT": "29500",
            "JOB_COMPLETION_INDEX": str(number),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3",
        }
        words = [sys.executable, "-m", "vaescale", "launch", RECIPE, *OPTIONS, f"run_dir={self.run}"]
        with self.logs[number].open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *words],
                cwd=self.folder,
                env=environment(**variables),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())

    def until(self, condition: Callable[[], bool], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert condition(), self.said()

    def assert_same_end(self, peace: list[dict[str, float]]) -> None:
        """The whole curve is that of an undisturbed run."""
        rows = curve(self.run)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        for own, other in zip(rows, peace, strict=True):
            for name in ("train/neg_elbo_nats", "train/sigma"):
                assert own[name] == pytest.approx(other[name], rel=1e-4)


@pytest.fixture
def pods(tmp_path: Path, digits: Path) -> Iterator[Pods]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    made = Pods(make_project(tmp_path, digits))
    try:
        with made:
            yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace here: {error.stderr.decode().strip()}")


def undisturbed(pods: Pods) -> list[dict[str, float]]:
    run = pods.folder / "peace"
    outcome = train(pods.folder, *OPTIONS, f"run_dir={run}")
    assert outcome.returncode == 0, outcome.stderr
    return curve(run)


def test_a_pod_is_cut_off_and_comes_back(pods: Pods) -> None:
    if ON_DEMAND not in os.environ:
        pytest.skip(f"waits for half a minute: set {ON_DEMAND}=1")
    both = [pods.start(number) for number in (0, 1)]
    pods.until(lambda: len(curve(pods.run)) >= 30, seconds=120)
    pods.cut()
    cut_off = time.monotonic()
    pods.until(
        lambda: all("no sign of life" in log.read_text() for log in pods.logs), seconds=WATCHDOG_SECONDS + 30
    )
    assert time.monotonic() - cut_off >= WATCHDOG_SECONDS - 1
    for number, log in enumerate(pods.logs):  # each says that it does not hear of the other
        assert f"rank {1 - number} not heard from" in log.read_text(), log.read_text()
    assert checkpoints(pods.run)
    pods.until(lambda: all(pod.poll() is not None for pod in both), seconds=60)
    assert [pod.returncode for pod in both] == [4, 4]
    pods.mend()
    both = [pods.start(number) for number in (0, 1)]
    assert [pod.wait(120) for pod in both] == [0, 0], pods.said()
    pods.assert_same_end(undisturbed(pods))


def test_a_pod_is_missing_then_killed_then_preempted(pods: Pods) -> None:
    if ON_DEMAND not in os.environ:
        pytest.skip(f"takes a minute: set {ON_DEMAND}=1")
    first = pods.start(0)
    pods.until(lambda: "waiting for node 1 of 2" in pods.logs[0].read_text(), seconds=30)
    second = pods.start(1)
    pods.until(lambda: len(curve(pods.run)) >= 30, seconds=120)
    pods.kill(1)
    second = pods.start(1)  # at once, while pod 0 has not noticed yet
    assert first.wait(WATCHDOG_SECONDS + 30) == 4, pods.said()
    assert "rank 0: another rank has ended or is cut off" in pods.logs[0].read_text()
    assert "Traceback" not in pods.logs[0].read_text().partition("another rank has ended")[0]
    first = pods.start(0)
    pods.until(lambda: len(curve(pods.run)) >= 60, seconds=120)
    os.kill(launcher(second.pid), signal.SIGTERM)  # the cluster wants pod 1's node
    assert [first.wait(60), second.wait(60)] == [75, 75], pods.said()
    both = [pods.start(number) for number in (1, 0)]
    assert [pod.wait(120) for pod in both] == [0, 0], pods.said()
    pods.assert_same_end(undisturbed(pods))


AGENT = """#!/bin/sh
# What mpirun calls in place of ssh: {agent} [OPTIONS] ADDRESS COMMAND
while [ "${{1#-}}" != "$1" ]; do shift; done
case "$1" in {addresses[0]}) space={names[0]} ;; *) space={names[1]} ;; esac
host=host-${{1##*.}}
shift
exec ip netns exec "$space" unshare --uts sh -c 'hostname "$0" && eval "$1"' "$host" "$*"
"""


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun_over_two_hosts(pods: Pods, kind: str) -> None:
    """mpirun starts its own daemon on the other host; no variable says where rank 0 is."""
    if ON_DEMAND not in os.environ:
        pytest.skip(f"takes half a minute: set {ON_DEMAND}=1")
    mpirun = shutil.which(f"mpirun.{kind}")
    if mpirun is None:
        pytest.skip(f"mpirun.{kind} is not installed")
    agent = pods.folder / "agent"
    agent.write_text(AGENT.format(agent=agent, addresses=pods.addresses, names=pods.names))
    agent.chmod(0o755)
    hosts = ",".join(pods.addresses)
    options = {
        "openmpi": [
            *("--allow-run-as-root", "--mca", "plm", "rsh", "--mca", "plm_rsh_agent", str(agent)),
            *("--mca", "ras", "^slurm", "--host", hosts, "-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"),
        ],
        "mpich": ["-launcher", "ssh", "-launcher-exec", str(agent), "-hosts", hosts, "-ppn", "1"],
    }[kind]
    words = [mpirun, *options, "-n", "2", sys.executable, "-m", "vaescale", "launch"]
    call = [RECIPE, *OPTIONS, f"run_dir={pods.run}"]

    def on_the_first_host(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [str(agent), pods.addresses[0], shlex.join(words)]
        return subprocess.run(
            command,
            cwd=pods.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = on_the_first_host(*words, *call)
    assert done.returncode == 2
    assert "does not tell the address of the one with rank 0: set MASTER_ADDR" in done.stderr
    done = on_the_first_host(*words, "--address", pods.addresses[0], *call)
    assert done.returncode == 0, done.stdout + done.stderr
    pods.assert_same_end(undisturbed(pods))


def launcher(pid: int) -> int:
    """`ip netns exec` replaces itself, so that the launcher has its number."""
    assert b"launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return pid
