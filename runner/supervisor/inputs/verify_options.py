"""The inputs that say on what terms a merge is made and judged, read from the form: rounding, limits, evaluation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from runner.protocol.limits import (
    AT_LEAST,
    AT_MOST,
    FIGURES,
    MOST_TOLERANT,
    TOLERANCES,
    Evaluation,
    Limits,
    QualityLimit,
    Tolerance,
)
from runner.protocol.rounding import Rounding
from runner.supervisor.inputs.form import Form
from runner.supervisor.inputs.sources import nearest

MAX_TEXT_BYTES = 1 << 20  # far more than the tokens of it that are read


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


def read_limits(form: Form, *, mode: str) -> Limits:
    """Return the limits that the user loosened or set."""
    if mode == "plan":
        for name in ("verify-tolerance", "quality-limits"):
            if form.values.get(name):
                form.add(
                    f"`{name}` is given, but `mode` is `plan`.",
                    why="Nothing is judged in this mode, so it would be ignored.",
                    fix=f"Remove `{name}`, or choose another `mode`.",
                )
    return Limits(tolerances=tuple(_tolerances(form)), quality=tuple(_quality(form)))


def read_evaluation(form: Form, *, mode: str) -> Evaluation:
    """Return what of the user's own the models are to be evaluated on."""
    return Evaluation(text=_eval_text(form, mode=mode))


def _eval_text(form: Form, *, mode: str) -> str:
    """Return the content of the file that `eval-text` names; "" for none."""
    value = form.values.get("eval-text", "")
    if not value:
        if "perplexity-ratio" in form.values.get("quality-limits", ""):
            form.add(
                "`quality-limits` names `perplexity-ratio`, and `eval-text` is missing.",
                why="The perplexity is that of a text of yours; there is none built in.",
                fix="Set `eval-text` to a text file, or remove that limit.",
            )
        return ""
    if mode == "plan":
        form.add(
            "`eval-text` is given, but `mode` is `plan`.",
            why="Nothing is judged in this mode, so it would be ignored.",
            fix="Remove `eval-text`, or choose another `mode`.",
        )
    path = form.attempt(lambda: form.workspace.locate("eval-text", value))
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES)
        text = content.decode("utf-8-sig", "ignore" if len(content) == MAX_TEXT_BYTES else "strict").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8, {error}"
        form.add(
            f"`eval-text` is {value!r}, which cannot be read.",
            why=f"{reason}.",
            fix="Name a text file in the workspace, saved as UTF-8.",
        )
        return ""
    if not text:
        form.add(
            f"`eval-text` is {value!r}, which holds no text.",
            why="There is nothing to predict.",
            fix="Name another file, or remove `eval-text`.",
        )
    return text


def _tolerances(form: Form) -> Iterator[Tolerance]:
    for layer, value in _pairs(form, "verify-tolerance", TOLERANCES, "=", "end-to-end=1e-3"):
        least = TOLERANCES[layer]
        if least < value <= MOST_TOLERANT:
            yield Tolerance(layer=layer, limit=value)
        else:
            form.add(
                f"`verify-tolerance` sets `{layer}` to {value:g}.",
                why=f"It may be loosened from {least:g} up to {MOST_TOLERANT:g}; beyond that, wrong merges pass.",
                fix="Correct it. A merge that needs more is wrong, or is not a merge of this base and this adapter.",
            )


def _quality(form: Form) -> Iterator[QualityLimit]:
    for figure, value in _pairs(form, "quality-limits", FIGURES, "<=|>=", "retention>=0.9"):
        if math.isfinite(value):
            yield QualityLimit(figure=figure, limit=value)
        else:
            form.add(
                f"`quality-limits` holds {figure!r} against {value}.",
                why="No finite value could fail it, or none could pass.",
                fix="Write a number.",
            )


def _pairs(form: Form, name: str, known: Mapping[str, object], sign: str, example: str) -> Iterator[tuple[str, float]]:
    """Yield (word, number) of every `word SIGN number` in the input; note what is wrong with the others."""
    text = re.sub(rf"\s*({sign})\s*", r"\1", form.values.get(name, "").replace(",", " "))
    seen: set[str] = set()
    for part in text.split():
        word, found, number, *_ = *re.split(f"({sign})", part, maxsplit=1), "", ""
        wanted = known.get(word)
        if wanted is None:
            match = nearest(word.lower(), known)
            form.add(
                f"`{name}` names {word!r}.",
                why=f"It takes: {', '.join(known)}.",
                fix=f"Did you mean `{match}`?" if match else f"Write, for example, `{example}`.",
            )
        elif (value := _number(number)) is None or (wanted in (AT_LEAST, AT_MOST) and found != wanted):
            shown = wanted if wanted in (AT_LEAST, AT_MOST) else "="
            form.add(
                f"`{name}` holds {part!r}.",
                why=f"`{word}` is held against one number, with `{shown}`.",
                fix=f"Write, for example, `{word}{shown}{0.9 if shown == AT_LEAST else 0.001:g}`.",
            )
        elif word in seen:
            form.add(f"`{name}` names `{word}` twice.", why="Only one limit can be meant.", fix="Remove one of them.")
        else:
            seen.add(word)
            yield word, value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
