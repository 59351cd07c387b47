"""The judge's own reader of tensors: what it cannot read is an error, not a number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.files.layout import build_header, read_tensor_file
from runner.judge.numbers.tensors import BLOCK_ELEMENTS, read_bytes, read_rows, row_blocks
from runner.protocol.errors import BrokenCheckpoint, UnsupportedCheckpoint


def test_a_file_that_shrinks_while_it_is_judged_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 8)}, tmp_path / "x.safetensors")
    (tensor,) = read_tensor_file(tmp_path, "x.safetensors").tensors
    os.truncate(tmp_path / "x.safetensors", tensor.end - 1)

    assert read_bytes(tmp_path, tensor, 0, 3)
    with pytest.raises(BrokenCheckpoint, match="ends inside 'a'"):
        read_bytes(tmp_path, tensor, 0, 4)


def test_quantised_values_are_not_compared(tmp_path: Path) -> None:
    header = build_header([("a", "F8_E8M0", (4, 8))], {})
    (tmp_path / "x.safetensors").write_bytes(header + bytes(32))
    (tensor,) = read_tensor_file(tmp_path, "x.safetensors").tensors

    with pytest.raises(UnsupportedCheckpoint, match="'a' is stored as F8_E8M0"):
        read_rows(tmp_path, tensor, 0, 4)


@pytest.mark.parametrize(
    "shape, blocks",
    [
        ((), [(0, 1)]),
        ((BLOCK_ELEMENTS,), [(0, BLOCK_ELEMENTS)]),
        ((BLOCK_ELEMENTS + 1,), [(0, BLOCK_ELEMENTS), (BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1)]),
        ((5, BLOCK_ELEMENTS // 2), [(0, 2), (2, 4), (4, 5)]),
        ((3, BLOCK_ELEMENTS // 4, 2), [(0, 2), (2, 3)]),
        ((2, 3 * BLOCK_ELEMENTS), [(0, 1), (1, 2)]),  # no row is divided
        ((3, 0), [(0, 3)]),
        ((0, 3), []),
    ],
)
def test_a_block_is_as_many_rows_as_the_memory_is_planned_for(
    shape: tuple[int, ...], blocks: list[tuple[int, int]]
) -> None:
    assert list(row_blocks(shape)) == blocks
