"""Run a command and measure it from outside: wall, CPU, memory and bytes of its whole process tree, from /proc.

Linux only. Nothing is asked of the command; it may print its own time after imports as JSON in a line of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY_S = 0.02
KEPT_OUTPUT_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A command that goes beyond one of these is stopped."""

    wall_s: float
    anonymous_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A command that succeeded; seconds and bytes of its process tree.

    Attributes:
        wall_s: from start to exit, imports included.
        after_imports_s: what the command itself printed, or None.
        plan_s: the part of it before the first weight is read, where it printed that too.
        cpu_s: user and system, of the command and of every descendant that was waited for.
        anonymous_bytes: highest sampled sum of RssAnon.
        resident_bytes: highest sampled sum of VmRSS (anonymous, file pages and shared memory; a page that two processes
            map counts twice), or the first process's own peak.
        read_bytes: through read calls, from the page cache or not; reads through a memory map do not count.
        written_bytes: through write calls and copy_file_range.
        disk_read_bytes: fetched from the device.
        disk_written_bytes: handed to the device's queue, or still to be.
    """

    wall_s: float
    after_imports_s: float | None
    plan_s: float | None
    cpu_s: float
    anonymous_bytes: int
    resident_bytes: int
    read_bytes: int
    written_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A command that did not succeed: no figure of it counts."""

    why: str
    output: str


def measure(
    command: Sequence[str], *, folder: Path, limits: Limits, environment: Mapping[str, str] | None = None
) -> Run | Failure:
    """Run `command` in `folder` and return what it took, or why it failed."""
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        tree = _Tree(process.pid)
        stopped = _watch(process.pid, tree, limits, started)
        wall_s = time.monotonic() - started
        tree.sample()  # what has ended is still there to be read until it is waited for
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if stopped or process.returncode:
        why = stopped or _ending(process.returncode)
        return Failure(why=why, output=text[-KEPT_OUTPUT_CHARS:])
    said = _said(text)
    return Run(
        wall_s=wall_s,
        after_imports_s=said.get("after_imports_s"),
        plan_s=said.get("plan_s"),
        cpu_s=usage.ru_utime + usage.ru_stime,
        anonymous_bytes=tree.anonymous_bytes,
        resident_bytes=tree.resident_bytes,
        read_bytes=tree.moved.get("rchar", 0),
        written_bytes=tree.moved.get("wchar", 0),
        disk_read_bytes=tree.moved.get("read_bytes", 0),
        disk_written_bytes=tree.moved.get("write_bytes", 0),
    )


class _Tree:
    """A process and its descendants; the highest of what was sampled."""

    def __init__(self, root: int) -> None:
        self._root = root
        self.anonymous_bytes = 0
        self.resident_bytes = 0
        self.moved: dict[str, int] = {}

    def sample(self) -> None:
        members = self._members()
        memory = [_fields(Path(f"/proc/{pid}/status")) for pid in members]
        self.anonymous_bytes = max(self.anonymous_bytes, sum(fields.get("RssAnon", 0) for fields in memory) << 10)
        resident = sum(fields.get("VmRSS", 0) for fields in memory)
        # The kernel's own high-water mark of the first process closes the gaps between two samples.
        self.resident_bytes = max(self.resident_bytes, max(resident, memory[0].get("VmHWM", 0)) << 10)
        # What a waited-for child has moved is in its parent's figures from then on, so a sum over the living is whole.
        moved = [_fields(Path(f"/proc/{pid}/io")) for pid in members]
        for name in ("rchar", "wchar", "read_bytes", "write_bytes"):
            self.moved[name] = max(self.moved.get(name, 0), sum(fields.get(name, 0) for fields in moved))

    def _members(self) -> list[int]:
        members = [self._root]
        for pid in members:
            try:
                threads = [entry.name for entry in os.scandir(f"/proc/{pid}/task")]
                for thread in threads:
                    members += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
        return members


def _watch(pid: int, tree: _Tree, limits: Limits, started: float) -> str:
    """Sample until the process has ended or was stopped; return why it was stopped, or an empty text."""
    stopped = ""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        tree.sample()
        if not stopped:
            if time.monotonic() - started > limits.wall_s:
                stopped = f"stopped after {limits.wall_s:g} s"
            elif tree.anonymous_bytes > limits.anonymous_bytes:
                stopped = f"stopped at {limits.anonymous_bytes / 1e9:.1f} GB of anonymous memory"
            if stopped:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(SAMPLE_EVERY_S)
    return stopped


def _fields(path: Path) -> dict[str, int]:
    """Return the lines `name: number …` of a file in /proc; nothing where the process is gone."""
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        first = value.split()[:1]
        if first and first[0].isdigit():
            found[name] = int(first[0])
    return found


def _said(text: str) -> dict[str, float]:
    """Return the times in the last line that a command printed for us, by name."""
    for line in reversed(text.splitlines()):
        if line.startswith('{"after_imports_s"'):
            return {name: float(value) for name, value in json.loads(line).items()}
    return {}


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
