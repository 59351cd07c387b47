"""The changes that `tools.mutants` makes: what can be changed in the judge's code, and how a process is given it.

Comparisons, boolean and arithmetic operators, numbers and truth values are replaced; conditions are negated; statements
are left out; texts stay. Constants of modules and defaults of arguments are not part of a function's code.
"""

from __future__ import annotations

import ast
import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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
        module: of `runner.judge`.
        function: its qualified name.
        line: in the file.
        first_line: of the statement, or of its head, that it belongs to.
        last_line: of the same.
        change: what is done there.
        number: of the node in the function's tree, in the order of `_nodes`.
        code: of the statement, or of its head, on one line.
    """

    module: str
    function: str
    line: int
    first_line: int
    last_line: int
    change: str
    number: int
    code: str

    @property
    def name(self) -> str:
        """What it is known by, whatever line it is on."""
        return f"{self.module}.{self.function} #{self.number}: {self.change}"


def mutants(module: str) -> Iterator[Mutant]:
    """Yield every mutant of a module of `runner.judge`."""
    text = path_of(module).read_text("utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    for name, function in _functions(tree, ""):
        heads = dict(_heads(function))
        silent = {
            id(part) for one in _nodes(function) if isinstance(one, ast.AnnAssign) for part in ast.walk(one.annotation)
        }
        for number, node in enumerate(_nodes(function)):
            for change in _changes(node) if id(node) not in silent else ():
                line: int = getattr(node, "lineno", 0)
                first, last = heads[node]
                code = " ".join(line.strip() for line in lines[first - 1 : last])
                yield Mutant(
                    module=module, function=name, line=line, first_line=first, last_line=last, change=change,
                    number=number, code=code,
                )  # fmt: skip


def path_of(module: str) -> Path:
    """Return the file of a module of `runner.judge`."""
    rooms = (ROOT / "runner" / "judge", ROOT / "runner" / "protocol")
    found = (path for room in rooms for path in sorted(room.rglob(f"{module}.py")))
    return next(path for path in found if path.parent.name != "diagnosis")


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
    tree = copy.deepcopy(ast.parse(path_of(mutant.module).read_text("utf-8")))
    function = dict(_functions(tree, ""))[mutant.function]
    _apply(list(_nodes(function))[mutant.number], mutant.change)
    code: CodeType = compile(ast.fix_missing_locations(tree), str(path_of(mutant.module)), "exec")
    for name in mutant.function.split("."):
        code = next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name)
    return code


def install(mutant: Mutant) -> None:
    """Give the function in this process the mutant's code, wherever it was imported to."""
    place: Any = importlib.import_module(".".join(path_of(mutant.module).relative_to(ROOT).with_suffix("").parts))
    *outer, last = mutant.function.split(".")
    for name in outer:
        place = getattr(place, name)
    found = vars(place)[last]
    function: Any = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    while not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    function.__code__ = code_of(mutant)
