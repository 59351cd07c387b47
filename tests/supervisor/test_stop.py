"""A main thread that is stuck while it leaves does not keep a stopped run alive, nor what the run has written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from runner.protocol.errors import EXIT_CANCELLED

ROOT = Path(__file__).resolve().parents[2]
STUCK = """
import shutil, sys, threading
from runner.supervisor.stop import Stops

def tell(stopped):
    print("told", type(stopped).__name__, flush=True)
    return 130

with Stops(tell) as stops:
    stops.unwind_s = 0.2
    stops.at_last(lambda: shutil.rmtree(sys.argv[1]))
    try:
        print("running", flush=True)
        threading.Event().wait(60)
    finally:
        threading.Event().wait(60)  # as in a library that joins its threads
"""


def test_a_stuck_run_is_told_cleaned_up_and_ended(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "shard").write_bytes(b"half")
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path / "work")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == "running\n"
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = out.read()
    code = process.wait()

    assert (code, said) == (EXIT_CANCELLED, "told Cancelled\n")
    assert time.monotonic() - started < 20  # of the 60 that the main thread would wait
    assert not (tmp_path / "work").exists()
