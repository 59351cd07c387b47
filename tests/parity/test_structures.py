"""The merge of every architecture equals what PEFT merges in float32 and transformers saves, rounded once.

The oracle takes no name from us: the merged model goes back to disk through transformers' own reverse mapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import save_file

from runner.judge.judge import judge
from runner.protocol.verdict import Layer, Outcome, Status
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge


@dataclass(frozen=True)
class Case:
    """One adapter on one architecture."""

    architecture: str
    config: PeftConfig
    dtype: torch.dtype = torch.bfloat16


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Where "all-linear" would reach fused experts, or a module that PEFT refuses (Mamba's out_proj).
TARGETS = {
    "MixtralForCausalLM": ATTENTION,
    "Qwen3MoeForCausalLM": ATTENTION,
    "Llama4ForCausalLM": ATTENTION,
    "FalconH1ForCausalLM": [*ATTENTION, "in_proj"],
    "Qwen3NextForCausalLM": [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"],
    "MambaForCausalLM": ["in_proj", "x_proj", "dt_proj"],
    "Mamba2ForCausalLM": ["in_proj"],
}
# PEFT cannot save an adapter of every linear layer of these: it asks for an embedding of tokens.
WAV2VEC2_TARGETS = ["q_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]
MEDIA_TARGETS = {"Wav2Vec2ForCTC": WAV2VEC2_TARGETS, "HubertForSequenceClassification": WAV2VEC2_TARGETS}
TASKS = {
    "WhisperForConditionalGeneration": None,
    "BertModel": "FEATURE_EXTRACTION",
    "BertForSequenceClassification": "SEQ_CLS",
    **dict.fromkeys(name for name in structures.ENCODERS if name.endswith("MaskedLM")),
}
FAULTY = (
    "Qwen2VLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
)
Tensors = dict[str, torch.Tensor]


def _vision_not_applied(after: Tensors, before: Tensors, changed: list[str], copied: list[str]) -> Layer:
    key = next(key for key in changed if "vis" in key)
    after[key] = before[key]
    return Layer.STORAGE


def _text_not_applied(after: Tensors, before: Tensors, changed: list[str], copied: list[str]) -> Layer:
    key = next(key for key in reversed(changed) if "vis" not in key)
    after[key] = before[key]
    return Layer.STORAGE


def _copy_changed(after: Tensors, before: Tensors, changed: list[str], copied: list[str]) -> Layer:
    after[copied[0]] = after[copied[0]].clone()
    after[copied[0]].view(-1)[0] += 0.5
    return Layer.STORAGE


def _key_renamed(after: Tensors, before: Tensors, changed: list[str], copied: list[str]) -> Layer:
    # A prefix of the model itself would be the same to transformers, which drops and adds it when it loads.
    after[f"another.{changed[-1]}"] = after.pop(changed[-1])
    return Layer.STRUCTURE


FAULTS = {
    "a vision tensor that is the base's": _vision_not_applied,
    "a text tensor that is the base's": _text_not_applied,
    "a copied tensor that is changed": _copy_changed,
    "a tensor under another name": _key_renamed,
}
CASES = {
    **{
        name: Case(name, _lora(target_modules=TARGETS.get(name, "all-linear")))
        for name in (*structures.TEXT_MODELS, *structures.VISION_MODELS)
    },
    **{
        name: Case(name, _lora(task_type=TASKS.get(name, "SEQ_2_SEQ_LM"), target_modules="all-linear"))
        for name in (*structures.ENCODER_DECODERS, *structures.ENCODERS)
    },
    **{
        name: Case(name, _lora(target_modules=MEDIA_TARGETS.get(name, "all-linear"), task_type=None))
        for name in structures.MEDIA_MODELS
    },
    "T5ForConditionalGeneration, DoRA": Case(
        "T5ForConditionalGeneration", _lora(target_modules=["q", "v"], use_dora=True, task_type="SEQ_2_SEQ_LM")
    ),
    "BertForMaskedLM, bias": Case("BertForMaskedLM", _lora(target_modules=["query", "value"], bias="all")),
    "LlamaForCausalLM, embeddings": Case("LlamaForCausalLM", _lora(target_modules=["q_proj", "embed_tokens"])),
    "Mamba2ForCausalLM, embeddings": Case("Mamba2ForCausalLM", _lora(target_modules=["in_proj", "embeddings"])),
    "LlavaForConditionalGeneration, embeddings": Case(
        "LlavaForConditionalGeneration", _lora(target_modules=["q_proj", "embed_tokens", "lm_head"])
    ),
    "Qwen2VLForConditionalGeneration, DoRA": Case("Qwen2VLForConditionalGeneration", _lora(use_dora=True)),
    "Gemma3ForConditionalGeneration, DoRA": Case("Gemma3ForConditionalGeneration", _lora(use_dora=True)),
    "Phi3ForCausalLM, DoRA": Case("Phi3ForCausalLM", _lora(use_dora=True)),
    "FalconForCausalLM, DoRA": Case("FalconForCausalLM", _lora(use_dora=True)),
    "GPTNeoXForCausalLM, bias": Case("GPTNeoXForCausalLM", _lora(bias="all")),
    "OPTForCausalLM, bias": Case("OPTForCausalLM", _lora(bias="all")),
    "PhiForCausalLM, lora_bias": Case("PhiForCausalLM", _lora(target_modules=["q_proj", "fc1"], lora_bias=True)),
    "Qwen2VLForConditionalGeneration, bias": Case("Qwen2VLForConditionalGeneration", _lora(bias="lora_only")),
    "GPTJForCausalLM, head": Case("GPTJForCausalLM", _lora(modules_to_save=["lm_head"])),
    "PaliGemmaForConditionalGeneration, projector": Case(
        "PaliGemmaForConditionalGeneration",
        _lora(target_modules=ATTENTION, modules_to_save=["multi_modal_projector"]),
    ),
    **{
        f"{name}, {str(dtype).removeprefix('torch.')}": Case(
            name, _lora(target_modules=TARGETS.get(name, "all-linear")), dtype
        )
        for name in ("GPT2LMHeadModel", "Qwen3NextForCausalLM", "Gemma3ForConditionalGeneration")
        for dtype in (torch.float16, torch.float32)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_is_merged_as_peft_merges_it_and_judged(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(structures.build(case.architecture), tmp_path / "base", dtype=case.dtype, shard="30KB")
    adapter = models.save_adapter(base, tmp_path / "adapter", case.config)

    plan, merged = run_merge(base, adapter, tmp_path / "merged")

    expected = oracle.saved_merge(base, adapter, tmp_path / "oracle")
    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    assert plan.index is not None
    assert after.keys() == before.keys()
    assert [key for key in after if not _same_bits(after[key], expected[key].to(before[key].dtype))] == []
    assert any(not _same_bits(after[key], before[key]) for key in after)
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


def test_a_model_that_continues_no_text_is_judged_without(tmp_path: Path) -> None:
    name = "SwitchTransformersForConditionalGeneration"
    base = models.save_base(structures.build(name), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", CASES[name].config)
    _, merged = run_merge(base, adapter, tmp_path / "merged")

    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")

    assert verdict.status is Status.PASS
    (left_out,) = (check for check in verdict.checks if check.outcome is Outcome.SKIPPED)
    assert "transformers says 'list index out of range'" in left_out.detail


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FAULTY)
def test_the_judge_fails_a_vision_language_merge_with(fault: str, name: str, tmp_path: Path) -> None:
    base = models.save_base(structures.build(name), tmp_path / "base", dtype=torch.bfloat16, shard="1GB")
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora())
    _, merged = run_merge(base, adapter, tmp_path / "merged")
    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    changed = sorted(key for key in after if not _same_bits(after[key], before[key]))
    copied = sorted(after.keys() - set(changed))

    layer = FAULTS[fault](after, before, changed, copied)
    save_file(after, merged.root / "model.safetensors", metadata={"format": "pt"})
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")

    assert verdict.status is Status.FAIL
    assert layer in {check.layer for check in verdict.failures}


@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "ViTForImageClassification"])
def test_the_judge_sees_in_its_outputs_that_a_model_of_sounds_or_pictures_was_not_merged(
    name: str, tmp_path: Path
) -> None:
    base = models.save_base(structures.build(name), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", CASES[name].config)

    verdict = judge(base=base, adapter=adapter, merged=base, dtype="auto")

    assert verdict.status is Status.FAIL
    assert "the un-rounded merge computes" in " ".join(check.name for check in verdict.checks)
    assert verdict.quality is not None
    assert verdict.quality.effect > 1e-3  # the adapter moves the outputs, so the comparison can see it


def test_a_model_that_the_judge_has_no_inputs_for_is_not_verified(tmp_path: Path) -> None:
    config = {"text_config": structures.CLIP_TEXT, "vision_config": structures.VISION, "projection_dim": 32}
    base = models.save_base(structures.build("CLIPModel", config), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora(target_modules=["q_proj"], task_type=None))
    _, merged = run_merge(base, adapter, tmp_path / "merged")

    right = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    wrong = judge(base=base, adapter=adapter, merged=base, dtype="auto")

    assert right.status is Status.NOT_VERIFIED
    assert [check.name for check in right.checks if check.outcome is Outcome.SKIPPED] == ["the models run"]
    assert wrong.status is Status.FAIL


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
