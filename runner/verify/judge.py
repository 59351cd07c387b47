"""The judge: base, adapter and merged folder in, `Verdict` out. It sees nothing of how the merge was made.

The claim "this folder is the best merge of base and adapter in its dtype" is split in parts that are each nearly
exact: structure, storage, semantics, end to end (see the modules of those names), and what no merge can avoid, the
loss by rounding, is measured and reported apart. A wrong merged folder is a failed verdict; a base or adapter that
cannot be used is an error of the input.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.checkpoint.layout import Checkpoint, read_checkpoint
from runner.combination import Several
from runner.errors import CheckpointError
from runner.verify.blueprint import check_heads, read_blueprint
from runner.verify.classes import read_task
from runner.verify.combined import as_one
from runner.verify.models import Unmerged, load_base, load_unmerged
from runner.verify.modules import LIMIT, Probe, probe_modules
from runner.verify.outputs import NEW_TOKENS, judge_outputs
from runner.verify.prompts import make_questions
from runner.verify.recipe import read_recipe
from runner.verify.shapes import resized_rows
from runner.verify.sources import Sources
from runner.verify.storage import Storage, compare_storage, judge_storage
from runner.verify.structure import Form, Wanted, judge_structure
from runner.verify.targets import Target, Targets, find_targets
from runner.verify.verdict import Check, Continuation, Layer, ModuleRow, Outcome, Quality, Status, Verdict

MIN_RETENTION = 0.9
LOSS = "the output dtype keeps the adapter"
GATES = (Layer.STRUCTURE, Layer.STORAGE, Layer.SEMANTICS, Layer.END_TO_END)
READABLE = "headers and index can be read"
Progress = Callable[[str, float], None]


@dataclass(slots=True)
class _Findings:
    """What has been found so far."""

    checks: list[Check] = field(default_factory=list)
    modules: tuple[ModuleRow, ...] = ()
    rounding_errors: tuple[int, ...] = ()
    quality: Quality | None = None
    continuations: tuple[Continuation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Everything that the layers look at."""

    base: Checkpoint
    adapter: Path
    merged: Checkpoint
    unmerged: Unmerged
    sources: Sources
    targets: Targets
    form: Form


