"""Every word of code, setting or command that a message of `runner` shows, read from the source.

Messages put them in backticks. Read are all texts that are no docstrings, but those of the documents (the card has
tests of its own), and the characters that `runner.protocol.syntax` quotes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools.messages import ROOT, text_of

# Not said to a user who has to act: pages and cards, and the grammar of names.
_OTHERS = ("runner/supervisor/documents/", "runner/protocol/syntax.py")
_SPAN = re.compile(r"`([^`\n]+)`")
# Code that somebody might paste, wherever it is written.
CODE = re.compile(
    r"(?:from|save)_pretrained|dequantize|\bpip3? install|\bdocker \w|\bgit (?:lfs|clone|pull)\b|python -\w|\bhf \w+"
)


def texts(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Yield (file, text) of every text in `runner`, with a gap for each part that is not known before a run."""
    for path in sorted((root / "runner").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(_OTHERS):
            for text in texts_of(path.read_text("utf-8")):
                yield name, text


def texts_of(source: str) -> Iterator[str]:
    """Yield the texts of one module that are no docstrings."""
    seen: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr):  # a docstring
            seen.update(ast.walk(node.value) if isinstance(node.value, ast.Constant) else ())
        elif isinstance(node, ast.BinOp | ast.JoinedStr | ast.Constant) and node not in seen:
            seen.update(ast.walk(node))
            yield text_of(node)


def spans(text: str) -> list[str]:
    """Return what a text shows in backticks, but for single characters and gaps."""
    return [span for span in _SPAN.findall(text) if re.search(r"[A-Za-z0-9]", span)]


def shown(root: Path = ROOT) -> dict[str, str]:
    """Return each span that a message shows, with a file that shows it."""
    return {span: name for name, text in texts(root) for span in spans(text)}
