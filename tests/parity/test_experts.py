"""Fused experts and other parameters that transformers computes from stored tensors: merged as PEFT merges them.

The oracle is PEFT's `merge_and_unload` of the base loaded in float32, brought back to the stored names by
transformers' own `revert_weight_conversion`, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from runner.judge.judge import judge
from runner.protocol.verdict import Outcome
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Case:
    """One adapter on one model."""

    build: Callable[[], PreTrainedModel]
    config: LoraConfig


def _lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": [], "task_type": "CAUSAL_LM", **options})


CASES = {
    "mixtral_both": Case(models.mixtral, _lora(target_parameters=BOTH)),
    "mixtral_gate_up": Case(models.mixtral, _lora(target_parameters=BOTH[:1])),
    "mixtral_down": Case(models.mixtral, _lora(target_parameters=BOTH[1:])),
    "mixtral_attention_beside": Case(
        models.mixtral, _lora(target_modules=["q_proj", "v_proj"], target_parameters=BOTH, use_rslora=True)
    ),
    "mixtral_rank_is_experts": Case(models.mixtral, _lora(r=4, target_parameters=BOTH)),
    "qwen3_moe_both": Case(partial(structures.build, "Qwen3MoeForCausalLM"), _lora(target_parameters=BOTH)),
    "qwen3_next_both": Case(partial(structures.build, "Qwen3NextForCausalLM"), _lora(target_parameters=BOTH)),
    "gpt_oss_both": Case(partial(structures.build, "GptOssForCausalLM"), _lora(target_parameters=BOTH)),
    "gpt_oss_rank_is_experts": Case(
        partial(structures.build, "GptOssForCausalLM"),
        _lora(r=4, target_modules=["q_proj"], target_parameters=BOTH, use_rslora=True),
    ),
    "mixtral_router": Case(models.mixtral, _lora(target_parameters=[*BOTH, "mlp.gate.weight"])),
}


def check_merge(base: Path, adapter: Path, merged: Path) -> None:
    """Compare every stored tensor with the oracle's, bit by bit."""
    expected = oracle.peft_merge_of_fused(base, adapter)
    before, after = oracle.read_folder(base), oracle.read_folder(merged)
    assert after.keys() == before.keys() == expected.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_merge_equals_peft_merge_of_the_fused_parameters_rounded_once(name: str, dtype: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(case.build(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", case.config)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype=dtype)

    check_merge(base, adapter, merged.root)
    assert {tensor.dtype for tensor in oracle.read_folder(merged.root).values()} == {TORCH[dtype]}


@pytest.mark.parametrize("name", CASES)
def test_the_judge_passes_the_merge(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(case.build(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", case.config)
    _, merged = run_merge(base, adapter, tmp_path / "merged")

    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")

    assert verdict.failures == ()
    assert not any(check.outcome is Outcome.SKIPPED for check in verdict.checks)
    assert verdict.passed
