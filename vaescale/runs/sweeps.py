"""The folder of a sweep: `sweep.json` lists the folders of its runs."""

from pathlib import Path

from vaescale.runs import folder as run_folder

STATE = "sweep.json"


def runs_of(folder: Path) -> list[Path]:
    """The run folders that a sweep's folder lists, or the folder itself when it is not the folder of a sweep."""
    runs = run_folder.read_json(folder / STATE).get("runs")
    return [folder] if runs is None else [Path(run) for run in runs]
