"""A Slurm cluster of this machine's own: a controller and nodes, each a host with a name, an address and processes of its own.

Each host is a network namespace on one bridge, with UTS, mount and PID namespaces, so that a host can be cut off from the
others, or lose its power. Needs root, ip, and Debian's slurmctld, slurmd, slurm-client and munge. All of its files are in one
folder; nothing of the machine changes, except that namespaces exist while it runs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("ip", "nsenter", "unshare", "munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
CONTROLLER = "ctl"
PATIENCE_SECONDS = 30

# A requeued job waits until its old credential has expired, 120 s by default: AuthInfo's cred_expire.
CONFIG = """
ClusterName=private
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_seconds}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN\n"


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        return "a Slurm cluster in namespaces needs root"
    return f"a Slurm cluster needs {', '.join(absent)}" if absent else ""


class Cluster:
    """A controller and nodes n1, n2, ... The folder's path must be short: it holds a Unix socket.

    gpus: device files of each node that Slurm takes for GPUs. requeue_seconds: how long a requeued job waits.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 2,
        gpus: int = 4,
        requeue_seconds: int = 5,
        kill_wait: int = 30,
        grace: int = 0,
        slurmd_timeout: int = 30,
    ) -> None:
        self.folder, self.gpus = folder, gpus
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._address = {
            host: f"10.78.0.{number}" for number, host in enumerate([CONTROLLER, *self.nodes], start=10)
        }
        self._settings = {
            "requeue_seconds": requeue_seconds,
            "kill_wait": kill_wait,
            "grace": grace,
            "slurmd_timeout": slurmd_timeout,
        }
        self._space = {host: f"vs{os.getpid() % 100000}{host}" for host in self._address}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_config()
            self._make_network()
            self._start_munge()
            self._start(CONTROLLER, ["slurmctld", "-D", "-f", str(self.config)])
            for node in self.nodes:
                self.power_on(node)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._daemons):
            self.power_off(name)
        for space in self._space.values():
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)

    @property
    def config(self) -> Path:
        return self.folder / "slurm.conf"

    def environment(self, more: Mapping[str, str] = {}) -> dict[str, str]:
        """As a fresh shell's on the controller's host."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return kept | {"PATH": path, "SLURM_CONF": str(self.config), "USER": "root"} | dict(more)

    def run(
        self,
        *words: str,
        cwd: Path | None = None,
        more: Mapping[str, str] = {},
        check: bool = True,
        timeout: float = 120,
    ) -> str:
        """What a command prints on the controller's host, both streams."""
        done = subprocess.run(
            self.inside(CONTROLLER, words),
            cwd=cwd,
            env=self.environment(more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def inside(self, host: str, words: Sequence[str]) -> list[str]:
        """A command in a host's network, with the host's name."""
        # `ip netns exec` would hide /sys/fs/cgroup, without which slurmd does not start.
        named = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        shell = ["sh", "-c", named, host, str(self.folder / "hosts"), *words]
        network = f"--net=/run/netns/{self._space[host]}"
        return ["nsenter", network, "unshare", "--uts", "--mount", *shell]

    def submit(self, *words: str, cwd: Path, more: Mapping[str, str] = {}) -> int:
        """`sbatch WORDS`. Returns the job's number."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd, more=more).split(";")[0].split()[-1])

    def job(self, job: int | str) -> dict[str, str]:
        """What scontrol says of a job."""
        text = self.run("scontrol", "show", "job", str(job), "-o")
        return dict(re.findall(r"(\w+(?::\w+)?)=(\S*)", text.splitlines()[0]))

    def wait(self, job: int | str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job has one of the states. Returns what scontrol says of it."""
        deadline = time.monotonic() + seconds
        while (found := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {found['JobState']}, not {states}: {found}"
            time.sleep(0.2)
        return found

    @contextmanager
    def without(self, node: str) -> Iterator[None]:
        """Take a node's cable out within the block."""
        cable = ("-n", self._space[CONTROLLER], "link", "set", f"to-{node}")
        self._ip(*cable, "down")
        try:
            yield
        finally:
            self._ip(*cable, "up")

    def power_off(self, host: str) -> None:
        """End all processes of a host at once."""
        daemon = self._daemons.pop(host)
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()

    def power_on(self, node: str) -> None:
        """Start a node's slurmd."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._start(node, ["slurmd", "-D", "-f", str(self.config)])

    def _start(self, host: str, words: Sequence[str]) -> None:
        # The death of `unshare --fork` ends the namespace's first process, and with it all others of the host. That first
        # process is a shell, because slurmd does not collect the slurmstepd processes that it leaves behind.
        own = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            '"$@" & wait',
            "init",
            *words,
        ]
        with (self.folder / f"{host}.out").open("ab") as log:
            self._daemons[host] = subprocess.Popen(
                self.inside(host, own),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {
            "socket": "socket",
            "key-file": "key",
            "log-file": "log",
            "pid-file": "pid",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
        with (self.folder / "munge.out").open("ab") as log:
            self._daemons["munge"] = subprocess.Popen(
                ["munged", "--foreground", "--force", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.folder / "munge.socket").exists():
            assert time.monotonic() < deadline, (self.folder / "munge.out").read_text()
            time.sleep(0.05)

    def _write_config(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        nodes = [NODE.format(name=node, address=self._address[node], gpus=self.gpus) for node in self.nodes]
        settings = {"controller": CONTROLLER, "address": self._address[CONTROLLER], "folder": self.folder}
        head, partitions = CONFIG.split("PartitionName", 1)
        text = head + "".join(nodes) + "PartitionName" + partitions
        self.config.write_text(text.format(**settings, **self._settings))
        devices = self.folder / "devices"
        devices.mkdir()
        for number in range(self.gpus):
            os.mknod(devices / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        lines = f"NodeName=n[1-{len(self.nodes)}] Name=gpu File={devices}/gpu[0-{self.gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(lines if self.gpus else "")

    def _make_network(self) -> None:
        lines = "".join(f"{address} {host}\n" for host, address in self._address.items())
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + lines)
        for host, space in self._space.items():
            self._ip("netns", "add", space)
            self._ip("-n", space, "link", "set", "lo", "up")
            if host == CONTROLLER:
                self._ip("-n", space, "link", "add", "bridge", "type", "bridge")
                self._ip("-n", space, "addr", "add", f"{self._address[host]}/24", "dev", "bridge")
                self._ip("-n", space, "link", "set", "bridge", "up")
        for node in self.nodes:
            cable = [
                "link",
                "add",
                f"to-{node}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                self._space[node],
            ]
            self._ip("-n", self._space[CONTROLLER], *cable)
            self._ip("-n", self._space[CONTROLLER], "link", "set", f"to-{node}", "master", "bridge", "up")
            self._ip("-n", self._space[node], "addr", "add", f"{self._address[node]}/24", "dev", "eth0")
            self._ip("-n", self._space[node], "link", "set", "eth0", "up")

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (seen := self.run("sinfo", "-hNp", "main", "-o", "%T", check=False).split()) != ["idle"] * len(
            self.nodes
        ):
            logs = "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))
            assert time.monotonic() < deadline, f"{seen}\n{logs}"
            time.sleep(0.2)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)
