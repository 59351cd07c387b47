"""The chat templates of a folder, from whichever of the files that may hold them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.files.sidecars.folders import MAX_JSON_BYTES, read_object
from runner.files.sidecars.names import MORE_TEMPLATES, TEMPLATES
from runner.files.sidecars.tokenizers import SETTINGS


def templates_of(root: Path) -> Mapping[str, str]:
    """Return name → template as transformers finds them: "default", and those that have names; empty without any."""
    found: dict[str, str] = {}
    for name in (SETTINGS, TEMPLATES[1]):
        found |= _named(read_object(root / name).get("chat_template"))
    if not found and _is_readable(root / TEMPLATES[1]):
        found = {"default": _text(root / TEMPLATES[1])}  # of a form that nobody knows
    more = {path.stem: path for path in (root / MORE_TEMPLATES).glob("*.jinja")}
    if (root / TEMPLATES[0]).is_file():
        found, more = {}, {**more, "default": root / TEMPLATES[0]}  # it stands before all others
    texts = {name: _text(path) for name, path in more.items() if _is_readable(path)}
    return found | texts


def _named(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value} if value else {}
    entries = value if isinstance(value, list) else []
    return {
        str(entry.get("name")): str(entry.get("template"))
        for entry in entries
        if isinstance(entry, dict) and entry.get("template")
    }


def _is_readable(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= MAX_JSON_BYTES


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace")
