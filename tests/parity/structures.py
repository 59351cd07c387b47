"""Tiny random models of many architectures, as transformers builds and saves them.

Sizes are chosen so that every matrix is small and no two of a layer have the same shape by accident.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 96
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
HEAD: Mapping[str, Any] = {**TEXT, "head_dim": 8}
UNTIED: Mapping[str, Any] = {**TEXT, "tie_word_embeddings": False}
VISION: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip

# Class of the model → the fields of its config that are not the class's own defaults.
TEXT_MODELS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": UNTIED,
    "MistralForCausalLM": {**TEXT, "sliding_window": 16},
    "Qwen2ForCausalLM": TEXT,
    "Qwen3ForCausalLM": HEAD,
    "GemmaForCausalLM": HEAD,
    "Gemma2ForCausalLM": HEAD,
    "Gemma3ForCausalLM": {**HEAD, "sliding_window": 16},
    "PhiForCausalLM": TEXT,
    "Phi3ForCausalLM": TEXT,
    "GPT2LMHeadModel": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoXForCausalLM": TEXT,
    "GPTJForCausalLM": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4,
    },
    "OPTForCausalLM": {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 56,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "BloomForCausalLM": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "MptForCausalLM": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "StableLmForCausalLM": TEXT,
    "Starcoder2ForCausalLM": TEXT,
    "OlmoForCausalLM": TEXT,
    "Olmo2ForCausalLM": TEXT,
    "CohereForCausalLM": TEXT,
    "Cohere2ForCausalLM": {**TEXT, "sliding_window": 16},
    "GraniteForCausalLM": TEXT,
    "SmolLM3ForCausalLM": TEXT,
    "Glm4ForCausalLM": HEAD,
    "GlmForCausalLM": HEAD,
    "NemotronForCausalLM": HEAD,
    "Ernie4_5ForCausalLM": HEAD,
    "ApertusForCausalLM": TEXT,
    "MambaForCausalLM": {
        "vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4,
    },
    "Mamba2ForCausalLM": {
        "vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
        "n_groups": 2, "chunk_size": 8, "tie_word_embeddings": False,
    },
    "RecurrentGemmaForCausalLM": {
        **HEAD, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "num_key_value_heads": 1,
    },
    "MixtralForCausalLM": {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {
        **HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False,
    },
    "FalconH1ForCausalLM": {
        **TEXT, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "tie_word_embeddings": False,
    },
    "Llama4ForCausalLM": {
        **HEAD, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40,
        "interleave_moe_layer_step": 2, "tie_word_embeddings": False,
    },
    "GptOssForCausalLM": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "Qwen3NextForCausalLM": {
        **HEAD, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

_QWEN_VISION: Mapping[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}

VISION_MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**UNTIED, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **_QWEN_TOKENS, "tie_word_embeddings": False,
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**UNTIED, "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "window_size": 16,
        },
        **_QWEN_TOKENS, "tie_word_embeddings": False,
    },
    "Qwen3VLForConditionalGeneration": {
        "text_config": {**HEAD, "rope_parameters": _MROPE, "tie_word_embeddings": False},
        "vision_config": {
            **_QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
        **_QWEN_TOKENS, "tie_word_embeddings": False,
    },
    "LlavaForConditionalGeneration": {
        "text_config": {"model_type": "llama", **UNTIED},
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        "image_token_index": 90,
    },
    "LlavaNextForConditionalGeneration": {
        "text_config": {"model_type": "llama", **UNTIED},
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        "image_token_index": 90, "image_grid_pinpoints": [[16, 16]],
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": {**HEAD, "sliding_window": 16},
        "vision_config": VISION,
        "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4,
    },
    "PaliGemmaForConditionalGeneration": {
        "text_config": {"model_type": "gemma", **HEAD},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 32},
        "image_token_index": 90, "projection_dim": 32,
    },
    "Idefics3ForConditionalGeneration": {
        "text_config": {"model_type": "llama", **UNTIED}, "vision_config": VISION, "image_token_id": 90,
        "scale_factor": 2, "tie_word_embeddings": False,
    },
    "SmolVLMForConditionalGeneration": {
        "text_config": {"model_type": "llama", **UNTIED}, "vision_config": VISION, "image_token_id": 90,
        "scale_factor": 2, "tie_word_embeddings": False,
    },
    "Mistral3ForConditionalGeneration": {
        "text_config": {"model_type": "mistral", **HEAD},
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8}, "image_token_index": 90,
    },
    "InternVLForConditionalGeneration": {
        "text_config": {"model_type": "qwen2", **UNTIED},
        "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}, "image_token_id": 90,
    },
}  # fmt: skip


T5: Mapping[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: Mapping[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
BERT: Mapping[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ENCODER_DECODERS: Mapping[str, Mapping[str, Any]] = {
    "T5ForConditionalGeneration": T5,
    "UMT5ForConditionalGeneration": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    # With more decoder layers than encoder layers transformers runs it, and fails to continue a text with it.
    "SwitchTransformersForConditionalGeneration": {
        **T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "num_decoder_layers": 3,
    },
    "BartForConditionalGeneration": BART,
    "M2M100ForConditionalGeneration": BART,
    "PegasusForConditionalGeneration": BART,
    "MarianMTModel": BART,  # its sinusoidal positions are not stored
    "WhisperForConditionalGeneration": {
        **{key: value for key, value in BART.items() if key != "max_position_embeddings"}, "num_mel_bins": 8,
        "max_source_positions": 20, "max_target_positions": 64,
    },
}  # fmt: skip
ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "BertForMaskedLM": BERT,
    "BertModel": BERT,
    "BertForSequenceClassification": {**BERT, "num_labels": 3},
    "RobertaForMaskedLM": BERT,
    "ModernBertForMaskedLM": {**BERT, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "DebertaV2ForMaskedLM": BERT,
    "DistilBertForMaskedLM": {
        "vocab_size": VOCAB, "dim": 32, "hidden_dim": 56, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
    },
}  # fmt: skip

_WAV2VEC2: Mapping[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56,
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
# A text and a picture at once, which the judge does not give.
CLIP_TEXT: Mapping[str, Any] = {**TEXT, "bos_token_id": 0, "eos_token_id": 1}
# They read no text: waveforms, a spectrogram, pictures.
MEDIA_MODELS: Mapping[str, Mapping[str, Any]] = {
    "Wav2Vec2ForCTC": _WAV2VEC2,
    "HubertForSequenceClassification": {**_WAV2VEC2, "num_labels": 3, "classifier_proj_size": 24},
    "ASTForAudioClassification": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_length": 64,
        "num_mel_bins": 16, "patch_size": 8,
    },
    "ViTForImageClassification": {**VISION, "num_labels": 3},
    "Dinov2Model": VISION,
    # Its batch norm has a counter of integers, which loading any adapter writes.
    "SegformerForSemanticSegmentation": {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
        "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 48,
        "num_labels": 3, "image_size": 32,
    },
}  # fmt: skip


def build(architecture: str, fields: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return a random model of a class of transformers, with livelier biases and norms than at initialisation."""
    model_class = getattr(transformers, architecture)
    known = {**TEXT_MODELS, **VISION_MODELS, **ENCODER_DECODERS, **ENCODERS, **MEDIA_MODELS}
    config: PretrainedConfig = model_class.config_class(**(fields or known[architecture]))
    torch.manual_seed(7)
    model: PreTrainedModel = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()
