"""Tiny random base models and adapters, written to disk as transformers and PEFT write them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A base and an adapter on disk."""

    base: Path
    adapter: Path


def llama(*, tied: bool = False) -> PreTrainedModel:
    """Return a random two-layer Llama."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    """Return a random two-layer GPT-2: Conv1D, biases, tied."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=160, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def qwen2() -> PreTrainedModel:
    """Return a random two-layer Qwen2: biases on the attention's inputs."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


BASES = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "qwen2": qwen2,
}


def save_base(folder: Path, kind: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a sharded base with a tokenizer and return its folder."""
    torch.manual_seed(seed)
    model = BASES[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
        else:
            parameter.data.mul_(4.0)  # livelier logits than the initialisation's
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that knows any text."""
    words = {
        token: number for number, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)


def lora(**fields: Any) -> LoraConfig:
    """Return a LoRA config on the attention's projections, changed by `fields`."""
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    )


def save_adapter(
    folder: Path,
    base: Path,
    config: PeftConfig,
    *,
    strength: float = 1.0,
    seed: int = 1,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
) -> Path:
    """Write an adapter whose every tensor is random and return its folder.

    Args:
        folder: where to.
        base: the base's folder.
        config: of the adapter.
        strength: factor on the size of the change.
        seed: of the random values.
        dtype: that the adapter is stored in; float32 by default.
        rows: of the vocabulary, where the training enlarged it.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if rows is not None:
            plain.resize_token_embeddings(rows, mean_resizing=False)
        model = get_peft_model(plain, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = parameter.data.std().clamp(min=0.05) if parameter.numel() > 1 else torch.tensor(0.05)
                parameter.data += strength * 0.5 * size * torch.randn_like(parameter)
        if dtype is not None:
            model.to(dtype)
        model.save_pretrained(folder)
    return folder
