"""A live display on a terminal, by rich: one bar for each phase, and the log above it.

Only where a person looks: standard output is a terminal that can move its cursor, and no workflow is running.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from runner.protocol.events import Progress
from runner.supervisor.console.progress import span

FRAMES_PER_S = 4  # a terminal over ssh, and the cores, have other work
_STYLES = {"error:": "bold red", "warning:": "yellow", "Verdict:": "bold", "Published ": "bold"}


def open_screen(out: TextIO, environ: Mapping[str, str]) -> LiveScreen | None:
    """Return a display on `out`, or None where it is no terminal that can show one."""
    if not out.isatty() or environ.get("GITHUB_ACTIONS") == "true":
        return None
    console = Console(file=out, highlight=False, markup=False, emoji=False, _environ=environ)
    return LiveScreen(console) if console.is_terminal and not console.is_dumb_terminal else None


class LiveScreen:
    """Bars below a log; the lines of the log are written to it, each as a whole."""

    def __init__(self, console: Console) -> None:
        """Show on `console` from the first phase on."""
        self._console = console
        self._bars = Bars(
            _Mark("dots"),
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(bar_width=20),
            _Share(table_column=Column(no_wrap=True, min_width=5, justify="right")),
            _Times(table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[doing]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            refresh_per_second=FRAMES_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: TaskID | None = None

    def begin(self, phase: str) -> None:
        """Show that a phase begins."""
        self._bars.start()
        self._task = self._bars.add_task(phase.capitalize(), total=None, doing="", is_stopped=False)

    def advance(self, event: Progress) -> None:
        """Show how far the phase is."""
        if self._task is not None:
            self._bars.update(self._task, total=event.total, completed=event.done, doing=event.doing)

    def end(self) -> None:
        """Show that the phase is done."""
        if self._task is not None:
            total = self._bars.tasks[self._task].total or 1
            self._bars.update(self._task, total=total, completed=total, doing="")
            self._task = None

    def refresh(self) -> None:
        """Draw the bars as they are now, not with the next frame."""
        self._bars.refresh()

    def close(self) -> None:
        """Leave the terminal as it was found; a phase that is not done is shown as stopped."""
        for task in self._bars.tasks:  # not only the last: a signal may come while that is being added
            if not task.finished and not task.fields["is_stopped"]:
                self._bars.update(task.id, is_stopped=True, doing="")
                self._bars.stop_task(task.id)
        self._task = None
        self._bars.stop()

    def write(self, text: str) -> int:
        """Print `text`, whole lines, above the bars."""
        for line in text.removesuffix("\n").split("\n"):
            style = next((style for start, style in _STYLES.items() if line.startswith(start)), "")
            self._console.print(Text(line, style), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Do nothing: every line is shown at once."""


class _Mark(SpinnerColumn):
    """Turns while a phase runs; then a tick, or a cross where it was stopped."""

    def render(self, task: Task) -> RenderableType:
        if task.fields["is_stopped"]:
            return Text("✗", "red")
        return Text("✓", "green") if task.finished else super().render(task)


class _Share(ProgressColumn):
    """How much is done."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text(f"{100 * task.completed / task.total:.0f} %")


class _Times(ProgressColumn):
    """How long it took so far, how fast it is, how long it will take."""

    def render(self, task: Task) -> Text:
        text = span((task.finished_time if task.finished else task.elapsed) or 0.0)
        if task.finished or task.fields["is_stopped"] or task.total is None:
            return Text(text)
        if task.total > 1 and task.speed:
            text += f", {task.speed / 1e6:.0f} MB/s"
        left_s = task.time_remaining
        return Text(text if left_s is None else f"{text}, {span(left_s)} left")
