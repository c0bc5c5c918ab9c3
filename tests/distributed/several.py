"""Several trainings in the same processes, in layouts that a launcher's variables would ask for.

    python -m tests.distributed.several RECIPE LAYOUT=WORDS LAYOUT=WORDS ...

A process takes seconds to import everything; this does so once.
"""

import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from vaescale.commands.train import train
from vaescale.recipe import load_recipe
from vaescale.training import launch as backends

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
OFFLOADED = dict.fromkeys(
    ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"), "cpu"
)
LAYOUTS = {
    "ddp": {},
    **{f"zero{stage}": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)},
    "zero3_offload": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"} | OFFLOADED,
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}


def main() -> None:
    """All of them, each from the start."""
    for words in sys.argv[2:]:
        layout, _, overrides = words.partition("=")
        for name in {name for variables in LAYOUTS.values() for name in variables}:
            os.environ.pop(name, None)
        os.environ.update(LAYOUTS[layout])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        launch = backends.start()
        assert layout.startswith(launch.strategy)
        train(load_recipe(Path(sys.argv[1]), overrides.split()), launch=launch)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
