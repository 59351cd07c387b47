"""What decides whether a folder passes, held by tests that a mutation run asked for (`python -m tools.mutants`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.checkpoint.layout import SINGLE_FILE, read_checkpoint
from runner.verify.comparison import MAX_BAD_ROWS, Comparison, Deviation
from runner.verify.elements import Stored, compare_touched, compare_untouched
from runner.verify.exact import ExactStored
from runner.verify.verdict import ERROR_BINS


def _stored(folder: Path, tensor: torch.Tensor) -> Stored:
    folder.mkdir(parents=True)
    save_file({"w": tensor.contiguous()}, folder / SINGLE_FILE)
    return Stored(root=folder, info=read_checkpoint(folder).tensors["w"])


def _deviation(ulps: float) -> Deviation:
    return Deviation(tensor="w", index=(0,), expected=1.0, found=2.0, ulps=ulps)


def test_blocks_add_up_to_the_whole_tensor() -> None:
    whole = Comparison()
    for number in range(1, 4):
        whole.add(
            Comparison(
                violations=number,
                worst=_deviation(float(5 - number)),
                new_non_finite=number,
                elements=10 * number,
                kept=0.5 * number,
                delta_squared=0.25 * number,
                base_squared=4.0 * number,
                moved_squared=3.0 * number,
                changed=7 * number,
                errors=[number] * ERROR_BINS,
                bad_rows=list(range(MAX_BAD_ROWS - 1)),
                bad_row_count=100,
            )
        )
    assert (whole.violations, whole.new_non_finite, whole.elements, whole.changed) == (6, 6, 60, 42)
    assert (whole.kept, whole.delta_squared, whole.base_squared, whole.moved_squared) == (3.0, 1.5, 24.0, 18.0)
    assert whole.errors == [6] * ERROR_BINS
    assert whole.worst == _deviation(4.0)
    assert (len(whole.bad_rows), whole.bad_row_count) == (MAX_BAD_ROWS, 300)
    assert whole.retention == 2.0
    assert whole.delta_ratio == 0.25


def test_a_remembered_block_is_only_used_for_the_same_bits(tmp_path: Path) -> None:
    right = torch.ones(4, 4).bfloat16()
    base = _stored(tmp_path / "base", right)
    exact = ExactStored(base.root, base.info)
    blocks: dict[tuple[str, int], tuple[torch.Tensor, Comparison]] = {}
    assert compare_touched(base, exact, base, right=blocks).violations == 0
    assert len(blocks) == 1
    wrong = right.clone()
    wrong[3, 3] = 2
    found = _stored(tmp_path / "wrong", wrong)
    for _ in range(2):  # a wrong block is not remembered
        assert compare_touched(found, exact, base, right=blocks).violations == 1
    assert compare_touched(base, exact, base, right=blocks).elements == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
@pytest.mark.parametrize("place", [(0, 0), (2, 1), (3, 3)])
def test_one_changed_element_of_an_untouched_tensor_is_one_violation(
    tmp_path: Path, dtype: torch.dtype, place: tuple[int, int]
) -> None:
    values = torch.arange(16).view(4, 4).to(dtype)
    changed = values.clone()
    changed[place] += 1
    result = compare_untouched(_stored(tmp_path / "a", changed), _stored(tmp_path / "b", values))
    assert (result.violations, result.bad_rows, result.bad_row_count) == (1, [place[0]], 1)
    assert result.worst is not None
    assert result.worst.index == place


def test_a_new_infinity_in_an_untouched_tensor_is_told_whatever_the_dtype(tmp_path: Path) -> None:
    values = torch.ones(3, 3).bfloat16()
    spoiled = values.clone()
    spoiled[1, 1] = torch.inf
    base = _stored(tmp_path / "base", values)
    assert compare_untouched(_stored(tmp_path / "same", spoiled), base).new_non_finite == 1
    assert compare_untouched(_stored(tmp_path / "other", spoiled.half()), base).new_non_finite == 1
    assert (
        compare_touched(_stored(tmp_path / "t", spoiled), ExactStored(base.root, base.info), base).new_non_finite == 1
    )


def test_what_a_changed_element_is_does_not_depend_on_the_dtype(tmp_path: Path) -> None:
    values = torch.tensor([[1 / 3, 2 / 3], [1.0, 3.0]])
    base = _stored(tmp_path / "base", values)
    exact = ExactStored(base.root, base.info)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cast = _stored(tmp_path / str(dtype), values.to(dtype))
        assert compare_touched(cast, exact, base).changed == 0
        moved = values.to(dtype).clone()
        moved[1] *= 2
        assert compare_touched(_stored(tmp_path / f"{dtype}-moved", moved), exact, base).changed == 2
