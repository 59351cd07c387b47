"""A folder as a list of files, and whether two files have the same bytes. Nothing is followed out of a regular file.

Links to regular files count as files, since caches of the Hub consist of them. Folders behind links, pipes, devices
and what cannot be read are told apart, never opened. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.protocol.syntax import parse_json

MAX_FILES = 20_000  # of one folder; a model has a few dozen
MAX_JSON_BYTES = 200_000_000
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Every file below a folder.

    Attributes:
        root: the folder.
        sizes: path with forward slashes → bytes, of regular files.
        odd: path → what it is instead of a regular file.
    """

    root: Path
    sizes: Mapping[str, int]
    odd: Mapping[str, str]

    def __contains__(self, path: str) -> bool:
        return path in self.sizes

    def names(self, path: str) -> Path:
        """Return where a listed file is."""
        return self.root / path


def list_folder(root: Path) -> Listing:
    """Return what is below `root`; an empty listing where it is no folder."""
    sizes: dict[str, int] = {}
    odd: dict[str, str] = {}
    for path, entry in _walk(root, ""):
        if len(sizes) + len(odd) >= MAX_FILES:
            odd["…"] = f"one of more than {MAX_FILES} files"
            break
        if isinstance(entry, str):
            odd[path] = entry
        else:
            sizes[path] = entry
    return Listing(root=root, sizes=dict(sorted(sizes.items())), odd=odd)


def _walk(root: Path, prefix: str) -> Iterator[tuple[str, int | str]]:
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        if prefix or not isinstance(error, FileNotFoundError | NotADirectoryError):
            yield prefix.rstrip("/") or ".", f"a folder that cannot be read ({error.strerror})"
        return
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root / entry.name, f"{path}/")
        else:
            yield path, _size(entry)


def _size(entry: os.DirEntry[str]) -> int | str:
    """Return a regular file's size, or what the entry is instead."""
    try:
        found = entry.stat()
    except OSError as error:
        return (
            f"a link that leads nowhere ({error.strerror})" if entry.is_symlink() else f"unreadable ({error.strerror})"
        )
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    what = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = what.get(stat.S_IFMT(found.st_mode), "a device")
    return f"a link to {kind}" if entry.is_symlink() else kind


def same_bytes(path: str, left: Listing, right: Listing, *, other: str | None = None) -> bool:
    """Return whether both have the file, with the same bytes; `other` is its path on the right.

    Raises:
        OSError: a file cannot be read.
    """
    theirs = path if other is None else other
    if path not in left or theirs not in right or left.sizes[path] != right.sizes[theirs]:
        return False
    if left.names(path).samefile(right.names(theirs)):
        return True
    with left.names(path).open("rb") as mine, right.names(theirs).open("rb") as yours:
        while block := mine.read(BLOCK_BYTES):
            if block != yours.read(len(block)):
                return False
    return True


def sha256_of(path: Path) -> str:
    """Return a file's sha256; see `same_bytes` for what it raises."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_of(path: str, listing: Listing) -> Any:
    """Return what a JSON file holds; None where it is absent, too large, unreadable or not JSON."""
    if listing.sizes.get(path, MAX_JSON_BYTES + 1) > MAX_JSON_BYTES:
        return None
    try:
        return parse_json(listing.names(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def canonical(value: Any) -> str:
    """Return a JSON value as text that is equal for equal values only: keys sorted, 1 and true and 1.0 apart."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True)


def shown(path: str) -> str:
    """Return a path that can be printed and sent, whatever bytes it has."""
    return path if path.isprintable() and path.isascii() else ascii(path)
