"""The storage layer's own counts and checks, on whole folders of which one thing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runner.files.layout import read_checkpoint
from runner.judge.case import Case, open_case
from runner.judge.numbers.comparison import Comparison
from runner.judge.numbers.tensors import read_tensor
from runner.judge.storage import Storage, compare_storage, judge_storage
from runner.protocol.rounding import STOCHASTIC, Rounding
from runner.protocol.verdict import Check, Outcome
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.judge.conftest import Maker
from tests.judge.faults import changed, rewrite
from tests.judge.merges import save_merge
from tests.judge.tiny import lora, save_adapter, save_base

Copier = Callable[[Path], Path]
LAST = "the adapter's change is in the files"


def _compare(case: Case, merged: Path, shares: list[float] | None = None) -> Storage:
    shares = [] if shares is None else shares
    return compare_storage(
        merged=read_checkpoint(merged), sources=case.sources, targets=case.targets, on_progress=shares.append
    )


def _failures(case: Case, storage: Storage) -> dict[str, Check]:
    checks = judge_storage(storage, case.targets, case.unmerged)
    assert [check.outcome for check in checks].count(Outcome.SKIPPED) == 0
    return {check.name: check for check in checks if check.outcome is Outcome.FAIL}


def _set(folder: Path, name: str, value: float) -> tuple[int, ...]:
    """Give the last element of a tensor another value; return its place."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    info = read_checkpoint(folder).tensors[name]
    rewrite(folder, info.file, edit)
    return tuple(size - 1 for size in info.shape)


def test_a_right_merge(right_merge: Maker, open_: Callable[[Path, Path], Case]) -> None:
    base, adapter, merged = right_merge("lora")
    case, shares = open_(base, adapter), list[float]()

    storage = _compare(case, merged, shares)

    names = {target.stored: target for target in case.targets.touched}
    assert set(changed(merged, base)) <= names.keys() == storage.comparisons.keys()
    assert storage.touched.tensors == len(names)
    assert storage.touched.elements == sum(torch.Size(target.shape).numel() for target in names.values())
    assert storage.untouched.tensors == len(read_checkpoint(base).tensors) - len(names)
    assert (storage.touched.violations, storage.untouched.violations, storage.strays, storage.non_finite) == (
        0,
        0,
        {},
        {},
    )
    assert storage.has_delta
    assert not storage.brings_new
    assert storage.changed > 100
    assert storage.dtypes == {"BF16"}
    assert {other.dtype for other in storage.alternatives} == {"float16", "float32", "auto"}
    deltas = [one.delta_squared for one in storage.comparisons.values()]
    assert storage.retention == sum(one.kept for one in storage.comparisons.values()) / sum(deltas)
    assert storage.rounding_errors == tuple(
        map(sum, zip(*(c.errors for c in storage.comparisons.values()), strict=True))
    )
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(1 / len(shares))
    assert shares[-1] == 1.0
    tensors = read_checkpoint(merged).tensors
    rest = [read_tensor(merged, info).abs().max() for name, info in tensors.items() if name not in names]
    assert storage.rest.largest == float(max(rest))
    assert _failures(case, storage) == {}
    assert {check.value for check in judge_storage(storage, case.targets, case.unmerged)} == {0.0}


def test_the_worst_of_all_touched_tensors_is_told(
    right_merge: Maker, open_: Callable[[Path, Path], Case], copy_of: Copier
) -> None:
    base, adapter, merged = right_merge("lora")
    damaged = copy_of(merged)
    first, second, third = changed(merged, base)[:3]
    _set(damaged, first, 3.0)
    place = _set(damaged, second, 700.0)
    _set(damaged, third, 5.0)
    worst = f"{second}[{', '.join(map(str, place))}] is 700"

    storage = _compare(open_(base, adapter), damaged)

    failures = _failures(open_(base, adapter), storage)
    assert list(failures) == ["touched elements are the exact sum, rounded once"]
    (check,) = failures.values()
    assert check.detail.startswith(f"3 elements in 3 of {storage.touched.tensors} tensors; the worst: {worst}")
    assert (check.value, check.limit) == (3.0, 0.0)
    assert storage.strays == {}


