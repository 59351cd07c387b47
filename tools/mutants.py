"""Change the judge's code in one place at a time, and see whether the tests notice.

    python -m tools.mutants                        all that have no result yet; writes docs/mutants.json
    python -m tools.mutants --modules elements     of one module
    python -m tools.mutants --show                 the survivors, each with its line

Every mutant is a process of its own, forked from one pytest session that has imported everything and made its
fixtures: in it one function gets other code, and the tests run until one fails. Comparisons, boolean and arithmetic
operators, numbers and truth values are replaced; conditions are negated; statements are left out; texts stay. Only
tests that run the changed line are asked, the quickest first.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from coverage import Coverage

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ROOT / "docs" / "mutants.json"
TIMEOUT_S = 240
ALIVE = ("survived", "not run")  # no test fails; no test runs the line
# The gates: what decides whether a folder passes.
MODULES = ("judge", "storage", "elements", "comparison", "exact", "tensors", "modules", "structure", "outputs", "case")
TESTS = (
    "alternatives", "comparison", "config_rules", "diagnosis", "elements", "exact", "gates", "rounding", "semantics",
    "storage", "stream_judge", "structure", "verdict", "wrong_merges",
)  # fmt: skip
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change.

    Attributes:
        module: of `runner.verify`.
        function: its qualified name.
        line: in the file.
        first_line: of the statement, or of its head, that it belongs to.
        last_line: of the same.
        change: what is done there.
        number: of the node in the function's tree, in the order of `_nodes`.
    """

    module: str
    function: str
    line: int
    first_line: int
    last_line: int
    change: str
    number: int

    @property
    def name(self) -> str:
        """What it is known by, whatever line it is on."""
        return f"{self.module}.{self.function} #{self.number}: {self.change}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", default=list(MODULES), choices=MODULES)
    parser.add_argument("--again", action="store_true", help="run those that no test killed once more")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each mutant no more tests than take this long")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no mutant after this time")
    parser.add_argument("--show", action="store_true", help="run nothing, list the survivors")
    options = parser.parse_args(arguments)
    there_are = {one.name for module in MODULES for one in mutants(module)}
    results = {name: one for name, one in json.loads(NUMBERS.read_bytes()).items() if name in there_are}
    if options.show:
        for name, result in sorted(results.items()):
            if result["by"] in ALIVE:
                print(f"{result['line']:>4} {name}: {result['by']}")
        return 0
    wanted = [one for module in options.modules for one in mutants(module)]
    todo = [m for m in wanted if m.name not in results or (options.again and results[m.name]["by"] in ALIVE)]
    plugin = Mutator(todo, results, until=time.monotonic() + 60 * options.minutes, limit_s=options.seconds)
    tests = [str(ROOT / "tests" / "verify" / f"test_{name}.py") for name in TESTS]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:warnings", *tests], plugins=[plugin]))


def mutants(module: str) -> Iterator[Mutant]:
    """Yield every mutant of a module of `runner.verify`."""
    tree = ast.parse(_path(module).read_text("utf-8"))
    for name, function in _functions(tree, ""):
        heads = dict(_heads(function))
        for number, node in enumerate(_nodes(function)):
            for change in _changes(node):
                line: int = getattr(node, "lineno", 0)
                first, last = heads[node]
                yield Mutant(
                    module=module, function=name, line=line, first_line=first, last_line=last, change=change,
                    number=number,
                )  # fmt: skip


def _path(module: str) -> Path:
    return ROOT / "runner" / "verify" / f"{module}.py"


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")


def _nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield what is in a function's body; its defaults and annotations are not part of its code."""
    for statement in function.body:
        yield from ast.walk(statement)


def _heads(statement: ast.stmt) -> Iterator[tuple[ast.AST, tuple[int, int]]]:
    """Yield every node below a statement, itself included, with the lines of its innermost statement without bodies."""
    inner = [node for node in ast.iter_child_nodes(statement) if isinstance(node, ast.stmt)]
    last = min((node.lineno - 1 for node in inner), default=statement.end_lineno or statement.lineno)
    lines = (statement.lineno, max(last, statement.lineno))
    yield statement, lines
    rest: list[ast.AST] = list(ast.iter_child_nodes(statement))
    while rest:
        node = rest.pop()
        if isinstance(node, ast.stmt):
            yield from _heads(node)
        else:
            yield node, lines
            rest.extend(ast.iter_child_nodes(node))


def _changes(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare | ast.BoolOp | ast.BinOp):
        for place, operator in enumerate(node.ops if isinstance(node, ast.Compare) else [node.op]):
            if type(operator) in _SWAPS:
                yield f"{type(operator).__name__} to {_SWAPS[type(operator)].__name__} at {place}"
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        yield f"{node.value!r} to {_other(node.value)!r}"
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition negated"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield "not left out"
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)):
        yield "statement left out"


def _other(value: Any) -> Any:
    return not value if isinstance(value, bool) else value + 1


