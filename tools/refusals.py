"""Say which test provokes which refusal: run tests, and note in tests/records/refusals.json where errors are built.

python -m tools.refusals tests/files -m 'not slow'  run these tests (pytest's own arguments) and add what they provoke
python -m tools.refusals --check                    fail where a refusal has no test, or names one that is gone
python -m tools.refusals                            drop what is gone, and name what no test is known to provoke

A refusal is a place in `runner` that says what happened, why and what to do (`tools.messages`). It is seen in the
tests' own process and in every process of Python that they start on this machine, by a `sitecustomize` on PYTHONPATH;
not in containers, so what only those provoke is written down here. What was seen before is kept as long as the place
and the test are there: after a change, run the tests of that change only. A test that was changed and no longer
provokes what it did is found by running it again after its lines were taken out of the JSON.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tools.listening import listen
from tools.messages import ROOT, Site, sites

NUMBERS = ROOT / "tests" / "records" / "refusals.json"
Record = dict[str, str]
IN_CONTAINERS: Mapping[str, str] = {
    "runner/supervisor/launch/again::start_again::LaunchError": (
        "tests/e2e/test_siblings.py::test_a_folder_of_the_system_is_no_cache"
    ),
}
# What no test provokes, and why.
OPEN: Mapping[str, str] = {
    "runner/worker/merge/units::_other_side::AdapterMismatch": "a guard: `model.vocabulary` refuses what leads here",
}
# Runs in every Python that the tests start, before anything of it. Only the standard library and
# runner.protocol.errors.
HOOK = """
import sys
if {root!r} not in sys.path:
    sys.path.append({root!r})
from tools.listening import listen
listen({log!r})
"""


class Recorder:
    """A pytest plugin that notes which test was running when an error was built.

    Attributes:
        seen: (file, line) → the first test, without its parameters.
    """

    def __init__(self, log: Path) -> None:
        self.seen: dict[tuple[str, int], str] = {}
        self._log = log
        self._offset = 0

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Attribute what was logged since the last test to this one."""
        with self._log.open("rb") as file:
            file.seek(self._offset)
            lines = file.read()
        whole = lines.rpartition(b"\n")[0] + b"\n" if b"\n" in lines else b""
        self._offset += len(whole)
        for line in whole.splitlines():
            name, number = json.loads(line)
            self.seen.setdefault((name, number), nodeid.partition("[")[0])


def main(arguments: list[str]) -> int:
    """Run tests and add to the record, or check it; return the exit code."""
    every = sites()
    if arguments == ["--check"]:
        return _check(every)
    keys = {site.key for site in every}
    known = {key: test for key, test in read().items() if key in keys and exists(test)}
    code = 0
    if arguments:
        code, seen = _run(arguments)
        for site in every:
            tests = sorted(test for (file, line), test in seen.items() if site.holds(file, line))
            if tests:
                known.setdefault(site.key, tests[0])
    NUMBERS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")
    tested = {**known, **IN_CONTAINERS}
    for site in every:
        if site.key not in tested:
            print(f"{site.file}:{site.first}: {site.family} was not provoked: {site.key}")
    print(f"{len(keys & tested.keys())} of {len(every)} refusals are provoked by a test")
    return code


def read() -> Record:
    """Return what was seen: a site's key → the test that provokes it."""
    known: Record = json.loads(NUMBERS.read_bytes()) if NUMBERS.exists() else {}
    return known


def problems(every: Iterable[Site], tested: Mapping[str, str], still_open: Iterable[str]) -> list[str]:
    """Return what is wrong with the record, one line for each.

    Args:
        every: the sites.
        tested: a site's key → its test.
        still_open: keys of sites that are known to have none.
    """
    found = []
    keys = {site.key for site in every}
    for site in every:
        if site.key not in tested and site.key not in still_open:
            found.append(f"{site.file}:{site.first}: no test is known to provoke this refusal: {site.key}")
        elif site.key in tested and not exists(tested[site.key]):
            found.append(f"{site.file}:{site.first}: its test is gone: {tested[site.key]}")
        elif site.key in tested and site.key in still_open:
            found.append(f"{site.file}:{site.first}: it has a test now and is said to have none: {site.key}")
    gone = sorted({*tested, *still_open} - keys)
    return found + [f"a refusal is gone: {key}; run `python -m tools.refusals`" for key in gone]


def _check(every: tuple[Site, ...]) -> int:
    found = problems(every, {**read(), **IN_CONTAINERS}, OPEN)
    for line in found:
        print(line)
    if found:
        print("A new refusal: write its test, then run `python -m tools.refusals tests/…/test_it.py`.")
    return int(bool(found))


def _run(arguments: list[str]) -> tuple[int, Mapping[tuple[str, int], str]]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        (Path(folder) / "sitecustomize.py").write_text(HOOK.format(root=str(ROOT), log=str(log)), "utf-8")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        listen(str(log))
        recorder = Recorder(log)
        options: list[Any] = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        return int(pytest.main([*arguments, *options], plugins=[recorder])), recorder.seen


def exists(test: str) -> bool:
    """Return whether the test is there, by its file and the name of its function."""
    file, _, name = test.partition("::")
    return name.rpartition("::")[2] in _functions(ROOT / file)


@cache
def _functions(path: Path) -> frozenset[str]:
    if not path.exists():
        return frozenset()
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
