"""Tiny real models and adapters for the parity suite, built by transformers and PEFT themselves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 96
LLAMA_CONFIG: Mapping[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def llama(*, tied: bool) -> PreTrainedModel:
    """Return a random two-layer Llama."""
    return _build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA_CONFIG, tie_word_embeddings=tied))


def qwen2() -> PreTrainedModel:
    """Return a random two-layer Qwen2, whose q, k and v have biases."""
    return _build(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**LLAMA_CONFIG, tie_word_embeddings=False))


def gpt2() -> PreTrainedModel:
    """Return a random two-layer GPT-2: Conv1D weights, tied embeddings, stored without the class's prefix."""
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    return _build(transformers.GPT2LMHeadModel, config)


def mixtral() -> PreTrainedModel:
    """Return a random Mixtral, whose experts are stored one by one and fused on loading."""
    config = transformers.MixtralConfig(
        **LLAMA_CONFIG, tie_word_embeddings=False, num_local_experts=4, num_experts_per_tok=2
    )
    return _build(transformers.MixtralForCausalLM, config)


def gemma2() -> PreTrainedModel:
    """Return a random Gemma 2: tied, scaled embeddings, sandwich norms."""
    config = transformers.Gemma2Config(**LLAMA_CONFIG, head_dim=12)
    return _build(transformers.Gemma2ForCausalLM, config)


def _build(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(7)
    model = model_class(config)
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a lost one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def save_base(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype, shard: str = "40KB") -> Path:
    """Write the model as a checkpoint of `dtype`, in shards of at most `shard`, and return the folder."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_adapter(
    base: Path, folder: Path, config: PeftConfig, *, scale: float = 0.05, seed: int = 3,
    change: Callable[[torch.nn.Module], None] | None = None,
) -> Path:  # fmt: skip
    """Put a random adapter of `config` on the base, as training would leave it, and save it with PEFT."""
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, copy.deepcopy(config))  # PEFT writes into it, and case tables share it
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
        if change is not None:
            change(peft_model)
    peft_model.save_pretrained(folder)
    return folder
