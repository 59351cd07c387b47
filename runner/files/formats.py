"""What the weights of a checkpoint are: plain numbers, or the codes of a quantised format, named by config and tensors.

Each stored tensor is recognised by its dtype and by what lies beside it (scales, zero points, states); the config only
settles what these leave open. Covered: bitsandbytes nf4, fp4 and int8; compressed-tensors; block fp8; the mxfp4 of
gpt-oss; ModelOpt; AWQ; GPTQ; torchao; HQQ; quanto; EXL2; AQLM; mlx; bare float8 and integers. A `quantization_config`
over plain tensors is told as that. Whole files in another format (GGUF) are named by `runner.files.absent`.

Sources: what each library writes (bitsandbytes 0.50, compressed-tensors 0.20, transformers 5.23, torchao 0.18,
gptqmodel 7.7, mlx 0.29), and docs/nastiest-cases.md. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from runner.files.layout import TensorInfo
from runner.protocol.errors import UnsupportedCheckpoint


class Format(StrEnum):
    """How weights are stored; the value is what people call it."""

    BNB_NF4 = "bitsandbytes nf4"
    BNB_FP4 = "bitsandbytes fp4"
    BNB_4BIT = "bitsandbytes 4-bit"
    BNB_INT8 = "bitsandbytes int8"
    CT_PACKED = "compressed-tensors packed integers"
    CT_INT8 = "compressed-tensors int8"
    CT_FP8 = "compressed-tensors fp8"
    CT_NVFP4 = "compressed-tensors NVFP4"
    CT_MXFP4 = "compressed-tensors MXFP4"
    CT_SPARSE = "compressed-tensors sparse"
    BLOCK_FP8 = "block fp8"
    SCALED_FP8 = "fp8 with scales"
    BARE_FP8 = "fp8 without scales"
    SCALED_INT8 = "int8 with scales"
    GPT_OSS_MXFP4 = "mxfp4 of gpt-oss"
    MODELOPT_NVFP4 = "ModelOpt NVFP4"
    GPTQ = "GPTQ"
    AWQ = "AWQ"
    TORCHAO = "torchao"
    HQQ = "HQQ"
    QUANTO = "quanto"
    EXL2 = "EXL2"
    AQLM = "AQLM"
    MLX = "mlx"
    CODES = "codes of an unknown format"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What a config says of quantisation.

    Attributes:
        where: the field, such as `quantization_config` or `text_config.quantization_config`.
        method: its `quant_method`; "" where it names none.
        fields: the whole of it.
    """

    where: str
    method: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What the weights of a checkpoint are stored as.

    Attributes:
        formats: format of each tensor that holds codes, by name; plain tensors and what belongs to codes are not here.
        stated: what config.json says, the first place that says something; None where it is silent.
        bits: of each code, where config or shapes tell.
        evidence: one tensor for each format: its name, its dtype, and what lies beside it.
    """

    formats: Mapping[str, Format]
    stated: Stated | None
    bits: int | None
    evidence: Mapping[Format, str]

    @property
    def is_plain(self) -> bool:
        """Whether every tensor is a plain number array."""
        return not self.formats

    @property
    def title(self) -> str:
        """What people call it, with the bits where they are no part of the name; several joined by "and"."""
        return " and ".join(self._called(kind) for kind in self.evidence)

    def _called(self, kind: Format) -> str:
        if kind is Format.CODES and self.stated is not None and self.stated.method:
            return self.stated.method
        if kind is Format.CT_PACKED and self.bits is not None:
            return f"compressed-tensors int{self.bits}, packed"
        return f"{kind}, {self.bits} bits" if kind in _OF_ANY_BITS and self.bits is not None else str(kind)


_OF_ANY_BITS = frozenset({Format.GPTQ, Format.AWQ, Format.MLX, Format.HQQ})
_F8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_BYTES = frozenset({"U8", "I8"})
_WORDS = frozenset({"I32", "U32"})
_CODES = _F8 | _BYTES | _WORDS | frozenset({"I16", "U16", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """A tensor whose name ends with `code` holds codes if it has such a dtype and each of `beside` lies beside it."""

    format: Format
    code: str
    dtypes: frozenset[str]
    beside: tuple[str, ...] = ()


# In this order; the first that fits names the tensor.
_RULES = (
    _Rule(format=Format.BNB_NF4, code="weight", dtypes=_BYTES, beside=("weight.quant_state.bitsandbytes__nf4",)),
    _Rule(format=Format.BNB_FP4, code="weight", dtypes=_BYTES, beside=("weight.quant_state.bitsandbytes__fp4",)),
    _Rule(format=Format.BNB_4BIT, code="weight", dtypes=_BYTES, beside=("weight.absmax",)),
    _Rule(format=Format.BNB_INT8, code="weight", dtypes=frozenset({"I8"}), beside=("SCB",)),
    _Rule(format=Format.CT_PACKED, code="weight_packed", dtypes=_WORDS, beside=("weight_scale",)),
    _Rule(format=Format.CT_NVFP4, code="weight_packed", dtypes=_BYTES, beside=("weight_scale", "weight_global_scale")),
    _Rule(format=Format.CT_MXFP4, code="weight_packed", dtypes=_BYTES, beside=("weight_scale",)),
    _Rule(format=Format.CT_SPARSE, code="compressed", dtypes=_CODES | {"BF16", "F16", "F32"}, beside=("bitmask",)),
    _Rule(format=Format.MODELOPT_NVFP4, code="weight", dtypes=_BYTES, beside=("weight_scale", "weight_scale_2")),
    _Rule(format=Format.BLOCK_FP8, code="", dtypes=_F8, beside=("_scale_inv",)),
    _Rule(format=Format.SCALED_FP8, code="", dtypes=_F8, beside=("_scale",)),
    _Rule(format=Format.SCALED_INT8, code="weight", dtypes=frozenset({"I8"}), beside=("weight_scale",)),
    _Rule(format=Format.GPT_OSS_MXFP4, code="_blocks", dtypes=frozenset({"U8"}), beside=("_scales",)),
    _Rule(format=Format.GPTQ, code="qweight", dtypes=_WORDS, beside=("scales", "g_idx")),
    _Rule(format=Format.AWQ, code="qweight", dtypes=_WORDS, beside=("scales", "qzeros")),
    _Rule(format=Format.TORCHAO, code="_weight_qdata", dtypes=_CODES),
    _Rule(format=Format.HQQ, code="W_q", dtypes=_CODES | {"F32"}),
    _Rule(format=Format.QUANTO, code="weight._data", dtypes=_CODES, beside=("weight._scale",)),
    _Rule(format=Format.EXL2, code="q_weight", dtypes=_WORDS),
    _Rule(format=Format.AQLM, code="codes", dtypes=_CODES, beside=("codebooks",)),
    _Rule(format=Format.MLX, code="weight", dtypes=frozenset({"U32"}), beside=("scales",)),
    _Rule(format=Format.BARE_FP8, code="weight", dtypes=_F8),
    _Rule(format=Format.BARE_FP8, code="_proj", dtypes=_F8),
    _Rule(format=Format.CODES, code="weight", dtypes=_CODES),
    _Rule(format=Format.CODES, code="qweight", dtypes=_CODES),
    _Rule(format=Format.CODES, code="weight_packed", dtypes=_CODES),
)  # fmt: skip
# What belongs to codes, and is none itself.
_BESIDE = re.compile(r"(?:^|[._])(?:scale|scales|scale_inv|scale_2|zero_?point|zeros|qzeros|bitmask|quant_map)$")

_FIELDS = ("quantization_config", "compression_config", "quantization")  # the last is mlx's own
_INNER = ("text_config", "llm_config", "language_config", "thinker_config")
_CT_METHODS = frozenset({"compressed-tensors", "compressed_tensors", "sparseml"})
# What a rule finds by the tensors, as a config that names the library calls it.
_BY_METHOD: Mapping[tuple[Format, bool], Format] = {
    (Format.SCALED_FP8, True): Format.CT_FP8,
    (Format.SCALED_INT8, True): Format.CT_INT8,
}


def read_storage(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Storage:
    """Return what the weights are stored as.

    Args:
        config: config.json.
        tensors: the stored tensors, from headers alone.
    """
    stated = next(_statements(config), None)
    is_ct = stated is not None and stated.method in _CT_METHODS
    formats: dict[str, Format] = {}
    evidence: dict[Format, str] = {}
    bits: int | None = None
    for name, info in sorted(tensors.items()):
        rule = _rule(name, info, tensors)
        if rule is None and stated is not None and info.dtype in _CODES and _may_be_codes(name, info):
            rule = _Rule(format=Format.CODES, code="", dtypes=_CODES)
        if rule is None:
            continue
        stem = name.removesuffix(rule.code)
        kind = _by_scales(rule.format, stem, tensors, is_ct=is_ct)
        formats[name] = kind
        bits = bits or _bits_of(kind, stem, tensors)
        beside = f" beside {stem + rule.beside[0]!r}" if rule.beside else ""
        evidence.setdefault(kind, f"{name!r} is stored as {info.dtype}{beside}")
    bits = _stated_bits(stated) or bits
    return Storage(formats=formats, stated=stated, bits=bits, evidence=evidence)


def check_plain(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Return if a base's weights are plain numbers and its config says nothing else.

    Args:
        config: config.json.
        tensors: the stored tensors.

    Raises:
        UnsupportedCheckpoint: they are codes, or the config calls plain weights quantised.
    """
    storage = read_storage(config, tensors)
    stated = storage.stated
    if not storage.is_plain:
        first = next(iter(storage.evidence.values()))
        more = f", like {len(storage.formats) - 1} more" if len(storage.formats) > 1 else ""
        silent = "" if stated is not None else "; its config.json says nothing of it"
        raise UnsupportedCheckpoint(
            f"The base is quantised ({storage.title}): {first}{more}{silent}.",
            why="A change added to quantised weights does not survive quantising them again, and the codes are not "
            "the weights.",
            fix="Set `base-model` to the 16-bit model that it was made from; its model card names it. An adapter that "
            "was trained on the quantised weights then gives a model near the trained one, not the very same.",
        )
    if stated is not None:
        dtypes = ", ".join(sorted({info.dtype for info in tensors.values()}))
        method = f" ({stated.method})" if stated.method else ""
        raise UnsupportedCheckpoint(
            f"The base's config.json has `{stated.where}`{method}, but no tensor is quantised: all "
            f"{len(tensors)} are stored plain ({dtypes}).",
            why="Loaders would take the weights for quantised ones, or quantise them, and the release would inherit "
            "the field.",
            fix=f"If these weights are the ones that you mean, remove `{stated.where}` from config.json in a copy of "
            "the base, and set `base-model` to that folder.",
        )


