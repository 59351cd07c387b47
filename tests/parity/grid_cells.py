"""What the grid is made of: PEFT's test models, its methods, and which go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
from peft import PeftConfig

from tests.parity.structures import BART, BERT, T5, TEXT, UNTIED, VISION, VOCAB


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One of PEFT's test models.

    Attributes:
        name: of the class in transformers.
        fields: of its config.
        task: the adapter's task type.
        linear: the ends of the names of the modules that methods are put on.
        feed: of those, the one that takes in what the others make, for IA3.
        embed: its embedding; "" for a model of pictures.
        head: its head; "" for a body.
        norm: one of its norms.
        is_conv: whether `linear` are convolutions.
        is_flipped: whether they are stored as (in, out).
        parameters: its fused experts, for `target_parameters`.
    """

    name: str
    fields: Mapping[str, Any]
    task: str | None
    linear: list[str]
    feed: str
    embed: str = ""
    head: str = ""
    norm: str = ""
    is_conv: bool = False
    is_flipped: bool = False
    parameters: list[str] = field(default_factory=list)


_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_QV = ["q_proj", "v_proj"]
_LLAMA: Mapping[str, Any] = {"feed": "down_proj", "embed": "embed_tokens", "head": "lm_head"}
_CAUSAL, _BODY = "CAUSAL_LM", "FEATURE_EXTRACTION"
_BERT: Mapping[str, Any] = {
    "linear": ["query", "value", "output.dense"],
    "feed": "output.dense",
    "embed": "word_embeddings",
}
_DEBERTA: Mapping[str, Any] = {
    **_BERT,
    "linear": ["query_proj", "value_proj", "output.dense"],
    "norm": "output.LayerNorm",
}

