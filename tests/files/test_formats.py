"""What a base's weights are called, by config and stored tensors: each kind as its library writes it, in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runner.files.formats import Format, Storage, check_plain, read_storage
from runner.files.layout import SINGLE_FILE, build_header, read_checkpoint, tensor_size_bytes
from runner.protocol.errors import UnsupportedCheckpoint

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
Q = "model.layers.0.self_attn.q_proj"
E = "model.layers.0.mlp.experts"
PLAIN: Tensors = {
    "model.embed_tokens.weight": ("BF16", (64, 32)),
    "model.layers.0.input_layernorm.weight": ("BF16", (32,)),
    "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (16,)),
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A base as it lies on disk, and what it must be called.

    Attributes:
        tensors: that are stored beside `PLAIN`.
        said: the value of `quantization_config`.
        format: of the codes.
        title: in the error.
        codes: names of the tensors that hold codes; None for the first of `tensors`.
    """

    tensors: Tensors
    said: Mapping[str, Any]
    format: Format
    title: str
    codes: tuple[str, ...] | None = None
    key: str = "quantization_config"
    more: Mapping[str, Any] = field(default_factory=dict)


def _ct(bits: int, kind: str, layout: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "strategy": "group"}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


_PACKED: Tensors = {
    f"{Q}.weight_packed": ("I32", (32, 4)),
    f"{Q}.weight_scale": ("BF16", (32, 1)),
    f"{Q}.weight_shape": ("I64", (2,)),
}
_GPTQ: Tensors = {
    f"{Q}.qweight": ("I32", (4, 32)),
    f"{Q}.qzeros": ("I32", (1, 4)),
    f"{Q}.scales": ("F16", (1, 32)),
    f"{Q}.g_idx": ("I32", (32,)),
}
_AWQ: Tensors = {
    f"{Q}.qweight": ("I32", (32, 4)),
    f"{Q}.qzeros": ("I32", (1, 4)),
    f"{Q}.scales": ("F16", (1, 32)),
}
_MLX: Tensors = {
    f"{Q}.weight": ("U32", (32, 4)),
    f"{Q}.scales": ("BF16", (32, 1)),
    f"{Q}.biases": ("BF16", (32, 1)),
}

