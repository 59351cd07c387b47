"""Say which refusals no test provokes: run tests, and list the places that build an error and were never reached.

python -m tools.refusals tests/unit tests/parity      pytest's own arguments

A refusal is a call of one of the classes for adapters and checkpoints (`runner.errors`) anywhere in `runner`. Only what
happens in the tests' own process is seen: what the whole action refuses in a process of its own is told apart in
tests/pipeline.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner import errors

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("BrokenAdapter", "UnsupportedAdapter", "AdapterMismatch", "BrokenCheckpoint", "UnsupportedCheckpoint")


class Recorder:
    """A pytest plugin that notes where errors are built."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self._init: Any = errors.RunnerError.__init__

    def pytest_sessionstart(self) -> None:
        """Listen in on the one constructor that all of them share."""
        recorder = self

        def init(error: errors.RunnerError, what: str, *, why: str, fix: str) -> None:
            frame = sys._getframe(1)
            recorder.seen.add((frame.f_code.co_filename, frame.f_lineno))
            recorder._init(error, what, why=why, fix=fix)

        errors.RunnerError.__init__ = init  # type: ignore[method-assign, assignment]

    def pytest_sessionfinish(self) -> None:
        """Stop listening."""
        errors.RunnerError.__init__ = self._init  # type: ignore[method-assign]


def sites() -> Iterator[tuple[Path, int, int, str]]:
    """Yield (file, first line, last line, class) of every call that builds a refusal."""
    for path in sorted((ROOT / "runner").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                yield path, node.lineno, node.end_lineno or node.lineno, node.func.id


def main(arguments: list[str]) -> int:
    """Run pytest and print what was not reached; return 1 where there is something, or pytest's own exit code."""
    recorder = Recorder()
    code = int(pytest.main([*arguments, "-q", "-p", "no:warnings", "-p", "no:xdist"], plugins=[recorder]))
    every = list(sites())
    missed = [
        site
        for site in every
        if not any(file == str(site[0]) and site[1] <= line <= site[2] for file, line in recorder.seen)
    ]
    for path, first, _, kind in missed:
        print(f"{path.relative_to(ROOT)}:{first}: {kind} was not provoked")
    print(f"{len(every) - len(missed)} of {len(every)} refusals were provoked")
    return code or int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
