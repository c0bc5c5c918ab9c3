"""Start a verb on all the processes that the cluster, or this machine, offers.

One launcher for each node starts the ranks of its node with `accelerate launch`; a task that is a rank itself becomes one. In
both cases all meet before anything heavy begins, so that a missing one is named.
"""

import difflib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple

import psutil
import yaml
from pydantic import Field

from vaescale.commands import ALONE, DISTRIBUTED
from vaescale.commands.signature import Count, NonNegative, PositiveReal, checked
from vaescale.data.plan import rank_slots
from vaescale.errors import UserError
from vaescale.recipe import load_recipe
from vaescale.runs.cluster_jobs import own_variant
from vaescale.system import early_stop, exit_codes
from vaescale.system.console import say
from vaescale.system.early_stop import TERMINATED, early_code
from vaescale.system.host import HELD_BACK, cores
from vaescale.system.meeting import PATIENCE_SECONDS, WAIT, Place, gloo_variables, meet
from vaescale.system.shipped import BACKENDS, shipped_file
from vaescale.system.slurm import components, without_stale_step
from vaescale.system.world import DEFAULT_PORT, World, read_world, without_launchers
from vaescale.system.world_check import refuse_incomplete

Port = Annotated[int, Field(ge=1, le=65535)]
VAESCALE = (sys.executable, "-m", "vaescale")
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# The launcher of torch's ranks kills them this long after SIGTERM; its own 30 s are too few for a large checkpoint.
SHUTDOWN_SECONDS = "110"
# Options that no verb has; --processes is one of train, too, for the expected number.
BEFORE_THE_RECIPE = ("--backend", "--nodes", "--node", "--address", "--port", "--wait", "--variants")
# Device files of NVIDIA's and AMD's drivers, and of NVIDIA's under WSL: without any, torch need not be asked for GPUs.
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


class Start(NamedTuple):
    """What a launch does on this node: a command, what it adds to the environment, and whom it meets before, if anybody.

    replaces: whether the command takes the place of this process, so that its signals and exit code are this process's.
    ranks: how many train together; of several nodes only those of this one are known, because nodes may differ.
    """

    command: list[str]
    variables: dict[str, str]
    replaces: bool
    place: Place | None = None
    ranks: int = 1


