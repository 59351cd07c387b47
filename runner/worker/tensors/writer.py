"""One shard after another, header first; written by one thread while another takes the digest.

The producer borrows a buffer, fills it and gives it up; it returns to the ring when both threads are done with
it. So memory is bounded by the ring, and no byte is read a second time for its digest. Bytes that stay as they are
never enter the ring: the kernel moves them from file to file (and shares them where the file system can), while the
other thread reads them for the digest.
Finished shards appear under their names by rename; a run that dies leaves only `*.part`.

Source: the ring and the two threads follow the measurements in docs/decisions (fresh buffers cost page faults;
sha256 at 1.3 GB/s hides behind the write).
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from runner.protocol.digests import FileDigest
from runner.protocol.errors import BrokenCheckpoint, NotEnoughDisk, ResourceError, RunnerError

BUFFER_BYTES = 1 << 20  # a block and its float32 sum stay in the cache: measured twice as fast as 4 MiB
BUFFERS = 24
RANGE_BYTES = 8 << 20  # the kernel copies this much before the digest may look at it: it is in the page cache then
_QUEUE_LENGTH = 64
# The kernel cannot copy between these two files: other file systems, an old kernel, a file of a special kind.
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(eq=False, slots=True)
class Buffer:
    """A borrowed piece of the ring: `raw` is (size,) uint8; `readers` counts who still needs it."""

    raw: torch.Tensor
    readers: int = 0


@dataclass(frozen=True, slots=True)
class _Chunk:
    view: memoryview
    buffer: Buffer | None


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes [start, start + size_bytes) of an open file."""

    descriptor: int
    start: int
    size_bytes: int


