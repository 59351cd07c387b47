"""Where `runner` refuses, and what it says there: every place and every message, found by reading the source.

An error is written where it is raised, as `Family(what, why=…, fix=…)`. What a message takes from the run is shown as
`…`. A message whose `what` is made elsewhere cannot be read here; the function that makes it has it.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.protocol import errors

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = frozenset(family.__name__ for family in errors.families())
NOUNS = FAMILIES | {"Problem", "InputError"}
GAP = "…"
# Functions that put a problem among those of the inputs.
_INPUTS = frozenset({"Problem", "add", "require", "_unknown"})
# Rooms whose `Problem` is not one of the inputs.
_OTHERS = {"runner/worker/gpu/diagnosis.py": "LaunchError"}
_NOT_HERE = frozenset({"runner/protocol/errors.py", "runner/supervisor/main.py"})  # the latter's are in SPECIAL
_TIMEOUT = (
    f"The phase `{GAP}` took longer than {GAP} minutes.",
    "`phase-timeout-minutes` ends a phase that hangs, so that there is time left to clean up.",
    "If the phase needs more time, set `phase-timeout-minutes` higher; the log says how far it was.",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place that refuses.

    Attributes:
        key: `module::function::what it builds`, and `::2` and so on for the next of the same; stays when lines move.
        file: relative to the repository.
        first, last: its lines, from 1.
        family: class of the error, "input" for a problem of the inputs.
    """

    key: str
    file: str
    first: int
    last: int
    family: str

    def holds(self, file: str, line: int) -> bool:
        """Return whether that line is of this site."""
        return file == self.file and self.first <= line <= self.last


def sites(root: Path = ROOT) -> tuple[Site, ...]:
    """Return every site of `runner`, by file and line.

    A site is a call that is given `why` and `fix`, or that builds one of `runner.protocol.errors`' classes. Where a
    private function of a module builds one error for several callers, each of the callers is a site in its place. The
    classes' own constructors, and what they are rebuilt with from a worker's message, are none.
    """
    found: list[Site] = []
    for path in sorted((root / "runner").rglob("*.py")):
        name = str(path.relative_to(root))
        if name != "runner/protocol/errors.py":
            found.extend(_Module(name, ast.parse(path.read_text("utf-8"))).sites())
    return tuple(found)


class _Module:
    """One module's calls, each with the function that it is in."""

    def __init__(self, file: str, tree: ast.Module) -> None:
        self._file = file
        self._calls: list[tuple[str, ast.Call]] = []
        self._functions: dict[str, Function] = {}
        self._visit(tree, ())

    def sites(self) -> Iterator[Site]:
        """Yield the module's sites by line."""
        shared = {name: calls for name in self._functions if len(calls := self._callers(name)) > 1}
        numbers: Counter[str] = Counter()
        for inside, call in sorted(self._calls, key=lambda each: (each[1].lineno, each[1].col_offset)):
            name = _name(call.func)
            if name in shared and any(call is caller for caller in shared[name]):
                family = _returned(self._functions[name])
            elif _tells(call) and inside.rpartition(".")[2] not in shared:
                family = name if name in FAMILIES else "input"
            else:
                continue
            key = f"{self._file.removesuffix('.py')}::{inside}::{name}"
            numbers[key] += 1
            yield Site(
                key=key + (f"::{numbers[key]}" if numbers[key] > 1 else ""), file=self._file,
                first=call.lineno, last=call.end_lineno or call.lineno, family=family,
            )  # fmt: skip

    def _visit(self, node: ast.AST, inside: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            scope = inside
            if isinstance(child, Function | ast.ClassDef):
                scope = (*inside, child.name)
                if isinstance(child, Function):
                    self._functions[child.name] = child
            elif isinstance(child, ast.Call):
                self._calls.append((".".join(inside) or "module", child))
            self._visit(child, scope)

    def _callers(self, name: str) -> list[ast.Call]:
        """Return the calls of a private function that builds one error; none for any other function."""
        function = self._functions[name]
        built = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _tells(node)]
        if not name.startswith("_") or not _returned(function) or len(built) > 1 + _nested(built):
            return []
        return [call for inside, call in self._calls if _name(call.func) == name and name not in inside.split(".")]


def _nested(calls: list[ast.Call]) -> int:
    """Return how many of these calls are arguments of another of them: `InputError([Problem(…)])` is one error."""
    return sum(any(call is not other and call in ast.walk(other) for other in calls) for call in calls)


def _tells(call: ast.Call) -> bool:
    given = {keyword.arg for keyword in call.keywords}
    return {"why", "fix"} <= given or (_name(call.func) in FAMILIES and bool(call.args))


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _returned(function: Function) -> str:
    """Return the error class that the function is annotated to return, "" for none."""
    words = ast.unparse(function.returns).strip("'\"").split(" | ") if function.returns else []
    return next((word.rpartition(".")[2] for word in words if word.rpartition(".")[2] in NOUNS), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What can be told, with gaps for what depends on the run."""

    family: str
    what: str
    why: str
    fix: str

    def matches(self, what: str) -> bool:
        """Return whether this is the message that a run told."""
        pattern = ".*".join(re.escape(part) for part in self.what.split(GAP))
        return re.fullmatch(pattern, what, re.DOTALL) is not None


def read_messages() -> tuple[Message, ...]:
    """Return every message that the source holds, by module and line."""
    found = [
        message
        for path in sorted((ROOT / "runner").rglob("*.py"))
        if (name := path.relative_to(ROOT).as_posix()) not in _NOT_HERE
        for message in messages_of(name, ast.parse(path.read_text("utf-8")))
    ]
    what, why, fix = _TIMEOUT
    found.append(Message(family="PhaseTimeout", what=what, why=why, fix=fix))
    return tuple(dict.fromkeys(found))


def messages_of(name: str, tree: ast.Module) -> Iterator[Message]:
    """Yield the messages of one module.

    Args:
        name: its path in the repository.
        tree: its source.
    """
    known = FAMILIES | {"InputError"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _name(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if not {"why", "fix"} <= given.keys() or called not in known | _INPUTS:
            continue
        told = given.get("what") or (node.args[0] if node.args else None)
        what = _text(told) if told is not None else GAP
        if not what.replace(GAP, "").strip(" .:"):
            continue  # made elsewhere
        family = called if called in known else _OTHERS.get(name, "InputError")
        yield Message(family=family, what=what, why=_text(given["why"]), fix=_text(given["fix"]))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.IfExp):
        either, other = text_of(node.body), text_of(node.orelse)
        return GAP if GAP in (either, other) else f"{either} / {other}"
    return text_of(node)


def text_of(node: ast.expr) -> str:
    """Return a text of the source, with a gap for each part that is not known before a run."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return GAP
