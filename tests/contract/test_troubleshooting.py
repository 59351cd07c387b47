"""docs/troubleshooting.md has every exit code, every class and every message; and the tests provoke every class."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from runner.protocol.errors import EXIT_CANCELLED, EXIT_INTERNAL, EXIT_VERDICT_FAILED, RunnerError, families
from tools.messages import GAP, Message, messages_of, read_messages
from tools.tables import wanted

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
CLASSES = sorted({one.__name__ for one in families()} | {"InputError"})
CODES = sorted({one.exit_code for one in families()} | {2, EXIT_VERDICT_FAILED, EXIT_INTERNAL, EXIT_CANCELLED})


def provoked(source: str) -> set[str]:
    """Return the classes that the tests in `source` expect to be raised, or to end a run."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "raises" and node.args:
            found |= {one.id for one in ast.walk(node.args[0]) if isinstance(one, ast.Name)}
    return found


EVIDENCE = {name for path in (ROOT / "tests").rglob("test_*.py") for name in provoked(path.read_text("utf-8"))}
ALONE = {one.__name__ for one in families() if [other.exit_code for other in families()].count(one.exit_code) == 1}
TOLD = {message.family for message in read_messages()}


@pytest.mark.parametrize("code", CODES)
def test_every_exit_code_has_its_section(code: int) -> None:
    section = PAGE.partition(f"\n## Exit code {code}\n")[2].partition("\n## ")[0]

    assert section.count("\n| ") >= 3  # a head, a rule, and at least one message


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_its_section_and_is_provoked_by_a_test(name: str) -> None:
    assert name == "RunnerError" or f"\n### `{name}`\n" in PAGE
    if name in TOLD:
        # The only class of its code is provoked by a run with that code: tests/supervisor/run/test_exit_codes.py.
        assert name in EVIDENCE or name in ALONE
    else:  # a family: only its members are ever told
        assert next(one for one in families() if one.__name__ == name).__subclasses__()


def test_the_page_is_up_to_date() -> None:
    assert wanted("docs/troubleshooting.md", PAGE) == PAGE


def test_a_class_that_no_test_provokes_is_noticed() -> None:
    source = "def test_x():\n    with pytest.raises((AccessDenied, TagExists)):\n        f(RepoNotFound)\n"

    assert provoked(source) == {"AccessDenied", "TagExists"}


def test_a_message_is_read_from_the_source() -> None:
    source = """
raise TagExists(f"The tag {tag!r} " "exists.", why="Left." if a else "Right.", fix=f"{fix}")
raise RepoNotFound(what, why="a", fix="b")
form.add(f"`x` is {x}.", why="c", fix="d" + more)
print("no error", why="e")
"""

    assert list(messages_of("runner/x.py", ast.parse(source))) == [
        Message(family="TagExists", what=f"The tag {GAP} exists.", why="Left. / Right.", fix=GAP),
        Message(family="InputError", what=f"`x` is {GAP}.", why="c", fix=f"d{GAP}"),
    ]


def test_no_message_lacks_its_reason_or_its_fix() -> None:
    assert [message for message in read_messages() if not (message.why.strip() and message.fix.strip())] == []
    assert len(read_messages()) > 200  # the reader sees them


def test_a_message_with_gaps_is_found_by_what_a_run_told() -> None:
    message = Message(family=RunnerError.__name__, what=f"The tag {GAP} is (not) {GAP}.", why="", fix="")

    assert message.matches("The tag v1 is (not) here.")
    assert not message.matches("The tag v1 is not here.")
