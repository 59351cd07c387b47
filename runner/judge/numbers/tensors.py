"""Stored tensors, read by row blocks, and the arithmetic of their number formats.

The judge reads files with code of its own: nothing here is shared with the merge, so that a fault of the merge's
reader or rounding cannot hide itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from runner.files.layout import TensorInfo
from runner.protocol.errors import BrokenCheckpoint, UnsupportedCheckpoint

BLOCK_ELEMENTS = 1 << 20  # 8 MiB in float64; a comparison holds about six such blocks
FLOATS = ("BF16", "F16", "F32")  # the dtypes that merges are stored in
DTYPE_NAMES: Mapping[str, str] = MappingProxyType({"bfloat16": "BF16", "float16": "F16", "float32": "F32"})

_TORCH: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }
)  # fmt: skip
_BITS: Mapping[str, torch.dtype] = MappingProxyType({"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32})


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary float: bits after the point of a normal number, and the smallest normal exponent."""

    fraction_bits: int
    min_exponent: int


FORMATS: Mapping[str, FloatFormat] = MappingProxyType(
    {
        "BF16": FloatFormat(fraction_bits=7, min_exponent=-126),
        "F16": FloatFormat(fraction_bits=10, min_exponent=-14),
        "F32": FloatFormat(fraction_bits=23, min_exponent=-126),
    }
)


def round_to(exact: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return float64 `exact` in `dtype`, round to nearest even.

    torch goes through float32 on the way to 16 bits. That differs from one rounding only within 2^-25 (relative) of
    the middle between two neighbours, where a merge computed in float32 may take either.
    """
    return exact.to(_TORCH[dtype])


def ulp(exact: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the unit in the last place of `dtype` at each float64 value; subnormal spacing below the normals."""
    form = FORMATS[dtype]
    exponent = torch.frexp(exact).exponent - 1  # |x| = m * 2^exponent with 1 <= m < 2
    exponent = torch.where(exact == 0, form.min_exponent, exponent)  # frexp gives zero the exponent of ½
    exponent = exponent.clamp(min=form.min_exponent) - form.fraction_bits
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)  # the bits of 2^exponent


def same_bits(left: torch.Tensor, right: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return where two tensors of the same stored float `dtype` have the same bits."""
    return left.view(_BITS[dtype]) == right.view(_BITS[dtype])


def row_count(shape: tuple[int, ...]) -> int:
    """Return how many rows a tensor is read in: its first dimension; a scalar is one row."""
    return shape[0] if shape else 1


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) over the rows so that a block has about `BLOCK_ELEMENTS` elements, at least one row."""
    rows = row_count(shape)
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def read_bytes(root: Path, tensor: TensorInfo, start: int, stop: int) -> bytearray:
    """Return the bytes of rows `start` to `stop` (not included).

    Raises:
        BrokenCheckpoint: the file ends early.
    """
    row_bytes = tensor.size_bytes // max(1, row_count(tensor.shape))
    data = bytearray((stop - start) * row_bytes)
    with (root / tensor.file).open("rb") as file:
        file.seek(tensor.start + start * row_bytes)
        if file.readinto(data) != len(data):
            raise BrokenCheckpoint(
                f"{tensor.file} ends inside {tensor.name!r}.",
                why="The file shrank while it was read.",
                fix="Write or download the folder again, where nothing else writes to it.",
            )
    return data


def read_rows(root: Path, tensor: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Return rows `start` to `stop` in the stored dtype, shape (stop - start, ...); a scalar gives shape (1,).

    Raises:
        BrokenCheckpoint: the file ends early.
        UnsupportedCheckpoint: a dtype that merges are not stored in.
    """
    if tensor.dtype not in _TORCH or sys.byteorder != "little":
        raise UnsupportedCheckpoint(
            f"{tensor.name!r} is stored as {tensor.dtype}.",
            why="The judge compares values of plain float and integer tensors only.",
            fix="Use a base in bfloat16, float16 or float32.",
        )
    shape = (stop - start, *tensor.shape[1:])
    data = read_bytes(root, tensor, start, stop)
    if not data:
        return torch.empty(shape, dtype=_TORCH[tensor.dtype])
    return torch.frombuffer(data, dtype=_TORCH[tensor.dtype]).view(shape)


def rows_of(data: bytearray, dtype: str) -> torch.Tensor:
    """Return the elements in `data`, flat, in the dtype that safetensors spells so."""
    return torch.frombuffer(data, dtype=_TORCH[dtype])


def read_tensor(root: Path, tensor: TensorInfo) -> torch.Tensor:
    """Return the whole tensor in its stored dtype and shape.

    Raises:
        BrokenCheckpoint: the file ends early.
    """
    return read_rows(root, tensor, 0, row_count(tensor.shape)).view(tensor.shape)
