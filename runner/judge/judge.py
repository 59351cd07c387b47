"""The judge: base, adapter and merged folder in, `Verdict` out. It sees nothing of how the merge was made.

The claim "this folder is the best merge of base and adapter in its dtype" is split in parts that are each nearly
exact: structure, storage, semantics, end to end (see the modules of those names), and what no merge can avoid, the
loss by rounding, is measured and reported apart. A wrong merged folder is a failed verdict; a base or adapter that
cannot be used is an error of the input.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.files.layout import Checkpoint, read_checkpoint
from runner.judge.case import Case, Progress, open_case, skipped
from runner.judge.diagnosis.files import read_unreadable
from runner.judge.diagnosis.report import diagnose
from runner.judge.expected.elements import RightBlocks
from runner.judge.expected.renamed import in_the_base_names
from runner.judge.gates import loosen, quality_checks
from runner.judge.numbers.alternatives import advice
from runner.judge.outputs import judge_outputs
from runner.judge.own_dtype import own_dtype, told
from runner.judge.prompts import Questions, make_questions
from runner.judge.quality.continuations import NEW_TOKENS
from runner.judge.quality.extras import measure_native
from runner.judge.semantics import Probe
from runner.judge.sidecars.files import judge_files
from runner.judge.storage import Storage, compare_storage, judge_storage
from runner.judge.structure import judge_structure
from runner.protocol.combination import Several
from runner.protocol.errors import CheckpointError
from runner.protocol.figures import Alternative
from runner.protocol.limits import Evaluation, Limits
from runner.protocol.rounding import Rounding
from runner.protocol.verdict import Check, Continuation, Diagnosis, Layer, ModuleRow, Outcome, Quality, Status, Verdict

MIN_RETENTION = 0.9
LOSS = "the output dtype keeps the adapter"
GATES = (Layer.STRUCTURE, Layer.FILES, Layer.STORAGE, Layer.SEMANTICS, Layer.END_TO_END)
WEIGHT_GATES = tuple(layer for layer in GATES if layer is not Layer.FILES)
READABLE = "headers and index can be read"


@dataclass(slots=True)
class _Findings:
    """What has been found so far."""

    checks: list[Check] = field(default_factory=list)
    modules: tuple[ModuleRow, ...] = ()
    rounding_errors: tuple[int, ...] = ()
    retention: float = 1.0
    storage: Storage | None = None
    diagnoses: tuple[Diagnosis, ...] = ()
    quality: Quality | None = None
    alternatives: tuple[Alternative, ...] = ()
    continuations: tuple[Continuation, ...] = ()


def judge(  # noqa: PLR0913 (all by name; each is a fact that only the caller has)
    *,
    base: Path,
    adapter: Path | Several,
    merged: Path,
    dtype: str,
    made_here: bool = True,
    rounding: Rounding | None = None,
    prompts: Sequence[str] = (),
    evaluation: Evaluation | None = None,
    limits: Limits | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> Verdict:
    """Return the verdict on `merged` as a merge of `adapter` into `base`.

    Args:
        base: folder of the base checkpoint.
        adapter: folder of the adapter; or several, and how they are combined.
        merged: folder to be judged.
        dtype: what the merge was asked for: "auto" (each tensor keeps its own), "bfloat16", "float16", "float32".
        made_here: whether it was; of others' merges "auto" is what the folder says (`runner.judge.own_dtype`).
        rounding: that the merge was asked for; to the nearest by default.
        prompts: the user's; texts, or chats as the JSON object {"messages": [...]}.
        evaluation: on a text of the user's.
        limits: that the user loosened or set.
        seed: of all random probes and token ids.
        device: where the models run ("cpu" or "cuda"); everything else is on the CPU.
        on_progress: told (what is being done, share of the whole in 0..1).

    Raises:
        CheckpointError: the base cannot be used.
        AdapterError: the adapter cannot be used, or is not for this base.
    """
    start = time.monotonic()
    plain = read_checkpoint(base)  # a base that cannot be read is the input's error, whatever the merged folder is
    found = _read(merged)
    if isinstance(found, Check):
        return _verdict(_unreadable(merged, found), seed, start)
    taken = own_dtype(plain, found) if dtype == "auto" and not made_here else dtype
    with open_case(base, adapter, dtype=taken, rounding=rounding, seed=seed, on_progress=on_progress) as case:
        verdict = judge_merge(
            case, merged, prompts=prompts, evaluation=evaluation, limits=limits, device=device, on_progress=on_progress
        )
    checks = verdict.checks if taken == dtype else (told(taken), *verdict.checks)
    return replace(verdict, checks=checks, wall_s=time.monotonic() - start)


def judge_merge(  # noqa: PLR0913 (all by name)
    case: Case,
    merged: Path,
    *,
    prompts: Sequence[str] = (),
    evaluation: Evaluation | None = None,
    limits: Limits | None = None,
    device: str = "cpu",
    end_to_end: bool = True,
    right: RightBlocks | None = None,
    on_progress: Progress | None = None,
) -> Verdict:
    """Return the verdict on one merged folder of an open case; see `judge`.

    Args:
        case: base and adapter, and what the merge was asked for.
        merged: folder to be judged.
        prompts: the user's.
        evaluation: on a text of the user's.
        limits: that the user loosened or set.
        device: where the models run.
        end_to_end: whether to run that layer, which takes most of the time. Without it nothing passes: the verdict is
            `FAIL` or `NOT_VERIFIED`.
        right: blocks of right merges of this case, remembered from one call to the next; see `compare_touched`.
        on_progress: told (what is being done, share of the whole in 0..1).
    """
    start = time.monotonic()
    say: Progress = on_progress or (lambda _what, _share: None)
    checkpoint = _read(merged)
    if isinstance(checkpoint, Check):
        return _verdict(_unreadable(merged, checkpoint), case.seed, start)
    checkpoint = in_the_base_names(checkpoint, case.targets, case.blueprint)
    findings = _Findings(checks=[Check(layer=Layer.STRUCTURE, name=READABLE, outcome=Outcome.PASS)])
    _judge_files(findings, case, checkpoint, right, say)
    broken = _failed(findings, Layer.STRUCTURE)
    if end_to_end and broken is None:
        _judge_models(
            findings, case, checkpoint, prompts=prompts, evaluation=evaluation or Evaluation(), device=device, say=say
        )
    else:
        reason = f"the structure failed ({broken.name}), so nothing of the folder was loaded" if broken else ""
        findings.checks.append(skipped(Layer.END_TO_END, reason or "it was not asked for"))
    limits = limits or Limits()
    findings.checks = loosen(findings.checks, limits) + quality_checks(findings.quality, limits)
    if findings.storage is not None:
        findings.diagnoses = diagnose(case, checkpoint, findings.storage, findings.checks)
    say("judged", 1.0)
    return _verdict(findings, case.seed, start)


def _failed(findings: _Findings, layer: Layer) -> Check | None:
    """Return the first check of a layer that failed, or None."""
    failed = (check for check in findings.checks if check.layer is layer and check.outcome is Outcome.FAIL)
    return next(failed, None)


def _verdict(findings: _Findings, seed: int, start: float) -> Verdict:
    checks = tuple(findings.checks)
    return Verdict(
        status=decide(checks),
        weights=decide([check for check in checks if check.layer is not Layer.FILES], WEIGHT_GATES),
        files=decide([check for check in checks if check.layer is Layer.FILES], (Layer.FILES,)),
        checks=checks,
        modules=findings.modules,
        rounding_errors=findings.rounding_errors,
        quality=findings.quality,
        alternatives=findings.alternatives,
        continuations=findings.continuations,
        diagnoses=findings.diagnoses,
        seed=seed,
        wall_s=time.monotonic() - start,
    )


def _read(merged: Path) -> Checkpoint | Check:
    """Return the merged folder's headers, or the check that they fail."""
    try:
        return read_checkpoint(merged)
    except CheckpointError as error:
        return _fail(Layer.STRUCTURE, READABLE, error.problem.what)


