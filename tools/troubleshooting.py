"""Every message of the program, by exit code: read from the source, so that none is missing and none is stale.

An error is written where it is raised, as `Family(what, why=…, fix=…)`. What a message takes from the run is shown as
`…`. A message whose `what` is made elsewhere cannot be read here; the function that makes it has it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner import errors
from runner.documents.markdown import table
from runner.errors import EXIT_CANCELLED, EXIT_INTERNAL, EXIT_VERDICT_FAILED, RunnerError

ROOT = Path(__file__).resolve().parent.parent
GAP = "…"
# Functions that put a problem among those of the inputs.
_INPUTS = frozenset({"Problem", "add", "require", "_unknown"})
# Rooms whose `Problem` is not one of the inputs.
_OTHERS = {"runner/gpu/diagnosis.py": "LaunchError"}
_NOT_HERE = frozenset({"runner/errors.py", "runner/supervisor.py"})  # the latter's are in SPECIAL
SPECIAL: Mapping[int, tuple[str, Sequence[tuple[str, str, str]]]] = {
    EXIT_VERDICT_FAILED: (
        "The merge was judged, and the verdict did not pass. It is a result, not an error: the report is complete, "
        "and nothing is published.",
        (
            (
                "The status is `FAIL`.",
                "A check found what a right merge cannot have; each failed check names the worst tensor, what was "
                "expected and what was found, and where it can be told, the diagnosis names the mistake.",
                "Read the failed checks in the summary. In `mode: verify`, repair the merge; a merge of this action "
                "that fails is a bug: please report it.",
            ),
            (
                "The status is `NOT_VERIFIED`.",
                "A part of the judgement could not run; the skipped check says which, and why.",
                "Remove the reason, or add `not-verified` to `allow`: the release then says that it is not verified.",
            ),
            (
                "A limit of `quality-limits` is missed.",
                "Rounding, or the adapter, costs more than you allow.",
                "Take another `dtype`, or `rounding: stochastic`, or loosen the limit.",
            ),
        ),
    ),
    EXIT_INTERNAL: (
        "An error that nobody foresaw: our bug.",
        (
            (
                f"An error that nobody foresaw: {GAP}.",
                "This is a bug of lora-merge-action, not of your inputs.",
                "Please report it with the traceback in the log.",
            ),
        ),
    ),
    EXIT_CANCELLED: (
        "Cancelled.",
        (
            (
                f"The run was cancelled in the phase `{GAP}`.",
                "The process got SIGINT or SIGTERM: a cancelled job, a timeout, or Ctrl-C.",
                "Run again: what is on the Hub already is found and not written twice.",
            ),
        ),
    ),
}
_TIMEOUT = (
    f"The phase `{GAP}` took longer than {GAP} minutes.",
    "`phase-timeout-minutes` ends a phase that hangs, so that there is time left to clean up.",
    "If the phase needs more time, set `phase-timeout-minutes` higher; the log says how far it was.",
)


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


def render_messages() -> str:
    """Return all messages as Markdown, a section for each exit code and class."""
    messages = read_messages()
    parts = {RunnerError.exit_code: _section([RunnerError], messages)}
    for family in RunnerError.__subclasses__():
        parts[family.exit_code] = _section([family, *family.__subclasses__()], messages)
    for code, (meaning, rows) in SPECIAL.items():
        parts[code] = f"## Exit code {code}\n\n{meaning}\n\n{_rows(rows)}"
    return "\n" + "\n".join(parts[code] for code in sorted(parts)) + "\n"


def _section(classes: Sequence[type[RunnerError]], messages: Sequence[Message]) -> str:
    family = classes[0]
    text = f"## Exit code {family.exit_code}\n"
    for one in classes:
        rows = sorted((m.what, m.why, m.fix) for m in messages if m.family == one.__name__)
        if one is RunnerError:
            text += "\nWhat fits no other code.\n"
        else:
            text += f"\n### `{one.__name__}`\n\n{(one.__doc__ or '').strip().partition(chr(10))[0]}\n"
        if rows:
            text += "\n" + _rows(rows)
        elif one.__subclasses__():
            text += "\nThe family of those below; by itself it is never told.\n"
    return text


def _rows(rows: Sequence[tuple[str, str, str]]) -> str:
    return table(("What happened", "Why", "What to do"), [[_cell(cell) for cell in row] for row in rows]) + "\n"


def _cell(text: str) -> str:
    if not text.strip(f"{GAP} ./"):
        return "(the message says it)"
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return flat.replace(GAP * 2, GAP)


def messages_of(name: str, tree: ast.Module) -> Iterator[Message]:
    """Yield the messages of one module.

    Args:
        name: its path in the repository.
        tree: its source.
    """
    known = {one.__name__ for one in errors.families()} | {"InputError"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
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
    """Return a text of the source, with a gap for each part that is not known before a run."""
    if isinstance(node, ast.IfExp):
        either, other = _part(node.body), _part(node.orelse)
        return GAP if GAP in (either, other) else f"{either} / {other}"
    return _part(node)


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_part(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _part(node.left) + _part(node.right)
    return GAP
