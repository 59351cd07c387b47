"""The bound on an element: it admits every right float32 computation, and nothing that is two units off."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from runner.files.layout import SINGLE_FILE, read_checkpoint
from runner.judge.expected.elements import Stored, compare_touched, compare_untouched, same_exact
from runner.judge.expected.exact import ExactLowRank, ExactStored
from runner.judge.numbers.comparison import MAX_BAD_ROWS
from runner.judge.numbers.tensors import BLOCK_ELEMENTS, read_rows, round_to, row_blocks, ulp
from runner.protocol.verdict import ERROR_BINS

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _stored(folder: Path, **tensors: torch.Tensor) -> dict[str, Stored]:
    folder.mkdir(exist_ok=True, parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_FILE)
    return {name: Stored(root=folder, info=info) for name, info in read_checkpoint(folder).tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@given(value=st.floats(min_value=-6e4, max_value=6e4, allow_nan=False))
@settings(deadline=None)
def test_ulp_is_the_distance_to_the_next_number(dtype: str, value: float) -> None:
    stored = torch.tensor([value]).to(DTYPES[dtype])
    away = torch.full_like(stored, math.copysign(math.inf, float(stored[0])))
    distance = (torch.nextafter(stored, away).double() - stored.double()).abs()
    assert float(ulp(stored.double(), dtype)[0]) == float(distance[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(dtype: str) -> None:
    numbers = torch.tensor([1.0, 2.0, 3.0]).to(DTYPES[dtype]).double()
    unit = ulp(numbers, dtype)
    assert torch.equal(round_to(numbers + 0.49 * unit, dtype).double(), numbers)
    assert torch.equal(round_to(numbers + 0.5 * unit, dtype).double(), numbers)
    assert torch.equal(round_to(numbers + 0.51 * unit, dtype).double(), numbers + unit)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, BLOCK_ELEMENTS), (2 * BLOCK_ELEMENTS + 1, 1), (0, 4), (5, 3, 2)])
def test_blocks_cover_every_row_once(shape: tuple[int, ...]) -> None:
    rows = [row for start, stop in row_blocks(shape) for row in range(start, stop)]
    assert rows == list(range(shape[0] if shape else 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 512])
@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_admits_a_merge_computed_in_float32(tmp_path: Path, dtype: str, rank: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    plain = torch.randn(96, 80, generator=generator).bfloat16()
    a, b = torch.randn(rank, 80, generator=generator), strength * torch.randn(96, rank, generator=generator)
    scaling = 16 / math.sqrt(rank) / 3
    right = (plain.float() + (b @ a) * scaling).to(DTYPES[dtype])
    base = _stored(tmp_path / "base", w=plain)["w"]
    exact = ExactLowRank(base=base.rows, shape=(96, 80), a=a, b=b, scaling=scaling)
    result = compare_touched(_stored(tmp_path / "right", w=right)["w"], exact, base)
    assert result.violations == 0
    row, column = divmod(int(right.abs().argmax()), 80)  # where the sum does not cancel
    noise = exact.noise(row, row + 1, output_is_float32=dtype == "F32")[0, column]
    allowed = 2 + math.ceil(float(noise / ulp(right[row, column].double(), dtype)))
    assert dtype == "F32" or allowed == 3
    assert allowed <= 4 or rank > 16 or strength > 0.01
    for steps in (allowed, -allowed):
        wrong = right.clone()
        wrong.view(torch.int32 if dtype == "F32" else torch.int16)[row, column] += steps
        result = compare_touched(_stored(tmp_path / "wrong", w=wrong)["w"], exact, base)
        assert result.violations == 1
        assert result.worst is not None
        assert result.worst.index == (row, column)
        assert f"w[{row}, {column}]" in str(result.worst)


def test_a_weight_that_must_be_zero_may_not_be_anything_else(tmp_path: Path) -> None:
    base = _stored(tmp_path / "base", w=torch.zeros(2, 2).bfloat16())["w"]
    exact = ExactLowRank(base=base.rows, shape=(2, 2), a=torch.ones(1, 2), b=torch.zeros(2, 1), scaling=1.0)
    found = _stored(tmp_path / "found", w=torch.tensor([[0.0, 0.0], [1e-30, 0.0]]).bfloat16())["w"]
    assert compare_touched(base, exact, base).violations == 0
    assert compare_touched(found, exact, base).violations == 1


def test_reports_retention_and_size_of_the_delta(tmp_path: Path) -> None:
    plain = torch.ones(8, 8).bfloat16()
    base = _stored(tmp_path / "base", w=plain)["w"]
    a, b = torch.ones(1, 8), torch.full((8, 1), 0.25)
    exact = ExactLowRank(base=base.rows, shape=(8, 8), a=a, b=b, scaling=1.0)
    found = _stored(tmp_path / "half", w=plain + 0.125)["w"]
    result = compare_touched(found, exact, base)
    assert result.retention == pytest.approx(0.5)
    assert result.delta_ratio == pytest.approx(0.25)
    assert result.violations == 64


def test_counts_rounding_errors_in_units_in_the_last_place(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(64, 64, generator=generator).bfloat16()
    a, b = torch.randn(4, 64, generator=generator), 0.1 * torch.randn(64, 4, generator=generator)
    exact = base.double() + b.double() @ a.double()
    once = exact.bfloat16()
    twice = base + (b @ a).bfloat16()  # the delta rounded first
    stored = _stored(tmp_path, base=base, once=once, twice=twice)
    wanted = ExactLowRank(base=stored["base"].rows, shape=(64, 64), a=a, b=b, scaling=1.0)

    right = compare_touched(stored["once"], wanted, stored["base"]).errors
    wrong = compare_touched(stored["twice"], wanted, stored["base"]).errors

    assert sum(right) == sum(wrong) == 64 * 64
    assert sum(right[10:]) == 0  # beyond half a unit
    assert min(right[:10]) > 200  # even, as rounding errors are
    assert sum(wrong[10:]) > 40


def test_an_untouched_tensor_may_not_even_change_the_sign_of_zero(tmp_path: Path) -> None:
    base = _stored(tmp_path / "base", w=torch.zeros(4, 4).bfloat16())["w"]
    changed = torch.zeros(4, 4).bfloat16()
    changed[2, 3] = -0.0
    result = compare_untouched(_stored(tmp_path / "found", w=changed)["w"], base)
    assert result.violations == 1
    assert result.worst is not None
    assert result.worst.index == (2, 3)


def test_an_untouched_tensor_keeps_the_base_own_nan(tmp_path: Path) -> None:
    values = torch.tensor([1.0, math.nan, math.inf])
    base = _stored(tmp_path / "base", w=values.bfloat16())["w"]
    assert compare_untouched(base, base).violations == 0
    cast = compare_untouched(_stored(tmp_path / "cast", w=values.half())["w"], base)
    assert (cast.violations, cast.new_non_finite) == (0, 0)


def test_a_cast_that_overflows_is_told(tmp_path: Path) -> None:
    base = _stored(tmp_path / "base", w=torch.tensor([1e5]).bfloat16())["w"]
    result = compare_untouched(_stored(tmp_path / "cast", w=torch.tensor([math.inf]).half())["w"], base)
    assert (result.violations, result.new_non_finite) == (0, 1)


def test_integers_are_compared_as_they_are(tmp_path: Path) -> None:
    base = _stored(tmp_path / "base", w=torch.arange(6))["w"]
    wrong = torch.arange(6)
    wrong[4] = 7
    assert compare_untouched(base, base).violations == 0
    found = compare_untouched(_stored(tmp_path / "found", w=wrong)["w"], base)
    assert (found.violations, str(found.worst)) == (1, "w[4] is 7, expected 4 (3 ulp off)")


def test_reads_rows_of_scalars_vectors_and_blocks(tmp_path: Path) -> None:
    tensors = {
        "s": torch.tensor(3.5),
        "v": torch.arange(5.0),
        "m": torch.arange(12.0).view(4, 3),
        "e": torch.zeros(0, 3),
    }
    stored = _stored(tmp_path, **tensors)
    assert read_rows(tmp_path, stored["s"].info, 0, 1).tolist() == [3.5]
    assert read_rows(tmp_path, stored["v"].info, 2, 4).tolist() == [2.0, 3.0]
    assert read_rows(tmp_path, stored["m"].info, 1, 3).tolist() == [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    assert read_rows(tmp_path, stored["e"].info, 0, 0).shape == (0, 3)


def test_exact_weights_are_equal_only_in_every_element(tmp_path: Path) -> None:
    stored = _stored(tmp_path, a=torch.ones(3, 3), b=torch.ones(3, 3), c=torch.eye(3), d=torch.ones(3, 4))
    exact = {name: ExactStored(one.root, one.info) for name, one in stored.items()}
    assert same_exact(exact["a"], exact["b"])
    assert not same_exact(exact["a"], exact["c"])
    assert not same_exact(exact["a"], exact["d"])


def _plain(stored: Stored) -> ExactStored:
    return ExactStored(stored.root, stored.info)


@pytest.mark.parametrize("base_dtype, dtype", [("BF16", "BF16"), ("F32", "F32"), ("BF16", "F16"), ("F32", "BF16")])
def test_a_number_is_no_nan_and_nan_is_no_number(tmp_path: Path, base_dtype: str, dtype: str) -> None:
    values = torch.tensor([1.0, math.nan, 2.0, math.nan])
    plain = values.to(DTYPES[base_dtype])
    wrong = plain.to(DTYPES[dtype], copy=True)
    wrong[1], wrong[2] = 0.0, math.nan
    base, right = _stored(tmp_path / "base", w=plain)["w"], _stored(tmp_path / "right", w=plain.to(DTYPES[dtype]))["w"]
    found = _stored(tmp_path / "found", w=wrong)["w"]

    for result in (compare_untouched(right, base), compare_touched(right, _plain(base), base)):
        assert (result.violations, result.new_non_finite) == (0, 0)
    for result in (compare_untouched(found, base), compare_touched(found, _plain(base), base)):
        assert (result.violations, result.new_non_finite, result.bad_rows) == (2, 1, [1, 2])


@pytest.mark.parametrize("base_dtype, dtype", [("BF16", "F16"), ("F32", "BF16"), ("BF16", "F32"), ("BF16", "BF16")])
def test_a_distance_is_told_in_units_of_the_stored_dtype(tmp_path: Path, base_dtype: str, dtype: str) -> None:
    values = torch.full((3,), 1.5).to(DTYPES[base_dtype])
    wrong = values.to(DTYPES[dtype], copy=True)
    wrong.view(torch.int32 if dtype == "F32" else torch.int16)[1] += 5
    base, found = _stored(tmp_path / "base", w=values)["w"], _stored(tmp_path / "found", w=wrong)["w"]

    for result in (compare_untouched(found, base), compare_touched(found, _plain(base), base)):
        worst = result.worst
        assert worst is not None
        assert (worst.index, worst.expected, worst.found, worst.ulps) == ((1,), 1.5, float(wrong[1]), 5.0)


def test_the_place_of_a_wrong_element_counts_all_blocks_before_it(tmp_path: Path) -> None:
    width = BLOCK_ELEMENTS // 50
    values = torch.zeros(2 * 50, width).bfloat16()
    wrong = values.clone()
    wrong[5:45, 1], wrong[52:92, 1], wrong[70, 3] = 1.0, 1.0, -2.0
    base, found = _stored(tmp_path / "base", w=values)["w"], _stored(tmp_path / "found", w=wrong)["w"]

    for result in (compare_untouched(found, base), compare_touched(found, _plain(base), base)):
        assert result.violations == 81
        assert result.worst is not None
        assert result.worst.index == (70, 3)
        assert (result.bad_row_count, len(result.bad_rows)) == (80, MAX_BAD_ROWS)
        assert result.bad_rows == [*range(5, 45), *range(52, 76)]


def test_an_error_beyond_all_bins_is_in_the_last(tmp_path: Path) -> None:
    base = _stored(tmp_path / "base", w=torch.ones(4).bfloat16())["w"]
    found = _stored(tmp_path / "found", w=torch.tensor([1.0, 1.0, 9.0, math.inf]).bfloat16())["w"]

    assert compare_touched(found, _plain(base), base).errors == [2, *[0] * (ERROR_BINS - 2), 1]


def test_what_changes_nothing_keeps_everything(tmp_path: Path) -> None:
    stored = _stored(tmp_path, zeros=torch.zeros(4).bfloat16(), ones=torch.ones(4).bfloat16())
    zeros, ones = stored["zeros"], stored["ones"]

    same = compare_touched(ones, _plain(ones), ones)
    assert (same.retention, same.delta_ratio, same.changed, same.moved_squared) == (1.0, 0.0, 0, 0.0)
    from_zero = compare_touched(ones, _plain(ones), zeros)
    assert (from_zero.retention, from_zero.delta_ratio, from_zero.changed, from_zero.moved_squared) == (
        1.0,
        0.0,
        4,
        4.0,
    )
