"""Where the worker runs: as a child process in its own process group, with nothing it does not need.

Covered: inline, on the CPU or on a GPU that is already visible. Not covered in this version: a sibling container
(the Docker SDK will be imported here and nowhere else).
"""

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
from types import TracebackType
from typing import Self

from runner.errors import LaunchError, NotEnoughMemory, RunnerError, rebuild
from runner.events import Event, Failed, Job, Ready, decode, encode

# What the worker may see of the environment. Tokens, inputs, ACTIONS_* and GITHUB_* are not among it.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ", "VIRTUAL_ENV")
PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "OMP_", "MKL_", "PYTHON")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "passive",  # on shared cores, threads that spin made a judgement ten times slower
}
STOP_GRACE_S = 3.0
LAST_LINES = 20


class Worker:
    """A worker process. Use as a context manager: leaving it ends the process and all its children."""

    def __init__(
        self, environ: Mapping[str, str], *, home: Path, log: Callable[[str], None], lock: int | None = None
    ) -> None:
        """Start the worker; it imports its libraries while the caller goes on.

        Args:
            environ: the supervisor's; only harmless variables are passed on.
            home: a folder for caches that the worker's libraries may write.
            log: gets every line that the worker's libraries print.
            lock: descriptor of the lock on the work folder, which the worker holds as long as it lives.
        """
        root = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runner.worker"],
            cwd=root,
            env=worker_environment(environ, home),
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
        self._last_lines: list[str] = []
        self._relay = threading.Thread(target=self._relay_errors, daemon=True)
        self._relay.start()

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
        raise self._death()

    def give(self, job: Job) -> None:
        """Tell the worker what to do; once."""
        stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it is dead, and `events` will say of what
            stdin.write(encode(job)) if stdin else None
            stdin.flush() if stdin else None

    def events(self) -> Iterator[Event]:
        """Yield events until the worker ends.

        Raises:
            RunnerError: the worker failed, with its own words; or it died, with what is known.
        """
        stdout = self._process.stdout
        for line in stdout or ():
            event = self._decode(line)
            if isinstance(event, Failed):
                raise rebuild(event.family, event.problem)
            yield event
            if isinstance(event, Ready):
                return
        if self._process.wait() != 0:
            raise self._death()

    def stop(self) -> None:
        """End the process group: asked first, killed after `STOP_GRACE_S`."""
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

    def _decode(self, line: str) -> Event:
        try:
            return decode(line)
        except ValueError as error:
            raise LaunchError(
                f"The worker said something that is no event: {line.strip()[:200]!r}.",
                why=f"Supervisor and worker are of different versions, or memory was damaged ({error}).",
                fix="Run again; if it happens again, report it with the log.",
            ) from error

    def _relay_errors(self) -> None:
        for line in self._process.stderr or ():
            text = line.rstrip("\n")
            self._last_lines = [*self._last_lines[-LAST_LINES + 1 :], text]
            self._log(text)

    def _death(self) -> RunnerError:
        code = self._process.wait()
        self._relay.join(timeout=1.0)
        if code == -signal.SIGKILL:
            return NotEnoughMemory(
                "The worker was killed (SIGKILL).",
                why="That is what the kernel does to a process when memory runs out.",
                fix="Give the job more memory: `mode: plan` says how much the merge takes; the judge holds the base "
                "and the merged model in float32.",
            )
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = next((line for line in reversed(self._last_lines) if line.strip()), "nothing")
        return LaunchError(
            f"The worker died ({how}).",
            why=f"Its last words: {last[:300]}",
            fix="Look at the lines above; if this is not about your machine, report it with the log.",
        )


def worker_environment(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the worker's environment: what it needs to find its libraries and the GPU, and nothing secret."""
    passed = {
        name: value for name, value in environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    return passed | OFFLINE | {"HF_HOME": str(home)}
