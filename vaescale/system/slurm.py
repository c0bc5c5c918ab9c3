"""What only the process itself shows of its place in a Slurm job."""

import contextlib
import re
from collections.abc import Mapping

import psutil

SHELLS = ("batch", "interactive")


def without_stale_step(environment: Mapping[str, str]) -> Mapping[str, str]:
    """The environment without the variables of a step, if this process belongs to a job's shell and not to a step.

    sbatch hands its own environment to the job. Typed within a step, such as `srun --pty bash`, it hands over SLURM_STEP_ID,
    SLURM_STEP_NUM_TASKS and others, which describe the step of another job then.
    """
    if "SLURM_STEP_ID" not in environment or _own_step() not in SHELLS:
        return environment
    return {name: value for name, value in environment.items() if not name.startswith("SLURM_STEP")}


def _own_step() -> str:
    """The Slurm step that this process belongs to, such as `0` or `batch`; empty if that cannot be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for parent in psutil.Process().parents():
            with contextlib.suppress(psutil.Error):  # processes of root may be hidden
                if found := re.match(r"slurmstepd: \[[^\]]*\.(\w+)\]", " ".join(parent.cmdline())):
                    return found[1]
    return ""
