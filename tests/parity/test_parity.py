"""The merge equals PEFT's own, bit for bit; everything that the adapter does not touch is the base's own bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runner.protocol.digests import digest_folder
from tests.parity import models, oracle
from tests.parity.cases import CASES, llama, lora, tied_llama
from tests.parity.pipeline import run_merge

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _check(base: Path, adapter: Path, merged: Path, *, unties: bool) -> None:
    expected = oracle.peft_merge(base, adapter, untie=unties)
    before, after = oracle.read_folder(base), oracle.read_folder(merged)
    assert after.keys() == before.keys() | expected.keys()
    for name, tensor in after.items():
        wanted = expected[name] if name in expected else before[name]
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name
    changed = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert changed or unties, "the adapter of this test changes nothing"


@pytest.mark.parametrize("name", CASES)
def test_merge_equals_peft_merge_of_a_float32_base_rounded_once(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(case.build(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", case.config)

    plan, merged = run_merge(base, adapter, tmp_path / "merged")

    _check(base, adapter, merged.root, unties=case.unties)
    assert bool(plan.summary.tensors_added) == case.unties
    tied = json.loads((merged.root / "config.json").read_text()).get("tie_word_embeddings")
    assert not (case.unties and tied)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merge_rounds_once_to_every_output_dtype(stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    base = models.save_base(llama(), tmp_path / "base", dtype=stored)
    config = lora(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", use_rslora=True)
    adapter = models.save_adapter(base, tmp_path / "adapter", config)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype=dtype)

    _check(base, adapter, merged.root, unties=False)
    assert {tensor.dtype for tensor in oracle.read_folder(merged.root).values()} == {TORCH[dtype]}
    assert json.loads((merged.root / "config.json").read_text())["dtype"] == dtype


def test_untouched_files_are_the_bases_bytes(tmp_path: Path) -> None:
    base = models.save_base(llama(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(target_modules=["q_proj"], task_type="CAUSAL_LM"))

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    before = {file.path: file for file in digest_folder(base)}
    after = {file.path: file for file in digest_folder(merged.root)}
    assert after.keys() == before.keys()
    assert merged.files == digest_folder(merged.root)
    for path in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert after[path] == before[path], path


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    base = models.save_base(tied_llama(), tmp_path / "base", dtype=torch.bfloat16)
    config = lora(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(base, tmp_path / "adapter", config)

    _, first = run_merge(base, adapter, tmp_path / "first")
    _, second = run_merge(base, adapter, tmp_path / "second")

    assert first.files == second.files
    assert first.digest == second.digest


def test_an_adapter_stored_in_bfloat16_is_not_rounded_again(tmp_path: Path) -> None:
    base = models.save_base(llama(), tmp_path / "base", dtype=torch.bfloat16)
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")

    def to_bfloat16(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()

    adapter = models.save_adapter(base, tmp_path / "adapter", config, change=to_bfloat16)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype="float32")

    _check(base, adapter, merged.root, unties=False)


def test_a_trained_head_keeps_float32_where_the_output_holds_it(tmp_path: Path) -> None:
    base = models.save_base(llama(), tmp_path / "base", dtype=torch.bfloat16)
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(base, tmp_path / "adapter", config)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype="float32")

    head = oracle.read_folder(merged.root)["lm_head.weight"]
    assert not torch.equal(head, head.bfloat16().float())
    _check(base, adapter, merged.root, unties=False)
