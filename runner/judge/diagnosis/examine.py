"""All readings of one suspect: each is one way to explain it, and several may."""

from __future__ import annotations

from collections.abc import Iterator

from runner.judge.case import Case
from runner.judge.diagnosis.again import read_again
from runner.judge.diagnosis.combination import read_combination
from runner.judge.diagnosis.elements import read_few, read_non_finite
from runner.judge.diagnosis.places import (
    holds,
    read_moved,
    read_rows_skipped,
    read_swapped,
    read_transposed,
    read_twin,
    read_zeroed,
)
from runner.judge.diagnosis.quantised import read_quantised
from runner.judge.diagnosis.rounding import read_rounding
from runner.judge.diagnosis.sample import Reading, Sample, Suspect, take_sample
from runner.judge.diagnosis.scale import read_scale
from runner.judge.diagnosis.strangers import read_stranger
from runner.judge.expected.elements import Stored
from runner.judge.expected.exact import Exact, ExactStored, low_rank
from runner.judge.expected.recipe import PREFIX, Copy, LowRank, scaling_of
from runner.judge.numbers.tensors import round_to
from runner.judge.streaming.models import LOAD_ERRORS
from runner.protocol.verdict import Cause

MIN_AGREEING = 3


def examine(case: Case, suspect: Suspect) -> list[Reading]:
    """Return every reading of the suspect, those that say most precisely what happened first."""
    plain = not_applied(suspect)
    if plain is not None:
        return [plain]
    sample = take_sample(suspect)
    if sample is None:
        return []
    whole = _exclusive(case, suspect, sample)
    if whole is not None:
        return [whole]
    scale = read_scale(suspect, sample, dict(case.recipe.config))
    # Elements that are off by chance do not agree on a factor; two of them may.
    few = read_few(suspect) if scale is None or suspect.comparison.violations < MIN_AGREEING else None
    found = [few, scale, read_rounding(suspect, sample)]
    readings = [reading for reading in found if reading is not None]
    if not any(reading.is_certain and reading.kind is not Cause.BIT_FLIP for reading in readings):
        quantised = read_quantised(suspect, sample)
        readings += [quantised if quantised is not None else read_stranger(suspect, sample)]
    return readings


def _exclusive(case: Case, suspect: Suspect, sample: Sample) -> Reading | None:
    """Return a reading that leaves no room for another, or None."""
    plain = _plain_lora(case, suspect)
    return (
        read_non_finite(suspect)
        or read_zeroed(suspect, sample)
        or _saved_ignored(suspect)
        or read_rows_skipped(suspect, sample)
        or read_twin(suspect, _twins(case, suspect))
        or read_swapped(suspect, sample, _others(case, suspect))
        or read_moved(suspect)
        or _applied_in_two_steps(suspect, sample)
        or _magnitude_ignored(suspect, sample, plain)
        or read_again(case, suspect, sample, plain)
        or read_combination(case, suspect, sample)
        or read_transposed(suspect, sample)
    )


def not_applied(suspect: Suspect) -> Reading | None:
    """Return the reading "still the base's", which needs no look at the file, or None."""
    result = suspect.comparison
    if not suspect.target.is_touched or not result.has_base or result.changed or not result.elements:
        return None
    kind, note = Cause.NOT_APPLIED, "Every element is the base's"
    if isinstance(suspect.rule, Copy):
        kind, note = Cause.SAVED_IGNORED, "Every element is the base's, not the one that the adapter brings"
    if suspect.target.key.endswith(".bias"):
        kind, note = Cause.BIAS_IGNORED, "Every element is the base's, though the adapter trains this bias"
    return Reading(kind=kind, tensor=suspect.name, note=note, factor=(0.0, 0.0))


def _saved_ignored(suspect: Suspect) -> Reading | None:
    """Tell whole tensors of another size than the base's: is it the base's in its rows, or are added rows wrong?"""
    base = suspect.target.base
    if not isinstance(suspect.rule, Copy) or base is None or suspect.target.same_shape_base is not None:
        return None
    rows = base.info.shape[0]
    if suspect.comparison.bad_rows and suspect.comparison.bad_rows[0] >= rows:
        count = suspect.comparison.bad_row_count
        note = f"{count} of the {suspect.exact.shape[0] - rows} added rows are not the adapter's, all others are right"
        return Reading(kind=Cause.ADDED_ROWS, tensor=suspect.name, note=note)
    if rows <= suspect.exact.shape[0] and holds(suspect, ExactStored(base.root, base.info)):
        note = "The rows that the base has, too, are the base's, not those that the adapter brings"
        return Reading(kind=Cause.SAVED_IGNORED, tensor=suspect.name, note=note, factor=(0.0, 0.0))
    return None


def _applied_in_two_steps(suspect: Suspect, sample: Sample) -> Reading | None:
    if sample.base is None or not bool((sample.delta != 0).any()):
        return None
    once = round_to(sample.exact, sample.dtype).double()
    if not sample.explains(once + sample.delta, steps=2 if sample.dtype == "F32" else 1):
        return None
    return Reading(kind=Cause.SCALE, tensor=suspect.name, note="", factor=(2.0, 2.0))


def _magnitude_ignored(suspect: Suspect, sample: Sample, plain: Exact | None) -> Reading | None:
    if plain is None:
        return None
    value = plain.rows(*sample.rows).reshape(sample.exact.shape)
    if not sample.explains(value):
        return None
    note = "The elements are W + s·B·A, without DoRA's magnitude"
    return Reading(kind=Cause.MAGNITUDE_IGNORED, tensor=suspect.name, note=note)


def _plain_lora(case: Case, suspect: Suspect) -> Exact | None:
    """Return W + s·B·A of a DoRA module, or None."""
    module = suspect.target.key.rpartition(".")[0]
    a, b = (f"{PREFIX}{module}.lora_{half}.weight" for half in "AB")
    tensors, base = dict(case.recipe.tensors), suspect.target.same_shape_base
    if not case.recipe.config.get("use_dora") or a not in tensors or b not in tensors or base is None:
        return None
    scaling = scaling_of(module, case.recipe.config)
    rule = LowRank(a=a, b=b, scaling=scaling, rank=tensors[a].shape[0], is_embedding=False, replaced_base=None)
    flip = module in case.blueprint.transposed
    shape = suspect.exact.shape
    return low_rank(rule, adapter=case.recipe.root, tensors=tensors, base=base.rows, shape=shape, flip=flip)


def _twins(case: Case, suspect: Suspect) -> Iterator[tuple[str, Exact]]:
    for pair in case.blueprint.ties.items():
        if suspect.target.key in pair:
            other = pair[1] if pair[0] == suspect.target.key else pair[0]
            try:
                yield other, case.sources.exact(other) if other in case.sources.keys else case.sources.of_base(other)
            except LOAD_ERRORS:
                continue


def _others(case: Case, suspect: Suspect) -> Iterator[tuple[str, Stored]]:
    for name, target in sorted(case.targets.required.items()):
        base = target.same_shape_base
        if base is not None and base.info.shape == suspect.exact.shape and len(base.info.shape) == 2:
            yield name, base
