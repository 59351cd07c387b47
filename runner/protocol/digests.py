"""Names for what is in a folder: sha256 of files, one digest of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runner.protocol.errors import BrokenCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """One file of a release.

    Attributes:
        path: relative to the folder, with forward slashes.
        size_bytes: of its content.
        sha256: 64 hex digits.
    """

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOrigins:
    """What came from where, by paths; each list is sorted.

    Attributes:
        base: carried from the base.
        adapter: carried from the adapter, by their names in the release.
        edited: of these, what was changed in them: path → keys.
        left_of_base: files of the base that the release does not have, hidden ones not named.
        left_of_adapter: the same of the adapter.
    """

    base: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    edited: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_of_base: tuple[str, ...] = ()
    left_of_adapter: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedCheckpoint:
    """A finished merge on disk.

    Attributes:
        root: the folder.
        files: every file in it, sorted by path.
        tensors_merged: stored tensors that the adapter changed or added.
        tensors_copied: stored tensors whose bytes are the base's.
        tensors_cast: stored tensors that only changed their dtype.
        read_bytes: of base and adapter weights.
        written_bytes: of all files.
        wall_s: seconds from the first byte to the last.
        shards_resumed: weight files that were taken over from a run that was interrupted.
        note: what the user should know of such a run; "" when there was none.
    """

    root: Path
    files: tuple[FileDigest, ...]
    tensors_merged: int
    tensors_copied: int
    tensors_cast: int
    read_bytes: int
    written_bytes: int
    wall_s: float
    shards_resumed: int = 0
    note: str = ""

    @property
    def digest(self) -> str:
        """The merged digest; see `digest_of`."""
        return digest_of(self.files)


def digest_of(files: Iterable[FileDigest]) -> str:
    """Return sha256 over the lines that `sha256sum` prints for the files, sorted by path: 64 hex digits.

    A line is the sha256, two spaces, the path and a line feed.
    """
    lines = sorted(f"{file.path}\0{file.sha256}" for file in files)
    text = "".join(f"{sha256}  {path}\n" for path, sha256 in (line.split("\0") for line in lines))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(root: Path, path: str) -> FileDigest:
    """Return size and sha256 of `root/path`, read once in blocks of 1 MiB."""
    digest = hashlib.sha256()
    size_bytes = 0
    with (root / path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size_bytes += len(block)
    return FileDigest(path=path, size_bytes=size_bytes, sha256=digest.hexdigest())


def digest_folder(root: Path) -> tuple[FileDigest, ...]:
    """Return the digests of every regular file under `root`, sorted by path; hidden ones are left out.

    Raises:
        BrokenCheckpoint: a file has a name that cannot be written in one line.
    """
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    return tuple(digest_file(root, plain_name(path)) for path in paths)


def plain_name(path: str) -> str:
    """Return `path` if it is text of one line, as every list of files needs it.

    Raises:
        BrokenCheckpoint: it holds a line break, a control character or bytes that are no text.
    """
    if path.isprintable():
        return path
    raise BrokenCheckpoint(
        f"A file has the name {path[:200]!r}.",
        why="A name with a line break or a control character could pass for another file, or for a command in a log.",
        fix="Rename or remove the file.",
    )
