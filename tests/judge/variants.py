"""The kinds of adapters that are merged and judged: name → (kind of base, config)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peft import (
    AdaLoraConfig,
    C3AConfig,
    DeftConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    VBLoRAConfig,
    VeraConfig,
)

from tests.judge.tiny import lora

ALL = "all-linear"
Variant = tuple[str, Callable[[], PeftConfig]]

LORA: Mapping[str, Variant] = {
    "lora": ("llama", lambda: lora(target_modules=ALL)),
    "rslora": ("llama", lambda: lora(use_rslora=True, target_modules=ALL)),
    "high_rank": ("llama", lambda: lora(r=64, use_rslora=True)),
    "patterns": (
        "llama",
        lambda: lora(
            target_modules=ALL,
            rank_pattern={"down_proj": 7, "layers.0.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 3, ".*1.mlp.up_proj": 5},
        ),
    ),
    "bias_lora_only": ("qwen2", lambda: lora(bias="lora_only")),
    "bias_all": ("qwen2", lambda: lora(bias="all", target_modules=ALL)),
    "lora_bias": ("qwen2", lambda: lora(lora_bias=True)),
    "saved_modules": ("llama", lambda: lora(modules_to_save=["lm_head", "embed_tokens"])),
    "saved_norm": ("llama", lambda: lora(modules_to_save=["norm"])),
    "embeddings": ("llama", lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "conv1d": ("gpt2", lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "conv1d_bias": ("gpt2", lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
}
TIED: Mapping[str, Variant] = {
    "tied_untouched": ("tied", lambda: lora(target_modules=ALL)),
    "tied_embedding": ("tied", lambda: lora(target_modules=["embed_tokens", "v_proj"])),
    "tied_head": ("tied", lambda: lora(target_modules=["lm_head", "v_proj"])),
    "tied_both": ("tied", lambda: lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)),
    "tied_saved_both": ("tied", lambda: lora(modules_to_save=["lm_head", "embed_tokens"])),
    "tied_saved_head": ("tied", lambda: lora(modules_to_save=["lm_head"])),
    "tied_saved_embedding": ("tied", lambda: lora(modules_to_save=["embed_tokens"])),
    "tied_saved_together": ("tied", lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied_gpt2": ("gpt2", lambda: lora(target_modules=["wte"])),
}
OTHERS: Mapping[str, Variant] = {
    "dora": ("llama", lambda: lora(use_dora=True, target_modules=ALL)),
    "dora_conv1d": ("gpt2", lambda: lora(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
    "dora_embedding": ("llama", lambda: lora(use_dora=True, target_modules=["embed_tokens", "q_proj"])),
    "trainable_tokens": ("llama", lambda: lora(trainable_token_indices=[3, 5, 7])),
    "tied_trainable_tokens": ("tied", lambda: lora(trainable_token_indices=[3, 5, 7])),
    "pissa": ("llama", lambda: lora(init_lora_weights="pissa")),
    "olora": ("llama", lambda: lora(init_lora_weights="olora")),
    "adalora": ("llama", lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"])),
    "loha": ("llama", lambda: LoHaConfig(r=4, target_modules=["q_proj"])),
    "lokr": ("llama", lambda: LoKrConfig(r=4, target_modules=["q_proj"])),
    "ia3": ("llama", lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "oft": ("llama", lambda: OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"])),
    "vera": ("llama", lambda: VeraConfig(r=4, target_modules=["q_proj"])),
    "fourierft": ("llama", lambda: FourierFTConfig(n_frequency=20, target_modules=["q_proj"])),
    "vblora": ("llama", lambda: VBLoRAConfig(r=4, num_vectors=16, vector_length=8, target_modules=["q_proj"])),
    "ln_tuning": ("llama", lambda: LNTuningConfig(task_type="CAUSAL_LM")),
    "deft": ("llama", lambda: DeftConfig(target_modules=["q_proj"])),
    "c3a": ("llama", lambda: C3AConfig(block_size=8, target_modules=["q_proj"])),
}
VARIANTS: Mapping[str, Variant] = {**LORA, **TIED, **OTHERS}
