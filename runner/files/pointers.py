"""Git LFS pointers: what a checkout without LFS leaves in the place of large files.

A pointer reads like a damaged file to everything else, or, as a tokenizer, like a file that is copied in good faith.
No torch.
"""

from __future__ import annotations

from pathlib import Path

from runner.protocol.errors import Problem

SIGNATURE = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024  # by the format's own definition


def is_pointer(path: Path) -> bool:
    """Return whether the file is a Git LFS pointer; reads at most its first bytes.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size >= MAX_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def pointer_problem(name: str) -> Problem:
    """Return what to tell about the file `name`, which is a pointer."""
    return Problem(
        what=f"{name} is a Git LFS pointer, not the file that it stands for.",
        why="The folder is a git checkout without its LFS files.",
        fix="Check out with `lfs: true` (`actions/checkout`), run `git lfs pull`, or name the repository on the Hub.",
    )
