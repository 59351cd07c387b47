"""A process that has its libraries imported, merges in children, and can kill them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.pipeline.conftest import ROOT

# Imports once, then a child for every merge: a real process, killed by a real SIGKILL, without seconds of imports.
WARM = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch
from runner.merge import merge
from runner.prepare import prepare
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        try:
            merged = merge(prepare(Path(job["base"]), Path(job["adapter"]), dtype=job["dtype"]), into=Path(job["into"]))
            Path(job["result"]).write_text(json.dumps({"resumed": merged.shards_resumed, "note": merged.note}))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if job["kill_after_s"] is not None:
        time.sleep(job["kill_after_s"])
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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

    def merge(self, adapter: Path, *, dtype: str = "auto", kill_after_s: float | None = None) -> int:
        """Merge in a child, kill it after a while, and return its exit code."""
        job = {
            "base": str(self.base), "adapter": str(adapter), "into": str(self.into), "dtype": dtype,
            "result": str(self.folder / "result.json"), "kill_after_s": kill_after_s,
        }  # fmt: skip
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        _say(stdin, json.dumps(job))
        return int(stdout.readline())

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
