"""Whether a config.json can be true of the weights beside it, asked before any code of a model reads the config.

Model classes and their configs make a list or a module for each layer, label and expert that they are told of, so a
number that no model has would take all memory or all time. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.protocol.syntax import parse_json

MOST = 1 << 20  # layers, heads, experts, labels: no model has as many

_IS_COUNT = re.compile(r"(?:^|_)(?:num|n|number|layers?|depths?|blocks|stages|experts|heads|labels)(?:_|$)")
_IS_LENGTH = re.compile(r"positions|ctx|context|tokens?(?:_|$)|steps|samples|params|bytes|size|length|seq|_id(?:_|s|$)")
_MAX_DEPTH = 100


def config_problem(root: Path) -> str:
    """Return which number of the folder's config.json no model has, as a sentence; "" for none, and for no config."""
    try:
        config = parse_json((root / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""  # told by who needs it
    for path, number in _counts(config, "", False, 0):
        if abs(number) > MOST:
            shown = f"{number:.3g}" if abs(number) < 1e300 else "a number of hundreds of digits"
            return f"config.json says {path} = {shown}, and no model has more than {MOST}."
    return ""


def _counts(value: Any, path: str, is_count: bool, depth: int) -> Iterator[tuple[str, int | float]]:
    """Yield every number that counts parts of a model, with its place."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            name = str(key)
            counts = bool(_IS_COUNT.search(name)) and not _IS_LENGTH.search(name)
            yield from _counts(inner, f"{path}.{name}" if path else name, counts, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            is_nested = isinstance(inner, list)  # GPT-Neo's [[["global", "local"], 12]]
            yield from _counts(inner, path, is_count or is_nested, depth + 1)
    elif is_count and isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value
