"""A worker that is a child of this process, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from runner.supervisor.launch.cgroup import read_memory
from runner.supervisor.launch.channel import STOP_GRACE_S, End

ROOT = Path(__file__).resolve().parents[3]


class Child:
    """A `Channel` to a child process."""

    def __init__(self, environ: Mapping[str, str], *, log: Callable[[str], None], lock: int | None) -> None:
        """Start it.

        Args:
            environ: all that it gets.
            log: gets every line that it writes on standard error.
            lock: descriptor of the lock on the work folder, which it holds as long as it lives.
        """
        self._memory = read_memory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runner.worker.main"],
            cwd=ROOT,
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
        self._log = log
        self._relay = threading.Thread(target=self._relay_errors, daemon=True)
        self._relay.start()

    def lines(self) -> Iterator[str]:
        """Yield what it writes on standard output."""
        stdout = self._process.stdout
        while stdout is not None and (
            line := stdout.readline()
        ):  # `yield from` would close the pipe with the generator
            yield line

    def send(self, line: str) -> None:
        """Write a line on its standard input."""
        stdin = self._process.stdin
        if stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(line)
                stdin.flush()

    def wait(self) -> End:
        """Wait until it has ended, and say how."""
        code = self._process.wait()
        self._relay.join(timeout=1.0)
        before, after = self._memory, read_memory()
        known = before is not None and after is not None
        return End(
            exit_code=code,
            ran_out_of_memory=after.kills > before.kills if before and after else None,
            memory_limit_bytes=after.limit_bytes if known and after else None,
        )

    def stop(self) -> None:
        """End the process group."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_GRACE_S
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _relay_errors(self) -> None:
        for line in self._process.stderr or ():
            self._log(line.rstrip("\n"))
