"""Markdown that cannot be broken by the text inside it. No I/O.

Model names, tensor names, prompts and errors come from files that nobody vouches for. Whatever they hold
(pipes, back-ticks, HTML, links, mentions, line breaks), it is shown as it is and does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_ENTITY = re.compile(r"[<>&$@]")
_PUNCTUATION = re.compile(r"[\\`*_\[\]()#!|~^{}]|^[-+=]|:(?=\S)|(?<=www)\.", re.IGNORECASE)
_SPAN = re.compile(r"`([^`]+)`")
_LIST_NUMBER = re.compile(r"^(\d+)(?=[.)](?:\s|$))")


def escape(text: str) -> str:
    """Return `text` as one line of literal Markdown: no markup, HTML, link, mention or table border in it."""
    return _literal(text).replace("&#64;", "&#64;&#8203;")  # an @ that touches a name would notify somebody


def code(text: str) -> str:
    """Return `text` as one line of inline code, safe in a table too."""
    return f"<code>{_literal(text)}</code>" if text else ""


def prose(text: str) -> str:
    """Return a sentence as `escape` does, with what stands between back-ticks as inline code."""
    parts = _SPAN.split(" ".join(text.split()))
    return "".join(code(part) if number % 2 else _spaced(part) for number, part in enumerate(parts))


def block(text: str) -> str:
    """Return `text` with its line breaks, in a box of fixed width."""
    lines = [_ENTITY.sub(_entity, line) for line in _printable(text).split("\n")]
    # An empty line would end the HTML block, and what follows would be read as Markdown again.
    return "<pre>" + "\n".join(line if line.strip() else "&#32;" for line in lines) + "</pre>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """Return a table; every cell must be Markdown already (see `escape` and `code`).

    Args:
        header: of the columns.
        rows: below it.
        numbers: how many of the columns, the last ones, hold numbers, which stand on the right.
    """
    lines = [header, ["---"] * (len(header) - numbers) + ["---:"] * numbers, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def details(title: str, body: str) -> str:
    """Return a part that is folded away; `title` is plain text, `body` is Markdown."""
    # Inside this HTML no Markdown is read, so a backslash would be shown: entities only.
    line = _ENTITY.sub(_entity, " ".join(_printable(title).split()))
    return f"<details><summary>{line}</summary>\n\n{body}\n\n</details>"


def _literal(text: str) -> str:
    line = " ".join(_printable(text).split())
    line = _PUNCTUATION.sub(lambda found: f"\\{found.group()}", line)
    line = _LIST_NUMBER.sub(r"\1\\", line)
    return _ENTITY.sub(_entity, line)


def _spaced(part: str) -> str:
    """Return a part of a line, escaped, with the spaces at its ends, which part it from code."""
    return " " * part.startswith(" ") + escape(part) + " " * (part.endswith(" ") and part.strip() != "")


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found.group())};"


def _printable(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.encode("utf-8", "replace").decode("utf-8")
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
