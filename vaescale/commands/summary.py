"""What a finished run says of itself: summary.json and its figures, from the rows that it wrote."""

import math
from pathlib import Path

from vaescale.figures import group_rates, training_curves
from vaescale.recipe import Recipe
from vaescale.runs import folder as run_folder
from vaescale.runs.tracking import push


def sum_up(folder: Path, recipe: Recipe, group_places: tuple[int, ...]) -> None:
    """Write both, and send them to MLflow, unless that was done: the start that finished a run may have been killed.

    group_places: of the model.
    """
    summary = run_folder.read_json(folder / run_folder.SUMMARY)
    curves = folder / "figures" / "curves.png"
    if summary.get("train", {}).get("step") == recipe.training.steps and curves.is_file():
        return
    rows = run_folder.read_metrics(folder)
    training_curves(curves, rows, title=recipe.name)
    if len(group_places) > 1:
        labels = [
            f"{number:02d}  {math.isqrt(count)}x{math.isqrt(count)}"
            for number, count in enumerate(group_places)
        ]
        group_rates(curves.with_name("groups.png"), rows, labels, title=recipe.name)
    for section in ("train", "val"):
        prefix = f"{section}/"
        last = next((row for row in reversed(rows) if f"{section}/mse" in row), None)
        if last is None:  # somebody deleted the metrics
            continue
        metrics = {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}
        run_folder.update_summary(folder, section, {"step": last["step"], **metrics})
    push(folder, recipe.tracking, status="FINISHED")
