"""Job files for clusters: the variants of a recipe as a Slurm array or as a Kubernetes indexed job. Pure strings."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vaescale.errors import UserError

INDICES = ("JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID")  # a task's number: Kubernetes' and Slurm's variable
NAME_CHARACTERS = 57  # the name of a pod adds a dash and the index, and has at most 63
CONFIG_MAP_BYTES = 1_000_000
GRACE_SECONDS = 180  # from SIGTERM to the end; the launcher takes up to 110 of them
TABLE = "/sweep/variants.txt"


def cluster_files(
    kind: str,
    recipe: Path,
    overrides: Sequence[Sequence[str]],
    folders: Sequence[str],
    *,
    name: str,
    launch: str,
    image: str,
) -> dict[str, str]:
    """Return the files that submit all variants of a recipe as one job, by file name.

    kind: `slurm` or `kubernetes`; overrides: of each variant; folders: each variant's run folder; launch: `vaescale launch`
    and its options, which start a run; image: of the Kubernetes containers. No shell interprets an override: a file has one
    line for each variant, its run folder and its overrides separated by tabs. Raises UserError for an override with a tab or
    a line break, and for another launcher.
    """
    rows = [[folder, *variant] for folder, variant in zip(folders, overrides, strict=True)]
    if any(re.search(r"[\t\n\r]", value) for row in rows for value in row):
        raise UserError(
            "a value has a tab or a line break, which the list of variants cannot hold; write the value without it"
        )
    lines = "".join("\t".join(row) + "\n" for row in rows)
    if kind == "slurm":
        arguments = _launch_arguments(launch, recipe, f"runs/{slug(name)}/variants.txt")
        start = f"vaescale {shlex.join(arguments)}"
        script = SLURM.format(name=slug(name), last=len(overrides) - 1, start=start)
        return {"variants.txt": lines, "sweep.sbatch": script}
    arguments = _launch_arguments(launch, recipe, TABLE)
    return {"sweep.yaml": _kubernetes(name, lines, arguments, image, len(overrides))}


def own_variant(file: Path, environment: Mapping[str, str]) -> list[str]:
    """The overrides of this task's variant: those of the line in variants.txt that the cluster's number of the task names.

    Raises UserError without such a number or line.
    """
    name = next((name for name in INDICES if name in environment), None)
    if name is None:
        raise UserError(
            f"--variants needs the number of this task: {INDICES[0]} of an indexed Kubernetes job, or {INDICES[1]}"
        )
    try:
        lines = file.read_text().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} has no list of variants: {getattr(error, 'strerror', error)}") from None
    number = environment[name]
    if not number.isdecimal() or int(number) >= len(lines):
        raise UserError(f"{name} (={number!r}) must be below the number of lines in {file} (={len(lines)})")
    return lines[int(number)].split("\t")[1:]


def _launch_arguments(launch: str, recipe: Path, variants: str) -> list[str]:
    """The arguments of `vaescale` that train this task's variant."""
    words = shlex.split(launch)
    if words[:2] != ["vaescale", "launch"]:
        raise UserError(
            f"--launch (={launch!r}) must begin with `vaescale launch` for --write, such as "
            "`vaescale launch --processes 8 --backend zero2`"
        )
    return [*words[1:], "--variants", variants, str(recipe)]


def _kubernetes(name: str, lines: str, arguments: list[str], image: str, count: int) -> str:
    """A ConfigMap with the lines of the variants, and an indexed Job with `count` tasks, as YAML."""
    if len(lines.encode()) > CONFIG_MAP_BYTES:
        raise UserError(
            "the list of variants does not fit into a ConfigMap of 1 MB; give fewer or shorter values"
        )
    label = re.sub("[^a-z0-9]+", "-", name.lower())[:NAME_CHARACTERS].strip("-") or "sweep"
    table = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": label},
        "data": {"variants.txt": lines},
    }
    rules = [
        {"action": "Ignore", "onExitCodes": {"containerName": "train", "operator": "In", "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailIndex", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}},
    ]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": label},
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": count,
            "backoffLimitPerIndex": 6,
            "podFailurePolicy": {"rules": rules},
            "template": {"spec": _pod(label, arguments, image)},
        },
    }
    head = (
        "# kubectl apply -f this file (Kubernetes 1.33 or newer). The volume claim `vaescale` holds recipes, data and runs, and\n"
        "# is mounted as /work; the secret `vaescale`, if there is one, becomes variables. A task that is preempted after a\n"
        "# checkpoint (75) or evicted starts again, however often; one whose recipe cannot work (2) does not.\n"
    )
    return head + yaml.safe_dump_all([table, job], sort_keys=False)


def _pod(name: str, arguments: list[str], image: str) -> dict[str, Any]:
    """The pod of recipes/kubernetes, for one GPU."""
    volumes: dict[str, tuple[str, dict[str, Any]]] = {
        "/sweep": ("sweep", {"configMap": {"name": name}}),
        "/work": ("work", {"persistentVolumeClaim": {"claimName": "vaescale"}}),
        "/tmp": ("tmp", {"emptyDir": {}}),  # noqa: S108
        "/dev/shm": ("shm", {"emptyDir": {"medium": "Memory"}}),  # noqa: S108
    }
    container = {
        "name": "train",
        "image": image,
        "args": arguments,
        "workingDir": "/work",
        "envFrom": [{"secretRef": {"name": "vaescale", "optional": True}}],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": volume, "mountPath": path} for path, (volume, _) in volumes.items()],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": volume, **source} for volume, source in volumes.values()],
    }


def slug(text: str) -> str:
    """The text with only letters, digits, dots, dashes and underscores, fit for a file name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_") or "none"


SLURM = """#!/bin/bash
# A sweep: one task of the array for each line of variants.txt beside this file. Submit it from the project's folder with the
# environment activated.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-1}}" # srun does not inherit it since Slurm 22.05
task="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" # SLURM_JOB_ID alone may name the whole array

srun --kill-on-bad-exit=1 {start}
code=$?
# 75: training has saved and can continue. A task that Slurm cancels or requeues itself is not RUNNING any more.
if [ "$code" -eq 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt 100 ] &&
    [ "$(squeue --noheader --jobs="$task" --format=%T)" = RUNNING ]; then
    scontrol requeue "$task"
fi
exit "$code"
"""
