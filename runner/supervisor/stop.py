"""What ends a run before its time: a signal, or a phase that takes too long. And what makes sure that it does end.

GitHub's runner gives a cancelled container 7.5 s, then SIGTERM and 2.5 s more; then it kills its own `docker run`, and
the container goes on. So nothing may wait for long: the worker is stopped at once, from a thread of its own, and a
main thread that is stuck (in a download's threads, in a library) is not waited for.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from runner.protocol.errors import EXIT_CANCELLED, PhaseTimeout

UNWIND_S = 3.2  # for the main thread to leave everything it is in
TELL_S = 2.0  # for it to tell what happened, where it has begun to


class Stopped(BaseException):
    """The run ends before its time. Not an `Exception`, so that nothing on the way up takes it for its own."""


class Cancelled(Stopped):
    """The runner, the user or the machine asked this process to stop."""


class PhaseTimedOut(Stopped):
    """A phase took longer than `phase-timeout-minutes`."""


class Stops:
    """Signals and the phases' clock; use it as a context manager in the main thread."""

    def __init__(self, tell: Callable[[Stopped], int]) -> None:
        """Take what tells the end: called once, by whoever comes first; it returns the exit code."""
        self._tell = tell
        self._telling = threading.Lock()
        self._at_once: list[Callable[[], None]] = []
        self._at_last: list[Callable[[], None]] = []
        self._limit_s: float | None = None
        self.unwind_s = UNWIND_S
        self.stopped: Stopped | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def limit_phases(self, limit_s: float | None) -> None:
        """Give every phase that begins from now on that much time."""
        self._limit_s = limit_s

    def begin_phase(self) -> None:
        """Start the clock anew."""
        signal.setitimer(signal.ITIMER_REAL, self._limit_s or 0)

    def end_phase(self) -> None:
        """Stop the clock: what comes now is in no phase."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def at_once(self, call: Callable[[], None]) -> None:
        """Have `call` called as soon as the run is stopped, in another thread."""
        self._at_once.append(call)

    def at_last(self, call: Callable[[], None]) -> None:
        """Have `call` called before this process is ended while its main thread is stuck and cannot clean up."""
        self._at_last.append(call)

    def tell_once(self, stopped: Stopped) -> int | None:
        """Tell the end, and return the exit code; None where it is being told already."""
        return self._tell(stopped) if self._telling.acquire(blocking=False) else None

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        for again in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):  # a second one must not interrupt the clean-up
            signal.signal(again, signal.SIG_IGN)
        stopped = PhaseTimedOut() if number == signal.SIGALRM else Cancelled(signal.Signals(number).name)
        self.stopped = stopped
        threading.Thread(target=self._make_sure, args=(stopped,), daemon=True).start()
        raise stopped

    def _make_sure(self, stopped: Stopped) -> None:
        for call in self._at_once:
            threading.Thread(target=call, daemon=True).start()
        threading.Event().wait(self.unwind_s)
        code = self.tell_once(stopped)
        if code is None:
            threading.Event().wait(TELL_S)
            code = EXIT_CANCELLED if isinstance(stopped, Cancelled) else PhaseTimeout.exit_code
        for call in self._at_last:
            call()
        os._exit(code)
