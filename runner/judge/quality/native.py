"""The models as they will be served: in the output dtype, weights and arithmetic, beside the unmerged model in float32.

    ρ = KL(float32 unmerged ‖ 16-bit merged) / KL(float32 unmerged ‖ 16-bit unmerged)

About 1 says that merging adds nothing to the noise that 16-bit arithmetic has anyway. It is reported, never judged by:
a merge that was never applied has a ρ of about 1 too, where the adapter is mild.

Covered: CUDA, and bfloat16 on processors that multiply it as fast as float32. Not run, with the reason: float16 on a
CPU (160 times slower), models that do not fit into memory beside what is there, and float32, whose native run is the
one that the end-to-end layer makes anyway.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from runner.judge.forward import outputs_of
from runner.judge.prompts import TokenSequence
from runner.judge.streaming.models import LOAD_ERRORS, NO_ADAPTER, first_line, model_class, quiet
from runner.protocol.figures import Native

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_MULTIPLIED = 384  # rows and columns of the matrices that are timed
_SHARE_OF_MEMORY = 0.5
Gold = Sequence[tuple[TokenSequence, torch.Tensor]]


def run_native(*, base: Path, adapter: Path, merged: Path, dtype: str, device: str, gold: Gold) -> Native:
    """Return the native run, or why there was none.

    Args:
        base: folder of the base.
        adapter: folder of the adapter.
        merged: folder of the merge.
        dtype: of the merged weights, as safetensors spells it.
        device: "cpu" or "cuda".
        gold: sequences, and the unmerged model's logits on them in float32.
    """
    reason = _obstacle(merged, dtype, device, gold)
    if reason:
        return Native(dtype=_NAMES.get(dtype, dtype), device=device, reason=reason)
    try:
        ours = _divergence(_load(merged, dtype, device), gold, device)
        with quiet():
            unmerged = PeftModel.from_pretrained(_load(base, dtype, device), str(adapter)).eval()
            theirs = _divergence(unmerged, gold, device)
    except LOAD_ERRORS as error:
        return Native(dtype=_NAMES[dtype], device=device, reason=f"it failed: {first_line(error)}")
    return Native(dtype=_NAMES[dtype], device=device, kl_merged_nats=ours, kl_unmerged_nats=theirs)


def _obstacle(merged: Path, dtype: str, device: str, gold: Gold) -> str:
    if dtype not in _DTYPES:
        return f"the output is {_NAMES.get(dtype, dtype)}, in which everything above was computed"
    if not gold:
        return "the model predicts no tokens of a text"
    size_bytes = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    room_bytes = free_bytes(device)
    if size_bytes > _SHARE_OF_MEMORY * room_bytes:
        return f"the model has {size_bytes / 1e9:.1f} GB, and {room_bytes / 1e9:.1f} GB of memory are free"
    if device == "cpu" and dtype == "F16":
        return "float16 is never multiplied on a CPU, where that is more than a hundred times slower"
    if device == "cpu" and not _multiplies_fast():
        return "this processor multiplies bfloat16 more slowly than float32"
    return ""


def _load(folder: Path, dtype: str, device: str) -> Any:
    with quiet():
        model = model_class(folder).from_pretrained(
            str(folder),
            dtype=_DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            adapter_kwargs=NO_ADAPTER,
        )
    return model.eval().requires_grad_(False).to(device)


def _divergence(model: Any, gold: Gold, device: str) -> float:
    """Return the mean KL(gold ‖ model) per token, in nats."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    found = []
    for sequence, reference in gold:
        with torch.no_grad(), quiet():
            logits = outputs_of(inner, sequence, device)
        width = min(logits.shape[-1], reference.shape[-1])
        wanted = torch.log_softmax(reference[:, :width].double(), dim=-1)
        log = torch.log_softmax(logits[:, :width].double(), dim=-1)
        found.append((wanted.exp() * (wanted - log)).sum(dim=-1))
    return float(torch.cat(found).mean())


def _multiplies_fast() -> bool:
    """Return whether a product in bfloat16 takes at most as long as one in float32; the best of several each."""
    return _seconds(torch.bfloat16) <= _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    left = torch.ones(_MULTIPLIED, _MULTIPLIED, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(left, left)
        best = min(best, time.perf_counter() - started)
    return best


def free_bytes(device: str) -> int:
    """Return the memory that is free on a device, also by the control group's limit."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    room_bytes = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return room_bytes
    return min(room_bytes, int(most) - used) if most.isdecimal() else room_bytes