def test_one_element_of_an_untouched_tensor(
    right_merge: Maker, open_: Callable[[Path, Path], Case], copy_of: Copier
) -> None:
    base, adapter, merged = right_merge("lora")
    damaged = copy_of(merged)
    name = next(target.stored for target in open_(base, adapter).targets.required.values() if not target.is_touched)
    place = _set(damaged, name, 3.0)

    storage = _compare(open_(base, adapter), damaged)

    failures = _failures(open_(base, adapter), storage)
    assert list(failures) == ["untouched tensors are the base's"]
    said = f"1 elements in 1 of {storage.untouched.tensors} tensors; the worst: {name}[{', '.join(map(str, place))}]"
    assert failures["untouched tensors are the base's"].detail.startswith(said)
    assert list(storage.strays) == [name]


def test_a_nan_and_an_infinity(right_merge: Maker, open_: Callable[[Path, Path], Case], copy_of: Copier) -> None:
    base, adapter, merged = right_merge("lora")
    damaged = copy_of(merged)
    first, second = changed(merged, base)[:2]
    _set(damaged, first, float("nan"))
    _set(damaged, second, float("inf"))

    storage = _compare(open_(base, adapter), damaged)

    assert storage.non_finite == {first: 1, second: 1}
    check = _failures(open_(base, adapter), storage)["no NaN or Inf that the base had not"]
    assert check.value == 2.0
    assert check.detail.endswith("holds 1 NaN or Inf (and 1 more).")


def test_what_is_missing_or_of_another_form_is_structures_to_tell(
    right_merge: Maker, open_: Callable[[Path, Path], Case], copy_of: Copier
) -> None:
    base, adapter, merged = right_merge("lora")
    damaged, (gone, cast, cut) = copy_of(merged), changed(merged, base)[:3]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(gone, None)
        if cast in tensors:
            tensors[cast] = tensors[cast].half()
        if cut in tensors:
            tensors[cut] = tensors[cut][:-1]

    for file in read_checkpoint(damaged).files:
        rewrite(damaged, file.name, edit)

    storage = _compare(open_(base, adapter), damaged)

    assert {gone, cast, cut} & storage.comparisons.keys() == set()
    assert _failures(open_(base, adapter), storage) == {}


def test_a_merge_that_equals_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["q_proj"]), strength=1e-6)
    merged = save_merge(tmp_path / "merged", base, adapter)
    assert changed(merged, base) == []
    with open_case(base, adapter, dtype="auto") as case:
        storage = _compare(case, merged)
        check = _failures(case, storage)[LAST]
    assert storage.has_delta
    assert check.detail.startswith(f"Not one of {storage.touched.elements} elements differs from the base's: either")
    assert check.value == 1.0


def test_an_adapter_without_effect(bases: dict[str, Path], tmp_path: Path, copy_of: Copier) -> None:
    base = bases["llama"]
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["q_proj"]), strength=0.0)
    merged = save_merge(tmp_path / "merged", base, adapter)
    with open_case(base, adapter, dtype="auto") as case:
        storage = _compare(case, merged)
        assert not storage.has_delta
        assert storage.alternatives == ()
        assert storage.touched.tensors == 0  # where nothing is added, the bytes must be the base's
        assert list(_failures(case, storage)) == [LAST]
        assert "changes no weight of this base" in _failures(case, storage)[LAST].detail
        assert _failures(case, storage)[LAST].value == 1.0
        name = case.targets.touched[0].stored
        damaged = copy_of(merged)
        _set(damaged, name, 3.0)
        failures = _failures(case, _compare(case, damaged))
    assert list(failures) == ["untouched tensors are the base's", LAST]
    assert f"the worst: {name}" in failures["untouched tensors are the base's"].detail


