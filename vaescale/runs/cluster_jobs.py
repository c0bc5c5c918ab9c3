"""Job files for clusters: the variants of a recipe as a Slurm array or as a Kubernetes indexed job. Pure strings."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vaescale.errors import UserError


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

    kind: `slurm` or `kubernetes`; overrides: of each variant; folders: each variant's run folder; launch: the command that
    starts a run; image: of the Kubernetes containers. No shell interprets an override: a file has one line for each
    variant, its run folder and its overrides separated by tabs. Raises UserError for an override with a tab or a line break.
    """
    rows = [[folder, *variant] for folder, variant in zip(folders, overrides, strict=True)]
    if any("\t" in value or "\n" in value for row in rows for value in row):
        raise UserError(
            "a value has a tab or a line break, which the list of variants cannot hold; write the value without it"
        )
    lines = "".join("\t".join(row) + "\n" for row in rows)
    start = f"{' '.join(map(shlex.quote, shlex.split(launch)))} -m vaescale train {shlex.quote(str(recipe))}"
    if kind == "slurm":
        script = SLURM.format(name=slug(name), last=len(overrides) - 1, start=start)
        return {"variants.txt": lines, "sweep.sbatch": script}
    label = slug(name).lower().replace("_", "-").replace(".", "-")  # Kubernetes takes no other characters
    return {"sweep.yaml": _kubernetes(label, lines, start, image, len(overrides))}


def _kubernetes(name: str, lines: str, start: str, image: str, count: int) -> str:
    """A ConfigMap with the lines of the variants, and an indexed Job with `count` tasks, as YAML."""
    take = f'mapfile -t LINES < /sweep/variants.txt; IFS=$\'\\t\' read -ra WORDS <<< "${{LINES[$JOB_COMPLETION_INDEX]}}"; exec {start} "${{WORDS[@]:1}}"'
    labels = {"metadata": {"name": name}}
    table = {"apiVersion": "v1", "kind": "ConfigMap", **labels, "data": {"variants.txt": lines}}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        **labels,
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": count,
            "backoffLimitPerIndex": 10,  # a preempted task (75) is started again, and continues
            "template": {"spec": _pod(name, take, image)},
        },
    }
    head = "# kubectl apply -f this file. The claim `vaescale` holds recipes, data and runs, and is mounted at /work.\n"
    return head + yaml.safe_dump_all([table, job], sort_keys=False)


def _pod(name: str, script: str, image: str) -> dict[str, Any]:
    container = {
        "name": "train",
        "image": image,
        "command": ["bash", "-c", script],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "volumeMounts": [{"name": "sweep", "mountPath": "/sweep"}, {"name": "work", "mountPath": "/work"}],
        "workingDir": "/work",
    }
    volumes = [
        {"name": "sweep", "configMap": {"name": name}},
        {"name": "work", "persistentVolumeClaim": {"claimName": "vaescale"}},
    ]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
        "volumes": volumes,
    }


def slug(text: str) -> str:
    """The text with only letters, digits, dots, dashes and underscores, fit for a file name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_") or "none"


SLURM = """#!/bin/bash
# One task for each line of variants.txt beside this file, a run folder and its overrides: submit it from the project's folder.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -u
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
mapfile -t LINES < runs/{name}/variants.txt
IFS=$'\\t' read -ra WORDS <<< "${{LINES[$SLURM_ARRAY_TASK_ID]}}"
{start} "${{WORDS[@]:1}}" &
trap 'kill -TERM $!' TERM
wait $!
code=$?
if [ "$code" -gt 128 ]; then  # the signal ended `wait`, not the training
    wait $!
    code=$?
fi
if [ "$code" -ne 0 ] && grep -qs '"exit_code": 75' "${{WORDS[0]}}/stopped.json"; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""