def _apply(node: Any, change: str) -> None:
    """Carry out one of `_changes` on a node, in place."""
    if change == "condition negated" and isinstance(node, ast.If | ast.IfExp | ast.While):
        node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)
    elif change == "not left out" and isinstance(node, ast.UnaryOp):
        node.operand = ast.UnaryOp(op=type(node.op)(), operand=node.operand)
    elif change == "statement left out":
        if isinstance(node, ast.AugAssign):
            node.value = ast.BinOp(left=node.value, op=ast.Mult(), right=ast.Constant(0))
        elif isinstance(node, ast.Expr):
            node.value = ast.Constant(None)
    elif isinstance(node, ast.Constant):
        node.value = _other(node.value)
    elif isinstance(node, ast.Compare):
        operators: list[Any] = node.ops
        place = int(change.rpartition(" ")[2])
        operators[place] = _SWAPS[type(operators[place])]()
    elif isinstance(node, ast.BoolOp | ast.BinOp):
        other: Any = _SWAPS[type(node.op)]()
        node.op = other


def code_of(mutant: Mutant) -> CodeType:
    """Return the code of the mutant's function."""
    tree = copy.deepcopy(ast.parse(_path(mutant.module).read_text("utf-8")))
    function = dict(_functions(tree, ""))[mutant.function]
    _apply(list(_nodes(function))[mutant.number], mutant.change)
    code: CodeType = compile(ast.fix_missing_locations(tree), str(_path(mutant.module)), "exec")
    for name in mutant.function.split("."):
        code = next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name)
    return code


def install(mutant: Mutant) -> None:
    """Give the function in this process the mutant's code, wherever it was imported to."""
    place: Any = importlib.import_module(f"runner.verify.{mutant.module}")
    *outer, last = mutant.function.split(".")
    for name in outer:
        place = getattr(place, name)
    found = vars(place)[last]
    function: Any = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    while not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    function.__code__ = code_of(mutant)


class Mutator:
    """A pytest plugin: instead of the tests once, all of them once and then as many as it takes for each mutant."""

    def __init__(self, todo: Sequence[Mutant], results: dict[str, Any], *, until: float, limit_s: float) -> None:
        """Take the mutants, the results so far, the time after which no mutant is begun, and what each may take."""
        self._todo = todo
        self._results = results
        self._until = until
        self._limit_s = limit_s
        self._took_s: dict[str, float] = {}
        self._items: list[pytest.Item] = []
        self._tests: dict[str, dict[int, list[str]]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests, then the mutants."""
        self._run_all(session)
        for number, mutant in enumerate(self._todo):
            if time.monotonic() > self._until:
                break
            by = self._try(mutant)
            self._results[mutant.name] = {"by": by, "line": mutant.line}
            print(f"{number + 1}/{len(self._todo)} {mutant.name} (line {mutant.line}): {by}", flush=True)
            NUMBERS.write_text(json.dumps(dict(sorted(self._results.items())), indent=1) + "\n", "utf-8")
        return True

    def _run_all(self, session: pytest.Session) -> None:
        """Run every test without a mutant, and note how long it takes and which lines of the judge it runs."""
        items = list(session.items)
        coverage = Coverage(data_file=None, include=[str(_path(module)) for module in MODULES])
        coverage.start()
        for item, following in zip(items, [*items[1:], items[0]], strict=True):
            coverage.switch_context(item.nodeid)
            started = time.monotonic()
            if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
                raise session.Failed(f"{item.nodeid} fails without any mutant")
            self._took_s[item.nodeid] = time.monotonic() - started
        coverage.stop()
        self._items = sorted(items, key=lambda item: self._took_s[item.nodeid])
        for module in MODULES:
            self._tests[module] = coverage.get_data().contexts_by_lineno(str(_path(module)))

    def _concerned(self, mutant: Mutant) -> list[pytest.Item]:
        """Return the tests that run a line of the mutant's statement, the quickest first, within the limit."""
        lines = self._tests[mutant.module]
        names = {name for line in range(mutant.first_line, mutant.last_line + 1) for name in lines.get(line, ())}
        concerned = [item for item in self._items if item.nodeid in names]
        sums_s = accumulate(self._took_s[item.nodeid] for item in concerned)
        return [item for item, sum_s in zip(concerned, sums_s, strict=True) if sum_s <= self._limit_s]

    def _try(self, mutant: Mutant) -> str:
        """Return the test that fails with the mutant, "timeout", "crash", or one of `ALIVE`."""
        concerned = self._concerned(mutant)
        if not concerned:
            return ALIVE[1]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.write(writer, self._run(mutant, concerned).encode())
            os._exit(0)
        os.close(writer)
        ready, _, _ = select.select([reader], [], [], TIMEOUT_S)
        said = os.read(reader, 4096).decode() if ready else "timeout"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        return said or "crash"

    def _run(self, mutant: Mutant, concerned: Sequence[pytest.Item]) -> str:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        install(mutant)
        for item, following in zip(concerned, [*concerned[1:], concerned[0]], strict=True):
            if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
                return item.nodeid
        return ALIVE[0]


if __name__ == "__main__":
    sys.exit(main())
