"""The dtype of a merge that somebody else made, where nobody says which it is.

`dtype: auto` asks that each tensor keeps the base's dtype. In `mode: verify` it is also what somebody has who merged in
float32 and left the input as it was: then the folder says itself what it is in, twice, and is judged as that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.files.layout import Checkpoint
from runner.judge.numbers.tensors import DTYPE_NAMES, FLOATS
from runner.judge.structure import DTYPE_KEYS, read_json
from runner.protocol.verdict import Check, Layer, Outcome


def own_dtype(base: Checkpoint, merged: Checkpoint) -> str:
    """Return what `dtype: auto` means for a folder: the one dtype of all its floats, where config.json says the same.

    "auto" where the base's tensors have that dtype already, where the folder's differ, or config.json says otherwise.
    """
    stored = _floats(merged)
    if len(stored) != 1 or stored == _floats(base):
        return "auto"
    (only,) = stored
    name = next(name for name, spelled in DTYPE_NAMES.items() if spelled == only)
    return name if _said(read_json(merged.root / "config.json") or {}) == {name} else "auto"


def told(dtype: str) -> Check:
    """Return the check that tells in which dtype a folder was judged that nobody named one for."""
    return Check(
        layer=Layer.STRUCTURE,
        name="the dtype is the folder's own",
        outcome=Outcome.PASS,
        detail=f"`dtype: auto` was read as {dtype}: every float of the folder is stored so, and config.json says so.",
    )


def _floats(checkpoint: Checkpoint) -> set[str]:
    return {info.dtype for info in checkpoint.tensors.values() if info.dtype in FLOATS}


def _said(config: Mapping[str, Any]) -> set[str]:
    """Return the dtypes that a config and those in it name."""
    found = {str(config[key]).removeprefix("torch.") for key in DTYPE_KEYS if config.get(key) is not None}
    return found.union(*(_said(value) for value in config.values() if isinstance(value, dict)))
