"""PEFT adds to a weight in place; what it is given to change is a copy, for every dtype and either side of a tie.

The oracle takes nothing from the merge: one side's sum is PEFT's own merge of an untied base, the other is the base.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from runner.judge.judge import judge
from runner.protocol.verdict import Status
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

# Class → the fields of its config that are not as in `structures`.
FAMILIES = {
    "LlamaForCausalLM": {**structures.UNTIED},
    "GPT2LMHeadModel": structures.TEXT_MODELS["GPT2LMHeadModel"],
    "OPTForCausalLM": structures.TEXT_MODELS["OPTForCausalLM"],
    "T5ForConditionalGeneration": {
        "vocab_size": structures.VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EMBEDDINGS = {
    "LlamaForCausalLM": "embed_tokens", "GPT2LMHeadModel": "wte", "OPTForCausalLM": "embed_tokens",
    "T5ForConditionalGeneration": "shared",
}  # fmt: skip


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("side", ["embeddings", "head"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_one_side_leaves_the_other_as_it_was(
    family: str, stored: str, side: str, is_tied: bool, tmp_path: Path
) -> None:
    fields = {**FAMILIES[family], "tie_word_embeddings": is_tied}
    base = models.save_base(structures.build(family, fields), tmp_path / "base", dtype=DTYPES[stored])
    target = EMBEDDINGS[family] if side == "embeddings" else "lm_head"
    adapter = models.save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=8, target_modules=[target]))

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype="float32")

    before = oracle.load(base).state_dict()
    wanted = _untied_merge(base, adapter)
    after = oracle.load(merged.root).state_dict()
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed
    assert after.keys() == wanted.keys()
    for key, tensor in after.items():
        assert torch.equal(tensor, wanted[key]), key
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="float32")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


def _untied_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    model = oracle.load(base)
    for key in model.all_tied_weights_keys:  # T5 has four sides
        path, _, name = key.rpartition(".")
        setattr(model.get_submodule(path), name, torch.nn.Parameter(model.get_parameter(key).detach().clone()))
    model.config.tie_word_embeddings = False
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=False).state_dict())


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("output", ["auto", "float32"])
def test_multi_head_attention_has_the_values_of_peft(stored: str, output: str, tmp_path: Path) -> None:
    model = structures.build("SiglipVisionModel", structures.VISION)
    base = models.save_base(model, tmp_path / "base", dtype=DTYPES[stored])
    adapter = models.save_adapter(
        base, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=8, target_modules=["attention"])
    )

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype=output)

    wanted = oracle.saved_merge(base, adapter, tmp_path / "oracle")
    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    assert after.keys() == before.keys() == wanted.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor.float(), before[name].float())}
    assert {name.partition("attention.")[2] for name in changed} == {"in_proj_weight", "out_proj.weight"}
    for name, tensor in after.items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype=output)
    assert verdict.failures == ()
    assert verdict.status is Status.PASS
