"""A synthetic sharded Llama checkpoint of a wanted size, and a LoRA adapter for it: real files, random values.

Written tensor by tensor, so that a large base needs little memory to make.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from runner.files.layout import INDEX_FILE, build_header

VOCAB = 32000
SHARD_BYTES = 2_000_000_000
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a Llama; each size of base has those of a real model of about that size."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Module name within a layer → (rows, columns)."""
        kv = self.hidden * self.kv_heads // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every stored tensor, in the order of its bytes."""
        yield "lm_head.weight", (VOCAB, self.hidden)
        yield "model.embed_tokens.weight", (VOCAB, self.hidden)
        for layer in range(self.layers):
            yield f"model.layers.{layer}.input_layernorm.weight", (self.hidden,)
            for name, shape in self.linear.items():
                yield f"model.layers.{layer}.{name}.weight", shape
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# (up to so many bytes, hidden, intermediate, heads, key-value heads)
SIZES = (
    (100_000_000, 128, 352, 4, 2),
    (600_000_000, 1024, 2816, 16, 8),
    (5_000_000_000, 2048, 5632, 32, 8),
    (float("inf"), 4096, 14336, 32, 8),
)


def shape_for(size_bytes: int) -> Shape:
    """Return the shape whose bf16 weights take about `size_bytes`."""
    _, hidden, intermediate, heads, kv_heads = next(row for row in SIZES if size_bytes <= row[0])

    def shape(layers: int) -> Shape:
        return Shape(hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, layers=layers)

    ends = _bytes(shape(0))
    return shape(max(1, round((size_bytes - ends) / (_bytes(shape(1)) - ends))))


def write_base(folder: Path, *, size_bytes: int, shard_bytes: int = SHARD_BYTES) -> Shape:
    """Write a bf16 Llama of about `size_bytes` with a tokenizer into `folder`; return its shape."""
    shape = shape_for(size_bytes)
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dimensions in shape.tensors:
        tensor_bytes = 2 * torch.Size(dimensions).numel()
        if filled + tensor_bytes > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append((name, dimensions))
        filled += tensor_bytes
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, tensors, seed=number)
        weight_map |= {name: file for name, _ in tensors}
    index = {"metadata": {"total_size": _bytes(shape)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}, indent=2))
    _write_tokenizer(folder)
    return shape


def write_adapter(folder: Path, *, base: Path, shape: Shape, r: int, targets: tuple[str, ...]) -> None:
    """Write a LoRA adapter of `base` with random A and B (float32) for the targets in every layer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linear.items():
            if name.rpartition(".")[2] in targets:
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(r, columns, generator=generator) / columns**0.5
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, r, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r,
        "target_modules": list(targets), "base_model_name_or_path": str(base), "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _bytes(shape: Shape) -> int:
    return sum(2 * torch.Size(dimensions).numel() for _, dimensions in shape.tensors)


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(build_header(((name, "BF16", shape) for name, shape in tensors), {"format": "pt"}))
        for _, shape in tensors:
            values = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            file.write(values.view(-1).view(torch.uint8).numpy().data)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single words; several peers refuse a base that has none."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(len(SPECIAL_TOKENS), VOCAB))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=SPECIAL_TOKENS[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "</s>", "model_max_length": 4096,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
