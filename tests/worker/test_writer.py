"""Shards appear whole, with the digest of what is on the disk, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.files.layout import SINGLE_FILE, build_header, read_checkpoint
from runner.protocol.errors import BrokenCheckpoint, NotEnoughDisk, ResourceError
from runner.worker.tensors.reader import Reader, tensor_bytes
from runner.worker.tensors.writer import ShardWriter


def test_what_is_written_is_what_the_digest_says(tmp_path: Path) -> None:
    tensor = torch.randn(700, 900)
    header = build_header([("w", "F32", (700, 900))], {"format": "pt"})

    with ShardWriter(tmp_path, buffer_bytes=4096) as writer:
        writer.begin("x.safetensors", header, len(header) + 700 * 900 * 4)
        raw = tensor.view(-1).view(torch.uint8)
        for first in range(0, len(raw), 4096):
            buffer = writer.borrow()
            piece = raw[first : first + 4096]
            buffer.raw[: len(piece)].copy_(piece)
            writer.put(tensor_bytes(buffer.raw[: len(piece)]), buffer)
        digest = writer.finish()

    path = tmp_path / "x.safetensors"
    assert digest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest.size_bytes == path.stat().st_size
    assert torch.equal(load_file(path)["w"], tensor)
    assert path.stat().st_mode & 0o777 == 0o644


def test_leaving_early_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.begin("x.safetensors", b"header", 100)
        assert (tmp_path / "x.safetensors.part").exists()

    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told_with_the_systems_reason(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # Python ignores the signal, so there is an error
    try:
        with ShardWriter(tmp_path) as writer, pytest.raises(ResourceError, match=r"x\.safetensors.*File too large"):
            writer.begin("x.safetensors", b"header", 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with ShardWriter(tmp_path) as writer, pytest.raises(NotEnoughDisk, match="disk is full"):
            writer.begin("x.safetensors", b"header", 1 << 20)
        with ShardWriter(tmp_path) as writer:
            writer.begin("x.safetensors", b"header", 6)  # reserves too little, so that the thread meets the end
            writer.put(memoryview(bytes(1 << 20)))
            with pytest.raises(NotEnoughDisk, match="disk is full"):
                writer.finish()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_written_to_is_told_as_such(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "absent") as writer, pytest.raises(ResourceError, match=r"x\.safetensors could not"):
        writer.begin("x.safetensors", b"header", 100)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / SINGLE_FILE)
    checkpoint = read_checkpoint(tmp_path)
    with (tmp_path / SINGLE_FILE).open("r+b") as file:
        file.truncate(1000)

    with Reader(checkpoint) as reader, pytest.raises(BrokenCheckpoint, match="inside 'w'"):
        reader.read(checkpoint.tensors["w"])


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """Return a descriptor of a file of 20 MB, so that a copy takes several ranges."""
    (tmp_path / "source").write_bytes(bytes(range(250)) * 80_000)
    descriptor = os.open(tmp_path / "source", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.ENOSYS, errno.EINVAL])
def test_copied_ranges_are_written_and_digested_where_they_belong(
    tmp_path: Path, source: int, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    copied = []

    def copy(*arguments: int) -> int:
        if refusal is not None:
            raise OSError(refusal, "refused")
        copied.append(kernel_copy(*arguments))
        return copied[-1]

    kernel_copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", copy)
    with ShardWriter(tmp_path) as writer:
        writer.begin("x.safetensors", b"header", 6 + 19_000_000 + 4 + 7)
        writer.copy(source, 500_001, 19_000_000)
        writer.put(memoryview(b"sums"))
        writer.copy(source, 3, 7)
        digest = writer.finish()

    whole = os.pread(source, 20_000_000, 0)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert content == b"header" + whole[500_001:19_500_001] + b"sums" + whole[3:10]
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
    assert sum(copied) == (19_000_007 if refusal is None else 0)


def test_a_source_that_ends_early_is_an_error(tmp_path: Path, source: int) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.begin("x.safetensors", b"", 200)
        writer.copy(source, 19_999_900, 200)
        with pytest.raises(BrokenCheckpoint, match="ends at byte 20000000"):
            writer.finish()


def test_a_full_disk_is_told_of_a_kernel_copy_too(tmp_path: Path, source: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with ShardWriter(tmp_path) as writer:
        writer.begin("x.safetensors", b"", 200)
        writer.copy(source, 0, 200)
        with pytest.raises(NotEnoughDisk, match="disk is full"):
            writer.finish()