def judge(
    *,
    base: Path,
    adapter: Path | Several,
    merged: Path,
    dtype: str,
    prompts: Sequence[str] = (),
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
        prompts: the user's; texts, or chats as the JSON object {"messages": [...]}.
        seed: of all random probes and token ids.
        device: where the models run ("cpu" or "cuda"); everything else is on the CPU.
        on_progress: told (what is being done, share of the whole in 0..1).

    Raises:
        CheckpointError: the base cannot be used.
        AdapterError: the adapter cannot be used, or is not for this base.
    """
    start = time.monotonic()
    say: Progress = on_progress or (lambda _what, _share: None)
    findings = _Findings()
    say("reading", 0.0)
    base_checkpoint = read_checkpoint(base)
    try:
        merged_checkpoint = read_checkpoint(merged)
    except CheckpointError as error:
        findings.checks.append(_fail(Layer.STRUCTURE, READABLE, error.problem.what))
        findings.checks.extend(_skipped(layer, "the merged folder cannot be read") for layer in Layer)
    else:
        findings.checks.append(Check(layer=Layer.STRUCTURE, name=READABLE, outcome=Outcome.PASS))
        say("loading base and adapter", 0.02)
        with as_one(adapter, base) as one:
            findings.checks.extend(one.checks)
            case = _prepare(base_checkpoint, one.root, merged_checkpoint, dtype)
            _judge_case(findings, case, prompts=prompts, seed=seed, device=device, say=say)
    say("judged", 1.0)
    checks = tuple(findings.checks)
    return Verdict(
        status=decide(checks),
        checks=checks,
        modules=findings.modules,
        rounding_errors=findings.rounding_errors,
        quality=findings.quality,
        continuations=findings.continuations,
        seed=seed,
        wall_s=time.monotonic() - start,
    )


def decide(checks: Sequence[Check]) -> Status:
    """Return the status that follows from the checks.

    Any failure fails. A gating layer with a skipped check, or with no check at all, is not verified. What remains is
    a pass, lossy where the output dtype kept less than `MIN_RETENTION` of the adapter.
    """
    if any(check.outcome is Outcome.FAIL for check in checks):
        return Status.FAIL
    judged = {check.layer for check in checks if check.outcome is not Outcome.SKIPPED}
    skipped = {check.layer for check in checks if check.outcome is Outcome.SKIPPED}
    if any(layer in skipped or layer not in judged for layer in GATES):
        return Status.NOT_VERIFIED
    lossy = any(check.name == LOSS and check.outcome is Outcome.WARN for check in checks)
    return Status.PASS_LOSSY if lossy else Status.PASS


def _prepare(base: Checkpoint, adapter: Path, merged: Checkpoint, dtype: str) -> _Case:
    task = read_task(base.root, adapter)
    blueprint = read_blueprint(base.root, base.tensors, task)
    recipe = read_recipe(adapter, list(blueprint.keys), blueprint.conversion.sources)
    rows = resized_rows(recipe, blueprint)
    check_heads(blueprint, recipe)
    loaded = load_base(base.root, rows, wanted=task.model_class, labels=task.labels)
    unmerged = load_unmerged(loaded, adapter, recipe.redundant)
    sources = Sources(base=base, blueprint=blueprint, recipe=recipe, unmerged=unmerged)
    targets = find_targets(sources, base=base, blueprint=blueprint, dtype=dtype)
    form = Form(
        required={name: _wanted(target) for name, target in targets.required.items()},
        optional={name: _wanted(target) for name, target in targets.optional.items()},
        dtype=dtype,
        is_untied=bool(targets.untied),
        may_untie=bool(targets.untied) or (bool(targets.optional) and targets.optional.keys() <= merged.tensors.keys()),
        rows=rows,
        config=task.config,
    )
    return _Case(
        base=base,
        adapter=adapter,
        merged=merged,
        unmerged=unmerged,
        sources=sources,
        targets=targets,
        form=form,
    )


def _judge_case(
    findings: _Findings, case: _Case, *, prompts: Sequence[str], seed: int, device: str, say: Progress
) -> None:
    say("structure", 0.08)
    findings.checks.extend(judge_structure(base=case.base, adapter=case.adapter, merged=case.merged, form=case.form))
    storage = compare_storage(
        merged=case.merged,
        sources=case.sources,
        targets=case.targets,
        on_progress=lambda share: say("storage", 0.08 + 0.2 * share),
    )
    findings.checks.extend(judge_storage(storage, case.targets, case.unmerged))
    say("semantics", 0.3)
    probes = tuple(probe_modules(case.unmerged, case.sources, seed))
    findings.checks.extend(_semantics(probes, case.unmerged))
    findings.modules = _rows(case, storage, probes)
    findings.rounding_errors = storage.rounding_errors
    say("end to end", 0.4)
    questions = make_questions(
        case.merged.root, rows=_embedding_rows(case), max_tokens=_max_tokens(case), prompts=prompts, seed=seed
    )
    outputs = judge_outputs(
        unmerged=case.unmerged,
        merged=case.merged.root,
        sources=case.sources,
        targets=case.targets,
        questions=questions,
        retention=storage.retention,
        device=device,
        on_progress=lambda share: say("end to end", 0.4 + 0.6 * share),
    )
    findings.checks.extend(outputs.checks)
    findings.quality, findings.continuations = outputs.quality, outputs.continuations
    findings.checks.append(_retention(storage))
    if questions.skipped:
        detail = f"{len(questions.skipped)} of your prompts could not be used, the first: {questions.skipped[0]!r}."
        findings.checks.append(
            Check(layer=Layer.QUALITY, name="your prompts were run", outcome=Outcome.WARN, detail=detail)
        )


def _semantics(probes: Sequence[Probe], unmerged: Unmerged) -> tuple[Check, ...]:
    name = "E does what PEFT's unmerged layer does"
    exact = "PEFT holds the adapter exactly as stored"
    altered = f"{unmerged.altered[0]} has other values in PEFT's model than in the file." if unmerged.altered else ""
    stored = _fail(Layer.SEMANTICS, exact, altered) if altered else _passed(Layer.SEMANTICS, exact)
    errors = [(probe.error, probe) for probe in probes if probe.error is not None]
    blind = [probe for probe in probes if probe.error is None]
    checks = [stored]
    if errors:
        worst, probe = max(errors, key=lambda entry: math.inf if math.isnan(entry[0]) else entry[0])
        passed = worst <= LIMIT
        checks.append(
            Check(
                layer=Layer.SEMANTICS,
                name=name,
                outcome=Outcome.PASS if passed else Outcome.FAIL,
                value=worst,
                limit=LIMIT,
                detail=""
                if passed
                else f"The worst of {len(errors)} modules is {probe.module}. {probe.detail}".strip(),
            )
        )
    if blind or not errors:
        first = f"{blind[0].module}: {blind[0].detail}" if blind else "PEFT touches no module"
        checks.append(_skipped(Layer.SEMANTICS, f"{len(blind)} modules were not probed; {first}"))
    return tuple(checks)


def _rows(case: _Case, storage: Storage, probes: Sequence[Probe]) -> tuple[ModuleRow, ...]:
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
    lossy = storage.has_delta and kept < MIN_RETENTION
    detail = (
        f"Of the adapter's change of the weights, {kept:.1%} survived rounding; the merge itself is exact. "
        "`dtype: float16` keeps about 8 times finer steps (its range ends at 65504, which is checked); "
        "`dtype: float32` keeps everything."
    )
    return Check(
        layer=Layer.QUALITY,
        name=LOSS,
        outcome=Outcome.WARN if lossy else Outcome.PASS,
        value=kept,
        limit=MIN_RETENTION,
        detail=detail if lossy else "",
    )


def _embedding_rows(case: _Case) -> int:
    return int(case.unmerged.model.get_base_model().get_input_embeddings().weight.shape[0])


def _max_tokens(case: _Case) -> int:
    """Return how long a prompt may be so that its continuation fits, too; windows have several names in configs."""
    config = case.unmerged.base.model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=1 << 20) - NEW_TOKENS


def _wanted(target: Target) -> Wanted:
    return Wanted(dtype=target.dtype, shape=target.shape)


def _passed(layer: Layer, name: str) -> Check:
    return Check(layer=layer, name=name, outcome=Outcome.PASS)


def _fail(layer: Layer, name: str, detail: str) -> Check:
    return Check(layer=layer, name=name, outcome=Outcome.FAIL, detail=detail)


def _skipped(layer: Layer, reason: str) -> Check:
    return Check(layer=layer, name=f"{layer.value} was judged", outcome=Outcome.SKIPPED, detail=f"{reason}.")
