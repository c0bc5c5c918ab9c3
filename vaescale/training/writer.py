"""A writer of checkpoints in the background: a step waits for the copy in memory, not for the disk."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from vaescale.runs import checkpoint
from vaescale.runs.checkpoint import Keep
from vaescale.system import heartbeat


class Writer:
    """A thread that writes checkpoints: `with Writer(folder) as writer: writer.save(..., keep=keep)` on the main process.

    One checkpoint is written at a time; the end of the block waits for the last one. The next call raises an error of the disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    def save(
        self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: Keep
    ) -> None:
        """Start to write tensors that no longer change. Raises OSError without room, or where the last checkpoint failed."""
        self.wait()
        needed = checkpoint.num_bytes({file: checkpoint.shapes_of(group) for file, group in tensors.items()})
        checkpoint.refuse_too_little_room(self._folder, needed)
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, state, keep), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises the error of one that failed."""
        self.join()
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def is_busy(self) -> bool:
        """Whether the last checkpoint is still being written, after a wait of up to a second."""
        heartbeat.beat("writing a checkpoint")
        if self._thread is not None:
            self._thread.join(1.0)
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait until the last checkpoint is on the disk or has failed. Raises nothing."""
        while self.is_busy():
            pass
        self._thread = None

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint could not be written."""
        return self._fault is not None

    def delete_surplus(self, step: int, keep: Keep) -> None:
        """Delete the checkpoints that `keep` does not name, when the last one, of this step, is on the disk."""
        self.wait()
        checkpoint.delete_surplus(self._folder, step, keep)

    def _write(
        self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: Keep
    ) -> None:
        try:
            checkpoint.write(self._folder, step, tensors, state, keep=keep)
        except BaseException as error:  # of any kind: training must not count this checkpoint as saved
            self._fault = error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.join()
