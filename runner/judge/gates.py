"""What the user's limits make of the judge's findings: loosened tolerances, and quality that gates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from runner.protocol.limits import Limits, QualityLimit
from runner.protocol.verdict import Check, Layer, Outcome, Quality

_LAYERS = {"semantics": Layer.SEMANTICS, "end-to-end": Layer.END_TO_END}


def loosen(checks: Iterable[Check], limits: Limits) -> list[Check]:
    """Return the checks, those of a loosened layer held against its new limit.

    A check that only its new limit lets pass is a warning: it does not fail, and nobody takes it for a pass.
    """
    wanted = {_LAYERS[tolerance.layer]: tolerance.limit for tolerance in limits.tolerances}
    return [_loosened(check, wanted[check.layer]) if check.layer in wanted else check for check in checks]


def quality_checks(quality: Quality | None, limits: Limits) -> list[Check]:
    """Return one check for each limit on quality; skipped, which is no pass, where the figure was not measured."""
    return [_quality_check(quality, limit) for limit in limits.quality]


def _loosened(check: Check, limit: float) -> Check:
    if check.value is None or check.limit is None or check.outcome not in (Outcome.PASS, Outcome.FAIL):
        return check
    found = replace(check, limit=limit, loosened_from=check.limit)
    if check.outcome is Outcome.FAIL and check.value <= limit:
        detail = f"Passes only because the limit was loosened from {check.limit:g} to {limit:g}. {check.detail}".strip()
        return replace(found, outcome=Outcome.WARN, detail=detail)
    return found


def _quality_check(quality: Quality | None, limit: QualityLimit) -> Check:
    value = figure(quality, limit.figure) if quality is not None else None
    if value is None:
        outcome, detail = Outcome.SKIPPED, "This was not measured: the models did not run, or have no such figure."
    elif limit.holds(value):
        outcome, detail = Outcome.PASS, ""
    else:
        outcome, detail = Outcome.FAIL, f"It is {value:.4g}, beyond the limit that `quality-limits` sets."
    return Check(
        layer=Layer.QUALITY, name=f"your limit {limit.text}", outcome=outcome, value=value, limit=limit.limit,
        detail=detail,
    )  # fmt: skip


def figure(quality: Quality, name: str) -> float | None:
    """Return a figure by its name in `runner.protocol.limits.FIGURES`; None where it was not measured."""
    if name == "nll-increase-nats":
        merged, unmerged = quality.nll_merged_nats, quality.nll_unmerged_nats
        return None if merged is None or unmerged is None else merged - unmerged
    if name == "perplexity-ratio":
        return None if quality.perplexity is None else quality.perplexity.ratio
    value: float | None = getattr(quality, name.replace("-", "_"))
    return value
