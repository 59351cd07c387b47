"""How a run shows where it is: a group for each phase in a workflow, lines in a log, a live display elsewhere.

In a log, one line at most every `EVERY_S` says how far the phase is, at what rate, and when it will be done. The line
comes whether or not there is news, so that a long computation does not look like one that hangs.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from runner.events import Progress
from runner.github import GitHub

EVERY_S = 15.0


class Screen(Protocol):
    """A live display; see `runner.screen`."""

    def begin(self, phase: str) -> None:
        """Show that a phase begins; the one before is done."""

    def advance(self, event: Progress) -> None:
        """Show how far the phase is."""

    def end(self) -> None:
        """Leave the terminal as a log that can be scrolled."""


class Showing:
    """Where the run is, shown as it goes. Use as a context manager; leaving it ends the last phase."""

    def __init__(self, github: GitHub, screen: Screen | None = None, *, every_s: float = EVERY_S) -> None:
        """Show by lines of `github`, or on `screen` where there is one."""
        self._github = github
        self._screen = screen
        self._every_s = every_s
        self._group: AbstractContextManager[None] | None = None
        self._phase = ""
        self._last: Progress | None = None
        self._started_s = self._told_s = 0.0
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._tell_regularly, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._close_group()
        if self._screen is not None:
            self._screen.end()

    def begin(self, phase: str) -> None:
        """Begin a phase; the one before is over."""
        with self._lock:
            self._phase, self._last = phase, None
            self._started_s = self._told_s = time.monotonic()
        self._close_group()
        if self._github.is_active:
            self._group = self._github.group(phase.capitalize())
            self._group.__enter__()
        elif self._screen is None:
            self._github.info(f"{phase.capitalize()} …")
        if self._screen is not None:
            self._screen.begin(phase)

    def advance(self, event: Progress) -> None:
        """Take note of how far the phase is."""
        with self._lock:
            self._last = event
        if self._screen is not None:
            self._screen.advance(event)

    def _close_group(self) -> None:
        if self._group is not None:
            group, self._group = self._group, None
            group.__exit__(None, None, None)

    def _tell_regularly(self) -> None:
        while not self._is_over.wait(self._every_s / 10):
            with self._lock:
                now = time.monotonic()
                is_due = bool(self._phase) and self._screen is None and now - self._told_s >= self._every_s
                if is_due:
                    self._told_s = now
                line = progress_line(self._phase, self._last, now - self._started_s)
            if is_due:
                self._github.info(line)


def progress_line(phase: str, event: Progress | None, elapsed_s: float) -> str:
    """Return one line with how far a phase is, its rate, and when it will be done as far as that can be known.

    Args:
        phase: its name.
        event: the newest of the phase; None where it says nothing of itself.
        elapsed_s: since it began.
    """
    if event is None or event.done <= 0 or event.total <= 0:
        return f"{phase}: {elapsed_s:.0f} s so far"
    part = min(event.done / event.total, 1.0)
    left_s = elapsed_s * (1 - part) / part
    rate = "" if event.total <= 1 else f", {event.done / max(elapsed_s, 1e-9) / 1e6:.0f} MB/s"
    return f"{phase}: {100 * part:.0f} %{rate}, about {left_s:.0f} s left ({event.doing})"
