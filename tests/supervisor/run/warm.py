"""A process that has its libraries imported, merges in children, and can kill them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from tests.supervisor.run.conftest import ROOT

# Imports once, then a child for every merge: a real process, killed by a real SIGKILL, without seconds of imports.
WARM = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
def finished(journal):
    try:
        return len(json.loads(journal.read_text())["files"])
    except OSError:
        return 0
for line in sys.stdin:
    job = json.loads(line)
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            merged = merge(prepare(Path(job["base"]), Path(job["adapter"]), dtype=job["dtype"]), into=Path(job["into"]))
            Path(job["result"]).write_text(json.dumps({"resumed": merged.shards_resumed, "note": merged.note}))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    ended, status = 0, 0
    if job["kill"] is not None:
        journal = Path(job["into"] + ".journal.json")
        while not ended and finished(journal) < job["kill"]["after_shards"]:
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(job["kill"]["after_s"])
            os.kill(child, signal.SIGKILL)
    if not ended:
        ended, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started]), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When to kill: `after_s` seconds after the journal names `after_shards` finished shards."""

    after_shards: int = 0
    after_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class End:
    """How a merge ended: exit code (negative: the signal), and wall seconds from its start."""

    code: int
    wall_s: float


@dataclass(frozen=True)
class Warm:
    """A process that has its libraries imported and merges in children."""

    process: subprocess.Popen[str]
    base: Path
    folder: Path

    @property
    def into(self) -> Path:
        return self.folder / "merged"

    @property
    def partial(self) -> Path:
        return self.folder / "merged.partial"

    @property
    def journal(self) -> Path:
        return self.folder / "merged.journal.json"

    def merge(self, adapter: Path, *, dtype: str = "auto") -> int:
        """Merge in a child, and return its exit code."""
        return self.end(adapter, dtype=dtype).code

    def end(self, adapter: Path, *, dtype: str = "auto", kill: Kill | None = None) -> End:
        """Merge in a child, kill it at that moment if it is not done by then, and return how it ended."""
        job = {
            "base": str(self.base), "adapter": str(adapter), "into": str(self.into), "dtype": dtype,
            "result": str(self.folder / "result.json"), "kill": asdict(kill) if kill else None,
        }  # fmt: skip
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        _say(stdin, json.dumps(job))
        code, wall_s = json.loads(stdout.readline())
        return End(code=code, wall_s=wall_s)

    def resumed(self) -> int:
        return int(json.loads((self.folder / "result.json").read_text())["resumed"])

    def note(self) -> str:
        return str(json.loads((self.folder / "result.json").read_text())["note"])


def _say(stream: IO[str], line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


@contextmanager
def warmed() -> Iterator[subprocess.Popen[str]]:
    """Yield the process; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", WARM], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()
