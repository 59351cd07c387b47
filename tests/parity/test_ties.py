"""Tied embeddings that an adapter changes: what plain transformers loads from disk is what was trained.

The oracle is PEFT's own advice: untie the base, then merge. `tests/parity/test_parity.py` has the other tied cases.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from runner.judge.judge import judge
from runner.protocol.rounding import STOCHASTIC, Rounding
from runner.protocol.verdict import Status
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

GEMMA = "Gemma3ForConditionalGeneration"
QWEN = "Qwen2VLForConditionalGeneration"


def _lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})


def _build(name: str) -> PreTrainedModel:
    if name == "llama":
        return models.llama(tied=True)
    if name == "gemma2":
        return models.gemma2()
    if name == QWEN:  # as the published ones: tied at the top level and in the text config
        fields = structures.VISION_MODELS[QWEN]
        text = {**fields["text_config"], "tie_word_embeddings": True}
        return structures.build(QWEN, {**fields, "text_config": text, "tie_word_embeddings": True})
    return structures.build(name)


@dataclass(frozen=True)
class Case:
    """One adapter on one tied model."""

    model: str
    adapter: LoraConfig


BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
CASES = {
    "saved both": Case("llama", _lora(**BOTH)),
    "saved embeddings": Case("llama", _lora(modules_to_save=["embed_tokens"])),
    "scaled embeddings": Case("gemma2", _lora(target_modules=["q_proj", "embed_tokens"])),
    "scaled, saved both": Case("gemma2", _lora(**BOTH)),
    "vision-language, saved both": Case(GEMMA, _lora(**BOTH)),
    "vision-language, head": Case(GEMMA, _lora(target_modules=["q_proj", "lm_head"])),
    "vision-language, scaled embeddings": Case(GEMMA, _lora(target_modules=["q_proj", "embed_tokens"])),
    "vision-language, tied in both configs": Case(QWEN, _lora(**BOTH)),
}


def _untied_merge(base: Path, adapter: Path) -> PreTrainedModel:
    torch.set_num_threads(1)
    model = oracle.load(base)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=False)


@pytest.mark.parametrize("name", CASES)
def test_both_sides_come_back_from_disk_as_they_were_trained(name: str, tmp_path: Path) -> None:
    base = models.save_base(_build(CASES[name].model), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", CASES[name].adapter)
    assert oracle.load(base).config.tie_word_embeddings

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    loaded, wanted = oracle.load(merged.root), _untied_merge(base, adapter)
    embeddings, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert not torch.equal(embeddings, head)
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.bfloat16().float()), key
    saved = json.loads((merged.root / "config.json").read_text())
    for holder in (saved, saved.get("text_config", {})):
        assert not holder.get("tie_word_embeddings")
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, BOTH], ids=["embeddings", "both"])
def test_a_tie_that_peft_keeps_is_kept(options: dict[str, list[str]], tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=True), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora(**options, ensure_weight_tying=True))

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    expected, after = oracle.saved_merge(base, adapter, tmp_path / "oracle"), oracle.read_folder(merged.root)
    assert "lm_head.weight" not in after
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in after.items())
    assert judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").passed


def test_a_tied_delta_is_added_once_where_peft_adds_it_twice(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=True), tmp_path / "base", dtype=torch.bfloat16)
    config = _lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    adapter = models.save_adapter(base, tmp_path / "adapter", config)

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    name = "model.embed_tokens.weight"
    after, before = (oracle.read_folder(folder)[name].float() for folder in (merged.root, base))
    peft = oracle.saved_merge(base, adapter, tmp_path / "oracle")[name]
    untied = _untied_merge(base, adapter).get_input_embeddings().weight
    assert torch.equal(after, untied.bfloat16().float())
    torch.testing.assert_close(peft - before, 2 * (untied - before), rtol=0, atol=1e-6)
    assert judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").passed


def _stored_twice(folder: Path) -> Path:
    """Save a base that is tied and yet stores both sides, as some published ones do."""
    model = models.llama(tied=False)
    model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    base = models.save_base(model, folder, dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return base


@pytest.mark.parametrize("rounding", [Rounding(), Rounding(kind=STOCHASTIC, seed=3)], ids=lambda each: each.kind)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [1, 5]},
    ],
    ids=["lora", "saved", "tokens"],
)
def test_two_stored_sides_of_a_tie_that_holds_stay_equal(
    options: dict[str, object], rounding: Rounding, tmp_path: Path
) -> None:
    base = _stored_twice(tmp_path / "base")
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora(**options))

    merged = merge(prepare(base, adapter, dtype="auto", rounding=rounding), into=tmp_path / "merged")

    after, before = oracle.read_folder(merged.root), oracle.read_folder(base)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert json.loads((merged.root / "config.json").read_text())["tie_word_embeddings"]
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto", rounding=rounding)
    assert verdict.failures == ()


@pytest.mark.parametrize("rounding", [Rounding(), Rounding(kind=STOCHASTIC, seed=3)], ids=lambda each: each.kind)
def test_two_stored_sides_of_a_tie_that_is_undone_are_each_their_own(rounding: Rounding, tmp_path: Path) -> None:
    base = _stored_twice(tmp_path / "base")
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora(target_modules=["q_proj", "lm_head"]))

    merged = merge(prepare(base, adapter, dtype="auto", rounding=rounding), into=tmp_path / "merged")

    after, before = oracle.read_folder(merged.root), oracle.read_folder(base)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert not json.loads((merged.root / "config.json").read_text())["tie_word_embeddings"]
    assert judge(base=base, adapter=adapter, merged=merged.root, dtype="auto", rounding=rounding).passed
