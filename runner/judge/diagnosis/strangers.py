"""Is it not this base, or not this adapter? What W′ − W is, beside ΔW.

The change of another adapter is of low rank, too, or as small as this adapter's, and knows nothing of ΔW. Another base
differs in every direction. Which of the two it is, is decided with the tensors that no adapter touches, where those
tell (`runner.judge.diagnosis.report`); a single tensor is only read for how it looks.
"""

from __future__ import annotations

import math

import torch

from runner.judge.diagnosis.sample import Reading, Sample, Suspect
from runner.judge.numbers.tensors import ulp
from runner.protocol.verdict import Cause

DIRECTIONS = 32  # that hold an adapter's change; of a small matrix, a quarter of what it has
LOW_SHARE = 0.8  # of the energy that is above rounding


def read_stranger(suspect: Suspect, sample: Sample) -> Reading:
    """Return "another adapter", "another base", or "unexplained" for a tensor that nothing else explains."""
    moved = sample.found - sample.base if sample.base is not None else None
    if moved is None or not bool(moved.isfinite().all()):
        note = "It is not what the adapter brings, and nothing that was tried gives it"
        return Reading(kind=Cause.UNEXPLAINED, tensor=suspect.name, note=note, is_certain=False)
    along, cosine = _against_delta(sample, moved)
    size = float(moved.norm() / sample.base.norm()) if sample.base is not None else math.inf
    told = f"W′ − W is {size:.2g} of W, its part along ΔW {along:.2g}, their cosine {cosine:.2f}"
    has_delta = bool((sample.delta != 0).any())
    if has_delta and abs(cosine) < 0.5 and (_is_low_rank(sample, moved) or _is_mostly_rounding(sample, moved)):
        note = "The change is another one, of low rank or as small as rounding"
        return Reading(kind=Cause.OTHER_ADAPTER, tensor=suspect.name, note=note, is_certain=False)
    if has_delta and 0.5 < along < 1.5:
        note = "The adapter's change is there, on other weights than the base's"
    else:
        note = f"Other weights than the base's: {told}"
    return Reading(kind=Cause.OTHER_WEIGHTS, tensor=suspect.name, note=note, is_certain=False)


def _against_delta(sample: Sample, moved: torch.Tensor) -> tuple[float, float]:
    """Return <moved, ΔW>/‖ΔW‖² and their cosine; 0.0 without a change."""
    delta = sample.delta
    squared, product = float(delta.square().sum()), float((moved * delta).sum())
    size = squared**0.5 * float(moved.norm())
    return (product / squared, product / size) if size > 0 else (0.0, 0.0)


def _is_low_rank(sample: Sample, moved: torch.Tensor) -> bool:
    """Return whether most of what is above rounding is in few directions."""
    directions = min(DIRECTIONS, min(moved.shape) // 4)
    energy = torch.linalg.svdvals(moved.float()).square()
    noise = float((ulp(sample.found, sample.dtype).square() / 12).sum()) if sample.dtype != "F32" else 0.0
    above = float(energy.sum()) - noise
    return above > noise and float(energy[:directions].sum()) >= LOW_SHARE * above


def _is_mostly_rounding(sample: Sample, moved: torch.Tensor) -> bool:
    """Return whether nearly every element is the base's or its neighbour, as with a change that the dtype swallows."""
    base = sample.base
    if base is None or sample.dtype == "F32":
        return False
    steps = (moved.abs() / ulp(base, sample.dtype)).nan_to_num(posinf=0.0)
    typical = float(sample.delta.square().mean().sqrt())
    small = (steps <= 1.0) | (moved.abs() <= 8 * typical)
    return float(small.double().mean()) > 0.99
