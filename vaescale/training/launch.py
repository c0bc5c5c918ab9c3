"""The launch of training: one Accelerator, on the available device, with the requested number of processes.

accelerate silently trains on fewer processes than requested in two cases: `accelerate launch --cpu --num_processes 2`
starts one process, and `--multi_gpu` on a machine without GPUs starts two that train independently. This module corrects
the second case (gloo on CPU) and checks for both.
"""

import contextlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vaescale import comm
from vaescale.errors import UserError
from vaescale.models.vae import VAE
from vaescale.networks import layers, normalization
from vaescale.system.meeting import Place, gloo_variables, meet, patience
from vaescale.system.slurm import without_stale_step
from vaescale.system.world import refuse_half_a_world, unjoined
from vaescale.training.config import TrainingConfig
from vaescale.training.launcher_settings import CONFIG_FILE, take_config_file
from vaescale.training.roll_call import meet_in_store
from vaescale.training.watchdog import Watchdog

if TYPE_CHECKING:
    from accelerate import Accelerator

ON = ("1", "true")
LARGE = 28  # height of an image whose maps are stored as [B, H, W, C] on a CPU: smaller ones are slower so
HARMLESS = (
    # A kernel with one input channel has two equivalent stride patterns, which DDP takes for different ones.
    (UserWarning, "Grad strides do not match bucket view strides"),
    (UserWarning, "FSDP2-wrapped module .* returned a view"),  # nothing changes a term in place
    # Passes before the capture of a CUDA graph run on another stream.
    (UserWarning, "The AccumulateGrad node's stream"),
    (FutureWarning, "`torch.distributed.* is deprecated"),  # DeepSpeed calls old names
)


class Launch(NamedTuple):
    """The accelerator of a launch, and the key of its training layout in `STRATEGIES`."""

    accelerator: "Accelerator"
    strategy: str


def start(*, processes: int | None = None, watchdog: Watchdog | None = None) -> Launch:
    """Start an Accelerator and join the other processes.

    The training step sets the precision, because accelerate would change the model's forward. processes: the expected number;
    None for the launcher's. watchdog: to start as soon as the ranks have met. Raises UserError when another number has started,
    or when the launcher requests something that would be ignored; TrainingStopped when a rank does not come.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--expect-processes (={processes}) must be at least 1")
    if processes != 1:
        refuse_lost_processes(os.environ)
    _meet_the_other_ranks()
    store = meet_in_store()
    if watchdog is not None and store is not None:
        watchdog.start(store)
    if store is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        join_anew(store)
    zero_options = take_config_file(os.environ)
    strategy = _requested_strategy(os.environ)
    handlers = _prepare_environment(strategy)
    for category, message in HARMLESS:
        warnings.filterwarnings("ignore", message=message, category=category)
    from accelerate import Accelerator

    # DeepSpeed prints to stdout, which is reserved for a verb's result.
    with contextlib.redirect_stdout(sys.stderr):
        if strategy == "zero":
            _without_operators()
        accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    if strategy == "zero":
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"].update(zero_options)
    expected = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    if accelerator.num_processes != expected:
        raise UserError(
            f"{expected} processes were asked for, but {accelerator.num_processes} started: type `vaescale launch --processes "
            f"{expected} RECIPE`, with the options of launch before the recipe"
        )
    return Launch(accelerator, strategy)


def _without_operators() -> None:
    """Keep DeepSpeed from compiling an operator: an all-reduce in shared memory, which only its inference calls.

    On a machine without a GPU it would need a C++ compiler at the first start, and a minute or two.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # what can be compiled here, by name


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the launcher's processes within the block, in a verb that does not train.

    Each process holds the whole model, whatever layout training used. Without a launcher this does nothing.
    """
    refuse_lost_processes(os.environ)
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", CONFIG_FILE):
        os.environ.pop(name, None)
    accelerator = start().accelerator
    yield
    stop(accelerator)


def _meet_the_other_ranks() -> None:
    """Wait for the other ranks, and name those that do not come, where no launcher on this node has done so.

    torch itself would wait without a word. Raises UserError for variables that describe no world.
    """
    refuse_half_a_world(os.environ)
    launcher_met = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if "WORLD_SIZE" not in os.environ or launcher_met or comm.is_joined():
        return
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])
    if size > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = meet(Place("rank", rank, size, address, port), seconds=patience(os.environ))
        if own is not None and not torch.cuda.is_available():
            os.environ.update(gloo_variables(own, os.environ))


def join_anew(store: Any) -> None:
    """Join the ranks after a restart by torch's launcher (`--max_restarts`), in a store of this attempt.

    With a static rendezvous, which is accelerate's, the launcher's store outlives an attempt: torch would read the addresses of the
    ranks that have ended, and fail to connect or wait for them (torch 2.13, gloo).
    """
    from torch.distributed import PrefixStore, init_process_group  # type: ignore[attr-defined]

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = PrefixStore("group", store)
    init_process_group(backend, store=group, rank=rank, world_size=size)


def _requested_strategy(environment: "os._Environ[str]") -> str:
    """The layout that the launcher's variables name. Raises UserError when it is not installed or not supported."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ON:
        for package in ("deepspeed", "transformers"):  # accelerate imports both for DeepSpeed
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"DeepSpeed was asked for and {package} is missing; pip install 'vaescale[deepspeed]'"
                )
        if environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "0":
            raise UserError(
                "DeepSpeed was asked for with zero_stage 0; take 1, 2 or 3, or recipes/backends/ddp.yaml"
            )
        return "zero"
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() in ON:
        if environment.get("FSDP_VERSION", "2") == "1":
            raise UserError(
                "FSDP was asked for with fsdp_version 1; take 2, as recipes/backends/fsdp2.yaml does"
            )
        return "fsdp2"
    return "ddp"


