"""Room on every disk that a run writes to, asked before anything is downloaded. Lower bounds: what fits is not refused.

The plan knows the exact figure later, and the merge checks it again; this is so that nobody waits for a download of
hours to be told.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.protocol.errors import NotEnoughDisk

REPORT_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one folder will take.

    Attributes:
        folder: need not exist yet.
        size_bytes: that are not there already.
        name: of the input that moves it.
        what: is written there.
    """

    folder: Path
    size_bytes: int
    name: str
    what: str


def check_room(needs: Sequence[Need]) -> None:
    """Return if everything fits, folders on one disk taken together.

    Raises:
        NotEnoughDisk: with every disk that is too small, its folders, and the missing bytes.
    """
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(existing(need.folder).stat().st_dev, []).append(need)
    short = []
    for shared in disks.values():
        free = shutil.disk_usage(existing(shared[0].folder)).free
        needed = sum(need.size_bytes for need in shared)
        if needed > free:
            parts = ", ".join(
                f"{need.what} in {str(need.folder)!r} takes {need.size_bytes / 1e9:.3f} GB" for need in shared
            )
            short.append((shared, f"{parts}; {free / 1e9:.3f} GB are free, {(needed - free) / 1e9:.3f} GB are missing"))
    if short:
        names = dict.fromkeys(f"`{need.name}`" for shared, _ in short for need in shared)
        raise NotEnoughDisk(
            f"There is not enough room: {'. '.join(text for _, text in short)}.",
            why="The folders of one disk are counted together, before anything is downloaded.",
            fix=f"Free space, or point {' or '.join(names)} at a larger disk.",
        )


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
