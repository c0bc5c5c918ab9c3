"""Messages for people, on stderr: a progress bar on a terminal, a line every ten seconds in a log file."""

import sys
import time
from types import TracebackType

from vaescale.system.secrets import redact

LINE_EVERY_SECONDS = 10.0


def say(text: str) -> None:
    """Write one line to stderr, without credentials."""
    sys.stderr.write(redact(text) + "\n")
    sys.stderr.flush()


class Progress:
    """A progress display: `with Progress("train", total) as progress: progress.update(step, "neg_elbo -61.2 nats")`.

    shown: true on the first process only. quiet_seconds: what ends within them is not shown at all.
    """

    def __init__(
        self, name: str, total: int, *, start: int = 0, shown: bool = True, quiet_seconds: float = 0.0
    ) -> None:
        self._name, self._total, self._shown = name, total, shown
        self._last_line_time, self._note = 0.0, ""
        self._quiet_until = time.monotonic() + quiet_seconds if quiet_seconds else 0.0
        self._bar = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total or None, completed=start, note="")

    def update(self, done: int, note: str = "", *, total: int | None = None, passing: bool = False) -> None:
        """Show that `done` of the total are done. An empty note keeps the previous one; a total of 0 means unknown.

        passing: whether the note is of something on the way, which is no line of its own at the end.
        """
        self._total = self._total if total is None else total
        if self._quiet_until:
            if time.monotonic() < self._quiet_until:
                return
            self._quiet_until = 0.0
            self._start()
        if self._bar is not None:
            self._note = note or self._note
            self._bar.update(self._task, completed=done, note=self._note, total=self._total or None)
        elif (
            self._shown
            and note
            and (
                (done >= self._total > 0 and not passing)
                or time.monotonic() - self._last_line_time > LINE_EVERY_SECONDS
            )
        ):
            self._last_line_time = time.monotonic()
            say(f"{self._name} {done}/{self._total or '?'}  {note}")

    def _start(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def __enter__(self) -> "Progress":
        if not self._quiet_until:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """Write a two-column table to stdout."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {redact(value)}" for name, value in rows]
    sys.stdout.write("\n".join([title, *lines]) + "\n")
    sys.stdout.flush()
