"""Drains of a run's metrics beside MLflow: TensorBoard, Weights & Biases and trackio, each imported only when it is asked for.

TensorBoard reads files, which are written anew each time, from the rows as they count: those of steps that were replayed or rolled back
are gone. The two others take a step once, in rising order: `RUN/synced.json` says which run there it is and the last step that
was sent, and the newest row of a run that still trains waits, because its evaluation may follow.
"""

import inspect
import secrets
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.errors import UserError
from vaescale.runs import folder as run_folder
from vaescale.system.console import Progress
from vaescale.system.files import LockHeldError, exclusive

STATE, LOCK = "synced.json", ".synced.lock"
EVENTS = "tensorboard"  # folder of TensorBoard's files in the run folder
PNG_SIZE = slice(16, 24)  # of a file: width and height, 32 bits each
Row = dict[str, float]


class Described(NamedTuple):
    """A run as the drains name it: its folder, name, project, and recipe as plain values."""

    folder: Path
    name: str
    project: str
    config: Mapping[str, Any]


def drain(run: Described, to: str) -> dict[str, Any]:
    """Send a run's metrics. Returns where they are and how many rows were sent.

    to: a name of DRAINS. Raises UserError without rows, and where another process sends them; ModuleNotFoundError without the package.
    """
    rows = run_folder.read_metrics(run.folder)
    if not rows:
        raise UserError(f"{run.folder} has no rows in {run_folder.METRICS} yet; train it first")
    try:
        with exclusive(run.folder / LOCK):
            return DRAINS[to](run, rows)
    except LockHeldError as error:
        raise UserError(f"another process sends {run.folder} ({error.holder}); wait for it") from error


def to_tensorboard(run: Described, rows: list[Row]) -> dict[str, Any]:
    """Write all rows and the figures to RUN/tensorboard, in place of what is there."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    final, fresh = run.folder / EVENTS, run.folder / f".{EVENTS}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    writer = EventFileWriter(str(fresh))
    with Progress("sync to TensorBoard", len(rows), unit="rows", quiet_seconds=2.0) as progress:
        for number, row in enumerate(rows, start=1):
            values = [Summary.Value(tag=name, simple_value=value) for name, value in _metrics(row).items()]
            event = Event(step=int(row["step"]), wall_time=row["time"], summary=Summary(value=values))
            writer.add_event(event)
            progress.update(number)
    last, figures = rows[-1], sorted((run.folder / "figures").glob("*.png"))
    for path in figures:
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[PNG_SIZE])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        value = Summary.Value(tag=f"figures/{path.stem}", image=image)
        writer.add_event(
            Event(step=int(last["step"]), wall_time=last["time"], summary=Summary(value=[value]))
        )
    writer.close()
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
    return {"to": str(final), "rows_sent": len(rows), "figures_sent": len(figures)}


def to_wandb(run: Described, rows: list[Row]) -> dict[str, Any]:
    """Send rows to Weights & Biases: to its server, or with WANDB_MODE=offline to RUN/wandb, from where `wandb sync` sends them."""
    import wandb

    with _newer(run, rows, "wandb") as (state, left, sent):
        started = wandb.init(
            project=run.project,
            name=run.name,
            id=state["id"],
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
        )
        try:
            for row in left:
                started.log(_metrics(row), step=int(row["step"]))
                sent(row)
        finally:
            started.finish()
    return {"to": started.url or str(run.folder / "wandb"), "run_id": state["id"], "rows_sent": len(left)}


def to_trackio(run: Described, rows: list[Row]) -> dict[str, Any]:
    """Send rows to trackio, which keeps them where TRACKIO_DIR or its space says."""
    import trackio

    # It would log the load of the machine that sends, as if it were the run's.
    automatic = ("auto_log_cpu", "auto_log_gpu")
    unwanted = {name: False for name in automatic if name in inspect.signature(trackio.init).parameters}
    # It prints to stdout, which is for results.
    with redirect_stdout(sys.stderr), _newer(run, rows, "trackio") as (state, left, sent):
        trackio.init(
            project=run.project,
            name=f"{run.name}-{state['id']}",
            config=dict(run.config),
            resume="allow",
            embed=False,
            **unwanted,
        )
        try:
            for row in left:
                trackio.log(_metrics(row), step=int(row["step"]))
                sent(row)
        finally:
            trackio.finish()
    return {
        "to": f"trackio, project {run.project}",
        "run_id": f"{run.name}-{state['id']}",
        "rows_sent": len(left),
    }


DRAINS: dict[str, Callable[[Described, list[Row]], dict[str, Any]]] = {
    "tensorboard": to_tensorboard,
    "wandb": to_wandb,
    "trackio": to_trackio,
}


@contextmanager
def _newer(
    run: Described, rows: list[Row], to: str
) -> Iterator[tuple[dict[str, Any], list[Row], Callable[[Row], None]]]:
    """The state of a drain, the rows that it has not got, and what to call for each that was sent. The state is kept at the end."""
    states = run_folder.read_json(run.folder / STATE)
    state = {"id": secrets.token_hex(4), "step": -1} | states.get(to, {})
    run_folder.write_json(run.folder / STATE, states | {to: state})  # a start that fails finds its run again
    whole = rows[:-1] if run_folder.is_training(run.folder) else rows
    left = [row for row in whole if row["step"] > state["step"]]
    try:
        with Progress(f"sync to {to}", len(left), unit="rows") as progress:
            done = iter(range(1, len(left) + 1))

            def sent(row: Row) -> None:
                state["step"] = int(row["step"])
                progress.update(next(done))

            yield state, left, sent
    finally:
        run_folder.write_json(run.folder / STATE, states | {to: state})


def _metrics(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("step", "time")}
