"""What is measured on top, where the hardware allows it: 16-bit arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from runner.judge.case import Case
from runner.judge.quality.native import Gold, run_native
from runner.protocol.verdict import Quality


def measure_native(case: Case, merged: Path, quality: Quality, *, gold: Gold, device: str) -> Quality:
    """Return the quality with the figures of a run in the output dtype in it."""
    native = run_native(
        base=case.base.root, adapter=case.adapter, merged=merged, dtype=_main_dtype(case), device=device, gold=gold
    )
    return replace(quality, native=native)


def _main_dtype(case: Case) -> str:
    """Return the dtype that the largest changed tensor is stored in."""
    largest = max(case.targets.touched, key=lambda target: math.prod(target.shape), default=None)
    return largest.dtype if largest is not None else "F32"
