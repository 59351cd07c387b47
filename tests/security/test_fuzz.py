"""A few of the folders that `python -m tests.security.fuzz_folders` damages; the program runs all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_damaged_folders_end_in_a_verdict_or_a_named_error() -> None:
    program = [sys.executable, "-m", "tests.security.fuzz_folders", "16", "1000"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith("16 folders: ")
