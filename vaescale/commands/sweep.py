"""Variants of a recipe: every combination of some keys' values, trained one after another or as the tasks of one cluster job."""

import itertools
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vaescale.errors import UserError
from vaescale.recipe import Recipe
from vaescale.runs import folder as run_folder
from vaescale.runs.mlflow import parent_run
from vaescale.system.console import say
from vaescale.system.secrets import redact

MOST_VARIANTS = 1000
STOPPED = (75, 130)  # preempted, Ctrl-C: the others wait too
STATE = "sweep.json"


class Variant(NamedTuple):
    """Its name, and its overrides, `name=` the last."""

    name: str
    overrides: list[str]


def variants(overrides: Sequence[str], name: str) -> list[Variant]:
    """Of `key=a,b` and `key=c`: every combination, named after the values that vary. Raises UserError for what is no such thing,
    and for two values with one name.
    """
    choices: list[tuple[str, list[str]]] = []
    for override in overrides:
        key, equals, values = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"{override!r} is not key=a,b,c, such as optimizer.lr=1e-3,2e-3")
        if key in ("name", "run_dir"):
            raise UserError(f"{key} is each variant's own; give the sweep a --name")
        choices.append((key, split_values(values)))
    if all(len(values) == 1 for _, values in choices):
        raise UserError("there is nothing to vary; give a key several values, such as optimizer.lr=1e-3,2e-3")
    found: dict[str, Variant] = {}
    for taken in itertools.product(*(values for _, values in choices)):
        varied = [
            f"{key.rpartition('.')[2]}-{slug(redact(value))}"
            for (key, values), value in zip(choices, taken, strict=True)
            if len(values) > 1
        ]
        own = "-".join([name, *varied])
        if own in found:
            raise UserError(f"two variants would both be called {own}; leave one of the values out")
        said = [f"{key}={value}" for (key, _), value in zip(choices, taken, strict=True)]
        found[own] = Variant(own, [*said, f"name={own}"])
        if len(found) > MOST_VARIANTS:
            raise UserError(f"these are more than {MOST_VARIANTS} variants; give fewer values")
    return list(found.values())


def split_values(words: str) -> list[str]:
    """`a,[1,2],{b: 1}` at the commas outside of brackets, braces and quotes."""
    values, depth, quote, start = [], 0, "", 0
    for place, sign in enumerate(words):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        elif sign == "," and depth == 0:
            values.append(words[start:place])
            start = place + 1
    values.append(words[start:])
    if depth or quote or not all(value.strip() for value in values):
        raise UserError(f"{words!r} is not a list of values; separate them by commas, and close each bracket")
    return [value.strip() for value in values]


def begin(
    recipe: Path, variants: Sequence[Variant], recipes: Sequence[Recipe], folder: Path
) -> list[Variant]:
    """Write down in the sweep's folder which runs are its own. Returns the variants, to stand below one run in MLflow, the same at
    every call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parent = run_folder.read_json(folder / STATE).get("mlflow_run") or parent_run(
        recipes[0].tracking.mlflow, recipes[0].tracking.experiment, folder.name
    )
    places = [resolved.run_dir for resolved in recipes]
    run_folder.write_json(folder / STATE, {"recipe": str(recipe), "mlflow_run": parent, "runs": places})
    said = [f"tracking.parent={parent}"] if parent else []
    return [variant._replace(overrides=[*variant.overrides, *said]) for variant in variants]


def train_all(
    recipe: Path,
    variants: Sequence[Variant],
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    launch: Sequence[str],
) -> list[int]:
    """Train each in a process of its own. Returns their exit codes; one that is preempted or interrupted is the last."""
    variants = begin(recipe, variants, recipes, folder)
    starter = _starter(launch)
    codes: list[int] = []
    for number, (variant, resolved) in enumerate(zip(variants, recipes, strict=True), start=1):
        say(f"\n== {number}/{len(variants)}  {variant.name}")
        ended = _ended([*starter, "-m", "vaescale", "train", str(recipe), *variant.overrides])
        stopped = run_folder.read_json(Path(resolved.run_dir) / run_folder.STOPPED)
        # A launcher's own exit code is always 1.
        code = ended if ended in (0, 2, 3, 4, *STOPPED) else stopped.get("exit_code", 4)
        codes.append(int(code))
        if code in STOPPED:
            say(f"stopped in {variant.name}; the same command goes on")
            return codes + [int(code)] * (len(variants) - len(codes))
    return codes


def _ended(words: Sequence[str]) -> int:
    """The exit code of a command, however it ends: Ctrl-C reaches it by itself, SIGTERM and SIGUSR1 are handed on, and it is waited
    for while it saves.
    """
    with subprocess.Popen(words, stdout=sys.stderr) as child:
        handlers: dict[int, Any] = {signal.SIGINT: lambda *_: None}
        for number in (signal.SIGTERM, signal.SIGUSR1):  # accelerate's launcher knows SIGTERM alone
            handlers[number] = lambda *_: child.send_signal(signal.SIGTERM)
        before = {own: signal.signal(own, handler) for own, handler in handlers.items()}
        try:
            return child.wait()
        finally:
            for own, handler in before.items():
                signal.signal(own, handler)


def runs_of(folder: Path) -> list[Path]:
    """The run folders of a sweep's folder, or the folder itself if it is none."""
    places = run_folder.read_json(folder / STATE).get("runs")
    return [folder] if places is None else [Path(place) for place in places]


