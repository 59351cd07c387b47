"""Change the judge's code in one place at a time, and see whether the tests notice.

    python -m tools.mutants                        all that have no result yet; writes tests/records/mutants.json
    python -m tools.mutants --modules elements     of one module
    python -m tools.mutants --tests elements       ask tests/judge/test_elements.py only
    python -m tools.mutants --again                the survivors that nobody has explained
    python -m tools.mutants --all                  every one, whatever is known of it
    python -m tools.mutants --show                 the survivors, each with its line, its code and why it may survive

Every mutant is a process of its own, forked from one pytest session that has imported everything and made its
fixtures: in it one function gets other code (`tools.mutations`), and the tests run until one fails. Only tests that run
the changed line are asked, the quickest first.

A survivor is explained by hand, in the field "why" of its result: one of `CLASSES`, a colon, and a reason. A rerun
keeps it as long as the mutant survives; it is gone once a test kills the mutant, or the code of its statement changes.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from coverage import Coverage

from tools.mutations import ROOT, Mutant, install, mutants, path_of

NUMBERS = ROOT / "tests" / "records" / "mutants.json"
TIMEOUT_S = 240
ALIVE = ("survived", "not run")  # no test fails; no test runs the line
# Why a mutant may survive: no behaviour differs; only time and memory do; the judge only gets stricter; only what a
# report says or shows changes, never whether the folder passes.
CLASSES = ("equivalent", "speed", "stricter", "words")
# What decides whether a folder passes: the gates, and what they hold it against.
MODULES = (
    "judge", "storage", "elements", "comparison", "exact", "tensors", "semantics", "structure", "outputs", "case",
    "stochastic", "experts", "filling", "forward", "fused", "gates", "recipe", "targets", "verdict", "wrapped",
)  # fmt: skip
TESTS = (
    "alternatives", "case", "stochastic", "comparison", "config_rules", "diagnosis", "doubt", "elements", "exact",
    "experts", "filling", "forward", "fused", "gates", "judge", "semantics", "outputs", "recipe", "rounding",
    "semantics", "storage", "stream_judge", "structure", "targets", "tensors", "verdict", "wrapped",
    "wrong_merges", "parity/test_expert_layouts", "parity/test_old_experts", "unit/test_rounding",
)  # fmt: skip

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", default=list(MODULES), choices=MODULES)
    parser.add_argument(
        "--tests",
        nargs="+",
        default=list(TESTS),
        help="of tests/judge, without `test_` and `.py`; or below tests, without `.py`",
    )
    parser.add_argument("--again", action="store_true", help="run unexplained survivors once more, too")
    parser.add_argument("--all", action="store_true", help="run all of them once more")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each mutant no more tests than take this long")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no mutant after this time")
    parser.add_argument("--show", action="store_true", help="run nothing, list the survivors")
    parser.add_argument("--file", type=Path, default=NUMBERS, help="of the results")
    options = parser.parse_args(arguments)
    wanted = [one for module in options.modules for one in mutants(module)]
    known = results(options.file)
    if options.show:
        for one in wanted:
            if known.get(one.name, {}).get("by") in ALIVE:
                print(f"{one.line:>4} {one.name}: {known[one.name].get('why', known[one.name]['by'])}\n     {one.code}")
        return 0
    todo = [m for m in wanted if options.all or m.name not in known or (options.again and _is_open(known[m.name]))]
    plugin = Mutator(todo, options.file, until=time.monotonic() + 60 * options.minutes, limit_s=options.seconds)
    places = [name if "/" in name else f"judge/test_{name}" for name in options.tests]
    tests = [str(ROOT / "tests" / f"{place}.py") for place in places]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:warnings", *tests], plugins=[plugin]))


def results(file: Path = NUMBERS) -> dict[str, Result]:
    """Return what is known of the mutants that the code has now, by name: "by", "line", "code" and perhaps "why"."""
    codes = {one.name: one.code for module in MODULES for one in mutants(module)}
    known: dict[str, Result] = json.loads(file.read_bytes()) if file.exists() else {}
    return {name: one for name, one in known.items() if one["code"] == codes.get(name)}


def result_of(mutant: Mutant, by: str, before: Mapping[str, Any] | None) -> Result:
    """Return a mutant's new result; an explanation stays while it is true."""
    result: Result = {"by": by, "line": mutant.line, "code": mutant.code}
    if before is not None and "why" in before and by in ALIVE and before["code"] == mutant.code:
        result["why"] = before["why"]
    return result


