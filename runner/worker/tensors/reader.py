"""Bytes and tensors of a checkpoint, read by position: no mapping, so that read pages never count as ours.

dtypes are spelled as in the safetensors header; `TORCH_DTYPES` translates them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from runner.files.layout import Checkpoint, TensorInfo
from runner.protocol.errors import BrokenCheckpoint

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }
)  # fmt: skip
FLOATS = ("BF16", "F16", "F32")  # the dtypes that are merged and cast


class Reader:
    """Open files of one checkpoint. Use as a context manager; the files close with it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._root = checkpoint.root
        self._stack = ExitStack()
        self._descriptors: dict[str, int] = {}
        self.read_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._descriptors.clear()

    def read_into(self, view: memoryview, tensor: TensorInfo, offset: int = 0) -> None:
        """Fill `view` with the tensor's bytes from `offset` on (counted from the tensor's first byte).

        Raises:
            BrokenCheckpoint: the file ends early.
        """
        position = tensor.start + offset
        descriptor = self._descriptor(tensor.file)
        left = view
        while len(left):
            count = os.preadv(descriptor, [left], position)
            if count == 0:
                raise BrokenCheckpoint(
                    f"{tensor.file} ends at byte {position}, inside {tensor.name!r}.",
                    why="The file shrank while it was read.",
                    fix="Download the base again, into a folder that nothing else writes to.",
                )
            left = left[count:]
            position += count
        self.read_bytes += len(view)

    def lend(self, tensor: TensorInfo) -> int:
        """Return a descriptor of the tensor's file, for somebody else to read the tensor; it stays open as we do."""
        self.read_bytes += tensor.size_bytes
        return self._descriptor(tensor.file)

    def read(self, tensor: TensorInfo) -> torch.Tensor:
        """Return the tensor, freshly allocated, in its stored dtype and shape."""
        raw = torch.empty(tensor.size_bytes, dtype=torch.uint8)
        self.read_into(raw.numpy().data, tensor)
        return raw.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            descriptor = os.open(Path(self._root) / file, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, descriptor)
            self._descriptors[file] = descriptor
        return self._descriptors[file]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's bytes, without a copy when it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
