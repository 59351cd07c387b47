"""Was it rounded more than once, or not to the nearest? The candidates are what the common pipelines compute."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from runner.judge.diagnosis.sample import NEARLY_ALL, Reading, Sample, Suspect, share
from runner.judge.expected.exact import ExactLowRank
from runner.judge.numbers.tensors import round_to, ulp
from runner.protocol.verdict import Cause

ROUNDINGS = 2.0  # units in the last place of bf16, of W and of E: what a computation in bf16 may be off by
TRUNCATED = "The values are the exact sum cut towards zero, not rounded to the nearest"


def read_rounding(suspect: Suspect, sample: Sample) -> Reading | None:
    """Return the reading "the right sum, rounded in another way", or None."""
    if sample.base is None or not bool((sample.delta != 0).any()):
        return None
    if _is_truncated(sample):
        return Reading(kind=Cause.TRUNCATED, tensor=suspect.name, note=TRUNCATED)
    for note, value in _candidates(suspect, sample):
        if sample.is_rounding_of(value) or sample.explains(value):
            return Reading(kind=Cause.ROUNDED_TWICE, tensor=suspect.name, note=note)
    if _is_near(sample):
        note = "Every element is within what computing in 16 bits adds, and the change has its right size"
        return Reading(kind=Cause.ROUNDED_TWICE, tensor=suspect.name, note=note, is_certain=False)
    return None


def _candidates(suspect: Suspect, sample: Sample) -> Iterator[tuple[str, torch.Tensor]]:
    base, exact = sample.base, sample.exact
    if base is None:
        return
    if isinstance(suspect.exact, ExactLowRank):
        half = suspect.exact.delta_of_rounded_factors(*sample.rows, torch.bfloat16).view(exact.shape)
        text = "The change was computed from factors in bf16"
        yield f"{text}, rounded to bf16, then added", base + _through(half, torch.bfloat16)
        yield f"{text}, then added", base + half
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        yield f"The change was rounded to {name} before it was added", base + _through(sample.delta, dtype)
        if sample.dtype != {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]:
            yield f"The sum was rounded to {name} first, then to the file's dtype", _through(exact, dtype)


def _through(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype).double()


def _is_truncated(sample: Sample) -> bool:
    exact, found = sample.exact, sample.found
    inward = found.abs() <= exact.abs() + sample.noise
    near = (exact - found).abs() < ulp(exact, sample.dtype) + sample.noise
    nearest = round_to(exact, sample.dtype).double()
    outward = nearest.abs() > exact.abs() + 2 * sample.noise  # here rounding and cutting differ
    return share(inward & near) >= NEARLY_ALL and share(found[outward] != nearest[outward]) >= NEARLY_ALL


def _is_near(sample: Sample) -> bool:
    """Return whether all elements are near E, and no factor but about 1 makes them so."""
    base, delta = sample.base, sample.delta
    if base is None:
        return False
    size = torch.maximum(base.abs(), sample.exact.abs())
    typical = delta.square().mean().sqrt()
    room = 0.5 * ulp(sample.exact, sample.dtype) + ROUNDINGS * ulp(size, "BF16") + 2.0**-6 * (delta.abs() + typical)
    error = sample.found - sample.exact
    if share(error.abs() <= room) < NEARLY_ALL:
        return False
    right = round_to(sample.exact, sample.dtype).double()
    moved = sample.found != base
    if bool(moved.any()) and share((right != base)[moved]) < 0.5:
        return False  # it changed other elements than this change does
    # Rounding errors do not know the change: what is off must not be a part of it.
    off = sample.found - right
    squared = float(delta.square().sum())
    along = float((off * delta).sum()) / squared
    spread = float(off.square().sum()) ** 0.5 / squared**0.5
    return bool(abs(along) <= max(0.02, 4 * spread / delta.numel() ** 0.5 * 2))
