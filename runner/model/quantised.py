"""Bases whose weights are quantised: how they are recognised, by config and by tensor names, and what to do instead.

A change added to quantised weights does not survive quantising them again, so that none of them is merged.
No torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from runner.errors import UnsupportedCheckpoint

_FIELDS = ("quantization_config", "compression_config")
_INNER = ("text_config", "llm_config", "language_config", "thinker_config")
# What each method adds beside a weight, or stores in its place; a checkpoint with one of these is quantised even if
# nothing in its config says so.
_EVIDENCE = (
    ("fp8", re.compile(r"\.weight_scale_inv$|\.(?:weight|input)_scale$")),
    ("mxfp4", re.compile(r"_blocks$")),
    ("bitsandbytes", re.compile(r"\.(?:absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.")),
    ("gptq or awq", re.compile(r"\.(?:qweight|qzeros|g_idx)$")),
    ("compressed-tensors", re.compile(r"\.weight_packed$")),
)
_SAVE = "`save_pretrained(folder, save_original_format=False)`"
_DEQUANTISED = {
    "fp8": "`from_pretrained(…, quantization_config=FineGrainedFP8Config(dequantize=True))`",
    "mxfp4": "`from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True))`",
}


def check_not_quantised(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse a quantised base.

    Args:
        config: its config.json.
        names: its stored tensors.

    Raises:
        UnsupportedCheckpoint: it is quantised, by its config or by the tensors beside its weights.
    """
    for where, stated in _stated(config):
        method = str(stated.get("quant_method") or stated.get("quantization_method") or "an unnamed method")[:40]
        raise _refusal(method, f"its config.json has `{where}`")
    for method, pattern in _EVIDENCE:
        if found := sorted(name for name in names if pattern.search(name)):
            if method == "mxfp4" and not any(name.endswith("_scales") for name in names):
                continue
            raise _refusal(method, f"it stores {found[0]!r}, though its config.json says nothing of it")


def _stated(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for prefix, holder in (("", config), *((f"{key}.", config.get(key)) for key in _INNER)):
        if isinstance(holder, dict):
            for field in _FIELDS:
                if holder.get(field):
                    stated = holder[field]
                    yield f"{prefix}{field}", stated if isinstance(stated, dict) else {}


def _refusal(method: str, evidence: str) -> UnsupportedCheckpoint:
    fix = "Set `base-model` to the 16-bit model that it was made from; its model card names it."
    if method in _DEQUANTISED:
        fix += f" Where there is none, dequantise it once: {_DEQUANTISED[method]}, then {_SAVE}, and give that folder."
    return UnsupportedCheckpoint(
        f"The base is quantised with {method}: {evidence}.",
        why="A change added to quantised weights does not survive quantising them again.",
        fix=fix,
    )
