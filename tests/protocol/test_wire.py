"""What the worker says arrives as it was said; what is not an event is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.protocol.combination import Combination
from runner.protocol.digests import FileDigest, MergedCheckpoint
from runner.protocol.errors import AdapterMismatch, InputError, Problem, RunnerError, rebuild
from runner.protocol.events import Failed, Job, Judged, Merged, Progress, decode, decode_job, encode
from runner.protocol.gpu_wish import GpuWish
from runner.protocol.limits import Evaluation, Limits, QualityLimit, Tolerance
from runner.protocol.rounding import Rounding
from runner.protocol.verdict import Check, Continuation, Layer, ModuleRow, Outcome, Quality, Status, Verdict

VERDICT = Verdict(
    status=Status.PASS_LOSSY,
    checks=(Check(layer=Layer.STORAGE, name="n", outcome=Outcome.WARN, value=1, limit=None, detail="d"),),
    modules=(ModuleRow(name="m", tensor="t", probe_error=None, delta_ratio=0.1, retention=0.5),),
    quality=Quality(
        retention=1, effect=2, effect_error=3, effect_retention=0.99,
        kl_mean_nats=4, kl_p99_nats=5, kl_base_mean_nats=6, top1_agreement=7,
        nll_base_nats=8, nll_unmerged_nats=9, nll_merged_nats=10, tokens=11,
    ),
    continuations=(Continuation(prompt="p", base="b", unmerged="u", merged="m"),),
    seed=0,
    wall_s=1.5,
)  # fmt: skip


def test_results_survive_the_pipe() -> None:
    files = (FileDigest(path="a/b", size_bytes=3, sha256="0" * 64),)
    merged = MergedCheckpoint(
        root=Path("x"), files=files, tensors_merged=1, tensors_copied=2, tensors_cast=3,
        read_bytes=4, written_bytes=5, wall_s=6.0,
    )  # fmt: skip
    for event in (Judged(verdict=VERDICT), Merged(checkpoint=merged, peak_rss_bytes=7)):
        assert decode(encode(event)) == event


@given(st.text(), st.floats(allow_nan=False), st.text())
def test_any_text_and_number_survives_the_pipe(phase: str, done: float, doing: str) -> None:
    event = Progress(phase=phase, done=done, total=1.0, doing=doing)

    line = encode(event)

    assert decode(line) == event
    assert line.count("\n") == 1


def test_a_job_survives_the_pipe() -> None:
    job = Job(
        base=Path("b"), adapters=(Path("a"), Path("c")), combination=Combination(kind="cat", weights=(1.0, -0.5)),
        merged=Path("m"), merges=True, verifies=False, dtype="auto",
        rounding=Rounding(kind="stochastic", seed=None), device="cpu", prompts=("one", "two"),
        evaluation=Evaluation(text="t"), limits=Limits(
            tolerances=(Tolerance(layer="semantics", limit=1e-5),),
            quality=(QualityLimit(figure="retention", limit=0.9),),
        ),
        seed=3, gpu=GpuWish(min_free_bytes=5, wait_s=1.5, locks=Path("l"), holder="x"),
    )  # fmt: skip

    assert decode_job(encode(job)) == job


@pytest.mark.parametrize(
    "line",
    [
        "", "[]", "{}", '{"event": "Novelty", "data": {}}', '{"event": "Progress", "data": {}}',
        '{"event": "Progress", "data": {"phase": 1, "done": 0.0, "total": 1.0, "doing": ""}}',
        '{"event": "PhaseStarted", "data": {"phase": "a", "more": 1}}',
    ],
)  # fmt: skip
def test_what_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (json's own errors are ValueErrors, too)
        decode(line)


def test_an_error_comes_back_as_its_family() -> None:
    event = decode(encode(Failed(family="AdapterMismatch", problem=Problem(what="w", why="y", fix="f"))))

    assert isinstance(event, Failed)
    assert isinstance(rebuild(event.family, event.problem), AdapterMismatch)
    assert type(rebuild("Novelty", event.problem)) is RunnerError


def test_a_verdict_of_another_version_is_refused() -> None:
    message = json.loads(encode(Judged(verdict=VERDICT)))
    del message["data"]["verdict"]["seed"]

    with pytest.raises(ValueError, match="Verdict"):
        decode(json.dumps(message))


def test_a_worker_that_refuses_an_input_ends_the_run_as_an_input_error() -> None:
    error = InputError([Problem(what="w", why="y", fix="f")])
    told = rebuild(type(error).__name__, error.problem)
    assert (type(told), told.exit_code, told.problems) == (InputError, 2, error.problems)
