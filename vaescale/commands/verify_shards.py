"""Check a folder of shards against its index, and name each fault with shard, member and byte offset."""

from pathlib import Path
from typing import Any

from vaescale.commands.signature import Jobs, checked
from vaescale.data.making import verifying
from vaescale.system.console import Progress
from vaescale.system.host import cores


@checked
def verify_shards(folder: str | Path, *, deep: bool = False, jobs: Jobs | None = None) -> dict[str, Any]:
    """Return the folder, the number of samples in its index, `deep`, the list of faults, and the table of its images.

    The table is None for an index of an earlier version or of tars made by others. deep: also decode every image. jobs: number
    of threads, by default the number of cores. Raises DataError when the folder has no readable index.
    """
    with Progress(f"verify {folder}", 0, unit="shards") as progress:
        samples, faults = verifying.verify_shards(
            str(folder),
            deep=deep,
            jobs=jobs or cores(),
            progress=lambda done, total: progress.update(done, total=total),
        )
    return {
        "folder": str(folder),
        "samples": samples,
        "deep": deep,
        "faults": [fault._asdict() for fault in faults],
        "table": verifying.kept_table(str(folder)),
    }
