"""What `vaescale chaos` finds when it compares two runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vaescale.commands.chaos import _compare


def write_run(folder: Path, rows: int, *, weight: float = 1.0) -> None:
    checkpoint = folder / "checkpoints" / "step-000000009"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.full((2,), weight), "bias": torch.zeros(3)}, checkpoint / "model.safetensors")
    lines = [json.dumps({"step": step, "time": 0.0, "train/mse": 1 / step}) for step in range(1, rows + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("rows", "weight"), [(9, 1.0), (4, 1.0), (9, 2.0)])
def test_lost_rows_and_other_tensors_are_counted(tmp_path: Path, rows: int, weight: float) -> None:
    write_run(tmp_path / "peace", 9)
    write_run(tmp_path / "chaos", rows, weight=weight)
    (tmp_path / "chaos.log").write_text("skipping checkpoint a: damaged\nskipping checkpoint b: damaged\n")
    result = _compare(tmp_path)
    assert (result["steps"], result["rows_lost"]) == (9, 9 - rows)
    assert (result["tensors_differing"], result["bit_equal"]) == (int(weight != 1), weight == 1)
    assert result["checkpoints_passed_over"] == 2
