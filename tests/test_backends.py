"""The launch configurations: each loads, says its own command, and leaves precision to the recipe."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FILES = sorted((Path(__file__).parents[1] / "recipes" / "backends").glob("*.yaml"))


def test_the_promised_ones_are_there() -> None:
    promised = {"cpu2", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload", "multi_node"}
    assert {path.stem for path in FILES} == promised


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_loads_and_says_its_command(path: Path) -> None:
    config = load_config_from_file(str(path))
    text = path.read_text()
    assert f"accelerate launch --config_file recipes/backends/{path.name}" in text
    assert config.mixed_precision == "no"
    assert config.num_processes >= 2
    kind = str(config.distributed_type)
    assert ("DEEPSPEED" in kind) == path.stem.startswith("zero")
    assert ("FSDP" in kind) == path.stem.startswith("fsdp")
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[4])
        assert ("offload_param_device" in config.deepspeed_config) == path.stem.endswith("offload")