def _starter(launch: Sequence[str]) -> list[str]:
    """The words that run a module: this Python, or accelerate's launcher under it."""
    if not launch:
        return [sys.executable]
    if list(launch[:2]) == ["accelerate", "launch"]:
        return [sys.executable, "-m", "accelerate.commands.launch", *launch[2:]]
    return list(launch)


def cluster_files(
    kind: str,
    recipe: Path,
    variants: Sequence[Variant],
    places: Sequence[str],
    *,
    name: str,
    launch: str,
    image: str,
) -> dict[str, str]:
    """By file name, what submits all variants as one job. No word of a variant is read by a shell: they lie in a file, one variant a
    line, its run folder (of `places`) and its overrides between tabs.
    """
    rows = [[place, *variant.overrides] for place, variant in zip(places, variants, strict=True)]
    if any("\t" in word or "\n" in word for row in rows for word in row):
        raise UserError(
            "a value holds a tab or a line break, which the list of variants cannot; write it otherwise"
        )
    lines = "".join("\t".join(row) + "\n" for row in rows)
    start = f"{' '.join(map(shlex.quote, shlex.split(launch)))} -m vaescale train {shlex.quote(str(recipe))}"
    if kind == "slurm":
        script = SLURM.format(name=slug(name), last=len(variants) - 1, start=start)
        return {"variants.txt": lines, "sweep.sbatch": script}
    return {
        "sweep.yaml": _kubernetes(
            slug(name).lower().replace("_", "-").replace(".", "-"), lines, start, image, len(variants)
        )
    }


def _kubernetes(name: str, lines: str, start: str, image: str, count: int) -> str:
    take = f'mapfile -t LINES < /sweep/variants.txt; IFS=$\'\\t\' read -ra WORDS <<< "${{LINES[$JOB_COMPLETION_INDEX]}}"; exec {start} "${{WORDS[@]:1}}"'
    labels = {"metadata": {"name": name}}
    table = {"apiVersion": "v1", "kind": "ConfigMap", **labels, "data": {"variants.txt": lines}}
    container = {
        "name": "train",
        "image": image,
        "command": ["bash", "-c", take],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "volumeMounts": [{"name": "sweep", "mountPath": "/sweep"}, {"name": "work", "mountPath": "/work"}],
        "workingDir": "/work",
    }
    volumes = [
        {"name": "sweep", "configMap": {"name": name}},
        {"name": "work", "persistentVolumeClaim": {"claimName": "vaescale"}},
    ]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
        "volumes": volumes,
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        **labels,
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": count,
            "backoffLimitPerIndex": 10,  # a preempted task (75) is started again, and goes on
            "template": {"spec": pod},
        },
    }
    head = "# kubectl apply -f this file. The claim `vaescale` holds recipes, data and runs, and is mounted at /work.\n"
    return head + yaml.safe_dump_all([table, job], sort_keys=False)


def slug(words: str) -> str:
    """As part of a file name."""
    return re.sub(r"[^\w.-]+", "_", words).strip("_") or "none"


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
if [ "$code" -gt 128 ]; then  # the signal ended the waiting, not the training
    wait $!
    code=$?
fi
if [ "$code" -ne 0 ] && grep -qs '"exit_code": 75' "${{WORDS[0]}}/stopped.json"; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""
