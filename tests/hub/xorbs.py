"""Xorbs: series of chunks, each with a header, stored plain, in LZ4 frames, or with its bytes grouped before.

Source: the Xet specification (xorb format) and the LZ4 frame and block formats. Checksums of LZ4 frames are skipped:
what a file holds is checked by its sha256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_HEADER_BYTES = 8
_FOOTER_MARK = b"XETBLOB"
_LZ4_MAGIC = b"\x04\x22\x4d\x18"
_PLAIN, _LZ4, _GROUPED_LZ4 = 0, 1, 2
_MAX_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One chunk of a xorb.

    Attributes:
        start: offset of its header in the xorb.
        end: offset of the first byte after it.
        size_bytes: of its content.
        scheme: how it is compressed.
    """

    start: int
    end: int
    size_bytes: int
    scheme: int


def chunks_of(xorb: bytes) -> list[Chunk]:
    """Return the chunks of a xorb in their order; raises ValueError where the bytes are no xorb."""
    return list(_chunks(xorb))


def _chunks(xorb: bytes) -> Iterator[Chunk]:
    start = 0
    while start < len(xorb) and not xorb.startswith(_FOOTER_MARK, start):
        header = xorb[start : start + _HEADER_BYTES]
        stored, size = int.from_bytes(header[1:4], "little"), int.from_bytes(header[5:8], "little")
        end = start + _HEADER_BYTES + stored
        if len(header) < _HEADER_BYTES or header[0] != 0 or header[4] > _GROUPED_LZ4 or end > len(xorb):
            raise ValueError(f"no chunk at byte {start}")
        yield Chunk(start=start, end=end, size_bytes=size, scheme=header[4])
        start = end
    if start == 0:
        raise ValueError("no chunks")


def content_of(xorb: bytes, chunk: Chunk) -> bytes:
    """Return the content of a chunk; raises ValueError where it does not decompress to its size."""
    stored = xorb[chunk.start + _HEADER_BYTES : chunk.end]
    if chunk.scheme == _PLAIN:
        content = stored
    else:
        try:
            content = _decompressed(stored)
        except IndexError:
            raise ValueError("an LZ4 frame ends too early") from None
        if chunk.scheme == _GROUPED_LZ4:
            content = _ungrouped(content)
    if len(content) != chunk.size_bytes:
        raise ValueError(f"a chunk has {len(content)} bytes, its header says {chunk.size_bytes}")
    return content


def _ungrouped(grouped: bytes) -> bytes:
    """Return bytes that were sorted by their position modulo 4."""
    content = bytearray(len(grouped))
    start = 0
    for position in range(4):
        size = len(content[position::4])
        content[position::4] = grouped[start : start + size]
        start += size
    return bytes(content)


def _decompressed(frame: bytes) -> bytes:
    if not frame.startswith(_LZ4_MAGIC):
        raise ValueError("no LZ4 frame")
    flags = frame[4]
    block_checksums, content_size, dictionary = flags & 0x10, flags & 0x08, flags & 0x01
    at = 7 + (8 if content_size else 0) + (4 if dictionary else 0)
    out = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        at += 4
        block = frame[at : at + (size & 0x7FFFFFFF)]
        at += len(block) + (4 if block_checksums else 0)
        if size >> 31:
            out += block
        else:
            _append_block(block, out)
    return bytes(out)


def _append_block(block: bytes, out: bytearray) -> None:
    """Decompress one LZ4 block to the end of `out`; its matches may reach back into what is there."""
    at, end = 0, len(block)
    while True:
        token = block[at]
        at += 1
        literals, matched = token >> 4, token & 15
        if literals == 15:
            literals, at = _longer(block, at)
        out += block[at : at + literals]
        at += literals
        if at >= end:
            return
        offset = block[at] | block[at + 1] << 8
        at += 2
        if matched == 15:
            matched, at = _longer(block, at)
        matched += 4
        start = len(out) - offset
        if offset == 0 or start < 0 or start > _MAX_CHUNK_BYTES:
            raise ValueError("an LZ4 block refers to what is not there")
        if offset >= matched:
            out += out[start : start + matched]
        else:
            out += (out[start:] * (matched // offset + 1))[:matched]


def _longer(block: bytes, at: int) -> tuple[int, int]:
    """Return a length that did not fit its four bits, and where the next byte is."""
    length = 15
    while (more := block[at]) == 255:
        length += 255
        at += 1
    return length + more, at + 1
