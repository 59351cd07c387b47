"""The judge passes the merge of every method that is merged, and fails it with one row altered or the scale wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.judge.case import open_case
from runner.judge.judge import judge, judge_merge
from runner.protocol.verdict import Layer, Outcome, Status
from tests.parity import models, oracle
from tests.parity.cases import CASES, llama, lora
from tests.parity.pipeline import run_merge

Tensors = dict[str, torch.Tensor]
# A constrained rotation is nearly the identity; bf16 keeps 1 % of it.
LOSSY = {"oft_constrained"}
FIRST = {case.config.peft_type: name for name, case in list(CASES.items())[::-1]}
ONE_OF_EACH = (*FIRST.values(), "dora", "kasa", "pissa")


def _row_altered(base: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    altered = merged.clone()
    row = int((merged.double() - base.double()).abs().flatten(1).sum(1).argmax()) if merged.ndim > 1 else 0
    altered[row] = base[row] + 3 * (merged[row] - base[row])
    return altered


def _scaled(base: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    return (base.double() + 1.25 * (merged.double() - base.double())).to(merged.dtype)


FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "one row altered": _row_altered,
    "scale wrong": _scaled,
}


def _merged(name: str, root: Path) -> tuple[Path, Path, Path]:
    case = CASES[name]
    base = models.save_base(case.build(), root / "base", dtype=torch.bfloat16, shard="1GB")
    adapter = models.save_adapter(base, root / "adapter", case.config)
    _, merged = run_merge(base, adapter, root / "merged")
    return base, adapter, merged.root


@pytest.mark.parametrize("name", CASES)
def test_passes_every_way_to_merge(name: str, tmp_path: Path) -> None:
    base, adapter, merged = _merged(name, tmp_path)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is (Status.PASS_LOSSY if name in LOSSY else Status.PASS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_fails_faults_in_every_method(name: str, tmp_path: Path) -> None:
    base, adapter, merged = _merged(name, tmp_path)
    before, after = oracle.read_folder(base), oracle.read_folder(merged)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    with open_case(base, adapter, dtype="auto") as case:
        for fault, damage in FAULTS.items():
            bad = _with(merged, tmp_path / fault, {key: damage(before[key], after[key]) for key in changed})
            verdict = judge_merge(case, bad, end_to_end=False)  # the files alone fail it
            assert verdict.status is Status.FAIL, fault
            assert Layer.STORAGE in {check.layer for check in verdict.failures}, fault


def _with(merged: Path, folder: Path, tensors: Tensors) -> Path:
    shutil.copytree(merged, folder)
    save_file(oracle.read_folder(merged) | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "ia3"])
def test_fails_a_folder_that_is_the_base(name: str, tmp_path: Path) -> None:
    base, adapter, _ = _merged(name, tmp_path)
    verdict = judge(base=base, adapter=adapter, merged=base, dtype="auto")
    assert verdict.status is Status.FAIL
    assert any("the adapter's change is in the files" in check.name for check in verdict.failures)


def test_fails_a_right_merge_whose_dtype_kept_nothing_of_the_adapter(tmp_path: Path) -> None:
    base = models.save_base(llama(), tmp_path / "base", dtype=torch.bfloat16)
    config = lora(target_modules=["q_proj"], lora_alpha=1e-7)
    adapter = models.save_adapter(base, tmp_path / "adapter", config)
    _, merged = run_merge(base, adapter, tmp_path / "merged")
    _, wide = run_merge(base, adapter, tmp_path / "wide", dtype="float32")

    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.status is Status.FAIL
    assert "its change is lost in this dtype" in verdict.failures[0].detail
    assert judge(base=base, adapter=adapter, merged=wide.root, dtype="float32").passed


def test_fails_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    base = models.save_base(llama(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", CASES["ia3"].config, scale=0.0)
    verdict = judge(base=base, adapter=adapter, merged=base, dtype="auto")
    assert verdict.status is Status.FAIL
    assert [check.detail for check in verdict.failures] == [
        "The adapter changes no weight of this base, so that there is nothing to release."
    ]


def test_fails_a_merge_into_another_base_of_the_same_shapes(tmp_path: Path) -> None:
    base, adapter, _ = _merged("lora", tmp_path)
    other = models.llama(tied=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    elsewhere = models.save_base(other, tmp_path / "other", dtype=torch.bfloat16)
    _, merged = run_merge(elsewhere, adapter, tmp_path / "from_other")
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.status is Status.FAIL
    assert {check.layer for check in verdict.checks if check.outcome is Outcome.FAIL} >= {Layer.STORAGE}
