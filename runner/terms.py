"""The inputs that say on what terms a merge is made and judged, read from the form: rounding, limits, evaluation."""

from __future__ import annotations

from runner.form import Form
from runner.rounding import Rounding


def read_rounding(form: Form, *, mode: str) -> Rounding:
    """Return how merged values are rounded; without a seed only where an existing merge is judged."""
    kind, text = form.choice("rounding"), form.values.get("rounding-seed", "")
    rounding = Rounding(kind=kind, seed=None)
    if not rounding.is_stochastic:
        if text:
            form.add(
                "`rounding-seed` is given, but `rounding` is `nearest`.",
                why="Rounding to the nearest draws nothing at random, so it would be ignored.",
                fix="Remove it, or set `rounding: stochastic`.",
            )
        return rounding
    if form.values.get("dtype") == "float32":
        form.add(
            "`rounding` is `stochastic`, but `dtype` is `float32`.",
            why="The merge computes in float32, so that nothing is left to be rounded.",
            fix="Remove `rounding`, or choose another `dtype`.",
        )
    if not text and mode == "verify":
        return rounding
    seed = int(text or "0") if (text or "0").isdecimal() else -1
    if not 0 <= seed < 1 << 63:
        form.add(
            f"`rounding-seed` is {text!r}.",
            why="It is a whole number from 0 to 2^63 - 1.",
            fix="Set it to such a number, or leave it out for 0.",
        )
    return Rounding(kind=kind, seed=seed)