def _unreadable(merged: Path, check: Check) -> _Findings:
    checks = [check, *(skipped(layer, "the merged folder cannot be read") for layer in Layer)]
    return _Findings(checks=checks, diagnoses=(read_unreadable(merged, check.detail),))


def decide(checks: Sequence[Check], gates: Sequence[Layer] = GATES) -> Status:
    """Return the status that follows from the checks, all of `gates` being needed.

    Any failure fails. A gating layer with a skipped check, or with no check at all, is not verified; nor is a limit on
    quality whose figure was not measured. What remains is a pass, lossy where the output dtype kept less than
    `MIN_RETENTION` of the adapter.
    """
    if any(check.outcome is Outcome.FAIL for check in checks):
        return Status.FAIL
    judged = {check.layer for check in checks if check.outcome is not Outcome.SKIPPED}
    skipped = {check.layer for check in checks if check.outcome is Outcome.SKIPPED}
    unmeasured = any(check.outcome is Outcome.SKIPPED and check.limit is not None for check in checks)
    if unmeasured or any(layer in skipped or layer not in judged for layer in gates):
        return Status.NOT_VERIFIED
    lossy = any(check.name == LOSS and check.outcome is Outcome.WARN for check in checks)
    return Status.PASS_LOSSY if lossy else Status.PASS


