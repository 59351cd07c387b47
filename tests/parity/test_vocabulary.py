"""A vocabulary that is not the base's: grown, or cut to what is used; rows come from the adapter or the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from runner.judge.judge import judge
from runner.protocol.errors import AdapterMismatch
from runner.protocol.verdict import Status
from runner.worker.merge.prepare import prepare
from tests.parity import heads, models, oracle, structures
from tests.parity.heads import Trained
from tests.parity.pipeline import run_merge

ATTENTION = ["q_proj", "v_proj"]
GROWN, CUT = models.VOCAB + 5, models.VOCAB - 7


@dataclass(frozen=True)
class Case:
    """One adapter with another vocabulary on one base; `unties` where both sides are then stored."""

    build: Callable[[], PreTrainedModel]
    trained: Trained
    unties: bool = False


def _llama() -> PreTrainedModel:
    return models.llama(tied=False)


def _tied() -> PreTrainedModel:
    return models.llama(tied=True)


def _trained(rows: int, targets: list[str] | None = None, task: str = "CAUSAL_LM", **options: object) -> Trained:
    return Trained(task=task, rows=rows, options={"target_modules": targets or ATTENTION, **options})


CASES = {
    "grown": Case(_llama, _trained(GROWN)),
    "grown_tied": Case(_tied, _trained(GROWN)),
    "grown_saved": Case(_llama, _trained(GROWN, modules_to_save=["embed_tokens", "lm_head"])),
    "grown_saved_tied": Case(_tied, _trained(GROWN, modules_to_save=["embed_tokens", "lm_head"]), unties=True),
    "grown_embedding_lora": Case(_llama, _trained(GROWN, ["q_proj", "embed_tokens", "lm_head"])),
    "grown_tokens_tied": Case(_tied, _trained(GROWN, trainable_token_indices=list(range(models.VOCAB - 2, GROWN)))),
    "grown_conv1d": Case(models.gpt2, _trained(GROWN, ["c_attn"], fan_in_fan_out=True)),
    "grown_labels": Case(_llama, _trained(GROWN, task="SEQ_CLS")),
    "cut": Case(_llama, _trained(CUT)),
    "cut_tied": Case(_tied, _trained(CUT)),
    "cut_saved": Case(_llama, _trained(CUT, modules_to_save=["embed_tokens", "lm_head"])),
    "cut_saved_head_tied": Case(_tied, _trained(CUT, modules_to_save=["lm_head"]), unties=True),
    "cut_embedding_lora": Case(_llama, _trained(CUT, ["q_proj", "embed_tokens", "lm_head"])),
    "cut_tokens": Case(_llama, _trained(CUT, trainable_token_indices=[3, 9])),
    "cut_labels": Case(_llama, _trained(CUT, task="SEQ_CLS")),
}


@pytest.mark.parametrize("name", CASES)
def test_merge_equals_peft_after_resizing_and_the_judge_agrees(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(case.build(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = heads.save_adapter(base, tmp_path / "adapter", case.trained)

    plan, merged = run_merge(base, adapter, tmp_path / "merged")

    expected = heads.peft_merge(base, adapter, case.trained, untie=case.unties)
    after = oracle.read_folder(merged.root)
    assert after.keys() == expected.keys()
    for key, tensor in after.items():
        assert torch.equal(tensor, expected[key].to(tensor.dtype)), key
    config = json.loads((merged.root / "config.json").read_text())
    assert config["vocab_size"] == case.trained.rows
    assert any(str(case.trained.rows) in note for note in plan.summary.notes)
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.passed


@pytest.mark.parametrize("name", ["grown", "cut"])
@pytest.mark.parametrize("fault", ["rows", "config", "shifted"])
def test_the_judge_fails_a_wrong_vocabulary(name: str, fault: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(case.build(), tmp_path / "base", dtype=torch.bfloat16, shard="10MB")
    adapter = heads.save_adapter(base, tmp_path / "adapter", case.trained)
    _, merged = run_merge(base, adapter, tmp_path / "merged")

    if fault == "config":
        config = json.loads((merged.root / "config.json").read_text())
        (merged.root / "config.json").write_text(json.dumps({**config, "vocab_size": models.VOCAB}))
    else:
        path = merged.root / "model.safetensors"
        tensors = load_file(path)
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = head[:-1].clone() if fault == "rows" else head.roll(1, 0).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")

    wanted = {"config": "vocab_size", "rows": "lm_head.weight has shape", "shifted": "lm_head.weight["}[fault]
    assert any(wanted in check.detail for check in verdict.failures), verdict.failures


@pytest.mark.parametrize("lost", ["lm_head.weight", "embed_tokens.weight"])
def test_refuses_to_invent_rows(lost: str, tmp_path: Path) -> None:
    base = models.save_base(_llama(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = heads.save_adapter(base, tmp_path / "adapter", CASES["grown"].trained)
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(lost)}
    save_file(kept, adapter / "adapter_model.safetensors")

    with pytest.raises(AdapterMismatch, match=r"rows of .* invented|rows of"):
        prepare(base, adapter, dtype="auto")


def test_refuses_embeddings_of_two_sizes(tmp_path: Path) -> None:
    base = models.save_base(_llama(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = heads.save_adapter(base, tmp_path / "adapter", CASES["grown"].trained)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    save_file({**weights, name: weights[name][:-1].clone()}, adapter / "adapter_model.safetensors")

    with pytest.raises(AdapterMismatch, match="100 and 101 rows"):
        prepare(base, adapter, dtype="auto")


PADDED = {
    "LlamaForCausalLM": ["q_proj"],
    "GPT2LMHeadModel": ["c_attn"],
    "OPTForCausalLM": ["q_proj"],
    "T5ForConditionalGeneration": ["q"],
    "BartForConditionalGeneration": ["q_proj"],
}


@pytest.mark.parametrize("architecture", PADDED)
def test_one_more_token_to_pad_with_is_merged_and_judged(architecture: str, tmp_path: Path) -> None:
    base = models.save_base(structures.build(architecture), tmp_path / "base", dtype=torch.float32)
    model = oracle.load(base)
    rows = model.get_input_embeddings().weight.shape[0] + 1
    model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(0)
    trained = get_peft_model(model, LoraConfig(r=4, target_modules=PADDED[architecture]))
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    trained.save_pretrained(tmp_path / "adapter")

    _, merged = run_merge(base, tmp_path / "adapter", tmp_path / "merged")

    expected = trained.merge_and_unload().state_dict()
    loaded = oracle.load(merged.root)
    assert loaded.get_input_embeddings().weight.shape[0] == rows
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)
    verdict = judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS
