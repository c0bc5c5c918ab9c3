"""What a launcher's configuration asks for: taken, or refused with the key that decides it in the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from vaescale.errors import UserError
from vaescale.training.config import OptimizerConfig, TrainingConfig
from vaescale.training.launcher_settings import CONFIG_FILE, refuse_ignored, take_config_file

TRAINING = TrainingConfig(steps=10, precision="bf16", accumulation=2, compile=True)
OPTIMIZER = OptimizerConfig(lr=1e-3, clip_norm=200)
FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_GRADIENT_CLIPPING": "200"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "none"},
        {"FSDP_OFFLOAD_PARAMS": "true"},  # of a launch without FSDP
        FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false"},
    ],
)
def test_what_agrees_with_the_recipe_is_taken(environment: dict[str, str]) -> None:
    refuse_ignored(environment, TRAINING, OPTIMIZER)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision is fp16, .* training.precision=fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision is fp8"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "training.accumulation=4"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, r"gradient_clipping is 1.0, .* optimizer.clip_norm=1.0"),
        ({"ACCELERATE_DYNAMO_BACKEND": "CUDAGRAPHS"}, "dynamo_backend is cudagraphs"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "use_megatron_lm is true, which vaescale does not do"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "take recipes/backends/zero3_offload.yaml"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "network.checkpointing=true"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "take recipes/backends/zero2.yaml"),
    ],
)
def test_what_the_recipe_does_otherwise_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        refuse_ignored(environment, TRAINING, OPTIMIZER)


ZERO = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            ZERO | {"optimizer": {"type": "Adam"}},
            "optimizer of .* is not taken; .* the recipe's optimizer section",
        ),
        (ZERO | {"scheduler": {"type": "WarmupLR"}}, "optimizer.schedule decides it"),
        (ZERO | {"fp16": {"enabled": True}}, "training.precision decides it"),
        (ZERO | {"bf16": {"enabled": "auto"}}, "training.precision decides it"),
        (ZERO | {"train_batch_size": 64}, "data.global_batch decides it"),
        (ZERO | {"gradient_accumulation_steps": 4}, "training.accumulation decides it"),
        (ZERO | {"gradient_clipping": 1.0}, "optimizer.clip_norm decides it"),
        (ZERO | {"sparse_attention": {"mode": "fixed"}}, "sparse_attention of .* is not known to vaescale"),
        ({"zero_optimization": {"stage": 0}}, "needs zero_optimization with a stage of 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "cpu and none are taken"),
        ([], "needs zero_optimization"),
    ],
)
def test_keys_of_a_deepspeed_file_that_are_not_taken(tmp_path: Path, content: Any, words: str) -> None:
    (tmp_path / "zero.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        refuse_ignored({CONFIG_FILE: str(tmp_path / "zero.json")}, TRAINING, OPTIMIZER)


def test_a_deepspeed_file_says_how_weights_are_partitioned(tmp_path: Path) -> None:
    """Training with one: zero1 of tests/distributed/test_any_number_of_devices.py."""
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "reduce_bucket_size": "auto",
        "overlap_comm": False,
    }
    taken = {
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": 2,
        "fp16": {"enabled": False},
        "steps_per_print": 5,
    }
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero, **taken}))
    environment = {CONFIG_FILE: str(tmp_path / "zero.json"), "OTHER": "1"}
    refuse_ignored(environment, TRAINING, OPTIMIZER)
    assert take_config_file(environment) == {"overlap_comm": False}
    assert environment == {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "OTHER": "1",
    }
    (tmp_path / "zero.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        refuse_ignored({CONFIG_FILE: str(tmp_path / "zero.json")}, TRAINING, OPTIMIZER)
