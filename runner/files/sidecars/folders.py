"""A folder as a list of its files, and the small JSON files in it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.files.sidecars.names import MODULES, is_hidden
from runner.protocol.syntax import parse_json

MAX_JSON_BYTES = 100_000_000


def files_of(root: Path) -> tuple[str, ...]:
    """Return every regular file under `root`, by its path with forward slashes, sorted."""
    return tuple(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; None where there is none that can be read, or it is larger than 100 MB."""
    try:
        return parse_json(path.read_bytes()) if path.stat().st_size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file; empty where there is none."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def module_folders(root: Path) -> tuple[str, ...]:
    """Return the folders that sentence-transformers loads modules from, with a slash at the end."""
    modules = read_json(root / MODULES)
    found = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    paths = [path.strip("/") for path in found if isinstance(path, str)]
    return tuple(f"{path}/" for path in paths if path and not is_hidden(path))


def is_same(left: Path, right: Path) -> bool:
    """Return whether both files are there, with the same bytes."""
    if not (left.is_file() and right.is_file()) or left.stat().st_size != right.stat().st_size:
        return False
    return left.read_bytes() == right.read_bytes()
