"""The storage layer as checks: runs `runner.judge.expected.elements` over every tensor of the merged folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from runner.files.layout import Checkpoint
from runner.judge.expected.elements import RightBlocks, Stored, compare_touched, compare_untouched, same_exact
from runner.judge.expected.exact import Exact, ExactStored
from runner.judge.expected.sources import Sources
from runner.judge.expected.targets import Target, Targets
from runner.judge.expected.unmerged import Unmerged
from runner.judge.numbers.alternatives import Gauge, alternatives
from runner.judge.numbers.comparison import Comparison, Deviation
from runner.judge.numbers.stochastic import Chance
from runner.judge.numbers.tensors import FLOATS
from runner.judge.streaming.models import LOAD_ERRORS, first_line
from runner.protocol.figures import Alternative
from runner.protocol.verdict import Check, Layer, Outcome


@dataclass(slots=True)
class Tally:
    """Violations of one kind, over tensors."""

    tensors: int = 0
    elements: int = 0
    bad_tensors: int = 0
    violations: int = 0
    worst: Deviation | None = None

    def add(self, result: Comparison) -> None:
        """Count one tensor."""
        self.tensors += 1
        self.elements += result.elements
        self.bad_tensors += result.violations > 0
        self.violations += result.violations
        if result.worst is not None and (self.worst is None or result.worst.ulps > self.worst.ulps):
            self.worst = result.worst


@dataclass(slots=True)
class Storage:
    """What this layer found.

    Attributes:
        touched: over the tensors that the adapter acts on.
        untouched: over all others.
        non_finite: stored name → elements that are NaN or Inf and should not be.
        unjudged: stored name → why its exact value could not be computed.
        comparisons: by stored name, for the tensors that the adapter acts on.
        dtypes: of the stored tensors that the adapter changes.
        rest: the ranges of all others.
        strays: by stored name, for the other tensors that are not what they must be.
    """

    touched: Tally = field(default_factory=Tally)
    untouched: Tally = field(default_factory=Tally)
    non_finite: dict[str, int] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    dtypes: set[str] = field(default_factory=set)
    rest: Gauge = field(default_factory=Gauge)
    strays: dict[str, Comparison] = field(default_factory=dict)

    @property
    def retention(self) -> float:
        """What the output dtype kept of all deltas together; 1.0 where nothing changed."""
        kept = sum(result.kept for result in self.comparisons.values())
        delta = sum(result.delta_squared for result in self.comparisons.values())
        return kept / delta if delta > 0 else 1.0

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """What storing it otherwise would keep; empty where nothing changed."""
        delta = sum(result.delta_squared for result in self.comparisons.values())
        gauges = [self.rest, *(result.gauge for result in self.comparisons.values())]
        return alternatives(gauges, delta_squared=delta, dtypes=self.dtypes) if delta > 0 else ()

    @property
    def rounding_errors(self) -> tuple[int, ...]:
        """Over all touched tensors; see `Verdict.rounding_errors`."""
        return tuple(map(sum, zip(*(result.errors for result in self.comparisons.values()), strict=True)))

    @property
    def has_delta(self) -> bool:
        """Whether the adapter changes any weight that the base has."""
        return any(result.delta_squared > 0 for result in self.comparisons.values())

    @property
    def brings_new(self) -> bool:
        """Whether a tensor of the adapter has none of its shape in the base, as a head or a larger vocabulary."""
        return any(not result.has_base for result in self.comparisons.values())

    @property
    def changed(self) -> int:
        """Elements on disk, of the tensors that the adapter acts on, that are not the base's."""
        return sum(result.changed for result in self.comparisons.values())


def compare_storage(
    *,
    merged: Checkpoint,
    sources: Sources,
    targets: Targets,
    on_progress: Callable[[float], None],
    right: RightBlocks | None = None,
) -> Storage:
    """Return how every tensor on disk compares; tensors that are missing or of a wrong form are structure's to tell.

    Args:
        merged: the folder.
        sources: E of every touched parameter.
        targets: what the folder must hold.
        on_progress: told the share that is done.
        right: see `compare_touched`.

    Raises:
        BrokenCheckpoint: a file ends early.
    """
    result = Storage()
    wanted = {**targets.optional, **targets.required}
    order = sorted(wanted.values(), key=lambda target: (sources.unit_of(target.key) or "", target.stored))
    for number, target in enumerate(order):
        info = merged.tensors.get(target.stored)
        if info is None or info.shape != target.shape or info.dtype != target.dtype:
            continue
        _compare(result, Stored(root=merged.root, info=info), target, sources, targets.chance(target), right)
        on_progress((number + 1) / len(order))
    return result


