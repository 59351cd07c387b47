"""What the parity suite merges: one case for every way in which a PEFT method can be merged, and their bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import peft
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import PreTrainedModel

from tests.parity import models

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One adapter on one model; `unties` where the right merge undoes the base's tie."""

    build: Callable[[], PreTrainedModel]
    config: PeftConfig
    unties: bool = False


def llama() -> PreTrainedModel:
    """Return a random two-layer Llama."""
    return models.llama(tied=False)


def tied_llama() -> PreTrainedModel:
    """Return the same with tied embeddings."""
    return models.llama(tied=True)


def lora(**options: object) -> LoraConfig:
    """Return a LoRA config of rank 4 on all linear layers, changed by `options`."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options})


def _gpt2_lora(**options: object) -> LoraConfig:
    return lora(**{"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, **options})


_QV = {"target_modules": ["q_proj", "v_proj"]}
_BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["o_proj", "down_proj"]}

LORA: Mapping[str, Case] = {
    "lora": Case(llama, lora()),
    "rslora": Case(llama, lora(use_rslora=True, target_modules="all-linear")),
    "dora": Case(llama, lora(use_dora=True)),
    "patterns": Case(llama, lora(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 32})),
    "dora_rslora_patterns": Case(
        llama,
        lora(
            use_dora=True, use_rslora=True, alpha_pattern={"up_proj": 32}, rank_pattern={"layers.0.self_attn.q_proj": 2}
        ),
    ),
    "some_layers": Case(llama, lora(layers_to_transform=[1], layers_pattern="layers")),
    "bias_all": Case(models.qwen2, lora(**_QV, bias="all")),
    "bias_lora_only": Case(models.qwen2, lora(**_QV, bias="lora_only")),
    "lora_bias": Case(models.qwen2, lora(**_QV, lora_bias=True)),
    "dora_bias": Case(models.qwen2, lora(**_QV, use_dora=True, bias="all")),
    "biased_base": Case(models.qwen2, lora()),
    "modules_to_save": Case(llama, lora(modules_to_save=["lm_head", "embed_tokens"])),
    "embeddings": Case(llama, lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "dora_embeddings": Case(llama, lora(target_modules=["q_proj", "embed_tokens"], use_dora=True)),
    "tokens": Case(llama, lora(trainable_token_indices=[1, 5, 9])),
    "conv1d": Case(models.gpt2, _gpt2_lora()),
    "conv1d_dora": Case(models.gpt2, _gpt2_lora(target_modules=["c_attn"], use_dora=True)),
    "conv1d_dora_rslora_patterns": Case(
        models.gpt2,
        _gpt2_lora(
            use_dora=True, use_rslora=True, alpha_pattern={"c_fc": 32}, rank_pattern={"h.0.attn.c_attn": 2}, bias="all"
        ),
    ),
    "gemma2": Case(models.gemma2, lora()),
    "fused_experts_untouched": Case(models.mixtral, lora(**_QV)),
    "init_gaussian": Case(llama, lora(init_lora_weights="gaussian")),
    "init_orthogonal": Case(llama, lora(init_lora_weights="orthogonal")),
    "init_random": Case(llama, lora(init_lora_weights=False)),
    "mica": Case(llama, lora(init_lora_weights="mica")),
    "pissa": Case(llama, lora(init_lora_weights="pissa")),
    "olora": Case(llama, lora(init_lora_weights="olora")),
    "kasa": Case(llama, lora(kasa_config=KasaConfig())),
    "velora": Case(llama, lora(velora_config=VeloraConfig(num_groups=4))),
    "monteclora": Case(llama, lora(monteclora_config=MontecloraConfig())),
    "qalora": Case(llama, lora(use_qalora=True, qalora_group_size=4)),
    "bdlora": Case(
        llama, lora(use_bdlora=BdLoraConfig(**_BLOCKS, target_modules_bd_b=[*LINEAR[:3], "gate_proj", "up_proj"]))
    ),
}
TIED: Mapping[str, Case] = {
    "tied": Case(tied_llama, lora()),
    "tied_tokens": Case(tied_llama, lora(trainable_token_indices=[1, 5, 9])),
    "tied_embed": Case(tied_llama, lora(target_modules=["q_proj", "embed_tokens"]), unties=True),
    "tied_head": Case(tied_llama, lora(target_modules=["q_proj", "lm_head"]), unties=True),
    "tied_both": Case(tied_llama, lora(target_modules=["q_proj", "lm_head", "embed_tokens"]), unties=True),
    "tied_head_saved": Case(tied_llama, lora(modules_to_save=["lm_head"]), unties=True),
}
OTHERS: Mapping[str, Case] = {
    "adalora": Case(llama, peft.AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10)),
    "loha": Case(llama, peft.LoHaConfig(r=4, target_modules=LINEAR)),
    "lokr": Case(llama, peft.LoKrConfig(r=4, target_modules=LINEAR)),
    "lokr_decomposed": Case(
        llama, peft.LoKrConfig(r=4, target_modules=LINEAR, decompose_both=True, decompose_factor=4)
    ),
    "ia3": Case(llama, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_conv1d": Case(
        models.gpt2,
        peft.IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"], fan_in_fan_out=True),
    ),
    "oft": Case(llama, peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])),
    "oft_cayley": Case(llama, peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=False, **_QV)),
    "oft_constrained": Case(llama, peft.OFTConfig(oft_block_size=4, r=0, coft=True, **_QV)),
    "boft": Case(llama, peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"])),
    "boft_butterfly": Case(llama, peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **_QV)),
    "vera": Case(llama, peft.VeraConfig(r=4, target_modules=["q_proj", "up_proj"])),
    "vera_regenerated": Case(llama, peft.VeraConfig(r=4, target_modules=["q_proj", "up_proj"], save_projection=False)),
    "pvera": Case(llama, peft.PveraConfig(r=4, **_QV)),
    "pvera_regenerated": Case(llama, peft.PveraConfig(r=4, **_QV, save_projection=False)),
    "fourierft": Case(llama, peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"])),
    "hra": Case(llama, peft.HRAConfig(r=4, target_modules=["q_proj"])),
    "hra_gram_schmidt": Case(llama, peft.HRAConfig(r=4, apply_GS=True, **_QV)),
    "vblora": Case(llama, peft.VBLoRAConfig(r=4, target_modules=["q_proj"], vector_length=8, num_vectors=16, topk=2)),
    "vblora_topk_saved": Case(
        llama,
        peft.VBLoRAConfig(r=4, vector_length=8, num_vectors=16, topk=2, save_only_topk_weights=True, **_QV),
    ),
    "unilora": Case(llama, peft.UniLoraConfig(r=4, theta_d_length=64, **_QV)),
    "unilora_indices_saved": Case(llama, peft.UniLoraConfig(r=4, theta_d_length=64, save_indices=True, **_QV)),
    "miss": Case(llama, peft.MissConfig(r=4, target_modules=["q_proj"])),
    "miss_bat": Case(llama, peft.MissConfig(r=4, init_weights="bat", **_QV)),
    "miss_mini": Case(llama, peft.MissConfig(r=4, init_weights="mini", mini_r=4, **_QV)),
    "randlora": Case(llama, peft.RandLoraConfig(r=4, target_modules=["q_proj"])),
    "randlora_regenerated": Case(
        llama, peft.RandLoraConfig(r=4, target_modules=["q_proj", "up_proj"], save_projection=False)
    ),
    "randlora_sparse": Case(llama, peft.RandLoraConfig(r=4, sparse=True, **_QV)),
    "road": Case(llama, peft.RoadConfig(target_modules=["q_proj"], group_size=4)),
    "road_2": Case(llama, peft.RoadConfig(variant="road_2", group_size=4, **_QV)),
    "road_4": Case(llama, peft.RoadConfig(variant="road_4", group_size=4, **_QV)),
    "hira": Case(llama, peft.HiraConfig(r=4, target_modules=["q_proj"])),
    "hira_conv1d": Case(models.gpt2, peft.HiraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)),
    "shira": Case(llama, peft.ShiraConfig(r=4, target_modules=["q_proj"])),
    "c3a": Case(llama, peft.C3AConfig(block_size=4, target_modules=["q_proj"])),
    "waveft": Case(llama, peft.WaveFTConfig(n_frequency=10, target_modules=["q_proj"])),
    "osf": Case(llama, peft.OSFConfig(target_modules=["q_proj"], effective_rank=4)),
    "delora": Case(llama, peft.DeloraConfig(r=4, target_modules=["q_proj"])),
    "gralora": Case(llama, peft.GraloraConfig(r=4, target_modules=["q_proj"])),
    "gralora_hybrid": Case(llama, peft.GraloraConfig(r=4, hybrid_r=2, **_QV)),
    "tinylora": Case(llama, peft.TinyLoraConfig(r=2, u=8, **_QV)),
    "tinylora_regenerated": Case(llama, peft.TinyLoraConfig(r=2, u=8, save_projection=False, **_QV)),
    "psoft": Case(llama, peft.PsoftConfig(r=4, **_QV)),
    "psoft_lowrank": Case(llama, peft.PsoftConfig(r=4, psoft_svd="lowrank", **_QV)),
    "peanut": Case(llama, peft.PeanutConfig(r=4, **_QV)),
    "supertuning": Case(llama, peft.SupertuningConfig(**_QV)),
    "supertuning_indices_saved": Case(llama, peft.SupertuningConfig(save_precomputed_indices=True, **_QV)),
    "supertuning_supra": Case(llama, peft.SupertuningConfig(r=4, lora_alpha=8, **_QV)),
    "deft": Case(llama, peft.DeftConfig(r=4, **_QV)),
    "deft_qr": Case(llama, peft.DeftConfig(r=4, decomposition_method="qr", **_QV)),
    "deft_para": Case(llama, peft.DeftConfig(r=4, para=True, **_QV)),
    "frod": Case(llama, peft.FrodConfig(**_QV)),
    "frod_regenerated": Case(llama, peft.FrodConfig(save_projection=False, **_QV)),
    "glora": Case(llama, peft.GloraConfig(r=4, **_QV)),
    "glora_vectors": Case(
        llama, peft.GloraConfig(r=4, config_A_B="vector", config_C="vector", config_D_E="vector", **_QV)
    ),
    "glora_bias": Case(models.qwen2, peft.GloraConfig(r=4, **_QV)),
    "beft": Case(models.qwen2, peft.BeftConfig(**_QV)),
    "ln_tuning": Case(llama, peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "trainable_tokens": Case(llama, peft.TrainableTokensConfig(token_indices=[1, 2, 3])),
}
CASES: Mapping[str, Case] = {**LORA, **TIED, **OTHERS}
for _case in CASES.values():
    _case.config.task_type = "CAUSAL_LM"
