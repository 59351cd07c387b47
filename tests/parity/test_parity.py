"""The merge equals PEFT's own, bit for bit; everything that the adapter does not touch is the base's own bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from runner.checkpoint.digests import digest_folder
from tests.parity import models, oracle
from tests.parity.pipeline import run_merge

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One adapter on one model; `unties` where the right merge undoes the base's tie."""

    build: Callable[[], PreTrainedModel]
    config: PeftConfig
    unties: bool = False


def _llama() -> PreTrainedModel:
    return models.llama(tied=False)


def _tied() -> PreTrainedModel:
    return models.llama(tied=True)


def _lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options})


CASES = {
    "lora": Case(_llama, _lora()),
    "rslora": Case(_llama, _lora(use_rslora=True, target_modules="all-linear")),
    "dora": Case(_llama, _lora(use_dora=True)),
    "patterns": Case(_llama, _lora(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 32})),
    "some_layers": Case(_llama, _lora(layers_to_transform=[1], layers_pattern="layers")),
    "bias_all": Case(models.qwen2, _lora(target_modules=["q_proj", "v_proj"], bias="all")),
    "bias_lora_only": Case(models.qwen2, _lora(target_modules=["q_proj", "v_proj"], bias="lora_only")),
    "lora_bias": Case(models.qwen2, _lora(target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "biased_base": Case(models.qwen2, _lora()),
    "modules_to_save": Case(_llama, _lora(modules_to_save=["lm_head", "embed_tokens"])),
    "embeddings": Case(_llama, _lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "tokens": Case(_llama, _lora(trainable_token_indices=[1, 5, 9])),
    "tied": Case(_tied, _lora()),
    "tied_tokens": Case(_tied, _lora(trainable_token_indices=[1, 5, 9])),
    "tied_embed": Case(_tied, _lora(target_modules=["q_proj", "embed_tokens"]), unties=True),
    "tied_head": Case(_tied, _lora(target_modules=["q_proj", "lm_head"]), unties=True),
    "tied_both": Case(_tied, _lora(target_modules=["q_proj", "lm_head", "embed_tokens"]), unties=True),
    "tied_head_saved": Case(_tied, _lora(modules_to_save=["lm_head"]), unties=True),
    "conv1d": Case(models.gpt2, _lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "conv1d_dora": Case(models.gpt2, _lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "gemma2": Case(models.gemma2, _lora()),
    "fused_experts_untouched": Case(models.mixtral, _lora(target_modules=["q_proj", "v_proj"])),
    "pissa": Case(_llama, _lora(init_lora_weights="pissa")),
    "olora": Case(_llama, _lora(init_lora_weights="olora")),
    "adalora": Case(_llama, peft.AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10)),
    "loha": Case(_llama, peft.LoHaConfig(r=4, target_modules=LINEAR)),
    "lokr": Case(_llama, peft.LoKrConfig(r=4, target_modules=LINEAR)),
    "ia3": Case(_llama, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "oft": Case(_llama, peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])),
    "boft": Case(_llama, peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"])),
    "vera": Case(_llama, peft.VeraConfig(r=4, target_modules=["q_proj"])),
    "fourierft": Case(_llama, peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"])),
    "hra": Case(_llama, peft.HRAConfig(r=4, target_modules=["q_proj"])),
    "vblora": Case(_llama, peft.VBLoRAConfig(r=4, target_modules=["q_proj"], vector_length=8, num_vectors=16, topk=2)),
    "miss": Case(_llama, peft.MissConfig(r=4, target_modules=["q_proj"])),
    "randlora": Case(_llama, peft.RandLoraConfig(r=4, target_modules=["q_proj"])),
    "road": Case(_llama, peft.RoadConfig(target_modules=["q_proj"], group_size=4)),
    "hira": Case(_llama, peft.HiraConfig(r=4, target_modules=["q_proj"])),
    "shira": Case(_llama, peft.ShiraConfig(r=4, target_modules=["q_proj"])),
    "c3a": Case(_llama, peft.C3AConfig(block_size=4, target_modules=["q_proj"])),
    "waveft": Case(_llama, peft.WaveFTConfig(n_frequency=10, target_modules=["q_proj"])),
    "osf": Case(_llama, peft.OSFConfig(target_modules=["q_proj"], effective_rank=4)),
    "delora": Case(_llama, peft.DeloraConfig(r=4, target_modules=["q_proj"])),
    "gralora": Case(_llama, peft.GraloraConfig(r=4, target_modules=["q_proj"])),
    "ln_tuning": Case(_llama, peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "trainable_tokens": Case(_llama, peft.TrainableTokensConfig(token_indices=[1, 2, 3])),
}


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
    case.config.task_type = "CAUSAL_LM"
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
    base = models.save_base(_llama(), tmp_path / "base", dtype=stored)
    config = _lora(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", use_rslora=True)
    adapter = models.save_adapter(base, tmp_path / "adapter", config)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype=dtype)

    _check(base, adapter, merged.root, unties=False)
    assert {tensor.dtype for tensor in oracle.read_folder(merged.root).values()} == {TORCH[dtype]}
    assert json.loads((merged.root / "config.json").read_text())["dtype"] == dtype


def test_untouched_files_are_the_bases_bytes(tmp_path: Path) -> None:
    base = models.save_base(_llama(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora(target_modules=["q_proj"], task_type="CAUSAL_LM"))

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    before = {file.path: file for file in digest_folder(base)}
    after = {file.path: file for file in digest_folder(merged.root)}
    assert after.keys() == before.keys()
    assert merged.files == digest_folder(merged.root)
    for path in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert after[path] == before[path], path


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    base = models.save_base(_tied(), tmp_path / "base", dtype=torch.bfloat16)
    config = _lora(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(base, tmp_path / "adapter", config)

    _, first = run_merge(base, adapter, tmp_path / "first")
    _, second = run_merge(base, adapter, tmp_path / "second")

    assert first.files == second.files
    assert first.digest == second.digest


def test_an_adapter_stored_in_bfloat16_is_not_rounded_again(tmp_path: Path) -> None:
    base = models.save_base(_llama(), tmp_path / "base", dtype=torch.bfloat16)
    config = _lora(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")

    def to_bfloat16(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()

    adapter = models.save_adapter(base, tmp_path / "adapter", config, change=to_bfloat16)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype="float32")

    _check(base, adapter, merged.root, unties=False)


def test_a_trained_head_keeps_float32_where_the_output_holds_it(tmp_path: Path) -> None:
    base = models.save_base(_llama(), tmp_path / "base", dtype=torch.bfloat16)
    config = _lora(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(base, tmp_path / "adapter", config)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype="float32")

    head = oracle.read_folder(merged.root)["lm_head.weight"]
    assert not torch.equal(head, head.bfloat16().float())
    _check(base, adapter, merged.root, unties=False)
