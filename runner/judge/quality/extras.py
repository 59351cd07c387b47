"""What is measured on top, where hardware, packages and the user's wishes allow it: 16-bit arithmetic, tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from runner.judge.case import Case
from runner.judge.quality.native import Gold, run_native
from runner.judge.quality.tasks import run_tasks
from runner.protocol.verdict import Check, Layer, Outcome, Quality


def measure_extras(
    case: Case,
    merged: Path,
    quality: Quality,
    *,
    gold: Gold,
    tasks: Sequence[str],
    device: str,
    say: Callable[[str, float], None],
) -> tuple[Quality, list[Check]]:
    """Return the quality with these figures in it, and what is to be said of those that could not be measured."""
    say("native run", 0.95)
    base, adapter = case.base.root, case.adapter
    native = run_native(base=base, adapter=adapter, merged=merged, dtype=_main_dtype(case), device=device, gold=gold)
    quality = replace(quality, native=native)
    if not tasks:
        return quality, []
    say("tasks", 0.97)
    scores, reason = run_tasks(tasks, base=base, adapter=adapter, merged=merged, device=device)
    name = "your tasks were run"
    if reason:
        return quality, [Check(layer=Layer.QUALITY, name=name, outcome=Outcome.WARN, detail=f"{reason}.")]
    return replace(quality, tasks=scores), [Check(layer=Layer.QUALITY, name=name, outcome=Outcome.PASS)]


def _main_dtype(case: Case) -> str:
    """Return the dtype that the largest changed tensor is stored in."""
    largest = max(case.targets.touched, key=lambda target: math.prod(target.shape), default=None)
    return largest.dtype if largest is not None else "F32"
