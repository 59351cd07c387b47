"""A live display on a terminal, by rich: one bar for each phase, and the log above it.

Only where a person looks: standard output is a terminal that can move its cursor, and no workflow is running.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from runner.events import Progress


def open_screen(out: TextIO, environ: Mapping[str, str]) -> LiveScreen | None:
    """Return a display on `out`, or None where it is no terminal for one."""
    if environ.get("GITHUB_ACTIONS") == "true" or not out.isatty():
        return None
    console = Console(file=out, highlight=False, markup=False, _environ=environ)
    return None if console.is_dumb_terminal else LiveScreen(console)


class LiveScreen(io.TextIOBase):
    """Bars below a log; as a text stream it takes the lines of the log."""

    def __init__(self, console: Console) -> None:
        """Show on `console` from the first phase on."""
        self._console = console
        self._bars = Bars(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(bar_width=30),
            _Share(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[doing]}", markup=False),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: TaskID | None = None
        self._rest = ""

    def begin(self, phase: str) -> None:
        """Show that a phase begins; the one before is done."""
        self._finish()
        if self._task is None:
            self._bars.start()
        self._task = self._bars.add_task(phase.capitalize(), total=None, doing="")

    def advance(self, event: Progress) -> None:
        """Show how far the phase is."""
        if self._task is not None:
            self._bars.update(self._task, total=event.total, completed=event.done, doing=event.doing)

    def end(self) -> None:
        """Leave the terminal as a log that can be scrolled."""
        self._finish()
        self._bars.stop()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Print every whole line of `text` above the bars."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)
        return len(text)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, total=task.total or 1, completed=task.total or 1, doing="")


class _Share(ProgressColumn):
    """How much is done: bytes where bytes are counted, else percent."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        share = f"{100 * task.completed / task.total:3.0f} %"
        is_bytes = task.total > 1
        speed = task.finished_speed or task.speed
        return Text(f"{share} {speed / 1e6:4.0f} MB/s" if is_bytes and speed else share)
