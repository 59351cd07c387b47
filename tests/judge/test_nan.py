"""Rows that are NaN in the base are no failure of a merge; any other NaN is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.files.layout import read_checkpoint
from runner.judge.forward import without_common_nan
from runner.judge.judge import judge
from runner.protocol.verdict import Outcome, Status
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.judge.faults import rewrite
from tests.judge.tiny import lora, save_adapter, save_base

UNUSED = 310  # rows of the vocabulary from here on belong to no token


def _with_nan(folder: Path, kind: str, start: int = UNUSED) -> tuple[Path, str]:
    base = save_base(folder, kind)
    name = "lm_head.weight" if kind == "llama" else "model.embed_tokens.weight"
    rewrite(base, read_checkpoint(base).tensors[name].file, lambda tensors: tensors[name][start:].fill_(torch.nan))
    return base, name


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    "kind, modules", [("llama", ["q_proj"]), ("llama", ["q_proj", "lm_head"]), ("tied", ["q_proj"])], ids=str
)
def test_unused_rows_of_the_head_may_be_nan(kind: str, modules: list[str], dtype: str, tmp_path: Path) -> None:
    base, name = _with_nan(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=modules))
    # PEFT's copies of the base beside an embedding's factors; with NaN in them, they are refused.
    rewrite(
        adapter,
        "adapter_model.safetensors",
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "base_layer" in key],
    )
    merged = merge(prepare(base, adapter, dtype=dtype), into=tmp_path / "merged").root

    right = judge(base=base, adapter=adapter, merged=merged, dtype=dtype)
    rewrite(merged, read_checkpoint(merged).tensors[name].file, lambda tensors: tensors[name][7].fill_(torch.nan))
    wrong = judge(base=base, adapter=adapter, merged=merged, dtype=dtype)

    assert right.status is Status.PASS, right.failures
    assert right.quality is not None
    assert right.quality.effect > 0.01
    assert right.quality.retention > 0.9
    assert "no NaN or Inf that the base had not" in {check.name for check in wrong.failures}


def test_a_base_that_is_all_nan_is_not_verified(tmp_path: Path) -> None:
    base, _ = _with_nan(tmp_path / "base", "llama", start=0)
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    merged = merge(prepare(base, adapter, dtype="auto"), into=tmp_path / "merged").root

    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")

    assert verdict.status is Status.NOT_VERIFIED
    (check,) = [check for check in verdict.checks if check.outcome is Outcome.SKIPPED]
    assert "computes nothing but NaN" in check.detail


def test_only_a_nan_that_all_have_is_left_out() -> None:
    nan = torch.nan
    base, same = torch.tensor([[1.0, nan, nan]]), torch.tensor([[2.0, nan, 4.0, nan]])
    made = without_common_nan({"base": base, "merged": same})
    assert torch.equal(made["base"].isnan(), torch.tensor([[False, False, True]]))
    assert torch.equal(made["merged"].isnan(), torch.tensor([[False, False, False, True]]))
    assert without_common_nan({"base": base, "merged": torch.ones(1, 3)})["base"] is base