MODELS: Sequence[Model] = (
    Model(
        name="OPTForCausalLM", task=_CAUSAL, linear=[*_QV, "fc2"], feed="fc2", embed="embed_tokens", head="lm_head",
        norm="self_attn_layer_norm",
        fields={
            "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 56,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32,
        },
    ),
    Model(
        name="GPTNeoXForCausalLM", task=_CAUSAL, linear=["query_key_value", "dense_4h_to_h"], feed="dense_4h_to_h",
        embed="embed_in", head="embed_out", norm="input_layernorm", fields=TEXT,
    ),
    Model(
        name="GPT2LMHeadModel", task=_CAUSAL, linear=["c_attn", "mlp.c_proj"], feed="mlp.c_proj", embed="wte",
        head="lm_head", norm="ln_1", is_flipped=True, fields=_GPT2,
    ),
    Model(
        name="BloomForCausalLM", task=_CAUSAL, linear=["query_key_value", "dense_4h_to_h"], feed="dense_4h_to_h",
        embed="word_embeddings", head="lm_head", norm="input_layernorm",
        fields={"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    Model(
        name="GPTNeoForCausalLM", task=_CAUSAL, linear=[*_QV, "mlp.c_proj"], feed="mlp.c_proj", embed="wte",
        head="lm_head", norm="ln_1",
        fields={
            "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]], "window_size": 16,
        },
    ),
    Model(
        name="GPTJForCausalLM", task=_CAUSAL, linear=[*_QV, "fc_out"], feed="fc_out", embed="wte", head="lm_head",
        norm="ln_1", fields={**_GPT2, "rotary_dim": 4},
    ),
    Model(
        name="GPTBigCodeForCausalLM", task=_CAUSAL, linear=["c_attn", "mlp.c_proj"], feed="mlp.c_proj", embed="wte",
        head="lm_head", norm="ln_1", fields=_GPT2,
    ),
    Model(
        name="LlamaForCausalLM", task=_CAUSAL, linear=[*_QV, "down_proj"], norm="input_layernorm", fields=UNTIED,
        **_LLAMA,
    ),
    Model(
        name="MistralForCausalLM", task=_CAUSAL, linear=[*_QV, "down_proj"], norm="input_layernorm", **_LLAMA,
        fields={**TEXT, "sliding_window": 16},
    ),
    Model(
        name="Gemma3ForCausalLM", task=_CAUSAL, linear=[*_QV, "down_proj"], norm="input_layernorm", **_LLAMA,
        fields={**TEXT, "head_dim": 8, "sliding_window": 16},
    ),
    Model(
        name="Qwen2ForCausalLM", task=_CAUSAL, linear=[*_QV, "down_proj"], norm="input_layernorm", fields=TEXT,
        **_LLAMA,
    ),
    Model(
        name="MixtralForCausalLM", task=_CAUSAL, linear=_QV, feed="v_proj", embed="embed_tokens", head="lm_head",
        norm="input_layernorm", parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        fields={**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Model(
        name="T5ForConditionalGeneration", task="SEQ_2_SEQ_LM", linear=["q", "v", "wo"], feed="wo", embed="shared",
        head="lm_head", norm="layer_norm", fields=T5,
    ),
    Model(
        name="BartForConditionalGeneration", task="SEQ_2_SEQ_LM", linear=[*_QV, "fc2"], feed="fc2", embed="shared",
        head="lm_head", norm="self_attn_layer_norm", fields=BART,
    ),
    Model(name="BertModel", task=_BODY, norm="output.LayerNorm", fields=BERT, **_BERT),
    Model(name="RobertaModel", task=_BODY, norm="output.LayerNorm", fields=BERT, **_BERT),
    Model(name="DebertaModel", task=_BODY, fields=BERT, **{**_DEBERTA, "linear": ["in_proj", "output.dense"]}),
    Model(name="DebertaV2Model", task=_BODY, fields=BERT, **_DEBERTA),
    Model(
        name="BertForSequenceClassification", task="SEQ_CLS", head="classifier", norm="output.LayerNorm",
        fields={**BERT, "num_labels": 3}, **_BERT,
    ),
    Model(
        name="RobertaForSequenceClassification", task="SEQ_CLS", head="classifier", norm="output.LayerNorm",
        fields={**BERT, "num_labels": 3}, **_BERT,
    ),
    Model(
        name="BertForTokenClassification", task="TOKEN_CLS", head="classifier", norm="output.LayerNorm",
        fields={**BERT, "num_labels": 3}, **_BERT,
    ),
    Model(
        name="ViTForImageClassification", task=None, linear=["q_proj", "v_proj", "fc2"], feed="fc2", head="classifier",
        norm="layernorm_before", fields={**VISION, "num_labels": 3},
    ),
    Model(
        name="ResNetForImageClassification", task=None, linear=["convolution"], feed="convolution",
        head="classifier.1", norm="normalization", is_conv=True,
        fields={
            "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3, "image_size": 32,
            "layer_type": "basic",
        },
    ),
)  # fmt: skip

Maker = Callable[[Model], PeftConfig | None]


def _lora(**options: Any) -> Maker:
    return lambda model: peft.LoraConfig(
        **{
            "r": 4, "lora_alpha": 8, "target_modules": model.linear, "task_type": model.task,
            "fan_in_fan_out": model.is_flipped, **options,
        }
    )  # fmt: skip


def _if(part: str, make: Callable[[Model], Maker]) -> Maker:
    return lambda model: make(model)(model) if getattr(model, part) else None


def _of(kind: str, *, conv: bool = False, flip: bool = False, **options: Any) -> Maker:
    """Return what makes a config of PEFT's class of that name; `conv` where it takes convolutions."""

    def make(model: Model) -> PeftConfig | None:
        if model.is_conv and not conv:
            return None
        flips = {"fan_in_fan_out": model.is_flipped} if flip else {}
        config: PeftConfig = getattr(peft, kind)(
            **{"target_modules": model.linear, "task_type": model.task, **flips, **options}
        )
        return config

    return make


def _ia3(model: Model) -> PeftConfig:
    return peft.IA3Config(
        target_modules=model.linear, feedforward_modules=[model.feed], task_type=model.task,
        fan_in_fan_out=model.is_flipped,
    )  # fmt: skip


def _prompt(kind: str, **options: Any) -> Maker:
    def make(model: Model) -> PeftConfig | None:
        if model.name not in ("LlamaForCausalLM", "GPT2LMHeadModel", "BartForConditionalGeneration"):
            return None
        config: PeftConfig = getattr(peft, kind)(task_type=model.task, num_virtual_tokens=4, **options)
        return config

    return make


METHODS: Mapping[str, Maker] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "lora, bias all": _lora(bias="all"),
    "lora, bias lora_only": _lora(bias="lora_only"),
    "lora_bias": _lora(lora_bias=True),
    "lora, patterns": lambda model: _lora(rank_pattern={model.linear[0]: 2}, alpha_pattern={model.feed: 4})(model),
    "lora, embedding": _if("embed", lambda model: _lora(target_modules=[*model.linear, model.embed])),
    "lora, head": _if("head", lambda model: _lora(target_modules=[*model.linear, model.head.rpartition(".")[2]])),
    "lora, saved head": _if("head", lambda model: _lora(modules_to_save=[model.head])),
    "lora, tokens": _if("embed", lambda model: _lora(trainable_token_indices={model.embed: [1, 5]})),
    "lora, parameters": _if(
        "parameters", lambda model: _lora(target_modules=model.linear, target_parameters=model.parameters)
    ),
    "adalora": _of("AdaLoraConfig", init_r=4, target_r=2, total_step=10, flip=True),
    "loha": _of("LoHaConfig", conv=True, r=4),
    "lokr": _of("LoKrConfig", conv=True, r=4),
    "ia3": _ia3,
    "oft": _of("OFTConfig", conv=True, oft_block_size=4, r=0),
    "boft": _of("BOFTConfig", boft_block_size=4, flip=True),
    "vera": _of("VeraConfig", r=4, flip=True),
    "fourierft": _of("FourierFTConfig", n_frequency=10, flip=True),
    "hra": _of("HRAConfig", conv=True, r=4),
    "vblora": _of("VBLoRAConfig", r=4, vector_length=8, num_vectors=16, topk=2, flip=True),
    "randlora": _of("RandLoraConfig", r=4, flip=True),
    "shira": _of("ShiraConfig", r=2, flip=True),
    "c3a": _of("C3AConfig", block_size=8),
    "road": _of("RoadConfig", group_size=4),
    "miss": _of("MissConfig", r=4),
    "hira": _of("HiraConfig", r=4, flip=True),
    "delora": _of("DeloraConfig", r=4),
    "waveft": _of("WaveFTConfig", n_frequency=10, flip=True),
    "osf": _of("OSFConfig", effective_rank=4),
    "ln_tuning": _if("norm", lambda model: _of("LNTuningConfig", conv=True, target_modules=[model.norm])),
    "trainable tokens": _if(
        "embed", lambda model: _of("TrainableTokensConfig", target_modules=[model.embed], token_indices=[1, 5])
    ),
    "prompt tuning": _prompt("PromptTuningConfig"),
    "prefix tuning": _prompt("PrefixTuningConfig"),
    "p-tuning": _prompt("PromptEncoderConfig", encoder_hidden_size=16),
}


def cells() -> Iterator[tuple[Model, str, PeftConfig]]:
    """Yield every model with every method that goes with it."""
    for model in MODELS:
        for method, make in METHODS.items():
            config = make(model)
            if config is not None:
                yield model, method, config
