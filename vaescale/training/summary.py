"""The summary of a finished run: summary.json and figures, from the rows that training wrote."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vaescale.evaluation.remarks import arrived_sigma, remarks
from vaescale.figures import group_rates, training_curves
from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.runs import folder as run_folder
from vaescale.runs.tracking import TrackingConfig, push

CURVES = "curves.png"


def went_wrong(rows: Iterable[Mapping[str, float]], likelihood: LikelihoodConfig) -> list[str]:
    """Sentences on a training that ended and yet failed, from its rows of metrics: those of `remarks`, or the bound got worse."""
    every = list(rows)
    held_out = [row for row in every if "val/mse" in row]
    if not held_out:
        return []
    first, last = held_out[0], held_out[-1]
    sentences = remarks({name.removeprefix("val/"): value for name, value in last.items()}, likelihood)
    if every[-1]["step"] > last["step"]:  # the run was stopped between two evaluations
        sentences = [f"at step {last['step']:.0f}: {sentence}" for sentence in sentences]
    for name in ("neg_elbo_nats", "neg_profile_elbo_nats"):
        before, after = first.get(f"val/{name}", math.nan), last.get(f"val/{name}", math.nan)
        if after > before and last["step"] > first["step"]:
            sentences.append(
                f"held-out {name} rose from {before:.6g} at step {first['step']:.0f} to {after:.6g} at step {last['step']:.0f}: "
                "lower optimizer.lr, or set optimizer.clip_norm"
            )
    return sentences


def sigma_at_the_end(rows: Iterable[Mapping[str, float]], likelihood: LikelihoodConfig) -> str | None:
    """The sentence on the running sigma after the last evaluation in training, and that of the held-out images; None without one."""
    held_out = [row for row in rows if "val/sigma_gap_nats" in row]
    if not held_out:
        return None
    return arrived_sigma(
        {name.removeprefix("val/"): value for name, value in held_out[-1].items()}, likelihood
    )


def draw(folder: Path, *, name: str, group_maps: Sequence[Sequence[int]]) -> None:
    """Draw the rows so far: figures/curves.png, and figures/groups.png of a ladder. The arguments are those of `sum_up`."""
    curves, rows = folder / "figures" / CURVES, run_folder.read_metrics(folder)
    training_curves(curves, rows, title=name)
    if len(group_maps) > 1:
        labels = [f"{number:02d}  {'x'.join(map(str, places))}" for number, places in enumerate(group_maps)]
        group_rates(curves.with_name("groups.png"), rows, labels, title=name)


def sum_up(
    folder: Path,
    *,
    name: str,
    steps: int,
    stopped_early: bool,
    group_maps: Sequence[Sequence[int]],
    tracking: TrackingConfig,
) -> None:
    """Write summary.json and figures and send them to MLflow, unless an earlier start of the run did.

    The start that reached the last step may have been killed before it did. name: the title of the figures; steps: the run's
    last step; stopped_early: whether early stopping chose it; group_maps: the height and the width of each group of latents, as in VAE.
    """
    summary = run_folder.read_json(folder / run_folder.SUMMARY)
    if summary.get("train", {}).get("step") == steps and (folder / "figures" / CURVES).is_file():
        return
    draw(folder, name=name, group_maps=group_maps)
    rows = run_folder.read_metrics(folder)
    for section in ("val", "train"):  # train last: it marks the summary as whole
        prefix = f"{section}/"
        last = next((row for row in reversed(rows) if f"{section}/mse" in row), None)
        if last is None:  # somebody deleted the metrics
            continue
        metrics = {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}
        early = {run_folder.STOPPED_EARLY: True} if stopped_early and section == "train" else {}
        run_folder.update_summary(folder, section, {"step": last["step"], **early, **metrics})
    push(folder, tracking, status="FINISHED")