def _judge_files(findings: _Findings, case: Case, merged: Checkpoint, right: RightBlocks | None, say: Progress) -> None:
    say("structure", 0.1)
    form = case.form(merged)
    findings.checks.extend(judge_structure(base=case.base, merged=merged, form=form))
    findings.checks.extend(judge_files(case.base.root, case.sides, merged, rows=case.rows))
    storage = compare_storage(
        merged=merged,
        sources=case.sources,
        targets=case.targets,
        on_progress=lambda share: say("storage", 0.1 + 0.3 * share),
        right=right,
    )
    findings.checks.extend(judge_storage(storage, case.targets, case.unmerged))
    findings.checks.extend(case.semantics())
    findings.modules = _rows(case, storage, case.probes)
    findings.rounding_errors = storage.rounding_errors
    findings.alternatives = storage.alternatives
    findings.retention, findings.storage = storage.retention, storage
    findings.checks.append(_retention(storage))


def _judge_models(
    findings: _Findings,
    case: Case,
    merged: Checkpoint,
    *,
    prompts: Sequence[str],
    evaluation: Evaluation,
    device: str,
    say: Progress,
) -> None:
    say("end to end", 0.4)
    questions = make_questions(
        merged.root,
        rows=case.embedding_rows,
        max_tokens=case.max_tokens - NEW_TOKENS,
        prompts=prompts,
        seed=case.seed,
        eval_text=evaluation.text,
    )
    outputs = judge_outputs(
        unmerged=case.unmerged,
        merged=merged.root,
        sources=case.sources,
        targets=case.targets,
        questions=questions,
        retention=findings.retention,
        device=device,
        on_progress=lambda share: say("end to end", 0.4 + 0.6 * share),
    )
    findings.checks.extend(outputs.checks)
    findings.quality, findings.continuations = outputs.quality, outputs.continuations
    if findings.quality is not None:
        say("native run", 0.95)
        findings.quality = measure_native(case, merged.root, findings.quality, gold=outputs.gold, device=device)
    questions.words.close()
    findings.checks.extend(_unasked(questions))


def _unasked(questions: Questions) -> Iterator[Check]:
    """Yield what kept a prompt from being run."""
    if questions.words.problem:
        detail = f"Where a prompt is missing, {questions.words.problem}."
        yield Check(layer=Layer.QUALITY, name="the tokenizer was run", outcome=Outcome.WARN, detail=detail)
    if questions.skipped:
        detail = f"{len(questions.skipped)} of your prompts could not be used, the first: {questions.skipped[0]!r}."
        yield Check(layer=Layer.QUALITY, name="your prompts were run", outcome=Outcome.WARN, detail=detail)


def _rows(case: Case, storage: Storage, probes: Sequence[Probe]) -> tuple[ModuleRow, ...]:
    errors = {probe.module: probe.error for probe in probes}
    return tuple(
        ModuleRow(
            name=target.key.rpartition(".")[0],
            tensor=target.stored,
            probe_error=errors.get(case.sources.unit_of(target.key) or ""),
            delta_ratio=storage.comparisons[target.stored].delta_ratio,
            retention=storage.comparisons[target.stored].retention,
        )
        for target in case.targets.touched
        if target.stored in storage.comparisons and storage.comparisons[target.stored].delta_squared > 0
    )


def _retention(storage: Storage) -> Check:
    kept = storage.retention
    lossy = kept < MIN_RETENTION
    detail = (
        f"Of the adapter's change of the weights, {kept:.1%} survived rounding; the merge itself is exact. "
        f"{advice(storage.alternatives)}"
    )
    return Check(
        layer=Layer.QUALITY,
        name=LOSS,
        outcome=Outcome.WARN if lossy else Outcome.PASS,
        value=kept,
        limit=MIN_RETENTION,
        detail=detail if lossy else "",
    )


def _fail(layer: Layer, name: str, detail: str) -> Check:
    return Check(layer=layer, name=name, outcome=Outcome.FAIL, detail=detail)
