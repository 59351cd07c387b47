"""What the kernel notes of memory for this process's control group: the limit, and how often it killed for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Version 2, then version 1. In a container the group's own files are at the root of the mount.
_FILES = (
    ("sys/fs/cgroup", "memory.events", "memory.max"),
    ("sys/fs/cgroup/memory", "memory.oom_control", "memory.limit_in_bytes"),
)
_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number near 2^63


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The control group's notes.

    Attributes:
        kills: processes that the kernel has killed in it for memory.
        limit_bytes: None for none.
    """

    kills: int
    limit_bytes: int | None


def read_memory(root: Path = Path("/")) -> Memory | None:
    """Return what is noted for this process, or None where the kernel does not tell it."""
    own = _own_paths(root)
    for mount, events, limit in _FILES:
        for group in own:
            folder = root / mount / group
            kills = _number(r"^oom_kill (\d+)$", folder / events)
            if kills is not None:
                bound = _number(r"^(\d+)$", folder / limit)
                return Memory(
                    kills=kills, limit_bytes=bound if bound is not None and bound < _UNLIMITED_BYTES else None
                )
    return None


def _own_paths(root: Path) -> list[str]:
    """Return the group's path below the mount as the kernel names it, then the mount itself."""
    try:
        text = (root / "proc/self/cgroup").read_text()
    except OSError:
        return [""]
    named = re.findall(r"^(?:\d+:memory:|0::)/(.*)$", text, re.MULTILINE)
    return [*named, ""]


def _number(pattern: str, path: Path) -> int | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
