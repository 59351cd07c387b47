"""Which PEFT methods are merged, what each needs of the base, and why the others are refused.

Every method that the installed PEFT knows has exactly one row in `METHODS`, and every LoRA initialisation and variant
one in `LORA_INITS` and `LORA_VARIANTS`; tests compare the tables with PEFT's own, so that a newer PEFT cannot add one
silently. What has no row is refused.

No torch: the supervisor refuses an adapter before it downloads a base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What becomes of the adapters of one kind.

    Attributes:
        refusal: why none of them is merged, as a clause; empty where they are.
        reads_base: whether PEFT derives something that stays from the base's values (or dtype) when it attaches the
            adapter. The base is then held in memory in float32, because what is derived from rounded values is wrong
            (docs/decisions/0003).
    """

    refusal: str = ""
    reads_base: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why one adapter is not merged: `subject` says what in its config it is about, `reason` is a clause."""

    subject: str
    reason: str


_MERGED = Method()
_READS_BASE = Method(reads_base=True)
_PROMPT = Method(refusal="it learns a prompt or a cache, not a change of weights")

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        **dict.fromkeys(
            """LORA ADALORA LOHA LOKR IA3 OFT BOFT VERA PVERA FOURIERFT WAVEFT HRA HIRA VBLORA MISS RANDLORA ROAD SHIRA
            C3A GRALORA GLORA PEANUT DEFT BEFT LN_TUNING TRAINABLE_TOKENS""".split(),
            _MERGED,
        ),
        **dict.fromkeys("OSF DELORA TINYLORA UNILORA PSOFT SUPERTUNING FROD".split(), _READS_BASE),
        **dict.fromkeys(
            "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING CPT CARTRIDGE".split(),
            _PROMPT,
        ),
        "ADAPTION_PROMPT": Method(refusal="it adds prompts and gates inside the attention, not a change of weights"),
        "XLORA": Method(refusal="its mixture depends on the input, so that no fixed weight equals it"),
        "POLY": Method(refusal="its mixture depends on the task, and PEFT has no merge for it"),
        "LILY": Method(refusal="its router depends on the input, and PEFT has no merge for it"),
        "SHADOW": Method(refusal="it runs a second network beside the layers, and PEFT has no merge for it"),
        "ADAMSS": Method(
            refusal="PEFT divides the base into clusters again to load it, with a library not in this image"
        ),
    }
)

_NOT_RESTORED = "the base that it was trained on is not the one on disk, and PEFT cannot restore it from the adapter"
LORA_INITS: Mapping[str, Method] = MappingProxyType(
    {
        **dict.fromkeys(("true", "false", "none", "gaussian", "orthogonal", "eva", "mica"), _MERGED),
        "pissa": _READS_BASE,
        "olora": _READS_BASE,
        "pissa_niter": Method(
            refusal="PEFT takes the base's principal part out again with a random algorithm, which gives another part "
            "each time; convert the adapter to plain LoRA with `path_initial_model_for_weight_conversion`"
        ),
        "corda": Method(refusal=_NOT_RESTORED),
        "lora_ga": Method(refusal=_NOT_RESTORED),
        "loftq": Method(refusal="the base that it was trained on is a quantised one"),
    }
)
LORA_VARIANTS: Mapping[str, Method] = MappingProxyType(
    {
        **dict.fromkeys(
            "use_dora use_qalora use_bdlora velora_config monteclora_config".split(),
            _MERGED,
        ),
        "kasa_config": _READS_BASE,
        "alora_invocation_tokens": Method(
            refusal="it acts only after its invocation tokens, so that no fixed weight equals it"
        ),
        "arrow_config": Method(refusal="the router picks adapters by the input, so that no fixed weight equals it"),
    }
)
# Other fields whose use no merge can follow, whatever the method.
REFUSED_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "layer_replication": "the model would have more layers than the base, and PEFT does not merge that",
        "megatron_config": "it needs Megatron layers, which a transformers checkpoint does not have",
        "sample_at_inference": "it draws random numbers at inference, so that no fixed weight equals it",
    }
)
# Fields that PEFT's own config does not have and that are no reason to refuse: one is followed (`lora_B_layout`, by
# `expert_layout`), the others tell a training its learning rates and dtypes (ms-swift, PEFT before 0.3) and the
# merge nothing.
HARMLESS_FIELDS = frozenset(
    "task_type peft_version lora_B_layout lora_dtype lorap_lr_ratio lorap_emb_lr merge_weights".split()
)
# The PEFT class of each task, by its name in `peft`.
TASK_CLASSES: Mapping[str | None, str] = MappingProxyType(
    {
        "CAUSAL_LM": "PeftModelForCausalLM",
        "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
        "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
        "SEQ_CLS": "PeftModelForSequenceClassification",
        "TOKEN_CLS": "PeftModelForTokenClassification",
        "QUESTION_ANS": "PeftModelForQuestionAnswering",
        None: "PeftModel",
    }
)
# Methods whose change of a weight is a product (or one factor): the prefixes of the tensors that it is made of. Where
# all of one factor is zero, so is the change.
FACTORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "LORA": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
        "ADALORA": ("lora_A", "lora_B", "lora_E"),
        "LOHA": ("hada_w",),
        "LOKR": ("lokr_w",),
        "HIRA": ("hira_A", "hira_B"),
        "GRALORA": ("gralora_A", "gralora_B"),
        "VERA": ("vera_lambda_b", "vera_lambda_d"),
        "FOURIERFT": ("fourierft_spectrum",),
        "WAVEFT": ("waveft_spectrum",),
        "C3A": ("c3a_kernel",),
        "SHIRA": ("shira_weight",),
    }
)
# Methods whose random projections PEFT rounds to the base's dtype unless the adapter brings them.
_ROUNDED_PROJECTIONS = frozenset({"VERA", "PVERA"})


def find_refusal(config: Mapping[str, Any]) -> Refusal | None:
    """Return why an adapter with this adapter_config.json is not merged, or None where it is."""
    peft_type = str(config.get("peft_type") or "")
    method = METHODS.get(peft_type)
    if method is None or method.refusal:
        reason = method.refusal if method else "this version knows no such method"
        return Refusal(subject=f"is of type {peft_type[:80] or 'unknown'!r}", reason=reason)
    for field, reason in REFUSED_FIELDS.items():
        if config.get(field):
            return Refusal(subject=f"sets `{field}`", reason=reason)
    if peft_type != "LORA":
        return None
    for field, variant in LORA_VARIANTS.items():
        if config.get(field) and variant.refusal:
            return Refusal(subject=f"sets `{field}`", reason=variant.refusal)
    init = _lora_init(config)
    row = LORA_INITS.get(init)
    if row is None or row.refusal:
        reason = row.refusal if row else "this version knows no such initialisation"
        value = str(config.get("init_lora_weights"))[:80]
        return Refusal(subject=f"sets `init_lora_weights` to {value!r}", reason=reason)
    return None


def reads_base(config: Mapping[str, Any]) -> bool:
    """Return whether the base must be in memory in float32 while an adapter with this config is attached."""
    peft_type = str(config.get("peft_type"))
    if METHODS[peft_type].reads_base:
        return True
    if peft_type == "LORA":
        variants = (row for field, row in LORA_VARIANTS.items() if config.get(field))
        return LORA_INITS[_lora_init(config)].reads_base or any(row.reads_base for row in variants)
    return peft_type in _ROUNDED_PROJECTIONS and not config.get("save_projection", True)


def _lora_init(config: Mapping[str, Any]) -> str:
    name, niter, _ = str(config.get("init_lora_weights", True)).lower().partition("_niter_")
    return name + niter.rstrip("_")