def judge_storage(result: Storage, targets: Targets, unmerged: Unmerged) -> tuple[Check, ...]:
    """Return the checks of this layer."""
    placed = _names("The adapter tensor", unmerged.unplaced, "fits nothing in the base; PEFT leaves it out")
    finite = ""
    if result.non_finite:
        name, count = next(iter(result.non_finite.items()))
        finite = f"{name} holds {count} NaN or Inf" + _more(len(result.non_finite))
    checks = [
        _check("every adapter tensor is used", placed, len(unmerged.unplaced)),
        _check(
            "touched elements are the exact sum, rounded once", _deviations(result.touched), result.touched.violations
        ),
        _check("untouched tensors are the base's", _deviations(result.untouched), result.untouched.violations),
        _check("no NaN or Inf that the base had not", finite, sum(result.non_finite.values())),
    ]
    unknown = {**dict.fromkeys(targets.unmapped, "it is computed from several stored tensors"), **result.unjudged}
    if unknown:
        name, reason = next(iter(unknown.items()))
        checks.append(
            Check(
                layer=Layer.STORAGE,
                name="every touched tensor could be judged",
                outcome=Outcome.SKIPPED,
                value=float(len(unknown)),
                detail=f"{name} was not judged: {reason}" + _more(len(unknown)),
            )
        )
    else:
        missing = _missing_change(result)
        checks.append(_check("the adapter's change is in the files", missing, bool(missing)))
    return tuple(checks)


def _missing_change(result: Storage) -> str:
    """Return what is wrong with a merge that equals its base, or ""."""
    if result.brings_new or not result.comparisons:  # what is not there is structure's to tell
        return ""
    if not result.has_delta:
        return "The adapter changes no weight of this base, so that there is nothing to release"
    if result.changed:
        return ""
    return (
        f"Not one of {sum(found.elements for found in result.comparisons.values())} elements differs from the base's: "
        "either the adapter was never applied, or its change is lost in this dtype and `dtype: float32` would keep it"
    )


def _compare(
    result: Storage,
    found: Stored,
    target: Target,
    sources: Sources,
    chance: Chance | None,
    right: RightBlocks | None,
) -> None:
    name = target.stored
    if not target.is_touched and target.base is not None:
        outcome = compare_untouched(found, target.base)
        result.untouched.add(outcome)
        result.rest.add(outcome.gauge)
        if outcome.violations:
            result.strays[name] = outcome
    elif found.info.dtype not in FLOATS:
        result.unjudged[name] = f"it is stored as {found.info.dtype}"
        return
    else:
        try:
            exact = sources.exact_of(target.key, target.base)
        except LOAD_ERRORS as error:
            result.unjudged[name] = f"PEFT's own merge of it fails: {first_line(error)}"
            return
        base = target.same_shape_base
        outcome = compare_touched(found, exact, base, chance, right)
        if base is not None and outcome.delta_squared == 0.0 and _is_still(found, base, exact, chance):
            # The adapter has no effect here (B = 0, an unchanged bias), so the bytes must be the base's.
            strict = compare_untouched(found, base)
            result.untouched.add(strict)
            outcome.new_non_finite = strict.new_non_finite
            outcome.violations, outcome.worst = strict.violations, strict.worst
            outcome.bad_rows, outcome.bad_row_count = strict.bad_rows, strict.bad_row_count
        else:
            result.touched.add(outcome)
        result.comparisons[name] = outcome
        result.dtypes.add(found.info.dtype)
    if outcome.new_non_finite:
        result.non_finite[name] = outcome.new_non_finite


def _is_still(found: Stored, base: Stored, exact: Exact, chance: Chance | None) -> bool:
    """Return whether E is the base's tensor, and its elements have but one right value in the output dtype."""
    has_one_value = chance is None or found.info.dtype == base.info.dtype
    return has_one_value and same_exact(exact, ExactStored(base.root, base.info))


def _deviations(tally: Tally) -> str:
    if not tally.violations:
        return ""
    return f"{tally.violations} elements in {tally.bad_tensors} of {tally.tensors} tensors; the worst: {tally.worst}"


def _names(noun: str, names: tuple[str, ...], predicate: str) -> str:
    return f"{noun} {names[0]!r} {predicate}" + _more(len(names)) if names else ""


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _check(name: str, problem: str, count: int) -> Check:
    return Check(
        layer=Layer.STORAGE,
        name=name,
        outcome=Outcome.FAIL if problem else Outcome.PASS,
        value=float(count),
        limit=0.0,
        detail=f"{problem}." if problem else "",
    )
