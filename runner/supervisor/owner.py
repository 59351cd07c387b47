"""To whom files belong. What root leaves in a user's folder stops the runner's next checkout, which cleans it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def owner_of(folder: Path) -> tuple[int, int]:
    """Return user and group of a folder, or of the nearest one above it that exists."""
    status = next(path for path in (folder, *folder.parents) if path.exists()).stat()
    return status.st_uid, status.st_gid


def give(paths: Iterable[Path], owner: tuple[int, int]) -> None:
    """Let these files, folders and links (not what they lead to) belong to `owner`; only root can, others do not."""
    if os.geteuid() == 0:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.chown(path, *owner, follow_symlinks=False)


def give_back(folder: Path, workspace: Path, *, whole: bool) -> None:
    """Let what root has made belong to the workspace's user if it lies there, else to the owner of its parent.

    Args:
        folder: with the folders above it that had to be made.
        workspace: of the job.
        whole: everything in it, too; for a folder that holds nothing of others.
    """
    is_inside = folder.is_relative_to(workspace) and folder != workspace
    owner = owner_of(workspace if is_inside else folder.parent)
    between = [path for path in folder.parents if path.is_relative_to(workspace)][:-1] if is_inside else []
    made = [
        path for path in (*between, folder, *(folder.rglob("*") if whole else ())) if path.is_symlink() or path.exists()
    ]
    give((path for path in made if path.lstat().st_uid == 0), owner)