class ShardWriter:
    """Writes the shards of one folder. Use as a context manager; leaving it early removes what is not finished."""

    def __init__(self, root: Path, *, buffer_bytes: int = BUFFER_BYTES, is_pinned: bool = False) -> None:
        """Make the ring.

        Args:
            root: the folder, which exists.
            buffer_bytes: of each buffer.
            is_pinned: in memory that a GPU can reach while the program goes on.
        """
        self._root = root
        self._free: queue.Queue[Buffer] = queue.Queue()
        for _ in range(BUFFERS):
            self._free.put(Buffer(torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=is_pinned)))
        self.buffer_bytes = buffer_bytes
        self._lock = threading.Lock()
        self._descriptor = -1
        self._name = ""
        self._size_bytes = 0
        self._hash = hashlib.sha256()
        self._has_kernel_copy = True
        self._window = memoryview(bytearray(BUFFER_BYTES))
        self._write = _Stage("write", self._write_chunk, self._release)
        self._digest = _Stage("sha256", self._digest_chunk, self._release)

    def __enter__(self) -> Self:
        self._write.start()
        self._digest.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write.stop()
        self._digest.stop()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._part.unlink(missing_ok=True)

    @property
    def _part(self) -> Path:
        return self._root / f"{self._name}.part"

    def begin(self, name: str, header: bytes, size_bytes: int) -> None:
        """Reserve a file of `size_bytes` and write its header.

        Raises:
            NotEnoughDisk: the file system cannot hold it.
        """
        self._name, self._size_bytes, self._hash = name, 0, hashlib.sha256()
        try:
            self._descriptor = os.open(self._part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.posix_fallocate(self._descriptor, 0, size_bytes)
        except OSError as error:
            raise _disk_error(self._name, error) from error
        self.put(memoryview(header))

    def borrow(self) -> Buffer:
        """Return a free buffer of `buffer_bytes`; waits until there is one."""
        return self._free.get()

    def put(self, view: memoryview, buffer: Buffer | None = None) -> None:
        """Append `view` to the file; it must stay as it is until both threads have seen it.

        Args:
            view: bytes to write; of `buffer`, when one was borrowed for them.
            buffer: goes back to the ring afterwards.

        Raises:
            RunnerError: what a thread met before.
        """
        self._raise_failure()
        if buffer is not None:
            buffer.readers = 2
        self._size_bytes += len(view)
        chunk = _Chunk(view, buffer)
        self._write.put(chunk)
        self._digest.put(chunk)

    def copy(self, descriptor: int, start: int, size_bytes: int) -> None:
        """Append `size_bytes` bytes of an open file from `start` on; it must stay open until `finish`.

        Raises:
            RunnerError: what a thread met before.
        """
        for first in range(0, size_bytes, RANGE_BYTES):
            self._raise_failure()
            piece = _Range(descriptor, start + first, min(RANGE_BYTES, size_bytes - first))
            self._size_bytes += piece.size_bytes
            self._write.put(piece)
            self._digest.put(piece)

    def finish(self) -> FileDigest:
        """Wait for both threads, give the file its name, and return what is in it."""
        self._write.drain()
        self._digest.drain()
        self._raise_failure()
        os.close(self._descriptor)
        self._descriptor = -1
        self._part.replace(self._root / self._name)
        return FileDigest(path=self._name, size_bytes=self._size_bytes, sha256=self._hash.hexdigest())

    def _write_chunk(self, chunk: _Chunk | _Range) -> None:
        try:
            if isinstance(chunk, _Range):
                self._copy_range(chunk)
            else:
                self._write_bytes(chunk.view)
        except OSError as error:
            raise _disk_error(self._name, error) from error

    def _write_bytes(self, left: memoryview) -> None:
        while len(left):
            left = left[os.write(self._descriptor, left) :]

    def _copy_range(self, piece: _Range) -> None:
        position, left = piece.start, piece.size_bytes
        while left and self._has_kernel_copy:
            try:
                count = os.copy_file_range(piece.descriptor, self._descriptor, left, position)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                count = 0
            if count == 0:  # refused, or (some file systems) nothing done and no error: read and write instead
                self._has_kernel_copy = False
            position += count
            left -= count
        while left:
            block = os.pread(piece.descriptor, min(left, BUFFER_BYTES), position)
            if not block:
                raise _shrunk(self._name, position)
            self._write_bytes(memoryview(block))
            position += len(block)
            left -= len(block)

    def _digest_chunk(self, chunk: _Chunk | _Range) -> None:
        if isinstance(chunk, _Chunk):
            self._hash.update(chunk.view)
            return
        position, left = chunk.start, chunk.size_bytes
        while left:
            count = os.preadv(chunk.descriptor, [self._window[: min(left, BUFFER_BYTES)]], position)
            if count == 0:
                raise _shrunk(self._name, position)
            self._hash.update(self._window[:count])
            position += count
            left -= count

    def _release(self, chunk: _Chunk | _Range) -> None:
        if isinstance(chunk, _Range) or chunk.buffer is None:
            return
        with self._lock:
            chunk.buffer.readers -= 1
            is_free = chunk.buffer.readers == 0
        if is_free:
            self._free.put(chunk.buffer)

    def _raise_failure(self) -> None:
        failure = self._write.failure or self._digest.failure
        if failure is not None:
            raise failure


class _Stage:
    """A thread that works through chunks in order; after a failure it only releases them."""

    def __init__(
        self, name: str, work: Callable[[_Chunk | _Range], None], release: Callable[[_Chunk | _Range], None]
    ) -> None:
        self._queue: queue.Queue[_Chunk | _Range | None] = queue.Queue(_QUEUE_LENGTH)
        self._work = work
        self._release = release
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.failure: RunnerError | None = None

    def start(self) -> None:
        self._thread.start()

    def put(self, chunk: _Chunk | _Range) -> None:
        self._queue.put(chunk)

    def drain(self) -> None:
        self._queue.join()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            try:
                if self.failure is None:
                    self._work(chunk)
            except RunnerError as error:
                self.failure = error
            finally:
                self._release(chunk)
                self._queue.task_done()


def _shrunk(name: str, position: int) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"The base's file for {name} ends at byte {position}.",
        why="The file shrank while it was read.",
        fix="Download the base again, into a folder that nothing else writes to.",
    )


def _disk_error(name: str, error: OSError) -> RunnerError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotEnoughDisk(
            f"The disk is full: {name} could not be written.",
            why="The merged model takes as much room as the base.",
            fix="Point `work-dir` at a file system with more free space.",
        )
    return ResourceError(
        f"{name} could not be written: {error.strerror}.",
        why="The folder for the merged model must be writable.",
        fix="Point `work-dir` at a folder that this user may write to.",
    )
