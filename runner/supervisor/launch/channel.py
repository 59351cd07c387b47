"""What carries a worker, whatever it runs in: lines out, one job in, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

STOP_GRACE_S = 2.5  # then it is killed; a cancelled run has 7.5 s in all


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a worker ended.

    Attributes:
        exit_code: of the process; minus the number of the signal that ended it.
        ran_out_of_memory: whether the kernel killed it for memory; None where that cannot be known.
        memory_limit_bytes: of its container or control group; None for none, or where it is not known.
    """

    exit_code: int
    ran_out_of_memory: bool | None = None
    memory_limit_bytes: int | None = None


class Channel(Protocol):
    """A running worker."""

    def lines(self) -> Iterator[str]:
        """Yield what it writes on standard output, line by line, until it ends."""

    def send(self, line: str) -> None:
        """Write a line on its standard input; nothing happens where it has ended already."""

    def wait(self) -> End:
        """Wait until it has ended, and say how."""

    def stop(self) -> None:
        """End it and everything that it started: asked first, killed after `STOP_GRACE_S`. May be called twice."""
