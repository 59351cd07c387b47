"""How a run shows where it is: a group for each phase in a workflow, lines in a log, a live display on a terminal.

In a log, one line every `EVERY_S` says how far the phase is, at what rate, and when it will be done. The line comes
whether or not there is news, so that a long computation does not look like one that hangs.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Protocol, Self

from runner.protocol.events import Progress
from runner.supervisor.github.commands import GitHub

EVERY_S = 15.0


class Screen(Protocol):
    """A live display; see `runner.supervisor.console.screen`."""

    def begin(self, phase: str) -> None:
        """Show that a phase begins."""

    def advance(self, event: Progress) -> None:
        """Show how far the phase is."""

    def end(self) -> None:
        """Show that the phase is done."""

    def close(self) -> None:
        """Leave the terminal as it was found; a phase that is not done is shown as stopped."""


class Showing:
    """Where the run is, shown as it goes. Use it as a context manager; what comes after it is in no group.

    Its methods may be called from any thread. `close` ends it for good, in the middle of a phase too: a run whose main
    thread is stuck is told by another one.
    """

    def __init__(self, github: GitHub, screen: Screen | None = None, *, every_s: float = EVERY_S) -> None:
        """Show by lines of `github`, or on `screen` where there is one."""
        self._github, self._screen, self._every_s = github, screen, every_s
        self._phase = ""
        self._pace = Pace(time.monotonic())
        self._told_s = 0.0
        self._lock = threading.RLock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._tell_regularly, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, phase: str) -> None:
        """Begin a phase; the one before is done."""
        with self._lock:
            self.end()
            if self._is_over.is_set():
                return
            self._phase, self._told_s = phase, time.monotonic()
            self._pace = Pace(self._told_s)
            if self._screen is not None:
                self._screen.begin(phase)
            elif self._github.is_active:
                self._github.begin_group(phase.capitalize())
            else:
                self._github.info(f"{phase.capitalize()} …")

    def advance(self, event: Progress) -> None:
        """Take note of how far the phase is."""
        with self._lock:
            self._pace.take(event, time.monotonic())
            if self._screen is not None and self._phase:
                self._screen.advance(event)

    def end(self) -> None:
        """End the phase: it is done, and what is said from now on is in none."""
        with self._lock:
            if self._phase and self._screen is not None:
                self._screen.end()
            self._leave()

    def close(self) -> None:
        """End it all, wherever the run is."""
        self._is_over.set()
        with self._lock:
            if self._screen is not None:
                self._screen.close()
            self._leave()

    def _leave(self) -> None:
        if self._phase and self._screen is None and self._github.is_active:
            self._github.end_group()
        self._phase = ""

    def _tell_regularly(self) -> None:
        while self._screen is None and not self._is_over.wait(self._every_s / 10):
            with self._lock:
                now = time.monotonic()
                if self._phase and now - self._told_s >= self._every_s:
                    self._told_s = now
                    self._github.info(f"{self._phase}: {self._pace.line(now)}")


class Pace:
    """How far a phase is, and how fast; what is counted may change on the way (download, then check)."""

    def __init__(self, started_s: float) -> None:
        """Begin at `started_s`, with nothing known."""
        self._started_s = started_s
        self._counted_s, self._counted_from = started_s, 0.0
        self._last: Progress | None = None

    def take(self, event: Progress, now_s: float) -> None:
        """Take note of the newest event."""
        if self._last is not None and self._last.total != event.total:  # something else is counted now
            self._counted_s, self._counted_from = now_s, event.done
        self._last = event

    def line(self, now_s: float) -> str:
        """Return how far the phase is, its rate, and when it will be done, as far as that can be known."""
        event = self._last
        if event is None or event.done <= 0 or event.total <= 0:
            return f"{span(now_s - self._started_s)} so far" + _doing(event)
        share = f"{100 * min(event.done / event.total, 1.0):.0f} %"
        if event.total > 1:  # bytes
            share += f" of {event.total / 1e6:.0f} MB"
        speed = (event.done - self._counted_from) / max(now_s - self._counted_s, 1e-9)
        if speed <= 0:
            return share + _doing(event)
        rate = f", {speed / 1e6:.0f} MB/s" if event.total > 1 else ""
        return f"{share}{rate}, about {span(max(event.total - event.done, 0.0) / speed)} left" + _doing(event)


def span(seconds: float) -> str:
    """Return a time for people: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _doing(event: Progress | None) -> str:
    return f" ({event.doing})" if event is not None and event.doing else ""