KINDS: dict[str, Kind] = {
    "bitsandbytes nf4": Kind(
        tensors={
            f"{Q}.weight": ("U8", (512, 1)),
            f"{Q}.weight.absmax": ("F32", (16,)),
            f"{Q}.weight.quant_map": ("F32", (16,)),
            f"{Q}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
        },
        said={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        format=Format.BNB_NF4,
        title="bitsandbytes nf4",
    ),
    "bitsandbytes fp4, double": Kind(
        tensors={
            f"{Q}.weight": ("U8", (512, 1)),
            f"{Q}.weight.absmax": ("U8", (16,)),
            f"{Q}.weight.nested_absmax": ("F32", (1,)),
            f"{Q}.weight.nested_quant_map": ("F32", (256,)),
            f"{Q}.weight.quant_map": ("F32", (16,)),
            f"{Q}.weight.quant_state.bitsandbytes__fp4": ("U8", (80,)),
        },
        said={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        format=Format.BNB_FP4,
        title="bitsandbytes fp4",
    ),
    "bitsandbytes 4-bit without its state": Kind(
        tensors={f"{Q}.weight": ("U8", (512, 1)), f"{Q}.weight.absmax": ("F32", (16,))},
        said={"quant_method": "bitsandbytes", "load_in_4bit": True},
        format=Format.BNB_4BIT,
        title="bitsandbytes 4-bit",
    ),
    "bitsandbytes int8": Kind(
        tensors={f"{Q}.weight": ("I8", (32, 32)), f"{Q}.SCB": ("F32", (32,)), f"{Q}.weight_format": ("U8", ())},
        said={"quant_method": "bitsandbytes", "load_in_8bit": True},
        format=Format.BNB_INT8,
        title="bitsandbytes int8",
    ),
    "compressed-tensors int4": Kind(
        tensors=_PACKED,
        said=_ct(4, "int", "pack-quantized"),
        format=Format.CT_PACKED,
        title="compressed-tensors int4, packed",
    ),
    "compressed-tensors int8, packed, asymmetric": Kind(
        tensors={**_PACKED, f"{Q}.weight_zero_point": ("I32", (4, 1))},
        said=_ct(8, "int", "pack-quantized"),
        format=Format.CT_PACKED,
        title="compressed-tensors int8, packed",
    ),
    "compressed-tensors int8": Kind(
        tensors={f"{Q}.weight": ("I8", (32, 32)), f"{Q}.weight_scale": ("BF16", (32, 1))},
        said=_ct(8, "int", "int-quantized"),
        format=Format.CT_INT8,
        title="compressed-tensors int8",
    ),
    "compressed-tensors fp8": Kind(
        tensors={f"{Q}.weight": ("F8_E4M3", (32, 32)), f"{Q}.weight_scale": ("BF16", (32, 1))},
        said=_ct(8, "float", "float-quantized"),
        format=Format.CT_FP8,
        title="compressed-tensors fp8",
    ),
    "compressed-tensors NVFP4": Kind(
        tensors={
            f"{Q}.weight_packed": ("U8", (32, 16)),
            f"{Q}.weight_scale": ("F8_E4M3", (32, 2)),
            f"{Q}.weight_global_scale": ("F32", (1,)),
        },
        said=_ct(4, "float", "nvfp4-pack-quantized"),
        format=Format.CT_NVFP4,
        title="compressed-tensors NVFP4",
    ),
    "compressed-tensors MXFP4": Kind(
        tensors={f"{Q}.weight_packed": ("U8", (32, 16)), f"{Q}.weight_scale": ("U8", (32, 1))},
        said=_ct(4, "float", "mxfp4-pack-quantized"),
        format=Format.CT_MXFP4,
        title="compressed-tensors MXFP4",
    ),
    "compressed-tensors sparse": Kind(
        tensors={f"{Q}.compressed": ("BF16", (16, 32)), f"{Q}.bitmask": ("U8", (32, 4))},
        said={"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        format=Format.CT_SPARSE,
        title="compressed-tensors sparse",
    ),
    "block fp8": Kind(
        tensors={f"{Q}.weight": ("F8_E4M3", (32, 32)), f"{Q}.weight_scale_inv": ("F32", (1, 1))},
        said={"quant_method": "fp8", "weight_block_size": [128, 128]},
        format=Format.BLOCK_FP8,
        title="block fp8",
    ),
    "block fp8 of experts": Kind(
        tensors={f"{E}.gate_up_proj": ("F8_E4M3", (4, 64, 32)), f"{E}.gate_up_proj_scale_inv": ("F32", (4, 1, 1))},
        said={"quant_method": "fp8"},
        format=Format.BLOCK_FP8,
        title="block fp8",
    ),
    "fp8 of FBGEMM": Kind(
        tensors={f"{Q}.weight": ("F8_E4M3", (32, 32)), f"{Q}.weight_scale": ("F32", (32, 1))},
        said={"quant_method": "fbgemm_fp8"},
        format=Format.SCALED_FP8,
        title="fp8 with scales",
    ),
    "fp8 of AMD": Kind(
        tensors={f"{Q}.weight": ("F8_E4M3FNUZ", (32, 32)), f"{Q}.weight_scale": ("F32", (1,))},
        said={"quant_method": "quark"},
        format=Format.SCALED_FP8,
        title="fp8 with scales",
    ),
    "ModelOpt NVFP4": Kind(
        tensors={
            f"{Q}.weight": ("U8", (32, 16)),
            f"{Q}.weight_scale": ("F8_E4M3", (32, 2)),
            f"{Q}.weight_scale_2": ("F32", ()),
            f"{Q}.input_scale": ("F32", ()),
        },
        said={"quant_method": "modelopt", "quant_algo": "NVFP4"},
        format=Format.MODELOPT_NVFP4,
        title="ModelOpt NVFP4",
    ),
    "gpt-oss": Kind(
        tensors={
            f"{E}.down_proj_blocks": ("U8", (4, 32, 1, 16)),
            f"{E}.down_proj_scales": ("U8", (4, 32, 1)),
            f"{E}.down_proj_bias": ("BF16", (4, 32)),
        },
        said={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        format=Format.GPT_OSS_MXFP4,
        title="mxfp4 of gpt-oss",
    ),
    "GPTQ": Kind(
        tensors=_GPTQ,
        said={"quant_method": "gptq", "bits": 4, "group_size": 128},
        format=Format.GPTQ,
        title="GPTQ, 4 bits",
    ),
    "GPTQ without g_idx": Kind(
        tensors={name: told for name, told in _GPTQ.items() if not name.endswith("g_idx")},
        said={"quant_method": "auto-round", "bits": 4},
        format=Format.GPTQ,
        title="GPTQ, 4 bits",
    ),
    "AWQ": Kind(tensors=_AWQ, said={"quant_method": "awq", "bits": 4}, format=Format.AWQ, title="AWQ, 4 bits"),
    "torchao": Kind(
        tensors={
            f"{Q}._weight_qdata": ("I8", (32, 32)),
            f"{Q}._weight_scale": ("F32", (32, 1)),
            f"{Q}._weight_zero_point": ("I8", (32, 1)),
        },
        said={"quant_method": "torchao"},
        format=Format.TORCHAO,
        title="torchao",
    ),
    "HQQ": Kind(
        tensors={f"{Q}.W_q": ("U8", (512, 1)), f"{Q}.scale": ("BF16", (16, 1)), f"{Q}.zero": ("BF16", (16, 1))},
        said={"quant_method": "hqq"},
        format=Format.HQQ,
        title="HQQ",
    ),
    "quanto": Kind(
        tensors={f"{Q}.weight._data": ("I8", (32, 32)), f"{Q}.weight._scale": ("BF16", (32, 1))},
        said={"quant_method": "quanto", "weights": "int8"},
        format=Format.QUANTO,
        title="quanto",
    ),
    "EXL2": Kind(
        tensors={f"{Q}.q_weight": ("I32", (4, 32)), f"{Q}.q_scale": ("I32", (1, 4)), f"{Q}.q_groups": ("I16", (2,))},
        said={"quant_method": "exl2", "bits": 4.0},
        format=Format.EXL2,
        title="EXL2",
    ),
    "AQLM": Kind(
        tensors={f"{Q}.codes": ("I16", (32, 4, 1)), f"{Q}.codebooks": ("F16", (1, 256, 1, 8))},
        said={"quant_method": "aqlm"},
        format=Format.AQLM,
        title="AQLM",
    ),
    "mlx, 4 bits": Kind(
        tensors=_MLX, said={"group_size": 64, "bits": 4}, key="quantization", format=Format.MLX, title="mlx, 4 bits"
    ),
    "mlx, 8 bits, both fields": Kind(
        tensors=_MLX,
        said={"group_size": 64, "bits": 8},
        more={"quantization": {"group_size": 64, "bits": 8}},
        format=Format.MLX,
        title="mlx, 8 bits",
    ),
    "bare float8": Kind(
        tensors={f"{Q}.weight": ("F8_E5M2", (32, 32))}, said={}, format=Format.BARE_FP8, title="fp8 without scales"
    ),
    "a kind that nobody knows": Kind(
        tensors={f"{Q}.trellis": ("I16", (32, 32)), f"{Q}.su": ("F16", (32,))},
        said={"quant_method": "exl9"},
        format=Format.CODES,
        title="exl9",
    ),
    "bare integers": Kind(
        tensors={f"{Q}.weight": ("I8", (32, 32))}, said={}, format=Format.CODES, title="codes of an unknown format"
    ),
}
# Without a config, the library's name is not known, nor are the bits where the shapes leave them open.
SILENT = {
    "compressed-tensors int4": "compressed-tensors packed integers",
    "compressed-tensors int8, packed, asymmetric": "compressed-tensors packed integers",
    "compressed-tensors int8": "int8 with scales",
    "compressed-tensors fp8": "fp8 with scales",
    "mlx, 4 bits": "mlx",
    "mlx, 8 bits, both fields": "mlx",
}


def _folder(root: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    """Write a checkpoint of zeros."""
    rows = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    size = sum(tensor_size_bytes(dtype, shape) for _, dtype, shape in rows)
    (root / SINGLE_FILE).write_bytes(build_header(rows, {}) + bytes(size))
    (root / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    return root


def _stored(root: Path) -> Storage:
    return read_storage(json.loads((root / "config.json").read_text()), read_checkpoint(root).tensors)


def _refused(root: Path) -> UnsupportedCheckpoint:
    with pytest.raises(UnsupportedCheckpoint) as raised:
        check_plain(json.loads((root / "config.json").read_text()), read_checkpoint(root).tensors)
    return raised.value


@pytest.mark.parametrize("name", KINDS)
def test_a_quantised_base_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    said = {kind.key: kind.said} if kind.said else {}
    root = _folder(tmp_path, {**PLAIN, **kind.tensors}, {**said, **kind.more})

    storage = _stored(root)

    first = next(iter(kind.tensors))
    assert dict(storage.formats) == {first: kind.format}
    assert storage.title == kind.title
    error = _refused(root)
    assert f"quantised ({kind.title}): {first!r} is stored as {kind.tensors[first][0]}" in str(error)
    assert "16-bit model" in error.problem.fix


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.title != "exl9"])
def test_tensors_tell_where_the_config_is_silent(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    root = _folder(tmp_path, {**PLAIN, **kind.tensors}, {})

    assert _stored(root).title == SILENT.get(name, kind.title)
    assert "its config.json says nothing of it" in str(_refused(root))


def test_codes_of_a_text_model_inside_another_are_found_with_its_own_config(tmp_path: Path) -> None:
    said = {"text_config": {"quantization_config": _ct(4, "int", "pack-quantized")}}
    root = _folder(tmp_path, {**PLAIN, **_PACKED}, said)

    storage = _stored(root)

    assert storage.title == "compressed-tensors int4, packed"
    assert storage.stated is not None
    assert storage.stated.where == "text_config.quantization_config"


def test_several_formats_are_all_named(tmp_path: Path) -> None:
    other = {name.replace("q_proj", "k_proj"): told for name, told in KINDS["compressed-tensors fp8"].tensors.items()}
    root = _folder(tmp_path, {**PLAIN, **_PACKED, **other}, {"quantization_config": _ct(4, "int", "mixed-precision")})

    assert _stored(root).title == "compressed-tensors fp8 and compressed-tensors int4, packed"
    assert ", like 1 more." in str(_refused(root))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"model.memory_blocks": ("U8", (4, 4))},
        {"model.layers.0.mlp.scales": ("F32", (4,)), "model.scale_inv": ("F32", (4,))},
        {"transformer.h.0.attn.bias": ("U8", (1, 1, 8, 8)), "transformer.h.0.attn.masked_bias": ("F32", ())},
        {"embeddings.position_ids": ("I64", (1, 64)), "bn.num_batches_tracked": ("I64", ())},
        {"model.layers.0.mlp.experts.down_proj_scales": ("BF16", (4, 4))},
    ],
)
@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_plain_base_is_not_refused(more: Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    root = _folder(tmp_path, {**PLAIN, **more}, config)

    assert _stored(root).is_plain
    check_plain(json.loads((root / "config.json").read_text()), read_checkpoint(root).tensors)


@pytest.mark.parametrize(
    "config, where, method",
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "", "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "", "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "", "gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "text_config.", "mxfp4"),
        ({"quantization_config": {"bits": 4}}, "", ""),
    ],
)
def test_a_config_that_calls_plain_weights_quantised_is_told_so(
    config: dict[str, Any], where: str, method: str, tmp_path: Path
) -> None:
    error = _refused(_folder(tmp_path, PLAIN, config))

    said = f" ({method})" if method else ""
    assert f"`{where}quantization_config`{said}, but no tensor is quantised: all 3 are stored plain" in str(error)
    assert f"remove `{where}quantization_config` from config.json" in error.problem.fix


def test_no_recipe_that_rounds_or_misreads_the_codes_is_printed(tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        root = tmp_path / name.replace(" ", "-").replace(",", "")
        root.mkdir()
        text = str(_refused(_folder(root, {**PLAIN, **kind.tensors}, {kind.key: kind.said} if kind.said else {})))
        assert "dequantize" not in text
        assert "from_pretrained" not in text