def kind_of(result: Mapping[str, Any]) -> str:
    """Return "killed", one of `CLASSES`, or "unexplained"."""
    if result["by"] not in ALIVE:
        return "killed"
    kind = str(result.get("why", "")).partition(":")[0]
    return kind if kind in CLASSES else "unexplained"


def _is_open(result: Mapping[str, Any]) -> bool:
    return kind_of(result) == "unexplained"


class Mutator:
    """A pytest plugin: instead of the tests once, all of them once and then as many as it takes for each mutant."""

    def __init__(self, todo: Sequence[Mutant], file: Path, *, until: float, limit_s: float) -> None:
        """Take the mutants, the file of results, the time after which no mutant is begun, and what each may take."""
        self._todo = todo
        self._file = file
        self._until = until
        self._limit_s = limit_s
        self._took_s: dict[str, float] = {}
        self._items: list[pytest.Item] = []
        self._tests: dict[str, dict[int, list[str]]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests, then the mutants."""
        self._run_all(session)
        by = _in_child(None, self._items, timeout_s=None)
        if by != ALIVE[0]:  # it would be taken for the killer of every mutant
            pytest.exit(f"{by} fails without any mutant when it is run once more, or in another order", returncode=1)
        for number, mutant in enumerate(self._todo):
            if time.monotonic() > self._until:
                break
            concerned = self._concerned(mutant)
            by = _in_child(mutant, concerned, timeout_s=TIMEOUT_S) if concerned else ALIVE[1]
            print(f"{number + 1}/{len(self._todo)} {mutant.name} (line {mutant.line}): {by}", flush=True)
            known = results(self._file)  # read again: explanations are written meanwhile
            known[mutant.name] = result_of(mutant, by, known.get(mutant.name))
            self._file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", "utf-8")
        return True

    def _run_all(self, session: pytest.Session) -> None:
        """Run every test without a mutant, and note how long it takes and which lines of the judge it runs."""
        items = list(session.items)
        coverage = Coverage(data_file=None, include=[str(path_of(module)) for module in MODULES])
        coverage.start()
        for item, following in zip(items, [*items[1:], items[0]], strict=True):
            coverage.switch_context(item.nodeid)
            started = time.monotonic()
            if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
                pytest.exit(f"{item.nodeid} fails without any mutant", returncode=1)
            self._took_s[item.nodeid] = time.monotonic() - started
        coverage.stop()
        self._items = sorted(items, key=lambda item: self._took_s[item.nodeid])
        for module in MODULES:
            self._tests[module] = coverage.get_data().contexts_by_lineno(str(path_of(module)))

    def _concerned(self, mutant: Mutant) -> list[pytest.Item]:
        """Return the tests that run a line of the mutant's statement, the quickest first, within the limit.

        What a fixture of a module runs is on record as run by the first of its tests; it concerns them all.
        """
        lines = self._tests[mutant.module]
        names = {name for line in range(mutant.first_line, mutant.last_line + 1) for name in lines.get(line, ())}
        shared = {fixture for item in self._items if item.nodeid in names for fixture in _module_fixtures(item)}
        concerned = [item for item in self._items if item.nodeid in names or _module_fixtures(item) & shared]
        sums_s = accumulate(self._took_s[item.nodeid] for item in concerned)
        return [item for item, sum_s in zip(concerned, sums_s, strict=True) if sum_s <= self._limit_s]


def _module_fixtures(item: Any) -> set[tuple[str, str]]:
    """Return the fixtures that a test shares with others of its file."""
    found = item._fixtureinfo.name2fixturedefs
    return {(item.nodeid.partition("::")[0], name) for name in found if found[name][-1].scope == "module"}


def _in_child(mutant: Mutant | None, items: Sequence[pytest.Item], *, timeout_s: float | None) -> str:
    """Return the test that fails with the mutant in a process of its own, "timeout", "crash", or "survived"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.write(writer, _run(mutant, items).encode())
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], timeout_s)
    said = os.read(reader, 4096).decode() if ready else "timeout"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return said or "crash"


def _run(mutant: Mutant | None, items: Sequence[pytest.Item]) -> str:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if mutant is not None:
        install(mutant)
    for item, following in zip(items, [*items[1:], items[0]], strict=True):
        if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
            return item.nodeid
    return ALIVE[0]


if __name__ == "__main__":
    sys.exit(main())
