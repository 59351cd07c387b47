"""Quantised bases are refused by the name of their method, whether the config says so or only the tensors."""

from __future__ import annotations

from typing import Any

import pytest

from runner.errors import UnsupportedCheckpoint
from runner.model.quantised import check_not_quantised

PLAIN = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight")
Q = "model.layers.0.self_attn.q_proj"

BY_CONFIG: dict[str, tuple[dict[str, Any], str, str]] = {
    "fp8": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8", "FineGrainedFP8"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4", "Mxfp4Config"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes", "16-bit model",
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq", "16-bit model"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq", "16-bit model"),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", "16-bit model",
    ),
    "an older key": ({"compression_config": {"quantization_method": "sparseml"}}, "sparseml", "16-bit model"),
    "a text config": (
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, r"text_config\.quantization_config",
        "FineGrainedFP8",
    ),
    "no method": ({"quantization_config": {"bits": 4}}, "an unnamed method", "16-bit model"),
}  # fmt: skip
BY_TENSORS = {
    "fp8": (f"{Q}.weight_scale_inv",),
    "mxfp4": ("model.layers.0.mlp.experts.down_proj_blocks", "model.layers.0.mlp.experts.down_proj_scales"),
    "bitsandbytes": (f"{Q}.weight.absmax", f"{Q}.weight.quant_state.bitsandbytes__nf4"),
    "gptq or awq": (f"{Q}.qweight", f"{Q}.scales", f"{Q}.qzeros"),
    "compressed-tensors": (f"{Q}.weight_packed",),
}


@pytest.mark.parametrize("name", BY_CONFIG)
def test_a_config_that_says_so_is_believed(name: str) -> None:
    config, method, fix = BY_CONFIG[name]

    with pytest.raises(UnsupportedCheckpoint, match=method) as raised:
        check_not_quantised(config, PLAIN)

    assert fix in raised.value.problem.fix


@pytest.mark.parametrize("method", BY_TENSORS)
def test_tensors_tell_where_the_config_is_silent(method: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=f"quantised with {method}: it stores"):
        check_not_quantised({"architectures": ["LlamaForCausalLM"]}, (*PLAIN, *BY_TENSORS[method]))


@pytest.mark.parametrize(
    "names", [PLAIN, (*PLAIN, "model.memory_blocks"), (*PLAIN, "model.layers.0.mlp.scales", "model.scale_inv")]
)
def test_a_plain_base_is_not_refused(names: tuple[str, ...]) -> None:
    check_not_quantised({"quantization_config": None, "text_config": {"vocab_size": 3}}, names)
