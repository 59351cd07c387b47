"""Every fault is caught, with the right reason: damaged copies of right merges fail in the layer and for the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runner.judge.case import open_case
from runner.judge.judge import judge, judge_merge
from runner.protocol.verdict import Check, Layer, Outcome, Status, Verdict
from tests.judge.conftest import Maker
from tests.judge.faults import FAULTS, damage_adapter_not_applied, damage_scale
from tests.judge.merges import edit_config, merged_weights, save_merge, write_merge
from tests.judge.tiny import lora, save_adapter

Copier = Callable[[Path], Path]
ON_VALUES = (
    "adapter_not_applied scale applied_twice wrong_scaling_rule tensor_skipped layer_skipped int8_base rows_swapped "
    "mantissa_bit untouched_bit tensor_zeroed nan_planted double_rounding missing_shard"
).split()


def _failed(verdict: Verdict, layer: Layer, text: str) -> list[Check]:
    return [check for check in verdict.failures if check.layer is layer and text in f"{check.name} {check.detail}"]


def _assert_caught(fault: str, base: Path, adapter: Path, damaged: Path, dtype: str, *, whole: bool = False) -> None:
    """Judge; the files alone, which fail all of them, or with the models that they make."""
    wanted = FAULTS[fault](damaged, base, adapter)
    with open_case(base, adapter, dtype=dtype) as case:
        verdict = judge_merge(case, damaged, end_to_end=whole)
    assert verdict.status is Status.FAIL
    assert _failed(verdict, wanted.layer, wanted.names), verdict.failures


@pytest.mark.parametrize("fault", FAULTS)
def test_fails_a_damaged_bfloat16_merge(right_merge: Maker, copy_of: Copier, fault: str) -> None:
    base, adapter, merged = right_merge("lora")
    _assert_caught(fault, base, adapter, copy_of(merged), "auto", whole=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("fault", ON_VALUES)
def test_fails_a_damaged_merge_in_a_requested_dtype(
    right_merge: Maker, copy_of: Copier, fault: str, dtype: str
) -> None:
    base, adapter, merged = right_merge("lora", dtype)
    _assert_caught(fault, base, adapter, copy_of(merged), dtype)


@pytest.mark.parametrize("variant", ["rslora", "dora", "oft", "conv1d", "tied_untouched", "bias_all"])
@pytest.mark.parametrize("fault", ["adapter_not_applied", "scale", "tensor_skipped", "rows_swapped", "mantissa_bit"])
def test_fails_damaged_merges_of_other_adapters(right_merge: Maker, copy_of: Copier, variant: str, fault: str) -> None:
    base, adapter, merged = right_merge(variant)
    _assert_caught(fault, base, adapter, copy_of(merged), "auto")


def test_fails_rslora_read_as_lora(right_merge: Maker, copy_of: Copier) -> None:
    base, adapter, merged = right_merge("rslora")
    _assert_caught("wrong_scaling_rule", base, adapter, copy_of(merged), "auto")


def test_a_weak_adapter_passes_as_lossy_and_is_told_what_would_help(weak: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = weak
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert verdict.status is Status.PASS_LOSSY
    warning = next(check for check in verdict.checks if check.layer is Layer.QUALITY and check.outcome is Outcome.WARN)
    assert warning.value is not None
    assert warning.value < 0.9
    assert "float16" in warning.detail
    assert "float32" in warning.detail


def test_a_weak_adapter_in_float32_loses_nothing(weak: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = weak
    merged = save_merge(tmp_path / "merged", base, adapter, dtype="float32")
    assert judge(base=base, adapter=adapter, merged=merged, dtype="float32").status is Status.PASS


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.98, 1.02, 2.0])
def test_a_weak_adapter_hides_no_wrong_factor(weak: tuple[Path, Path, Path], copy_of: Copier, factor: float) -> None:
    base, adapter, merged = weak
    damaged = copy_of(merged)
    if factor:
        damage_scale(damaged, base, adapter, factor)
    else:
        damage_adapter_not_applied(damaged, base, adapter)
    verdict = judge(base=base, adapter=adapter, merged=damaged, dtype="auto")
    assert _failed(verdict, Layer.STORAGE, "touched elements")


@pytest.mark.parametrize("variant", ["tied_head", "tied_embedding", "tied_saved_head", "tied_saved_embedding"])
def test_fails_a_merge_whose_config_ties_what_must_differ(right_merge: Maker, copy_of: Copier, variant: str) -> None:
    base, adapter, merged = right_merge(variant)
    damaged = copy_of(merged)
    edit_config(damaged, tie_word_embeddings=True)
    verdict = judge(base=base, adapter=adapter, merged=damaged, dtype="auto")
    assert _failed(verdict, Layer.STRUCTURE, "the two embeddings must differ")


def test_fails_a_merge_that_leaks_through_the_tie(right_merge: Maker, tmp_path: Path) -> None:
    # What `merge_and_unload` does with LoRA on a tied head: the embedding gets the head's delta.
    base, adapter, _ = right_merge("tied_head")
    weights = merged_weights(base, adapter)
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
    leaked = write_merge(tmp_path / "leaked", base, weights)
    verdict = judge(base=base, adapter=adapter, merged=leaked, dtype="auto")
    assert _failed(verdict, Layer.STRUCTURE, "lm_head.weight is missing")
    assert _failed(verdict, Layer.STORAGE, "model.embed_tokens.weight")
    skipped = next(check for check in verdict.checks if check.layer is Layer.END_TO_END)
    assert (skipped.outcome, "the structure failed" in skipped.detail) == (Outcome.SKIPPED, True)


def test_fails_a_merge_that_took_the_untrained_copy(right_merge: Maker, tmp_path: Path) -> None:
    base, adapter, _ = right_merge("saved_modules")
    weights = merged_weights(base, adapter)
    del weights["lm_head.weight"]
    verdict = judge(base=base, adapter=adapter, merged=write_merge(tmp_path / "merged", base, weights), dtype="auto")
    assert _failed(verdict, Layer.STORAGE, "lm_head.weight")


def test_fails_a_delta_that_overflows_float16(right_merge: Maker, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], lora(lora_alpha=8_000_000_000))
    merged = save_merge(tmp_path / "merged", bases["llama"], adapter, dtype="float16")
    verdict = judge(base=bases["llama"], adapter=adapter, merged=merged, dtype="float16")
    assert _failed(verdict, Layer.STORAGE, "NaN or Inf")


def test_fails_a_merge_in_another_dtype_than_asked_for(right_merge: Maker) -> None:
    base, adapter, merged = right_merge("lora", "float16")
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert _failed(verdict, Layer.STRUCTURE, "is F16, expected BF16")
    assert _failed(verdict, Layer.STRUCTURE, 'dtype is "float16", expected "bfloat16"')


def test_fails_a_merge_of_another_adapter(right_merge: Maker, bases: dict[str, Path], tmp_path: Path) -> None:
    base, _, merged = right_merge("lora")
    other = save_adapter(tmp_path / "other", base, lora(target_modules="all-linear"), seed=77)
    verdict = judge(base=base, adapter=other, merged=merged, dtype="auto")
    assert _failed(verdict, Layer.STORAGE, "touched elements")


def test_names_an_adapter_tensor_that_nothing_uses(right_merge: Maker, copy_of: Copier) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter, merged = right_merge("lora")
    spoiled = copy_of(adapter)
    weights = load_file(spoiled / "adapter_model.safetensors")
    stray = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    save_file(weights | {stray: torch.ones(4, 48)}, spoiled / "adapter_model.safetensors")
    verdict = judge(base=base, adapter=spoiled, merged=merged, dtype="auto")
    assert _failed(verdict, Layer.STORAGE, stray)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_fails_a_folder_that_lacks_a_file_of_the_base(right_merge: Maker, copy_of: Copier, name: str) -> None:
    base, adapter, merged = right_merge("lora")
    damaged = copy_of(merged)
    (damaged / name).unlink()
    verdict = judge(base=base, adapter=adapter, merged=damaged, dtype="auto")
    layer = Layer.STRUCTURE if name == "config.json" else Layer.FILES
    assert _failed(verdict, layer, f"{name} is missing")


def test_a_folder_without_weights_fails_and_nothing_else_is_claimed(right_merge: Maker, tmp_path: Path) -> None:
    base, adapter, _ = right_merge("lora")
    verdict = judge(base=base, adapter=adapter, merged=tmp_path, dtype="auto")
    assert verdict.status is Status.FAIL
    assert {check.layer for check in verdict.checks if check.outcome is Outcome.SKIPPED} == set(Layer)
    assert not any(check.outcome is Outcome.PASS for check in verdict.checks)


def test_a_total_of_the_base_that_is_wrong_is_not_the_merges_fault(right_merge: Maker, tmp_path: Path) -> None:
    base, adapter, merged = right_merge("lora")
    folders = []
    for folder in (base, merged):
        path = write_total(folder, tmp_path / folder.name / "copy")
        folders.append(path)
    assert judge(base=folders[0], adapter=adapter, merged=folders[1], dtype="auto").status is Status.PASS


def write_total(folder: Path, out: Path) -> Path:
    """Return a copy of the folder whose index announces 7 bytes."""
    import shutil

    shutil.copytree(folder, out)
    path = out / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"metadata": {"total_size": 7}}))
    return out
