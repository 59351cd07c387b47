"""Adapters that transformers 4 trained on single experts, for bases whose experts transformers 5 fuses.

They are written by hand under the old names; the oracles are W + s·B·A for each stored matrix, and PEFT's own merge.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.judge.judge import judge
from runner.protocol.errors import AdapterMismatch
from runner.protocol.verdict import Status
from runner.worker.merge.prepare import prepare
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Case:
    """Which modules of which base an adapter of transformers 4 was trained on."""

    architecture: str
    targets: tuple[str, ...]


CASES = {
    "mixtral_all": Case("MixtralForCausalLM", ("w1", "w2", "w3", "q_proj")),
    "mixtral_down": Case("MixtralForCausalLM", ("w2",)),
    "mixtral_router": Case("MixtralForCausalLM", ("w1", "w2", "w3", "gate", "q_proj")),
    "qwen3_moe_all": Case("Qwen3MoeForCausalLM", ("gate_proj", "up_proj", "down_proj", "q_proj")),
    "qwen3_moe_down": Case("Qwen3MoeForCausalLM", ("down_proj",)),
    "qwen3_moe_router": Case("Qwen3MoeForCausalLM", ("gate_proj", "up_proj", "down_proj", "gate")),
}


def _write(case: Case, base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write the adapter of the case, and return what the matrices that it changes must be."""
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    pattern = re.compile(rf"(.+\.(?:{'|'.join(case.targets)}))\.weight")
    for name, weight in oracle.read_folder(base).items():
        if match := pattern.fullmatch(name):
            a, b = torch.randn(RANK, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], RANK) * 0.1
            tensors[f"base_model.model.{match[1]}.lora_A.weight"] = a
            tensors[f"base_model.model.{match[1]}.lora_B.weight"] = b
            wanted[name] = (weight.double() + ALPHA / RANK * (b.double() @ a.double())).float()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.17.1", "r": RANK, "lora_alpha": ALPHA,
        "target_modules": list(case.targets),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return wanted


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_single_experts_is_merged_into_them_and_judged(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(structures.build(case.architecture), tmp_path / "base", dtype=torch.bfloat16, shard="30KB")
    wanted = _write(case, base, tmp_path / "adapter")

    _, merged = run_merge(base, tmp_path / "adapter", tmp_path / "merged")

    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    expected = oracle.saved_merge(base, tmp_path / "adapter", tmp_path / "oracle")
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert torch.equal(tensor, expected[key].bfloat16()), key
        if key in wanted:
            torch.testing.assert_close(tensor.float(), wanted[key], rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(tensor, before[key]), key
    assert all(not torch.equal(after[key], before[key]) for key in wanted)
    verdict = judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


REFUSED = {
    "half of a fused pair": (Case("MixtralForCausalLM", ("w1",)), "w1 without also targeting w3"),
    "a fused pair alone": (Case("MixtralForCausalLM", ("w1", "w3")), "experts"),
    "experts and a shared expert of the same names": (
        Case("Qwen3NextForCausalLM", ("gate_proj", "up_proj", "down_proj")), "shared_expert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_bring_to_the_fused_experts_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case, text = REFUSED[name]
    base = models.save_base(structures.build(case.architecture), tmp_path / "base", dtype=torch.bfloat16, shard="30KB")
    _write(case, base, tmp_path / "adapter")

    with pytest.raises(AdapterMismatch, match=text):
        prepare(base, tmp_path / "adapter", dtype="auto")