def _rule(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> _Rule | None:
    """Return the rule that names a tensor; None for a plain one, and for what belongs to codes."""
    if info.dtype in _PLAIN_DTYPES and not name.endswith(("compressed", "W_q")):
        return None
    if _BESIDE.search(name):
        return None
    for rule in _RULES:
        if not name.endswith(rule.code) or info.dtype not in rule.dtypes or not _is_word(name, rule.code):
            continue
        stem = name.removesuffix(rule.code) if rule.code else name
        if all(stem + beside in tensors for beside in rule.beside):
            return rule
    return None


_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "BOOL", "I64", "U64", "C64"})


def _is_word(name: str, code: str) -> bool:
    """Return whether `code` is a whole part of the name: `weight` of `q_proj.weight`, not of `unweight`."""
    return not code or code.startswith("_") or name == code or name[: -len(code)].endswith(".")


def _may_be_codes(name: str, info: TensorInfo) -> bool:
    return len(info.shape) >= 2 and not name.endswith("bias") and _BESIDE.search(name) is None


def _by_scales(kind: Format, stem: str, tensors: Mapping[str, TensorInfo], *, is_ct: bool) -> Format:
    """Settle by shapes and dtypes what the names leave open."""
    if kind is Format.AWQ and tensors[f"{stem}qweight"].shape[-1:] == tensors[f"{stem}scales"].shape[-1:]:
        return Format.GPTQ  # words run along the rows, so that there is one column for each output
    if kind is Format.CT_MXFP4 and tensors[f"{stem}weight_scale"].dtype in _F8:
        return Format.CT_NVFP4
    return _BY_METHOD.get((kind, is_ct), kind)


