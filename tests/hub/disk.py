"""Bytes on disk: files replaced atomically, blobs named by what is in them."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from tests.hub import refusals


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` at `path`, so that a reader or a crash sees the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    new.replace(path)


def git_blob_oid(content: bytes) -> str:
    """Return the git object id (sha1, 40 hex digits) of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A large blob that is arriving; nothing is stored unless `store` is reached with the right digest."""

    folder: Path
    size_bytes: int = 0
    _file: BinaryIO = field(init=False)
    _path: Path = field(init=False)
    _sha256: hashlib._Hash = field(default_factory=hashlib.sha256)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / f".{secrets.token_hex(8)}"
        self._file = self._path.open("wb")
        return self

    def write(self, block: bytes) -> None:
        """Append the next bytes."""
        self._file.write(block)
        self._sha256.update(block)
        self.size_bytes += len(block)

    def store(self, path: Path, *, sha256: str, size_bytes: int) -> None:
        """Keep the bytes at `path`; refuses bytes that are not what was announced."""
        self._file.close()
        got = self._sha256.hexdigest()
        if (got, self.size_bytes) != (sha256, size_bytes):
            raise refusals.bad_request(
                f"The uploaded bytes do not match: got sha256 {got} and {self.size_bytes} bytes, "
                f"announced sha256 {sha256} and {size_bytes} bytes"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path.replace(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blobs:
    """All content of one Hub: small files by git object id, large files by sha256, parts of uploads in progress."""

    root: Path

    def put_small(self, content: bytes) -> str:
        """Store a small file and return its git object id."""
        oid = git_blob_oid(content)
        path = self.small_path(oid)
        if not path.exists():
            write_atomically(path, content)
        return oid

    def put_large(self, content: bytes) -> str:
        """Store a large file and return its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        with self.incoming() as incoming:
            incoming.write(content)
            incoming.store(self.large_path(sha256), sha256=sha256, size_bytes=len(content))
        return sha256

    def small_path(self, oid: str) -> Path:
        """Return where the small file with this git object id lies."""
        return self.root / "git" / oid[:2] / oid

    def large_path(self, sha256: str) -> Path:
        """Return where the large file with this sha256 lies, if it is here."""
        return self.root / "lfs" / sha256[:2] / sha256

    def incoming(self) -> Incoming:
        """Return a context in which a large file can arrive."""
        return Incoming(folder=self.root / "incoming")

    def part_path(self, upload: str, number: int) -> Path:
        """Return where a part of a multipart upload lies."""
        return self.root / "parts" / upload / f"{number:05d}"

    def drop_parts(self, upload: str) -> None:
        """Remove what is left of a multipart upload."""
        folder = self.root / "parts" / upload
        for part in sorted(folder.iterdir()) if folder.is_dir() else ():
            part.unlink()
        if folder.is_dir():
            folder.rmdir()

    def flipped(self, sha256: str) -> str:
        """Store a copy of a large file with its last bit flipped; return the sha256 of the copy."""
        content = bytearray(self.large_path(sha256).read_bytes())
        content[-1] ^= 1
        return self.put_large(bytes(content))

    def rot(self, sha256: str) -> None:
        """Flip the last bit of a large file where it lies: its name is then wrong."""
        content = bytearray(self.large_path(sha256).read_bytes())
        content[-1] ^= 1
        write_atomically(self.large_path(sha256), bytes(content))