def test_rows_that_only_the_adapter_has_are_new(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    config = lora(modules_to_save=["embed_tokens", "lm_head"])
    adapter = save_adapter(tmp_path / "adapter", base, config, strength=0.0, rows=326)
    merged = save_merge(tmp_path / "merged", base, adapter, rows=326)
    with open_case(base, adapter, dtype="auto") as case:
        storage = _compare(case, merged)
        assert storage.brings_new
        assert _failures(case, storage) == {}


def test_what_cannot_be_judged_is_skipped_and_never_passes(
    right_merge: Maker, open_: Callable[[Path, Path], Case]
) -> None:
    base, adapter, merged = right_merge("lora")
    case = open_(base, adapter)
    storage = _compare(case, merged)

    def told(storage: Storage, *unmapped: str) -> Check:
        checks = judge_storage(storage, replace(case.targets, unmapped=unmapped), case.unmerged)
        assert LAST not in {check.name for check in checks}
        return next(check for check in checks if check.outcome is Outcome.SKIPPED)

    assert told(storage, "a").detail == "a was not judged: it is computed from several stored tensors"
    storage.unjudged["b"] = "it is stored as I8"
    assert told(storage).detail == "b was not judged: it is stored as I8"
    check = told(storage, "a")
    assert check.detail == "a was not judged: it is computed from several stored tensors (and 1 more)"
    assert check.value == 2.0


def test_a_tensor_of_the_adapter_without_a_place_fails(right_merge: Maker, open_: Callable[[Path, Path], Case]) -> None:
    base, adapter, merged = right_merge("lora")
    case = open_(base, adapter)
    checks = judge_storage(_compare(case, merged), case.targets, replace(case.unmerged, unplaced=("x", "y")))
    failed = [check for check in checks if check.outcome is Outcome.FAIL]
    assert [(check.name, check.value) for check in failed] == [("every adapter tensor is used", 2.0)]
    assert failed[0].detail == "The adapter tensor 'x' fits nothing in the base; PEFT leaves it out (and 1 more)."


def test_a_cast_by_chance_is_no_change_of_the_adapters(right_merge: Maker, open_: Callable[[Path, Path], Case]) -> None:
    base, adapter, _ = right_merge("lora")
    moved = Comparison(elements=9, changed=5)
    assert list(_failures(open_(base, adapter), Storage(comparisons={"a": moved}))) == [LAST]
    moved.delta_squared = 0.25
    assert _failures(open_(base, adapter), Storage(comparisons={"a": moved})) == {}


@pytest.mark.parametrize("is_cast", [False, True])
def test_by_chance_what_the_adapter_leaves_alone_is_the_base_or_a_draw_of_it(
    bases: dict[str, Path], tmp_path: Path, is_cast: bool
) -> None:
    """Where the base has the output's dtype there is nothing to draw; where it is cast, every element is drawn."""
    base = save_base(tmp_path / "base", "llama", dtype=torch.float32) if is_cast else bases["llama"]
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["q_proj"]))
    still = "model.layers.1.self_attn.q_proj"
    rewrite(
        adapter, "adapter_model.safetensors", lambda tensors: tensors[f"base_model.model.{still}.lora_B.weight"].zero_()
    )
    rounding, merged = Rounding(kind=STOCHASTIC, seed=1), tmp_path / "merged"
    merge(prepare(base, adapter, dtype="bfloat16", rounding=rounding), into=merged)
    with open_case(base, adapter, dtype="bfloat16", rounding=rounding) as case:
        storage = _compare(case, merged)
        assert (storage.touched.tensors, len(storage.comparisons)) == (2 if is_cast else 1, 2)
        assert (storage.comparisons[f"{still}.weight"].changed > 100) is is_cast
        assert _failures(case, storage) == {}
        _set(merged, f"{still}.weight", 3.0)
        (failure,) = _failures(case, _compare(case, merged))
    assert failure == (
        "touched elements are the exact sum, rounded once" if is_cast else "untouched tensors are the base's"
    )
