"""Starting: one Accelerator, on the device there is, with as many processes as were asked for.

accelerate trains on fewer processes than asked, in silence, in two cases: `accelerate launch --cpu
--num_processes 2` starts one process, and `--multi_gpu` on a machine without GPUs starts two that each believe to
be alone. The second is mended here (gloo on CPU), both are checked.
"""

import os
import warnings
from typing import TYPE_CHECKING

import torch

from vaescale.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

UNSUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}


def start(*, processes: int | None = None) -> "Accelerator":
    """Join the other processes. Precision is the step's business: accelerate would change the model's forward.

    processes: the number asked for, if it was. Raises UserError when another number is there, or when the launcher
    asks for what would be ignored.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--processes (={processes}) must be at least 1")
    if processes != 1:
        refuse_lost_processes(os.environ)
    for variable, meaning in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UserError(
                f"{meaning} is not supported yet; launch with --multi_gpu or recipes/backends/cpu2.yaml"
            )
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which accelerate imports, warns of it
    torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; torch's default is TF32 in convolutions
    # A kernel with one input channel has two equally good stride patterns; DDP takes them for two different ones.
    warnings.filterwarnings(
        "ignore", message="Grad strides do not match bucket view strides", category=UserWarning
    )
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Buffers are the same on all ranks by construction: sending them with each forward would be wasted. accelerate
    # knows this option by its old name alone, of which torch 2.13 warns.
    data_parallel = DistributedDataParallelKwargs()
    data_parallel.to_kwargs = lambda: {"forward_sync_buffers": False}
    # The environment could set both otherwise, against the recipe.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[data_parallel])
    asked = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for and {accelerator.num_processes} came; launch with "
            "`accelerate launch --config_file recipes/backends/cpu2.yaml` or `--multi_gpu --num_processes N`"
        )
    return accelerator


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
