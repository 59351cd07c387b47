"""A synthetic sharded Llama checkpoint of a wanted size, and a LoRA adapter for it: real files, random values.

Written tensor by tensor, so that a large base needs little memory to make.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from runner.checkpoint.layout import INDEX_FILE, build_header

HIDDEN, INTERMEDIATE, VOCAB = 2048, 5632, 32000
HEADS, KV_HEADS = 32, 8
SHARD_BYTES = 700 << 20
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
ALL_LINEAR = tuple(name.rpartition(".")[2] for name in LINEAR)
LAYER_BYTES = 2 * (sum(rows * columns for rows, columns in LINEAR.values()) + 2 * HIDDEN)
ENDS_BYTES = 2 * (2 * VOCAB * HIDDEN + HIDDEN)


def write_base(folder: Path, *, size_bytes: int) -> int:
    """Write a bf16 Llama of about `size_bytes` into `folder`; return how many layers it has."""
    layers = max(1, round((size_bytes - ENDS_BYTES) / LAYER_BYTES))
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in _tensors(layers):
        tensor_bytes = 2 * torch.Size(shape).numel()
        if filled + tensor_bytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += tensor_bytes
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, tensors, seed=number)
        weight_map |= {name: file for name, _ in tensors}
    total = sum(2 * torch.Size(shape).numel() for tensors in shards for _, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(_config(layers), indent=2))
    return layers


def write_adapter(folder: Path, *, layers: int, r: int, targets: tuple[str, ...]) -> None:
    """Write a LoRA adapter with random A and B for the targets in every layer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEAR.items():
            if name.rpartition(".")[2] in targets:
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(r, columns, generator=generator) / columns**0.5
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, r, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r,
        "target_modules": list(targets), "base_model_name_or_path": "synthetic", "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "lm_head.weight", (VOCAB, HIDDEN)
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        for name, shape in LINEAR.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(build_header(((name, "BF16", shape) for name, shape in tensors), {"format": "pt"}))
        for _, shape in tensors:
            values = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            file.write(values.view(-1).view(torch.uint8).numpy().data)


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
