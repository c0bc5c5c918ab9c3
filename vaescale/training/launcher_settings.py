"""What a launcher's configuration asks for besides processes and a layout: taken, or refused in one sentence.

The recipe decides precision, accumulation, clipping and compilation, so that one recipe trains alike under any launcher.
accelerate passes its answers to these questions in environment variables; a DeepSpeed configuration file is read here.
"""

import json
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.errors import UserError
from vaescale.training.config import OptimizerConfig, TrainingConfig

ON = ("1", "true", "yes")
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
AUTO = "auto"
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
OFFLOAD = {
    "offload_optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}
# Keys of a DeepSpeed file that change no number of a run: what is printed, and sizes that DeepSpeed computes again.
PRINTED = {
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "comms_logger", "flops_profiler"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "memory_breakdown"),
    *("train_micro_batch_size_per_gpu", "checkpoint"),
}


class Setting(NamedTuple):
    """A setting of accelerate's configuration: its variable and name, the values that ask for nothing, and a remedy."""

    variable: str
    name: str
    nothing: tuple[str, ...]
    remedy: str


SETTINGS = (
    Setting("ACCELERATE_MIXED_PRECISION", "mixed_precision", ("no", ""), "training.precision={value}"),
    Setting(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_accumulation_steps",
        ("1", "", AUTO),
        "training.accumulation={value}",
    ),
    Setting(
        "ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", ("", AUTO, "none"), "optimizer.clip_norm={value}"
    ),
    Setting("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend", ("no", ""), "training.compile=true"),
)
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": ("use_megatron_lm", ON, "take recipes/backends/zero2.yaml or fsdp2.yaml"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "parallelism_config",
        ON,
        "take recipes/backends/zero2.yaml or fsdp2.yaml",
    ),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", ON, "take recipes/backends/zero3_offload.yaml"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        ON,
        "set network.checkpointing=true in the recipe of a resnet or a ladder",
    ),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "fsdp_reshard_after_forward",
        ("false",),
        "take recipes/backends/zero2.yaml",
    ),
}


def refuse_ignored(
    environment: Mapping[str, str], training: TrainingConfig, optimizer: OptimizerConfig
) -> None:
    """Raise UserError where the launcher's configuration asks for something that the recipe does otherwise, or nobody does."""
    does = {
        "mixed_precision": (training.precision,),
        "gradient_accumulation_steps": (str(training.accumulation),),
        "gradient_clipping": (str(optimizer.clip_norm),),
        "dynamo_backend": ("inductor",) if training.compile else (),
    }
    for setting in SETTINGS:
        value = environment.get(setting.variable, "").lower()
        if value in setting.nothing or _is_one_of(value, does[setting.name]):
            continue
        remedy = setting.remedy.format(value=value)
        raise UserError(
            f"the launcher's {setting.name} is {value}, and the recipe decides it: leave it out there, and give {remedy} if you "
            "mean it"
        )
    uses_fsdp = environment.get("ACCELERATE_USE_FSDP", "").lower() in ON
    for variable, (name, refused, remedy) in REFUSED.items():
        if variable.startswith("FSDP") and not uses_fsdp:
            continue
        if (value := environment.get(variable, "").lower()) in refused:
            raise UserError(f"the launcher's {name} is {value}, which vaescale does not do: {remedy}")
    if path := environment.get(CONFIG_FILE):
        _refuse_keys(Path(path), _read(Path(path)), training, optimizer)


def take_config_file(environment: MutableMapping[str, str]) -> dict[str, Any]:
    """Move what a DeepSpeed configuration file says of ZeRO to the variables that accelerate reads, in place of the file.

    Returns the other options of its `zero_optimization`, such as sizes of buckets; DeepSpeed's own where they are "auto".
    """
    path = environment.pop(CONFIG_FILE, None)
    if not path:
        return {}
    options = dict(_read(Path(path))["zero_optimization"])
    environment[STAGE] = str(options.pop("stage"))
    for name, variable in OFFLOAD.items():
        if isinstance(target := options.pop(name, None), dict):
            environment[variable] = str(target.get("device", "none"))
    return {name: value for name, value in options.items() if value != AUTO}


def _is_one_of(value: str, values: tuple[str, ...]) -> bool:
    """Whether a value is one of some values, as a word or as a number."""
    try:
        return any(value == other or float(value) == float(other) for other in values)
    except ValueError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed configuration file. Raises UserError where it names no stage of ZeRO."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file {path} cannot be read ({error})") from error
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise UserError(
            f"deepspeed_config_file {path} needs zero_optimization with a stage of 1, 2 or 3, such as "
            '{"zero_optimization": {"stage": 2}}'
        )
    return dict(content)


def _refuse_keys(
    path: Path, content: Mapping[str, Any], training: TrainingConfig, optimizer: OptimizerConfig
) -> None:
    """Raise UserError for the first key of a DeepSpeed file that asks for something that the recipe decides, or is unknown."""
    decided = {
        "optimizer": "the recipe's optimizer section",
        "scheduler": "optimizer.schedule",
        "train_batch_size": "data.global_batch",
        "gradient_accumulation_steps": "training.accumulation",
        "gradient_clipping": "optimizer.clip_norm",
        **dict.fromkeys(("fp16", "bf16", "amp", "torch_autocast"), "training.precision"),
    }
    does = {
        "gradient_accumulation_steps": (str(training.accumulation), "1"),
        "gradient_clipping": (str(optimizer.clip_norm), "0"),
    }
    for key, value in content.items():
        off = isinstance(value, dict) and value.get("enabled") is False
        if key in ("zero_optimization", *PRINTED) or value == AUTO or off:
            continue
        if _is_one_of(str(value), does.get(key, ())):
            continue
        if key not in decided:
            raise UserError(
                f"{key} of {path} is not known to vaescale; leave it out of the deepspeed_config_file, of which "
                "zero_optimization is taken"
            )
        raise UserError(
            f"{key} of {path} is not taken; leave it out, because {decided[key]} decides it in the recipe"
        )
    for name in OFFLOAD:
        target = content["zero_optimization"].get(name)
        if isinstance(target, dict) and target.get("device", "none") not in ("cpu", "none"):
            raise UserError(f"{name} of {path} names the device {target['device']!r}; cpu and none are taken")
