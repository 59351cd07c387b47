"""The user's limits: a tolerance makes a warning of a failure at most, a limit on quality gates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from runner.judge.gates import figure, loosen, quality_checks
from runner.judge.judge import GATES, decide, judge
from runner.protocol.figures import Perplexity
from runner.protocol.limits import FIGURES, Limits, QualityLimit, Tolerance
from runner.protocol.verdict import Check, Layer, Outcome, Quality, Status, Verdict

QUALITY = Quality(
    retention=0.95, effect=0.5, effect_error=0.02, effect_retention=0.97, kl_mean_nats=1e-3, kl_p99_nats=1e-2,
    kl_base_mean_nats=0.5, top1_agreement=0.99, nll_base_nats=2.0, nll_unmerged_nats=1.0, nll_merged_nats=1.25,
    tokens=10, perplexity=Perplexity(base=9.0, unmerged=4.0, merged=5.0, tokens=9, is_cut=False),
)  # fmt: skip
LOOSER = Limits(tolerances=(Tolerance(layer="end-to-end", limit=1e-3),))


def _check(value: float, layer: Layer = Layer.END_TO_END) -> Check:
    outcome = Outcome.PASS if value <= 1e-4 else Outcome.FAIL
    return Check(layer=layer, name="x", outcome=outcome, value=value, limit=1e-4)


@pytest.mark.parametrize(
    "value, outcome",
    [
        (1e-5, Outcome.PASS),
        (5e-4, Outcome.WARN),
        (1e-3, Outcome.WARN),
        (math.nextafter(1e-3, 1), Outcome.FAIL),
        (math.nan, Outcome.FAIL),
    ],
)
def test_a_tolerance_moves_the_limit_of_its_layer_and_says_so(value: float, outcome: Outcome) -> None:
    (check,) = loosen([_check(value)], LOOSER)
    assert (check.outcome, check.limit, check.loosened_from) == (outcome, 1e-3, 1e-4)
    assert ("only because the limit was loosened" in check.detail) == (outcome is Outcome.WARN)


def test_a_tolerance_touches_nothing_else() -> None:
    others = [
        _check(5e-4, Layer.SEMANTICS),
        _check(5e-4, Layer.STORAGE),
        Check(layer=Layer.END_TO_END, name="loads", outcome=Outcome.FAIL),
        Check(layer=Layer.END_TO_END, name="x", outcome=Outcome.SKIPPED, value=1.0, limit=1e-4),
    ]
    assert loosen(others, LOOSER) == others
    assert loosen(others, Limits()) == others


def test_a_value_at_the_loosened_limit_is_let_through() -> None:
    (check,) = loosen([_check(1e-3)], LOOSER)
    assert (check.outcome, check.value, check.limit) == (Outcome.WARN, 1e-3, 1e-3)


def test_a_figure_is_of_the_merged_model_beside_the_unmerged() -> None:
    assert figure(QUALITY, "nll-increase-nats") == 0.25
    assert figure(QUALITY, "perplexity-ratio") == 1.25
    assert figure(QUALITY, "top1-agreement") == 0.99
    for lacking in (replace(QUALITY, nll_merged_nats=None), replace(QUALITY, nll_unmerged_nats=None)):
        assert figure(lacking, "nll-increase-nats") is None
    assert figure(replace(QUALITY, perplexity=None), "perplexity-ratio") is None


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_gates_on_both_sides_of_its_limit(name: str) -> None:
    value = figure(QUALITY, name)
    assert value is not None
    for limit, one in ((value - 1e-6, ">="), (value + 1e-6, "<=")):
        (check,) = quality_checks(QUALITY, Limits(quality=(QualityLimit(figure=name, limit=limit),)))
        assert check.outcome is (Outcome.PASS if FIGURES[name] == one else Outcome.FAIL)
    (check,) = quality_checks(
        replace(QUALITY, retention=math.nan), Limits(quality=(QualityLimit(figure="retention", limit=0),))
    )
    assert check.outcome is Outcome.FAIL


def test_figures_that_are_made_of_others() -> None:
    assert figure(QUALITY, "nll-increase-nats") == 0.25
    assert figure(QUALITY, "perplexity-ratio") == 1.25
    assert figure(QUALITY, "kl-p99-nats") == 1e-2
    assert figure(replace(QUALITY, nll_merged_nats=None), "nll-increase-nats") is None
    assert figure(replace(QUALITY, nll_unmerged_nats=None), "nll-increase-nats") is None
    assert figure(replace(QUALITY, perplexity=None), "perplexity-ratio") is None


def test_a_figure_that_was_not_measured_is_no_pass() -> None:
    limits = Limits(quality=(QualityLimit(figure="kl-mean-nats", limit=1.0),))
    passes = [Check(layer=layer, name="x", outcome=Outcome.PASS) for layer in GATES]
    for quality in (None, replace(QUALITY, kl_mean_nats=None)):
        checks = quality_checks(quality, limits)
        assert [check.outcome for check in checks] == [Outcome.SKIPPED]
        assert decide([*passes, *checks]) is Status.NOT_VERIFIED


@pytest.mark.parametrize(
    "layers, is_only", [((), False), ((Layer.QUALITY,), True), ((Layer.QUALITY, Layer.STORAGE), False)]
)
def test_what_fails_but_for_its_quality_is_told_apart(layers: tuple[Layer, ...], is_only: bool) -> None:
    passed = Check(layer=Layer.STORAGE, name="x", outcome=Outcome.PASS)
    failed = [Check(layer=layer, name="x", outcome=Outcome.FAIL) for layer in layers]
    verdict = Verdict(
        status=Status.FAIL, checks=(passed, *failed), modules=(), quality=None, continuations=(), seed=0, wall_s=0.0
    )
    assert verdict.failures == tuple(failed)
    assert verdict.fails_quality_only is is_only
    passing = [status for status in Status if replace(verdict, status=status).passed]
    assert passing == [Status.PASS, Status.PASS_LOSSY]


def test_the_judge_holds_a_weak_merge_against_the_limit_and_the_verdict_says_what_failed(
    weak: tuple[Path, Path, Path],
) -> None:
    base, adapter, merged = weak
    limits = Limits(
        tolerances=(Tolerance(layer="semantics", limit=1e-3),),
        quality=(QualityLimit(figure="retention", limit=0.9), QualityLimit(figure="kl-mean-nats", limit=10.0)),
    )
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto", limits=limits)
    assert verdict.status is Status.FAIL
    assert verdict.fails_quality_only
    assert [check.name for check in verdict.failures] == ["your limit retention>=0.9"]
    assert any(
        check.name == "your limit kl-mean-nats<=10.0" and check.outcome is Outcome.PASS for check in verdict.checks
    )
    assert {check.layer for check in verdict.loosened} == {Layer.SEMANTICS}
