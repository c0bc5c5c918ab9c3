"""The equality of two runs of one recipe, bit for bit: `peace`, which nothing disturbed, and `chaos`, beside each other."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vaescale.runs.folder import read_metrics


def compare(folder: Path) -> dict[str, Any]:
    """The differences between the runs `peace` and `chaos` of a folder: rows, tensors of the last checkpoint, and damage noticed."""
    peace, chaos = _rows(folder / "peace"), _rows(folder / "chaos")
    names = [name for name in next(iter(peace.values())) if name.startswith("train/")]
    differing = [
        step
        for step in peace.keys() & chaos.keys()
        if any(peace[step][n] != chaos[step].get(n) for n in names)
    ]
    last = sorted((folder / "peace" / "checkpoints").glob("step-*"))[-1].name
    unequal = []
    for path in sorted((folder / "peace" / "checkpoints" / last).glob("*.safetensors")):
        expected, tensors = load_file(path), load_file(folder / "chaos" / "checkpoints" / last / path.name)
        unequal += [
            f"{path.stem}:{name}" for name in expected if not torch.equal(expected[name], tensors[name])
        ]
    log = (folder / "chaos.log").read_text(errors="replace")
    return {
        "steps": len(peace),
        "rows_lost": len(peace.keys() - chaos.keys()),
        "rows_differing": len(differing),
        "tensors_differing": len(unequal),
        "bit_equal": not differing and not unequal,
        "checkpoints_passed_over": log.count("skipping checkpoint"),
    }


def step_seconds(run: Path) -> float:
    """The seconds that the steps of a run took, by the durations in its rows."""
    return sum(row.get("perf/step_seconds", 0.0) for row in _rows(run).values())


def _rows(run: Path) -> dict[int, dict[str, float]]:
    """The training rows by step; a replayed step's last one."""
    return {int(row["step"]): row for row in read_metrics(run) if "train/mse" in row}
