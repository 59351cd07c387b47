"""The worker as the supervisor sees it: ready, one job, events, an end; whatever carries it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from runner.protocol.errors import LaunchError, NotEnoughMemory, RunnerError, rebuild
from runner.protocol.events import Event, Failed, Job, Ready, decode, encode
from runner.supervisor.launch.channel import Channel, End

LAST_LINES = 20
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


class Worker:
    """A worker. Use as a context manager: leaving it ends the worker and everything that it started."""

    def __init__(self, start: Callable[[Callable[[str], None]], Channel], log: Callable[[str], None]) -> None:
        """Start the worker; it imports its libraries while the caller goes on.

        Args:
            start: starts it, given what is to get every line that its libraries print.
            log: gets those lines.
        """
        self._log = log
        self._last_lines: list[str] = []
        self._channel = start(self._note)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self) -> Ready:
        """Return the worker's first event.

        Raises:
            LaunchError: it died while it imported its libraries.
        """
        for event in self.events():
            if isinstance(event, Ready):
                return event
        raise self._death(self._channel.wait())

    def give(self, job: Job) -> None:
        """Tell the worker what to do; once."""
        self._channel.send(encode(job))  # if it is dead, `events` will say of what

    def events(self) -> Iterator[Event]:
        """Yield events until the worker ends.

        Raises:
            RunnerError: the worker failed, with its own words; or it died, with what is known.
        """
        for line in self._channel.lines():
            event = self._decode(line)
            if isinstance(event, Failed):
                raise rebuild(event.family, event.problem)
            yield event
            if isinstance(event, Ready):
                return
        end = self._channel.wait()
        if end.exit_code != 0:
            raise self._death(end)

    def stop(self) -> None:
        """End the worker and everything that it started."""
        self._channel.stop()

    def _note(self, line: str) -> None:
        self._last_lines = [*self._last_lines[-LAST_LINES + 1 :], line]
        self._log(line)

    def _decode(self, line: str) -> Event:
        try:
            return decode(line)
        except ValueError as error:
            raise LaunchError(
                f"The worker said something that is no event: {line.strip()[:200]!r}.",
                why=f"Supervisor and worker are of different versions, or memory was damaged ({error}).",
                fix="Run again; if it happens again, report it with the log.",
            ) from error

    def _death(self, end: End) -> RunnerError:
        if end.ran_out_of_memory or (end.exit_code == -signal.SIGKILL and end.ran_out_of_memory is None):
            return _out_of_memory(end)
        if end.exit_code == -signal.SIGKILL:
            return LaunchError(
                "The worker was killed (SIGKILL).",
                why="Not by the kernel for lack of memory: its counter of such kills has not moved. So a person, or "
                "a program that watches this machine, did it.",
                fix="Look at what else runs on the machine, then run again.",
            )
        last = next((line for line in reversed(self._last_lines) if line.strip()), "nothing")
        if -end.exit_code in _CRASHES:
            return LaunchError(
                f"The worker crashed (signal {signal.Signals(-end.exit_code).name}).",
                why="A native library (torch, or the driver of the GPU) failed; the lines above name what it was "
                f"called from. The last one: {last[:300]}",
                fix="Run again with `device: cpu`; if it crashes there too, report it with the log.",
            )
        code = end.exit_code
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return LaunchError(
            f"The worker died ({how}).",
            why=f"Its last words: {last[:300]}",
            fix="Look at the lines above; if this is not about your machine, report it with the log.",
        )


def _out_of_memory(end: End) -> NotEnoughMemory:
    limit = end.memory_limit_bytes
    room = f" The limit here is {limit / 1e9:.2f} GB." if limit is not None else ""
    certain = end.ran_out_of_memory
    return NotEnoughMemory(
        "The worker was killed (SIGKILL), out of memory." if certain else "The worker was killed (SIGKILL).",
        why=("The kernel killed it because memory ran out." + room)
        if certain
        else "That is what the kernel does to a process when memory runs out.",
        fix="Give the job more memory: `mode: plan` says how much the merge takes; the judge holds the base "
        "and the merged model in float32.",
    )
