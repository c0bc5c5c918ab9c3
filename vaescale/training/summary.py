"""The summary of a finished run: summary.json and figures, from the rows that training wrote."""

import math
from pathlib import Path

from vaescale.figures import group_rates, training_curves
from vaescale.runs import folder as run_folder
from vaescale.runs.tracking import TrackingConfig, push


def sum_up(
    folder: Path, *, name: str, steps: int, group_places: tuple[int, ...], tracking: TrackingConfig
) -> None:
    """Write summary.json and figures and send them to MLflow, unless an earlier start of the run did.

    The start that reached the last step may have been killed before it did. name: the title of the figures; steps: the run's
    last step; group_places: the number of places of each group of latents, as in VAE.
    """
    summary = run_folder.read_json(folder / run_folder.SUMMARY)
    curves = folder / "figures" / "curves.png"
    if summary.get("train", {}).get("step") == steps and curves.is_file():
        return
    rows = run_folder.read_metrics(folder)
    training_curves(curves, rows, title=name)
    if len(group_places) > 1:
        labels = [
            f"{number:02d}  {math.isqrt(count)}x{math.isqrt(count)}"
            for number, count in enumerate(group_places)
        ]
        group_rates(curves.with_name("groups.png"), rows, labels, title=name)
    for section in ("val", "train"):  # train last: it marks the summary as whole
        prefix = f"{section}/"
        last = next((row for row in reversed(rows) if f"{section}/mse" in row), None)
        if last is None:  # somebody deleted the metrics
            continue
        metrics = {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}
        run_folder.update_summary(folder, section, {"step": last["step"], **metrics})
    push(folder, tracking, status="FINISHED")
