"""The judge's own reader of tensors: what it cannot read is an error, not a number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.checkpoint.layout import build_header, read_tensor_file
from runner.errors import BrokenCheckpoint, UnsupportedCheckpoint
from runner.verify.tensors import read_bytes, read_rows


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
