"""Shards: which chunks of which xorbs make up a file, and which chunks a xorb holds.

Source: the Xet specification (shard format). Hashes are text as the protocol writes them: four little-endian 64-bit
words, each in hexadecimal.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

TAG = b"HFRepoMetaData\x00Ui" + bytes((103, 69, 106, 123, 129, 87, 131, 165, 189, 217, 92, 205, 209, 74, 169))
_ROW_BYTES = 48
_BOOKEND = b"\xff" * 32 + bytes(16)
_FOOTER_BYTES = 200
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30
_EXPIRES_AFTER_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Chunks `start` to `end` (not included) of a xorb, of `size_bytes` when they are not compressed."""

    xorb: str
    start: int
    end: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One file: its Xet hash, its content as terms, and the sha256 of the content (hex) where it is told."""

    xet_hash: str
    terms: tuple[Term, ...]
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class XorbInfo:
    """The chunks of one xorb.

    Attributes:
        xet_hash: of the xorb.
        chunks: their hashes.
        block: the serialised information itself.
    """

    xet_hash: str
    chunks: tuple[str, ...]
    block: bytes


def hash_text(raw: bytes) -> str:
    """Return the text of a hash of 32 bytes."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def read_shard(shard: bytes) -> tuple[list[FileInfo], list[XorbInfo]]:
    """Return the files and the xorbs of a shard, with or without footer; raises ValueError for anything else."""
    if shard[:32] != TAG or int.from_bytes(shard[32:40], "little") != 2:
        raise ValueError("no shard of version 2")
    rows = memoryview(shard)[_ROW_BYTES:]
    files: list[FileInfo] = []
    at = 0
    while (header := _row(rows, at)) != _BOOKEND:
        info, at = _file_info(rows, at, header)
        files.append(info)
    xorbs: list[XorbInfo] = []
    at += 1
    while (header := _row(rows, at)) != _BOOKEND:
        (count,) = struct.unpack_from("<I", header, 36)
        chunks = tuple(hash_text(_row(rows, at + 1 + number)[:32]) for number in range(count))
        block = bytes(rows[at * _ROW_BYTES : (at + 1 + count) * _ROW_BYTES])
        xorbs.append(XorbInfo(xet_hash=hash_text(header[:32]), chunks=chunks, block=block))
        at += 1 + count
    return files, xorbs


def _file_info(rows: memoryview, at: int, header: bytes) -> tuple[FileInfo, int]:
    flags, count = struct.unpack_from("<II", header, 32)
    terms = []
    for number in range(count):
        row = _row(rows, at + 1 + number)
        _, size, start, end = struct.unpack_from("<4I", row, 32)
        terms.append(Term(xorb=hash_text(row[:32]), start=start, end=end, size_bytes=size))
    at += 1 + count
    if flags & _WITH_VERIFICATION:
        at += count
    sha256 = None
    if flags & _WITH_METADATA:
        sha256 = hash_text(_row(rows, at)[:32])
        at += 1
    return FileInfo(xet_hash=hash_text(header[:32]), terms=tuple(terms), sha256=sha256), at


def _row(rows: memoryview, number: int) -> bytes:
    row = bytes(rows[number * _ROW_BYTES : (number + 1) * _ROW_BYTES])
    if len(row) < _ROW_BYTES:
        raise ValueError("the shard ends too early")
    return row


def known_chunks(blocks: Mapping[str, bytes]) -> bytes:
    """Return a shard without files that tells a client which chunks are here; `blocks` are of `XorbInfo`, by hash."""
    infos = TAG + struct.pack("<QQ", 2, _FOOTER_BYTES) + _BOOKEND + b"".join(blocks.values()) + _BOOKEND
    # What the specification calls reserved are the places and lengths of three tables. hf_xet takes the place of the
    # first for the end of the information, and reads the information itself where the tables are empty.
    end, now_s = len(infos), int(time.time())
    footer = struct.pack("<3Q6Q", 1, _ROW_BYTES, 2 * _ROW_BYTES, end, 0, end, 0, end, 0)
    footer += struct.pack("<32xQQ72xQ", now_s, now_s + _EXPIRES_AFTER_S, end)
    return infos + footer
