"""Starting: one Accelerator, on the device there is, with as many processes as were asked for.

accelerate trains on fewer processes than asked, in silence, in two cases: `accelerate launch --cpu
--num_processes 2` starts one process, and `--multi_gpu` on a machine without GPUs starts two that each believe to
be alone. The second is mended here (gloo on CPU), both are checked.
"""

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vaescale.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

ON = ("1", "true")
HARMLESS = (
    # A kernel with one input channel has two equally good stride patterns; DDP takes them for two different ones.
    (UserWarning, "Grad strides do not match bucket view strides"),
    (UserWarning, "FSDP2-wrapped module .* returned a view"),  # nothing changes a term in place
    (FutureWarning, "`torch.distributed.* is deprecated"),  # DeepSpeed calls old names
)


class Launch(NamedTuple):
    """The processes that came together, and how training lies on them: a key of `STRATEGIES`."""

    accelerator: "Accelerator"
    strategy: str


def start(*, processes: int | None = None) -> Launch:
    """Join the other processes. Precision is the step's business: accelerate would change the model's forward.

    processes: the number asked for, if it was. Raises UserError when another number is there, or when the launcher
    asks for what would be ignored.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--processes (={processes}) must be at least 1")
    if processes != 1:
        refuse_lost_processes(os.environ)
    strategy = _asked_for(os.environ)
    handlers = _prepare_environment(strategy)
    for category, words in HARMLESS:
        warnings.filterwarnings("ignore", message=words, category=category)
    from accelerate import Accelerator

    with contextlib.redirect_stdout(
        sys.stderr
    ):  # DeepSpeed speaks there, and a verb's result alone belongs there
        accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    asked = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for and {accelerator.num_processes} came; launch with "
            "`accelerate launch --config_file recipes/backends/cpu2.yaml` or `--multi_gpu --num_processes N`"
        )
    return Launch(accelerator, strategy)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that a launcher started, for a verb that trains nothing: each then holds the whole model,
    however training was laid out. Without a launcher nothing happens.
    """
    refuse_lost_processes(os.environ)
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    accelerator = start().accelerator
    yield
    stop(accelerator)


def _asked_for(environment: "os._Environ[str]") -> str:
    """The strategy that the launcher's variables name. Raises UserError for what is not installed or not supported."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ON:
        for package in ("deepspeed", "transformers"):  # accelerate's own path to DeepSpeed imports the second
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
    """`ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`: a strategy with the stage that the launcher's variables name."""
    return strategy + (os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if strategy == "zero" else "")


def _prepare_environment(strategy: str) -> list[Any]:
    """What accelerate must find, or not find, before it is made; its handlers."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which accelerate imports, warns of it
    if on_cpu and strategy == "zero":  # with use_cpu accelerate would leave DeepSpeed out, in silence
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    elif on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if strategy == "fsdp2":
        os.environ.pop("ACCELERATE_USE_FSDP")  # `strategies/fsdp2.py` calls torch itself
    # The environment could set both otherwise, against the recipe.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # Buffers are the same on all ranks by construction: sending them with each forward would be wasted. accelerate
    # knows this option by its old name alone, of which torch 2.13 warns.
    data_parallel = DistributedDataParallelKwargs()
    data_parallel.to_kwargs = lambda: {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
    several = "WORLD_SIZE" in os.environ
    return [data_parallel, *([InitProcessGroupKwargs(backend="gloo")] if on_cpu and several else [])]


def refuse_to_compile(strategy: str) -> None:
    """Raise UserError where weights are gathered in hooks that a compiled forward pass would not run."""
    if layout(strategy) in ("zero3", "fsdp2"):
        raise UserError(
            f"training.compile is not for {layout(strategy)}, whose weights are in parts; take ddp, zero1 or zero2"
        )


def set_precision(precision: str) -> None:
    """Compute a GPU's float32 products in float32, or in TF32 if asked: torch's default is TF32 in convolutions alone."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def precision_of_evaluation() -> Iterator[None]:
    """Compute float32 products within as `vaescale evaluate` does, whatever training uses."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_precision("fp32")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def launched(launch: Launch | None, *, processes: int | None = None) -> Iterator[Launch]:
    """The launch that is given, or one that is started here and stopped at the end (see `start`)."""
    if launch is not None:
        yield launch
        return
    started = start(processes=processes)
    try:
        yield started
    finally:
        stop(started.accelerator)


def stop(accelerator: "Accelerator") -> None:
    """Leave the process group in order."""
    accelerator.end_training()


def refuse_lost_processes(environment: "os._Environ[str] | dict[str, str]") -> None:
    """Raise UserError when a launcher was asked for several processes and started only this one.

    Its single-process path sets MASTER_ADDR if, and only if, more than one process or machine was asked for, and
    never sets WORLD_SIZE.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment
    if launched and "MASTER_ADDR" in environment:
        raise UserError(
            "several processes were asked for and the launcher started one; on CPU launch with `accelerate launch "
            "--config_file recipes/backends/cpu2.yaml`, or `--multi_gpu --num_processes N` in place of `--cpu` (if one "
            "is right: --processes 1)"
        )
