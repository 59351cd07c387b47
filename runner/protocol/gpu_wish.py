"""What a run wants of a GPU, as both processes know it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuWish:
    """What a run wants of a GPU before it uses one.

    Attributes:
        min_free_bytes: of its memory; 0 for any.
        wait_s: how long to wait for that, and for the other runs.
        locks: folder of the locks that the runs of this host share; None for none.
        holder: what other runs are told of this one.
    """

    min_free_bytes: int = 0
    wait_s: float = 0.0
    locks: Path | None = None
    holder: str = ""
