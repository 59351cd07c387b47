"""Right merges, judged under everything that may vary: seeds, prompts of other lengths, threads, attention.

Semantics is probed with every seed. The models run with some of them: each with prompts of its own lengths, one, two or
four threads, and eager or sdpa attention, for the reference and for the folder not always the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from runner.judge.case import Case, judge_semantics, open_case
from runner.judge.expected.elements import RightBlocks
from runner.judge.expected.recipe import LowRank
from runner.judge.expected.sources import Sources
from runner.judge.judge import judge_merge
from runner.judge.semantics import LIMIT, probe_modules
from runner.protocol.verdict import Outcome, Verdict
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare

SEEDS = 50
THREADS = (1, 2, 4)
ATTENTION = ("sdpa", "eager")
# (seed, threads, attention of the reference, how many words the user's prompts have)
RUNS = tuple((seed, THREADS[seed % 3], ATTENTION[seed % 2], 1 + 17 * (seed % 4)) for seed in range(1, 13))
Add = Callable[[dict[str, Any]], None]
Has = Callable[..., bool]


def judge_good(base: Path, adapter: Path, dtype: str, right: Path, has: Has, add: Add) -> None:
    """Judge the right merge of one adapter in one dtype, and write what has no result yet.

    Args:
        base: folder of the base.
        adapter: folder of the adapter.
        dtype: that was asked for.
        right: where the right merge is, or is made.
        has: tells whether there is a result of an adapter, dtype and kind.
        add: takes a result.
    """
    key = {"adapter": adapter.name, "dtype": dtype}
    # The models run in float32, whatever the dtype of the files: one run of the others is enough.
    runs = [run for run in (RUNS if dtype == "auto" else RUNS[:1]) if not has(**key, kind=_name(run))]
    probes = dtype == "auto" and not has(**key, kind="semantics")  # does not look at the merged folder
    if not runs and not probes:
        return
    if not right.exists():
        merge(prepare(base, adapter, dtype=dtype), into=right)
    blocks: RightBlocks = {}
    with open_case(base, adapter, dtype=dtype) as case:
        case.sources.keeps_units = True
        for run in runs:
            entry = {**key, "kind": _name(run), **_run(case, right, run, blocks)}
            add(entry)
            print(f"{entry['verdict']:<12} {adapter.name} {dtype} {entry['kind']}", flush=True)
        if probes:
            add({**key, "kind": "semantics", **_probe(case)})


def _name(run: tuple[int, int, str, int]) -> str:
    seed, threads, attention, words = run
    return f"right: seed {seed}, {threads} threads, {attention}, prompts of {words} words"


def _probe(case: Case) -> dict[str, Any]:
    """Probe every module with every seed."""
    worst, alarms = 0.0, 0
    for seed in range(SEEDS):
        probes = list(probe_modules(case.unmerged, case.sources, seed))
        worst = max([worst, *(probe.error for probe in probes if probe.error is not None)])
        checks = judge_semantics(probes, case.unmerged)
        alarms += any(check.outcome is not Outcome.PASS for check in checks)
    return {
        "verdict": "alarm" if alarms else "passed",
        "alarms": alarms,
        "seeds": SEEDS,
        "worst": worst,
        "limit": LIMIT,
        "louder": _louder(case),
    }


def _louder(case: Case) -> float | None:
    """Return the least of the modules' errors when the judge reads every factor of a LoRA 2 % too large."""
    rules = {
        key: replace(rule, scaling=1.02 * rule.scaling) if isinstance(rule, LowRank) else rule
        for key, rule in case.recipe.rules.items()
    }
    recipe = replace(case.recipe, rules=rules)
    sources = Sources(base=case.base, blueprint=case.blueprint, recipe=recipe, unmerged=case.unmerged)
    louder = {key.rpartition(".")[0] for key, rule in rules.items() if isinstance(rule, LowRank)}
    errors = [probe.error for probe in probe_modules(case.unmerged, sources, 0) if probe.module in louder]
    return min((error for error in errors if error is not None), default=None)


def _run(case: Case, right: Path, run: tuple[int, int, str, int], blocks: RightBlocks) -> dict[str, Any]:
    seed, threads, attention, words = run
    before = torch.get_num_threads()
    started = time.monotonic()
    base_model: Any = case.unmerged.model.get_base_model()
    torch.set_num_threads(threads)
    base_model.set_attn_implementation(attention)
    try:
        seeded = replace(case, seed=seed)
        prompts = [" ".join([f"word{number}"] * words) for number in range(3)]
        verdict = judge_merge(seeded, right, prompts=prompts, right=blocks)
    finally:
        torch.set_num_threads(before)
        base_model.set_attn_implementation("sdpa")
    return {"verdict": _told(verdict), "values": _values(verdict), "wall_s": round(time.monotonic() - started, 1)}


def _told(verdict: Verdict) -> str:
    return str(verdict.status) if verdict.passed else f"alarm: {verdict.failures[0].name if verdict.failures else ''}"


def _values(verdict: Verdict) -> dict[str, float]:
    return {
        f"{check.layer.value}: {check.name}": check.value
        for check in verdict.checks
        if check.value is not None and check.outcome in (Outcome.PASS, Outcome.FAIL)
    }
