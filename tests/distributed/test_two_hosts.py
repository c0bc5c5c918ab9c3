"""Two hosts, as network namespaces of this machine: one run over both, one of them cut off and brought back."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import checkpoints, children, command, curve, environment, make_project, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
OPTIONS = ("training.precision=fp32", "training.log_every=1", "training.checkpoint_every=20")
WATCHDOG_SECONDS = 6


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """`first` and `second`, with a cable between them."""

    def __init__(self) -> None:
        own = os.getpid() % 10000
        self.names = [f"vs{own}a", f"vs{own}b"]
        self.devices = [f"vs{own}x", f"vs{own}y"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self) -> "Hosts":
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
            ip("link", "set", device, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "up")

    def start(self, folder: Path, number: int, *words: str) -> "subprocess.Popen[bytes]":
        """What a person types on one of the hosts."""
        training = command(*words, backend="multi_node", processes=2)
        at = training.index("-m", 2)
        training[at:at] = ["--machine_rank", str(number), "--main_process_ip", self.addresses[0]]
        with (folder / f"host{number}.log").open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *training],
                cwd=folder,
                env=environment(
                    ACCELERATE_USE_CPU="true",
                    GLOO_SOCKET_IFNAME=self.devices[number],
                    TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3",
                ),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    try:
        with Hosts() as made:
            yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace here: {error.stderr.decode().strip()}")


def test_a_host_is_cut_off_and_brought_back(hosts: Hosts, tmp_path: Path, digits: Path) -> None:
    folder, run = make_project(tmp_path, digits), tmp_path / "run"
    options = (*OPTIONS, "training.steps=100", f"training.watchdog_seconds={WATCHDOG_SECONDS}")
    words = (*options, f"run_dir={run}", "--processes", "2")
    both = [hosts.start(folder, number, *words) for number in (0, 1)]
    logs = [folder / f"host{number}.log" for number in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        while len(curve(run)) < 30 and time.monotonic() < deadline:
            assert all(host.poll() is None for host in both), logs[0].read_text() + logs[1].read_text()
            time.sleep(0.05)
        hosts.cut()
        deadline = time.monotonic() + WATCHDOG_SECONDS + 60
        while not all("no sign of life" in log.read_text() for log in logs) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for host in both:
            end(host)
    for number, log in enumerate(logs):  # each side says that it does not hear of the other
        assert f"rank {1 - number} not heard from" in log.read_text(), log.read_text()
    assert checkpoints(run)
    hosts.mend()
    both = [hosts.start(folder, number, *words) for number in (0, 1)]
    try:
        assert [host.wait(120) for host in both] == [0, 0], logs[0].read_text() + logs[1].read_text()
    finally:
        for host in both:
            end(host)
    outcome = train(folder, *options, f"run_dir={tmp_path}/peace")
    assert outcome.returncode == 0, outcome.stderr
    for own, peace in zip(curve(run), curve(tmp_path / "peace"), strict=True):
        for name in ("train/neg_elbo_nats", "train/sigma"):
            assert own[name] == pytest.approx(peace[name], rel=1e-4)


def end(host: "subprocess.Popen[bytes]") -> None:
    if host.poll() is None:
        for process in (*children(host.pid), host.pid):
            os.kill(process, signal.SIGKILL)
        host.wait()
