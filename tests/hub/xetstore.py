"""The Xet storage on disk: xorbs as they came and unpacked, what is in them, and the files that they make up."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import RLock

from tests.hub.disk import Blobs, write_atomically
from tests.hub.shards import FileInfo, Term, XorbInfo, known_chunks, read_shard
from tests.hub.xorbs import Chunk, chunks_of, content_of


@dataclass(slots=True, kw_only=True)
class XetStore:
    """All xorbs and files of one Hub, in `root`; whole files also go to `blobs`, for clients without Xet."""

    root: Path
    blobs: Blobs
    _xorb_of_chunk: dict[str, str] = field(default_factory=dict)
    _lock: RLock = field(default_factory=RLock)

    def __post_init__(self) -> None:
        for path in self.root.glob("infos/*"):
            self._remember(_info(path.read_bytes()))

    def xorb_path(self, xorb: str) -> Path:
        """Return where a xorb lies, if it is here."""
        return self.root / "xorbs" / xorb

    def put_xorb(self, xorb: str, body: bytes) -> bool:
        """Store a xorb; False where it was here already. Raises ValueError for bytes that are no xorb."""
        content = b"".join(content_of(body, chunk) for chunk in chunks_of(body))
        if self.xorb_path(xorb).exists():
            return False
        write_atomically(self.root / "unpacked" / xorb, content)
        write_atomically(self.xorb_path(xorb), body)
        return True

    def chunks(self, xorb: str) -> list[Chunk]:
        """Return the chunks of a xorb; raises ValueError where it is not here."""
        path = self.xorb_path(xorb)
        if not path.exists():
            raise ValueError(f"xorb {xorb} is not here")
        return _chunks_at(path)

    def put_shard(self, body: bytes) -> list[tuple[str, str]]:
        """Register the files of a shard; return the Xet hash and the sha256 of each.

        Raises:
            ValueError: no shard; a term of what is not here; a file without sha256.
            RefusedError: the content of a file has another sha256.
        """
        files, xorbs = read_shard(body)
        known = []
        for file in files:
            if file.sha256 is None:
                raise ValueError(f"file {file.xet_hash} has no sha256")
            self._put_file(file, file.sha256)
            known.append((file.xet_hash, file.sha256))
        for info in xorbs:
            if len(self.chunks(info.xet_hash)) != len(info.chunks):
                raise ValueError(f"xorb {info.xet_hash} has another number of chunks")
            write_atomically(self.root / "infos" / info.xet_hash, info.block)
            self._remember(info)
        return known

    def _put_file(self, file: FileInfo, sha256: str) -> None:
        size_bytes = sum(term.size_bytes for term in file.terms)
        with self.blobs.incoming() as incoming:
            for term in file.terms:
                incoming.write(self._content(term))
            incoming.store(self.blobs.large_path(sha256), sha256=sha256, size_bytes=size_bytes)
        record = {"sha256": sha256, "terms": [asdict(term) for term in file.terms]}
        write_atomically(self.root / "files" / file.xet_hash, json.dumps(record))

    def _content(self, term: Term) -> bytes:
        chunks = self.chunks(term.xorb)
        if not 0 <= term.start < term.end <= len(chunks):
            raise ValueError(f"xorb {term.xorb} has no chunks {term.start} to {term.end}")
        before = sum(chunk.size_bytes for chunk in chunks[: term.start])
        size_bytes = sum(chunk.size_bytes for chunk in chunks[term.start : term.end])
        if size_bytes != term.size_bytes:
            raise ValueError(f"a term says {term.size_bytes} bytes, its chunks have {size_bytes}")
        with (self.root / "unpacked" / term.xorb).open("rb") as unpacked:
            unpacked.seek(before)
            return unpacked.read(size_bytes)

    def file(self, xet_hash: str) -> FileInfo | None:
        """Return what makes up a file, None where it is not here."""
        path = self.root / "files" / xet_hash
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        terms = tuple(Term(**term) for term in record["terms"])
        return FileInfo(xet_hash=xet_hash, terms=terms, sha256=record["sha256"])

    def chunk_shard(self, chunk: str) -> bytes | None:
        """Return a shard that tells which xorb holds a chunk, and what else is in it; None where none does."""
        with self._lock:
            xorb = self._xorb_of_chunk.get(chunk)
        return None if xorb is None else known_chunks({xorb: (self.root / "infos" / xorb).read_bytes()})

    def rot(self, xorb: str) -> None:
        """Flip the last bit of a xorb where it lies."""
        body = bytearray(self.xorb_path(xorb).read_bytes())
        body[chunks_of(bytes(body))[-1].end - 1] ^= 1
        write_atomically(self.xorb_path(xorb), bytes(body))

    def _remember(self, info: XorbInfo) -> None:
        with self._lock:
            for chunk in info.chunks:
                self._xorb_of_chunk.setdefault(chunk, info.xet_hash)


def _info(block: bytes) -> XorbInfo:
    _, (info,) = read_shard(known_chunks({"": block}))
    return info


@lru_cache(maxsize=64)
def _chunks_at(path: Path) -> list[Chunk]:
    return chunks_of(path.read_bytes())