def _bits_of(kind: Format, stem: str, tensors: Mapping[str, TensorInfo]) -> int | None:
    """Return the bits of a code by the shapes of GPTQ's and AWQ's tensors; None where they do not tell."""
    zeros, scales = tensors.get(f"{stem}qzeros"), tensors.get(f"{stem}scales")
    if kind not in (Format.GPTQ, Format.AWQ) or zeros is None or scales is None:
        return None
    words, columns = (info.shape[-1] if info.shape else 0 for info in (zeros, scales))
    return words * 32 // columns if columns and words * 32 % columns == 0 else None


def _statements(config: Mapping[str, Any]) -> Iterator[Stated]:
    """Yield what the config, and those of its parts, say of quantisation."""
    for prefix, holder in (("", config), *((f"{key}.", config.get(key)) for key in _INNER)):
        if not isinstance(holder, dict):
            continue
        for field in _FIELDS:
            if not holder.get(field):
                continue
            fields = holder[field] if isinstance(holder[field], dict) else {}
            method = str(fields.get("quant_method") or fields.get("quantization_method") or "")[:40]
            if not method and {"bits", "group_size"} <= fields.keys():
                method = "mlx" if holder.get("quantization") else ""
            yield Stated(where=f"{prefix}{field}", method=method, fields=fields)


def _stated_bits(stated: Stated | None) -> int | None:
    """Return the bits that a config states, of the first group where it has several."""
    if stated is None:
        return None
    groups = stated.fields.get("config_groups")
    group = next((one for one in groups.values() if isinstance(one, dict)), {}) if isinstance(groups, dict) else {}
    weights = group.get("weights")
    found = weights.get("num_bits") if isinstance(weights, dict) else stated.fields.get("bits")
    return found if type(found) is int and 0 < found <= 16 else None