@checked
def launch(
    words: Sequence[str],
    *,
    processes: Count | None = None,
    backend: str | None = None,
    nodes: Count | None = None,
    node: NonNegative | None = None,
    address: str | None = None,
    port: Port | None = None,
    wait: PositiveReal = PATIENCE_SECONDS,
    variants: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Start `vaescale WORDS` on all processes. Returns the exit code, or the description of a dry run.

    words: a recipe and its overrides, or a verb that runs on several processes with its arguments. processes: ranks on each
    node, by default one for each GPU. backend: a name in recipes/backends or a YAML file of accelerate's. nodes, node, address,
    port: what the environment does not say or says wrongly. wait: seconds for all nodes to come. variants: the file of a sweep
    with one line for each task of an array, whose overrides are added to the words. Raises UserError for words
    or an environment that cannot work. Does not return where the command takes the place of this process.
    """
    call = _call([*words, *(own_variant(variants, os.environ) if variants else [])])
    world = _with(
        read_world(without_stale_step(os.environ)), nodes=nodes, node=node, address=address, port=port
    )
    refuse_incomplete(world)
    start = plan(world, call, processes=processes, backend=backend, wait=wait)
    if dry_run:
        return {
            "understood": world.summary,
            "command": shlex.join(start.command),
            "variables": start.variables,
        }
    _refuse_a_wrong_recipe(call, start)
    say(f"vaescale launch: {world.summary}; {shlex.join(start.command)}")
    variables = dict(start.variables)
    if start.place is not None and (own := meet(start.place, seconds=wait)) is not None:
        variables |= gloo_variables(own, os.environ)
    kept = os.environ if world.joined or world.srun else without_launchers(os.environ)
    environment = {**kept, **variables}
    if start.replaces:
        if shutil.which(start.command[0]) is None:
            raise UserError(
                f"{start.command[0]} is not on PATH; unset SLURM_JOB_ID to use this machine alone"
            )
        if start.command[0] == sys.executable:  # which takes the mask off, when it can answer a signal
            signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        os.execvpe(start.command[0], start.command, environment)  # noqa: S606
    early = early_code(environment) if call[0] in ("train", "fit-prior") else None
    return {"exit_code": _supervise(start.command, environment, early=early)}


def plan(
    world: World,
    call: Sequence[str],
    *,
    processes: int | None = None,
    backend: str | None = None,
    wait: float = PATIENCE_SECONDS,
) -> Start:
    """Decide what starts on this node, or instead of this task. Raises UserError for options that contradict the world."""
    if world.srun:
        port = None if world.port == DEFAULT_PORT else world.port
        options = {"--processes": processes, "--backend": backend, "--address": world.address, "--port": port}
        options |= {"--wait": f"{wait:g}"}
        given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        command = [*VAESCALE, "launch", *given, *call]
        return Start(_srun(world, os.environ, command), _srun_variables(os.environ), True)
    if world.rank is not None:
        if processes not in (None, world.local_size):
            raise UserError(
                f"--processes {processes} does not apply: {world.source} started {world.local_size} on this node"
            )
        if not world.joined:
            _refuse_shared_gpus(world, os.environ)
        variables = ({} if world.joined else _rank_variables(world)) | {WAIT: f"{wait:g}"}
        layout = layout_variables(backend) if backend else {}
        return Start([*VAESCALE, *call], variables | layout, True, ranks=world.size or 1)
    gpus = num_gpus()
    local = processes or world.processes or gpus or 1
    if gpus and local > gpus:
        raise UserError(
            f"this node has {gpus} GPU{'s'[: gpus > 1]} for {local} processes; pass --processes {gpus}"
        )
    if local * world.nodes == 1 and backend is None:
        return Start([*VAESCALE, *call], {}, True)
    return _node(world, call, local=local, backend=backend or ("ddp" if gpus else "cpu2"), on_cpu=not gpus)


def _node(world: World, call: Sequence[str], *, local: int, backend: str, on_cpu: bool) -> Start:
    """The launcher of the ranks of this node."""
    file = shipped_file(backend, BACKENDS)
    command = [sys.executable, "-m", "vaescale.training.ranks", "--config_file", str(file)]
    command += ["--num_machines", str(world.nodes), "--num_processes", str(local * world.nodes)]
    # On one node any free port will do, so that two launches do not collide.
    command += ["--main_process_port", str(world.port) if world.nodes > 1 else "0"]
    place = None
    if world.nodes > 1:
        assert world.address is not None
        command += ["--machine_rank", str(world.node), "--main_process_ip", world.address]
        if _read_backend(file).get("distributed_type") == "DEEPSPEED":
            command += [
                "--deepspeed_multinode_launcher",
                "standard",
            ]  # else node 0 starts the others over SSH
        place = Place("node", world.node, world.nodes, world.address, world.port, world.hosts)
    variables = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_SECONDS}
    if on_cpu:
        variables |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(max(1, cores() // local))}
    unset = {name: value for name, value in variables.items() if name not in os.environ}
    return Start([*command, "-m", "vaescale", *call], unset, False, place, local)


def num_gpus() -> int:
    """The number of GPUs that this process may use."""
    if not any(Path(device).exists() for device in DEVICES):
        return 0
    import torch

    return torch.cuda.device_count()


def layout_variables(backend: str) -> dict[str, str]:
    """The variables with which accelerate tells its ranks the layout of a file in recipes/backends.

    Raises UserError for a file with settings that have no variable here.
    """
    file = shipped_file(backend, BACKENDS)
    content = _read_backend(file)
    kind = content.get("distributed_type")
    section = {"DEEPSPEED": "deepspeed_config", "FSDP": "fsdp_config"}.get(str(kind))
    if section is None:
        return {}
    known = {
        "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "fsdp_version": "FSDP_VERSION",
    }
    settings = content.get(section) or {}
    if unknown := sorted(settings.keys() - known.keys()):
        raise UserError(
            f"{file}: {section}.{unknown[0]} cannot be passed to tasks that are ranks already; start one task on each node"
        )
    return {f"ACCELERATE_USE_{kind}": "true"} | {known[name]: str(value) for name, value in settings.items()}


def _read_backend(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not a YAML file of accelerate's: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a YAML file of accelerate's: it has no keys")
    return content


def _call(words: Sequence[str]) -> list[str]:
    """The verb and its arguments: `train` if the first word is no verb."""
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise UserError(
            "a recipe or a verb is missing, for example `vaescale launch recipes/digits/optimal.yaml`"
        )
    if words[0] == "launch" or (words[0] not in DISTRIBUTED and words[0] in ALONE):
        raise UserError(f"{words[0]} runs on one process; type `vaescale {shlex.join(words)}`")
    if misplaced := [word for word in words if word.partition("=")[0] in BEFORE_THE_RECIPE]:
        raise UserError(
            f"{misplaced[0]} is an option of launch, and what follows the recipe or the verb belongs to that: type "
            f"`vaescale launch {misplaced[0]} ... {words[0]}`"
        )
    if words[0] in DISTRIBUTED:
        return list(words)
    near = difflib.get_close_matches(words[0], DISTRIBUTED, n=1, cutoff=0.8)
    if near and not Path(words[0]).exists():
        raise UserError(f"{words[0]!r} is neither a recipe nor a verb; did you mean {near[0]}?")
    return ["train", *words]


def _refuse_a_wrong_recipe(call: Sequence[str], start: Start) -> None:
    """Raise UserError for a recipe that the ranks cannot train, before the other nodes are waited for."""
    given = [word for word in call[1:] if not word.startswith("-")]
    if call[0] == "train" and given and not {"-h", "--help"} & set(call):
        recipe = load_recipe(Path(given[0]), [word for word in given[1:] if "=" in word])
        batch, accumulation = recipe.data.global_batch, recipe.training.accumulation
        if start.place is None or start.ranks > batch:
            rank_slots(batch, rank=0, world_size=start.ranks, accumulation=accumulation)


def _with(world: World, **given: int | str | None) -> World:
    """The world with what the options say. Raises UserError for options that do not apply."""
    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not said:
        return world
    if world.rank is not None and said.keys() & {"nodes", "node"}:
        raise UserError(f"--nodes and --node do not apply: {world.source} started each rank itself")
    return world._replace(**said, srun=world.srun and "nodes" not in said)


def _refuse_shared_gpus(world: World, environment: Mapping[str, str]) -> None:
    """Raise UserError if this node has fewer GPUs than tasks, where that can be told: NCCL takes no GPU for two ranks."""
    visible = num_gpus()
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    # One visible GPU may be each task's own.
    gpus = int(on_node) if on_node.isdecimal() else visible if visible > 1 else world.local_size
    if visible and gpus < world.local_size:
        raise UserError(
            f"{world.source} started {world.local_size} tasks on this node for {gpus} GPU{'s'[: gpus > 1]}: start one task for "
            "each GPU, or one on each node"
        )


def _rank_variables(world: World) -> dict[str, str]:
    """What torch reads, for a task that is a rank."""
    # A cluster that gives each task one GPU of its own numbers it 0 in every task.
    own_gpu = len([one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]) == 1
    threads = os.environ.get("SLURM_CPUS_PER_TASK") or str(max(1, cores() // world.local_size))
    on_cpu = {} if num_gpus() or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
    return {
        **on_cpu,
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": "0" if own_gpu else str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": world.address or "127.0.0.1",
        "MASTER_PORT": str(world.port),
    }


def _srun(world: World, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """`srun COMMAND` in a job of several tasks or nodes: the job's own tasks, or one on each node."""
    srun = ["srun", "--kill-on-bad-exit=1"]
    if groups := len(components(environment)):
        # One step over all components of a heterogeneous job, each with its own cores.
        words: list[str] = []
        for group in range(groups):
            cpus = environment.get(f"SLURM_CPUS_PER_TASK_HET_GROUP_{group}")
            options = [f"--het-group={group}", *([f"--cpus-per-task={cpus}"] if cpus else [])]
            words += [*([":"] if group else []), *options, *command]
        return [*srun, *words]
    if environment.get("SLURM_NTASKS") is None:
        srun += [f"--ntasks={world.nodes}", "--ntasks-per-node=1"]
    return [*srun, *command]


def _srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """srun does not take over the job's cores for each task since Slurm 22.05."""
    cpus = environment.get("SLURM_CPUS_PER_TASK")
    if not cpus or "SRUN_CPUS_PER_TASK" in environment or components(environment):
        return {}
    return {"SRUN_CPUS_PER_TASK": cpus}


def _supervise(command: list[str], environment: dict[str, str], *, early: int | None = None) -> int:
    """Run accelerate's launcher to its end. Returns the ranks' own exit code, which the launcher does not pass on.

    early: the code after a request to stop, if no rank left one; None for a verb that does not train.

    A cluster signals every process of a job. The launcher would die of SIGUSR1, and of the second or third SIGTERM while its
    ranks still save, so it gets neither: it inherits a mask, which its ranks take off again (`host.take_signals`).
    """
    asked = threading.Event()
    with tempfile.TemporaryDirectory(prefix="vaescale-") as folder:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        early_stop.withdraw()
        variables = environment | {exit_codes.FOLDER: folder}
        with subprocess.Popen(command, env=variables) as process, _forwarding(process, asked):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
            code = process.wait()
        left = exit_codes.collect(Path(folder))
    if left is None and code and asked.is_set():
        if early is not None:
            say(f"vaescale launch: {early_stop.sentence('the request to stop', early)}")
        return early or TERMINATED
    if left is None and code == TERMINATED:
        say("vaescale launch: another process than the cluster or this one ended a rank with SIGTERM")
    return left or (code if code >= 0 else 128 - code)


@contextmanager
def _forwarding(process: "subprocess.Popen[bytes]", asked: threading.Event) -> Iterator[None]:
    """Pass a cluster's signals on as SIGTERM to the ranks that a launcher has started. Sets `asked` when there was one.

    A Ctrl-C reaches all of them from the terminal itself.
    """

    def forward(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if number == signal.SIGINT:
            if not sys.stdin.isatty():
                process.send_signal(signal.SIGINT)
            return
        asked.set()
        with suppress(psutil.NoSuchProcess):
            ranks = psutil.Process(process.pid).children()
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.terminate()
            if not ranks:
                process.kill()

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            # srun sends a SIGTERM once the first task has ended, which must not replace this one's exit code.
            signal.signal(number, handler if number == signal.SIGINT else signal.SIG_IGN)
