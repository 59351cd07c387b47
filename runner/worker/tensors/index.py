"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from runner.files.layout import INDEX_FILE
from runner.protocol.syntax import parse_json


def build_index(base: Path, weight_map: Mapping[str, str], total_bytes: int) -> bytes:
    """Return the index of the output: the base's own bytes where they are still true.

    Args:
        base: folder with the base's index, whose order and other metadata are kept.
        weight_map: tensor name → file name in the output; what the base does not name goes to the end.
        total_bytes: of all tensors.
    """
    original = (base / INDEX_FILE).read_bytes()
    index = parse_json(original)
    if index["weight_map"] == weight_map and index.get("metadata", {}).get("total_size") == total_bytes:
        return original
    kept = {name: weight_map[name] for name in index["weight_map"] if name in weight_map}
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total_bytes}
    index["weight_map"] = kept | dict(weight_map)
    return (json.dumps(index, indent=2) + "\n").encode()
