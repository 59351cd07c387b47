"""All suspects together: the fewest explanations that cover them, the one about most tensors first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from runner.files.layout import Checkpoint
from runner.judge.case import Case
from runner.judge.diagnosis.examine import examine, not_applied
from runner.judge.diagnosis.files import read_structure
from runner.judge.diagnosis.sample import Reading, Suspect
from runner.judge.diagnosis.scale import name_factor
from runner.judge.expected.elements import Stored
from runner.judge.expected.exact import ExactStored
from runner.judge.numbers.tensors import FLOATS
from runner.judge.storage import Storage
from runner.judge.streaming.models import LOAD_ERRORS
from runner.protocol.verdict import MAX_NAMED, Cause, Check, Diagnosis, Layer, Outcome

MAX_EXAMINED = 24  # tensors of each sort, touched and untouched, spread over all that failed
_VAGUE = (Cause.OTHER_WEIGHTS, Cause.OTHER_ADAPTER, Cause.UNEXPLAINED)
_FEW = (Cause.BIT_FLIP, Cause.FEW_ELEMENTS)
MAX_DAMAGED = 3  # tensors; damage to single elements does not hit more, a weak change that is wrong does
_SCALES = (Cause.SCALE, Cause.PATTERN_IGNORED)


def diagnose(case: Case, merged: Checkpoint, storage: Storage, checks: Sequence[Check]) -> tuple[Diagnosis, ...]:
    """Return what explains the failed checks; empty where none failed.

    Args:
        case: base and adapter.
        merged: the folder.
        storage: what comparing its tensors gave.
        checks: of all layers.

    Raises:
        BrokenCheckpoint: a file ends early.
    """
    # A limit of the user's on quality may fail a merge that is right: that is no wrong merge.
    failures = [check for check in checks if check.outcome is Outcome.FAIL and check.layer is not Layer.QUALITY]
    if not failures:
        return ()
    found = [*_tensors(case, merged, storage), *read_structure(case, merged), *_inputs(case, failures)]
    if not found:
        told = "; ".join(f"{check.name}: {check.detail}" for check in failures[:3])
        found = [Diagnosis(kind=Cause.UNEXPLAINED, is_certain=False, evidence=told)]
    return tuple(found)


def _inputs(case: Case, failures: Sequence[Check]) -> Iterator[Diagnosis]:
    if case.unmerged.unplaced:
        told = f"{case.unmerged.unplaced[0]} fits nothing in the base; the adapter is for another model, or misnamed."
        yield Diagnosis(
            kind=Cause.UNUSED,
            is_certain=True,
            evidence=told,
            tensors=case.unmerged.unplaced[:MAX_NAMED],
            count=len(case.unmerged.unplaced),
        )
    for check in failures:
        if check.layer is Layer.SEMANTICS:
            told = f"The judge's reading of the adapter and PEFT's layers differ: {check.detail}"
            yield Diagnosis(kind=Cause.UNEXPLAINED, is_certain=False, evidence=told)


def _tensors(case: Case, merged: Checkpoint, storage: Storage) -> list[Diagnosis]:
    suspects = list(_suspects(case, merged, storage))
    readings = {one.name: [plain] for one in suspects if (plain := not_applied(one)) is not None}
    rest = [one for one in suspects if one.name not in readings]
    touched = [one for one in rest if one.target.is_touched]
    others = [one for one in rest if not one.target.is_touched]
    for one in (*_spread(touched), *_spread(others)):
        readings[one.name] = examine(case, one)
    if not suspects and not storage.changed and storage.comparisons and not storage.brings_new:
        told = "Nothing differs from the base, and nothing had to: the dtype swallows all of the adapter's change."
        return [Diagnosis(kind=Cause.NOT_APPLIED, is_certain=False, evidence=told, factor=0.0)]
    readings = {name: _plausible(found, len(suspects)) for name, found in readings.items()}
    _decide_strangers(readings, {one.name for one in others}, storage, _off_share(case, storage))
    unexamined = len(suspects) - len(readings)
    made = [_as_diagnosis(case, kind, group, storage) for kind, group in _cover(readings)]
    if unexamined and made:
        made[0] = replace(made[0], evidence=f"{made[0].evidence} {unexamined} more wrong tensors were not looked at.")
    return made


def _suspects(case: Case, merged: Checkpoint, storage: Storage) -> Iterator[Suspect]:
    wanted = {**case.targets.optional, **case.targets.required}
    failed = {name: result for name, result in storage.comparisons.items() if result.violations}
    failed |= storage.strays
    failed |= {name: storage.comparisons[name] for name in storage.non_finite if name in storage.comparisons}
    for name, result in sorted(failed.items()):
        target = wanted[name]
        if not {target.dtype, merged.tensors[name].dtype} <= set(FLOATS):
            continue  # indices, masks, fp8: no merge explains them, and the failed check names them
        try:
            if target.is_touched:
                exact = case.sources.exact_of(target.key, target.base)
            elif target.base is not None:
                exact = ExactStored(target.base.root, target.base.info)
            else:
                continue
        except LOAD_ERRORS:
            continue
        yield Suspect(
            target=target,
            found=Stored(root=merged.root, info=merged.tensors[name]),
            exact=exact,
            comparison=result,
            chance=case.targets.chance(target),
            rule=case.recipe.rules.get(target.key),
        )


def _spread(suspects: Sequence[Suspect]) -> list[Suspect]:
    """Return at most `MAX_EXAMINED` of them, evenly spread."""
    count = len(suspects)
    if count <= MAX_EXAMINED:
        return list(suspects)
    return [suspects[number * count // MAX_EXAMINED] for number in range(MAX_EXAMINED)]


def _plausible(found: list[Reading], suspects: int) -> list[Reading]:
    """Leave out what the number of suspects speaks against: damaged elements in many tensors, strangers in a few."""
    few = [one for one in found if one.kind in _FEW]
    if few and suspects <= MAX_DAMAGED:
        return [one for one in found if one.kind not in _VAGUE and (one in few or one.is_certain)]
    return [one for one in found if one not in few] or found


def _off_share(case: Case, storage: Storage) -> float:
    """Return how much of what the adapter leaves alone is in tensors that are not the base's: by their elements.

    A base that is near this one often has the very same norms, which are many tensors and few elements.
    """
    sizes = {name: math.prod(one.shape) for name, one in case.targets.required.items() if not one.is_touched}
    return sum(sizes.get(name, 0) for name in storage.strays) / max(1, sum(sizes.values()))


def _decide_strangers(
    readings: dict[str, list[Reading]], untouched: set[str], storage: Storage, off_share: float
) -> None:
    """Let the untouched tensors decide between another base and another adapter."""
    vague = {name for name, found in readings.items() if found and all(not one.is_certain for one in found)}
    bases = vague & untouched
    if bases and off_share > 0.5:
        told = (
            f"{storage.untouched.bad_tensors} of {storage.untouched.tensors} tensors that the adapter does not touch "
        )
        told += "are not the base's"
        for name in vague:
            readings[name] = [Reading(kind=Cause.WRONG_BASE, tensor=name, note=told, is_certain=False)]
        return
    kinds = Counter(one.kind for name in vague - untouched for one in readings[name] if one.kind in _VAGUE)
    if not storage.untouched.bad_tensors and kinds[Cause.OTHER_ADAPTER] > kinds[Cause.OTHER_WEIGHTS]:
        told = "Only tensors that the adapter touches are off, and their change knows nothing of the adapter's"
        for name in vague:
            readings[name] = [Reading(kind=Cause.OTHER_ADAPTER, tensor=name, note=told, is_certain=False)]


def _cover(readings: Mapping[str, list[Reading]]) -> Iterator[tuple[Cause, list[Reading]]]:
    """Yield explanations until every suspect has one: always the one that explains most of what is left."""
    left = {name: found for name, found in readings.items() if found}
    lost = [name for name, found in readings.items() if not found]
    while left:
        best: list[Reading] = []
        for kind in dict.fromkeys(one.kind for found in left.values() for one in found):
            group = _agreeing([one for found in left.values() for one in found if one.kind is kind])
            if len(group) > len(best):
                best = group
        yield best[0].kind, best
        for one in best:
            left.pop(one.tensor)
    if lost:
        note = "Nothing that was tried gives what is stored"
        yield (
            Cause.UNEXPLAINED,
            [Reading(kind=Cause.UNEXPLAINED, tensor=name, note=note, is_certain=False) for name in lost],
        )


def _agreeing(group: list[Reading]) -> list[Reading]:
    """Return the largest part of a group whose factors agree; all of it where the factor is not the point."""
    if not group or group[0].kind is not Cause.SCALE:
        return group
    best: list[Reading] = []
    for seed in group[:MAX_EXAMINED]:
        low, high = seed.factor or (0.0, 0.0)
        chosen = []
        for one in [seed, *(other for other in group if other is not seed)]:
            mine = one.factor or (0.0, 0.0)
            if max(low, mine[0]) <= min(high, mine[1]):
                low, high = max(low, mine[0]), min(high, mine[1])
                chosen.append(one)
        if len(chosen) > len(best):
            best = chosen
    return best


def _as_diagnosis(case: Case, kind: Cause, group: Sequence[Reading], storage: Storage) -> Diagnosis:
    names = sorted(one.tensor for one in group)
    note, same = Counter(one.note for one in group).most_common(1)[0]
    others = len(group) - same
    evidence = f"{note} ({next(one.tensor for one in group if one.note == note)}; {others} more alike)."
    evidence = evidence if others else f"{note}."
    factor: float | None = None
    is_certain = all(one.is_certain for one in group)
    if kind in _SCALES:
        kind, factor, evidence, is_clear = _scale(case, kind, group, storage, evidence)
        is_certain = is_certain and is_clear
    elif kind is Cause.NOT_APPLIED:
        factor = 0.0
        if storage.changed:
            kind = Cause.MODULES_SKIPPED
            evidence = f"{_where(names, storage)} the base's, to the last element; other modules have their change."
        else:
            evidence = "Every element of every tensor that the adapter changes is the base's."
    return Diagnosis(
        kind=kind,
        is_certain=is_certain,
        evidence=evidence,
        tensors=tuple(names[:MAX_NAMED]),
        count=len(names),
        factor=factor,
    )


def _scale(
    case: Case, kind: Cause, group: Sequence[Reading], storage: Storage, evidence: str
) -> tuple[Cause, float, str, bool]:
    low = max(one.factor[0] for one in group if one.factor)
    high = min(one.factor[1] for one in group if one.factor)
    results = [storage.comparisons[one.tensor] for one in group if one.tensor in storage.comparisons]
    kept, delta = sum(result.kept for result in results), sum(result.delta_squared for result in results)
    fitted = kept / delta if delta > 0 else 0.0
    told = f"Every element that was looked at fits the change times a factor in [{low:.6g}, {high:.6g}]"
    told += f"; least squares over {len(results)} whole tensors gives {fitted:.4g}."
    if kind is Cause.PATTERN_IGNORED:
        return kind, fitted, f"{evidence} {told}", True
    named, factor, text, is_clear = name_factor((low, high), dict(case.recipe.config))
    if named is Cause.SCALE and low <= fitted <= high:
        factor = fitted
    return named, factor, f"{told} {text}".strip(), is_clear


def _where(names: Sequence[str], storage: Storage) -> str:
    """Return where the skipped tensors are: in one layer, of one type, or how many."""
    layers = {tuple(part for part in name.split(".") if part.isdigit()) for name in names}
    types = {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}
    every = {name for name in storage.comparisons if ".".join(p for p in name.split(".") if not p.isdigit()) in types}
    if len(names) == 1:
        return f"{names[0]} is"
    if len(layers) == 1 and next(iter(layers)):
        return f"The {len(names)} changed tensors of layer {next(iter(layers))[0]} are"
    if len(types) == 1:
        return f"{'All' if len(every) == len(names) else 'Of'} {next(iter(types))}, {len(names)} tensors, are"
    return f"{len(names)} tensors are"
