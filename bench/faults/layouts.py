"""Ten layouts of models as they lie on the Hub: tiny random weights by transformers, and all files beside them.

Vocabularies are short; files of libraries that are not here (SentencePiece, tekken) hold a few bytes of their own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.judge.tiny import VOCABULARY, tokenizer

Files = Mapping[str, object]  # path → content; what is no text is written as JSON
_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_WORDS: Files = {"vocab.json": {"a": 0, "b": 1}, "merges.txt": "#version: 0.2\na b\n"}
_CARD: Files = {"README.md": "# A model\n", ".gitattributes": "*.bin filter=lfs\n", "LICENSE": "Apache-2.0\n"}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT))


def _gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


_TWO_SIDES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip


def _marian() -> Any:
    config = transformers.MarianConfig(**_TWO_SIDES, max_position_embeddings=64, eos_token_id=1)
    return transformers.MarianMTModel(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        **_TWO_SIDES, max_source_positions=16, max_target_positions=16, num_mel_bins=8, bos_token_id=1, eos_token_id=1
    )
    return transformers.WhisperForConditionalGeneration(config)


def _llava() -> Any:
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**_TEXT), vision_config=sight)
    return transformers.LlavaForConditionalGeneration(config)


def _mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_TEXT))


def _bert() -> Any:
    few = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}
    return transformers.BertModel(transformers.BertConfig(**few))


def _mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_TEXT, num_local_experts=2, num_experts_per_tok=1)
    )


_SENTENCE: Files = {
    "modules.json": [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")))
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
    "2_Dense/config.json": {"in_features": 32, "out_features": 8, "bias": True},
    "2_Dense/model.safetensors": "the weights of the head",
    "config_sentence_transformers.json": {"prompts": {"query": "query: "}},
    "sentence_bert_config.json": {"max_seq_length": 64},
    "vocab.txt": "[PAD]\n[UNK]\n",
}
LAYOUTS: Mapping[str, tuple[Callable[[], Any], Files]] = {
    "Llama": (_llama, {"tokenizer.model": "pieces", "special_tokens_map.json": {"bos_token": "<s>"}}),
    "GPT-2": (_gpt2, _WORDS),
    "T5": (_t5, {"spiece.model": "pieces", "special_tokens_map.json": {"eos_token": "</s>"}}),
    "Marian": (_marian, {"source.spm": "from", "target.spm": "to", "vocab.json": {"a": 0}, "target_vocab.json": {}}),
    "Whisper": (
        _whisper,
        {
            **_WORDS, "normalizer.json": {"colour": "color"}, "added_tokens.json": {"<|en|>": 9},
            "preprocessor_config.json": {"feature_size": 8, "sampling_rate": 16000},
        },
    ),
    "LLaVA": (
        _llava,
        {
            "preprocessor_config.json": {"size": {"height": 16}}, "processor_config.json": {"patch_size": 8},
            "video_preprocessor_config.json": {"fps": 2}, "chat_template.json": {"chat_template": "{{ messages }}"},
        },
    ),
    "Mistral": (_mistral, {"tekken.json": {"config": {}}, "params.json": {"dim": 32}, "SYSTEM_PROMPT.txt": "Be kind."}),
    "sentence-transformers": (_bert, _SENTENCE),
    "remote code": (
        _llama,
        {
            "modeling_own.py": "class Own: ...\n", "configuration_own.py": "class Config: ...\n",
            "layers/attention.py": "class Attention: ...\n", "qwen.tiktoken": "YQ== 0\n",
            "additional_chat_templates/tool.jinja": "{{ tools }}",
        },
    ),
    "MoE": (_mixtral, {"bpe.codes": "a b\n", "dict.txt": "a 1\n", "notice.txt": "by many\n"}),
}  # fmt: skip


def write_layout(name: str, root: Path) -> Path:
    """Write the base of a layout and return its folder."""
    build, files = LAYOUTS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build().save_pretrained(root)
        tokenizer().save_pretrained(root)
    defaults = {"generation_config.json": {"eos_token_id": 1}}
    for path, content in {**defaults, **_CARD, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content if isinstance(content, str) else json.dumps(content))
    return root