def layout(strategy: str) -> str:
    """The layout `ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`; the launcher's variables name the stage of `zero`."""
    return strategy + (os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if strategy == "zero" else "")


def _prepare_environment(strategy: str) -> list[Any]:
    """Set and unset the variables that accelerate reads. Returns the handlers to create it with."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # avoids a warning of DeepSpeed
    if on_cpu and strategy == "zero":  # with use_cpu accelerate silently ignores DeepSpeed
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    elif on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if strategy == "fsdp2":
        os.environ.pop("ACCELERATE_USE_FSDP")  # `strategies/fsdp2.py` calls torch itself
    # The environment could contradict the recipe in both.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    for name in ("ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_DYNAMO_BACKEND"):
        os.environ.pop(name, None)
    from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # accelerate knows only the older name of an option.
    data_parallel = DistributedDataParallelKwargs()
    data_parallel.to_kwargs = data_parallel_options
    several = "WORLD_SIZE" in os.environ
    return [data_parallel, *([InitProcessGroupKwargs(backend="gloo")] if on_cpu and several else [])]


def data_parallel_options() -> dict[str, bool]:
    """The options of torch's DistributedDataParallel, with the names that this version of torch has for them.

    Buffers are equal on all ranks by construction, so they need not be sent with each forward. `broadcast_buffers` is the only
    name of that option in torch 2.11, and torch 2.13 warns of it.
    """
    accepted = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    return {option: False, "gradient_as_bucket_view": True}


def refuse_to_compile(strategy: str) -> None:
    """Raise UserError for layouts that gather weights in hooks, which a compiled forward pass would not run."""
    if layout(strategy) in ("zero3", "fsdp2"):
        raise UserError(
            f"training.compile does not work with {layout(strategy)}, which partitions the weights; take ddp, zero1 or zero2"
        )


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Turn a failure of torch's compiler within the block, such as a missing C++ compiler, into a UserError."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        reason = f"{type(error.inner_exception).__name__}: {error.inner_exception}".strip().splitlines()[0]
        raise UserError(
            f"training.compile is true and torch cannot compile the model ({reason}); install what is missing (a C++ "
            "compiler, and openssl for a CPU), or set training.compile=false"
        ) from error


def takes_channels_last(config: TrainingConfig, device: torch.device, model: VAE, strategy: str) -> bool:
    """Whether weights and maps are stored as [B, H, W, C]: as the recipe says, and always where it is faster.

    Never where DeepSpeed or FSDP2 divides the weights: they take torch's usual order alone. Raises UserError if the recipe asks for it there.

    On a GPU in half precision cuDNN's convolutions are of this order, and others are converted before and after each of them. On a
    CPU it pays where normalization is compiled and maps are large (tools/bench/README.md).
    """
    if strategy != "ddp":
        if config.channels_last:
            raise UserError(
                f"training.channels_last is true, and {layout(strategy)} divides weights in torch's usual order alone; set it to false, or take ddp"
            )
        return False
    if config.channels_last or device.type == "cuda":
        return config.channels_last or config.precision in ("bf16", "fp16")
    large = min(model.image_shape[1:]) >= LARGE and not config.compile
    return large and layers.has_norms(model) and normalization.are_usable()


def set_precision(precision: str) -> None:
    """Compute a GPU's float32 products in float32, or in TF32 if requested; torch's default uses TF32 in convolutions."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def precision_of_evaluation() -> Iterator[None]:
    """Use the float32 precision of `vaescale evaluate` within the block, whatever precision training uses."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_precision("fp32")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def launched(
    launch: Launch | None, *, processes: int | None = None, watchdog: Watchdog | None = None
) -> Iterator[Launch]:
    """Yield the given launch, or start one (see `start`) and stop it at the end, and the watchdog as well."""
    if launch is not None:
        yield launch
        return
    try:
        started = start(processes=processes, watchdog=watchdog)
        try:
            yield started
        finally:
            stop(started.accelerator)
    finally:
        if watchdog is not None:
            watchdog.stop()


def stop(accelerator: "Accelerator") -> None:
    """Leave the process group."""
    accelerator.end_training()


def refuse_lost_processes(environment: "os._Environ[str] | dict[str, str]") -> None:
    """Raise UserError when several processes were asked for, and this one does not know the others.

    The launcher's single-process path sets MASTER_ADDR if, and only if, more than one process or machine was asked for. It
    never sets WORLD_SIZE.
    """
    if (world := unjoined(without_stale_step(environment))) is not None:
        raise UserError(
            f"{world.source} started {world.size or world.nodes} tasks, which do not know each other: type `vaescale launch` "
            "in place of `vaescale` (to train on one process: --processes 1, and one task)"
        )
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment
    if launched and "MASTER_ADDR" in environment:
        raise UserError(
            "several processes were asked for and the launcher started one; on CPU launch with `accelerate launch "
            "--config_file recipes/backends/cpu2.yaml`, or `--multi_gpu --num_processes N` in place of `--cpu` (to "
            "train on one process: --processes 1)"
        )
