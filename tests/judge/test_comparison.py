"""What decides whether a folder passes, held by tests that a mutation run asked for (`python -m tools.mutants`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.files.layout import SINGLE_FILE, read_checkpoint
from runner.judge.expected.elements import Stored, compare_touched, compare_untouched, is_right
from runner.judge.expected.exact import ExactShift, ExactStored
from runner.judge.numbers import tensors
from runner.judge.numbers.comparison import MAX_BAD_ROWS, Comparison, Deviation
from runner.judge.numbers.stochastic import Chance
from runner.judge.numbers.tensors import round_to
from runner.judge.storage import Storage, Tally
from runner.protocol.verdict import ERROR_BINS

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _stored(folder: Path, tensor: torch.Tensor) -> Stored:
    folder.mkdir(parents=True)
    save_file({"w": tensor.contiguous()}, folder / SINGLE_FILE)
    return Stored(root=folder, info=read_checkpoint(folder).tensors["w"])


def _deviation(ulps: float, place: int = 0) -> Deviation:
    return Deviation(tensor="w", index=(place,), expected=1.0, found=2.0, ulps=ulps)


def _exact(stored: Stored) -> ExactStored:
    return ExactStored(stored.root, stored.info)


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


def test_of_equal_distances_the_first_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Comparison()
    for place in range(3):
        whole.add(Comparison(worst=_deviation(2.0, place)))
        whole.add(Comparison())
    assert whole.worst == _deviation(2.0, 0)
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 8)  # two rows
    values = torch.ones(6, 4).bfloat16()
    wrong = values.clone()
    wrong[3, 1] = wrong[3, 2] = wrong[4, 0] = 1.5
    base, found = _stored(tmp_path / "base", values), _stored(tmp_path / "found", wrong)
    for result in (compare_untouched(found, base), compare_touched(found, _exact(base), base)):
        assert result.worst is not None
        assert (result.violations, result.worst.index) == (3, (3, 1))


def test_ratios_of_small_sums() -> None:
    small = Comparison(kept=0.125, delta_squared=0.25, base_squared=0.0625)
    assert (small.retention, small.delta_ratio) == (0.5, 2.0)


def test_the_middle_between_two_numbers_may_go_either_way_only_where_the_adapter_computes(tmp_path: Path) -> None:
    base = _stored(tmp_path / "base", torch.tensor([1.0 + 2.0**-8, 1.0]))
    computed = ExactShift(base=base.rows, shape=(2,), vector=torch.zeros(2), scaling=1.0)
    even = _stored(tmp_path / "even", torch.tensor([1.0, 1.0]).bfloat16())
    odd = _stored(tmp_path / "odd", torch.tensor([1.0 + 2.0**-7, 1.0]).bfloat16())
    for found, count in ((even, 0), (odd, 1)):
        assert compare_touched(found, computed, base).violations == 0
        assert compare_touched(found, _exact(base), base).violations == count  # a copy
        assert compare_untouched(found, base).violations == count


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("shape", [(12, 6), (5, 24), (60,)])  # blocks of two rows, of a part of one, of twelve
def test_by_chance_only_the_neighbour_that_was_drawn_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 12)
    chance = Chance(name="w", seed=3)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    drawn, nearest = chance.round(values.double(), dtype, 0), round_to(values.double(), dtype)
    base = _stored(tmp_path / "base", values)
    right, wrong = _stored(tmp_path / "right", drawn), _stored(tmp_path / "wrong", nearest)
    count = int((drawn != nearest).sum())

    assert count > 10
    assert compare_touched(right, _exact(base), base, chance).violations == 0
    assert compare_touched(wrong, _exact(base), base, chance).violations == count
    assert compare_touched(right, _exact(base), base).violations == count
    for seed, accepted in ((None, True), (5, False)):
        found = compare_touched(wrong, _exact(base), base, Chance(name="w", seed=seed))
        assert (found.violations == 0) is accepted


@pytest.mark.parametrize("chance", [None, Chance(name="w", seed=1), Chance(name="w", seed=None)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_nan_is_right_only_for_nan(tmp_path: Path, chance: Chance | None, dtype: str) -> None:
    wanted = torch.tensor([1.0, 1.0, torch.nan, torch.nan])
    found = torch.tensor([1.0, torch.nan, 1.0, torch.nan]).to(FLOATS[dtype])
    base = _stored(tmp_path / "base", wanted)
    kept = is_right(found, _exact(base), 0, wanted.double(), dtype, chance)
    assert kept.tolist() == [True, False, False, True]
    result = compare_touched(_stored(tmp_path / "found", found), _exact(base), base, chance)
    assert (result.violations, result.bad_rows) == (2, [1, 2])


def test_the_values_that_are_held_against_the_bound_stay_as_they_are(tmp_path: Path) -> None:
    base = _stored(tmp_path / "base", torch.ones(3))
    for dtype in (torch.float32, torch.float64):
        found = torch.full((3,), 2.0, dtype=dtype)
        wanted = torch.ones(3, dtype=torch.float64)
        assert not is_right(found, _exact(base), 0, wanted, "BF16").any()
        assert (found.tolist(), wanted.tolist()) == ([2.0] * 3, [1.0] * 3)


def test_what_other_dtypes_would_make_of_it_is_measured_on_every_tensor(tmp_path: Path) -> None:
    values = torch.tensor([4.0, 2.0**-20, 0.0, -1.0]).bfloat16()
    base = _stored(tmp_path / "base", values)
    delta = torch.tensor([0.25, 0.0, 0.0, 0.0])
    exact = ExactShift(base=base.rows, shape=(4,), vector=delta, scaling=1.0)
    touched = compare_touched(_stored(tmp_path / "merged", values + delta.bfloat16()), exact, base)
    assert (touched.gauge.largest, touched.gauge.subnormal) == (4.25, 1)
    assert touched.gauge.kept == {"float16": 0.0625, "float32": 0.0625}
    whole, cast = _stored(tmp_path / "whole", values.float()), _stored(tmp_path / "half", values.half())
    changed = _stored(tmp_path / "changed", values * 2)
    new = compare_touched(base, _exact(base), None)
    for found, largest in (
        (compare_untouched(base, base), 4.0),
        (compare_untouched(cast, base), 4.0),
        (compare_untouched(base, whole), 4.0),
        (compare_untouched(changed, base), 8.0),
        (new, 4.0),
    ):
        assert (found.gauge.largest, found.gauge.subnormal) == (largest, 1)


def test_the_same_bytes_under_another_dtype_are_other_values(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 3.0, -5.0]).bfloat16()
    base, found = _stored(tmp_path / "base", values), _stored(tmp_path / "found", values.view(torch.float16))
    assert compare_untouched(found, base).violations == 3


def test_integers_and_empty_tensors_have_no_range(tmp_path: Path) -> None:
    for name, values in (("integers", torch.arange(9)), ("empty", torch.zeros(2, 0))):
        stored = _stored(tmp_path / name, values)
        result = compare_untouched(stored, stored)
        assert (result.violations, result.gauge.largest, result.gauge.subnormal) == (0, 0.0, 0)


def test_sums_are_over_all_tensors() -> None:
    found = {
        "a": Comparison(kept=0.125, delta_squared=0.25, changed=2, errors=[1, 2]),
        "b": Comparison(kept=0.25, delta_squared=0.5, changed=3, errors=[3, 4]),
    }
    storage = Storage(comparisons=found, dtypes={"BF16"})
    assert (storage.retention, storage.changed, storage.rounding_errors) == (0.5, 5, (4, 6))
    assert storage.has_delta
    assert not storage.brings_new
    assert len(storage.alternatives) == 3
    nothing = Storage()
    assert (nothing.retention, nothing.changed, nothing.rounding_errors, nothing.alternatives) == (1.0, 0, (), ())
    assert not nothing.has_delta
    assert Storage(comparisons={**found, "c": Comparison(has_base=False)}).brings_new


def test_of_tensors_equally_wrong_the_first_is_told() -> None:
    tally = Tally()
    for name in ("a", "b"):
        worst = Deviation(tensor=name, index=(0,), expected=1.0, found=2.0, ulps=4.0)
        tally.add(Comparison(elements=3, violations=2, worst=worst))
    tally.add(Comparison(elements=3))
    assert tally.worst is not None
    assert (tally.worst.tensor, tally.tensors, tally.elements) == ("a", 3, 9)
    assert (tally.bad_tensors, tally.violations) == (2, 4)
