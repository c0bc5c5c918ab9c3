"""Messages for people, on stderr: one live line on a terminal, a line every half minute in a log file."""

import sys
import time
from types import TracebackType
from typing import Any, ClassVar

from vaescale.system.secrets import redact

LINE_EVERY_SECONDS = 30.0
BAR_WIDTH = 8
LAST = {"spoken": time.monotonic()}  # when something was last written, in monotonic seconds


def say(text: str) -> None:
    """Write one line to stderr, without credentials."""
    LAST["spoken"] = time.monotonic()
    sys.stderr.write(redact(text) + "\n")
    sys.stderr.flush()


class Progress:
    """A progress display: `with Progress("train", 400, unit="steps") as progress: progress.update(step, "neg_elbo -61.2 nats")`.

    It shows the name, what is done of the total (0: unknown), elapsed and remaining time, and the note. unit: what is counted.
    epoch: the number of units in an epoch, which is then shown too. shown: true on the first process only. quiet_seconds: what ends
    within them is not shown at all.
    """

    active: ClassVar[list["Progress"]] = []
    """Displays in use, the innermost last."""

    def __init__(
        self,
        name: str,
        total: int,
        *,
        unit: str = "",
        start: int = 0,
        epoch: int | None = None,
        shown: bool = True,
        quiet_seconds: float = 0.0,
    ) -> None:
        self._name, self._total, self._unit, self._epoch, self._shown = name, total, unit, epoch, shown
        self._done = self._start = start
        self._note, self._last_line, self._ended = "", "", False
        self._begun = self._line_time = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and number of the first that was done
        self._paused: float | None = None  # since when something on the way is done
        self._quiet_until = self._begun + quiet_seconds if quiet_seconds else 0.0
        self._live = _live(self) if shown and sys.stderr.isatty() else None

    def update(self, done: int, note: str = "", *, total: int | None = None, passing: bool = False) -> None:
        """Show that `done` of the total are done. An empty note keeps the previous one; a total of 0 means unknown.

        passing: whether the note is of something on the way, which is no line of its own at the end.
        """
        now = time.monotonic()
        self._total = self._total if total is None else total
        is_first = not self._last_line
        if self._first is None and done > self._start:
            self._first = now, done
        self._paused = (self._paused or now) if passing else None
        ends = done >= self._total > 0 and not passing and (done > self._done or not self._ended)
        self._done, self._note = done, note or self._note
        if self._quiet_until:
            if now < self._quiet_until:
                return
            self._quiet_until = 0.0
            self._open()
        if self._live is None and (is_first or ends or now - self._line_time > LINE_EVERY_SECONDS):
            self._ended = self._ended or ends
            self.speak()

    def speak(self) -> None:
        """Write a line of what is known, where no live line is."""
        line = self.text()
        if not self._shown or self._live is not None or self._quiet_until or line == self._last_line:
            return
        self._line_time, self._last_line = time.monotonic(), line
        say(line)

    def text(self, *, brief: int = 0) -> str:
        """The line: `train NAME  340/600 steps  57%  epoch 31 of 54  0:12 elapsed, 0:09 left  NOTE`.

        brief: 1 leaves the percentage out, 2 also the epoch, 3 also the unit and the elapsed time.
        """
        left = self._seconds_left()
        elapsed = clock(time.monotonic() - self._begun) + ("" if brief else " elapsed")
        times = [elapsed] if brief < 3 or left is None else []
        times += [] if left is None else [f"{clock(left)} left"]
        parts = [self._name, *self._counts(brief=brief), ", ".join(times)]
        return "  ".join([*parts, self._note] if self._note else parts)

    @property
    def is_shown(self) -> bool:
        """Whether this process shows anything."""
        return self._shown

    def share(self) -> float | None:
        """The share that is done, in [0, 1]; None where the total is not known."""
        return min(1.0, self._done / self._total) if self._total else None

    def _counts(self, *, brief: int) -> list[str]:
        unit = f" {self._unit}" if self._unit and brief < 3 else ""
        if not self._total:
            return [f"{self._done}{unit}"] if self._done or self._unit else []
        counts = [f"{self._done}/{self._total}{unit}"]
        if not brief:
            counts.append(f"{self._done / self._total:.0%}")
        if self._epoch and brief < 2:
            now = min(self._done, self._total - 1) // self._epoch + 1
            counts.append(f"epoch {now} of {-(-self._total // self._epoch)}")
        return counts

    def _seconds_left(self) -> float | None:
        """The time that the rest takes at the speed so far, without the first one, which often warms up; None where it is alone.

        The clock stands still while something on the way is done; when it is over, its time counts, as more of it is to come.
        """
        if not self._total or self._first is None or not self._first[1] < self._done < self._total:
            return None
        since, begun = self._first
        return (
            ((self._paused or time.monotonic()) - since) / (self._done - begun) * (self._total - self._done)
        )

    def _open(self) -> None:
        if self._live is not None:
            self._live.start()

    def __enter__(self) -> "Progress":
        if self._shown:
            Progress.active.append(self)
        if not self._quiet_until:
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in Progress.active:
            Progress.active.remove(self)
        if self._live is not None:
            self._live.stop()


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _live(progress: Progress) -> Any:
    """The live line of a terminal: a bar and the progress's text, as brief as the terminal's width asks for, and cut there."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def line() -> Text:
        LAST["spoken"] = time.monotonic()
        share = progress.share()
        full = round(BAR_WIDTH * (share or 0.0))
        bar = "" if share is None else "\u2501" * full + "\u2500" * (BAR_WIDTH - full) + "  "
        lines = [bar + progress.text(brief=1), *(progress.text(brief=brief) for brief in (1, 2, 3))]
        fitting = next((text for text in lines if len(text) <= console.width), lines[-1])
        return Text(redact(fitting), no_wrap=True, overflow="ellipsis", end="")

    console = Console(stderr=True, highlight=False)
    return Live(console=console, get_renderable=line, refresh_per_second=4)


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """Write a two-column table to stdout."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {redact(value)}" for name, value in rows]
    sys.stdout.write("\n".join([title, *lines]) + "\n")
    sys.stdout.flush()
