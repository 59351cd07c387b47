"""The parts of a report as Markdown: each takes one noun and gives one section, safe whatever its texts hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from runner.protocol.errors import Problem
from runner.protocol.figures import Native
from runner.protocol.plan_summary import PlanSummary
from runner.protocol.verdict import Check, Continuation, Diagnosis, Layer, ModuleRow, Outcome, Quality, Status, Verdict
from runner.supervisor.documents.canvas import Picture
from runner.supervisor.documents.markdown import block, code, details, escape, prose, table
from runner.supervisor.documents.provenance import REPORT_FOLDER

WORST_MODULES = 5
_LONGEST_PROMPT, _LONGEST_ANSWER, _MOST_TOLD = 300, 600, 20  # characters, and problems or notes
_OUTCOMES = {Outcome.PASS: "✅", Outcome.FAIL: "❌", Outcome.WARN: "⚠️", Outcome.SKIPPED: "⏭️"}
_HEADLINES = {
    Status.PASS: "✅ Verified: the merged model is the base with the adapter, correctly rounded.",
    Status.PASS_LOSSY: "⚠️ Verified, with a loss: the merge is exact, but its dtype keeps little of the adapter.",
    Status.FAIL: "❌ Not verified: the merged model is not the base with the adapter.",
    Status.NOT_VERIFIED: "❌ Not verified: a part of the judgement did not run.",
}
_ONLY_QUALITY = "❌ Below your limits: the merge is exact, but rounding cost more than `quality-limits` allows."


class Published(Protocol):
    """What is told of a release; see `runner.supervisor.publish.Release`."""

    @property
    def repo_id(self) -> str:
        """`owner/name`."""

    @property
    def tag(self) -> str:
        """Its name."""

    @property
    def commit(self) -> str:
        """What the tag points to, 40 hex digits."""

    @property
    def url(self) -> str:
        """Page of the revision."""

    @property
    def pull_request(self) -> str | None:
        """Page of the pull request that it is; None for a tagged release."""

    @property
    def created(self) -> bool:
        """False where the tag was there already and nothing was written."""

    @property
    def status(self) -> Status | None:
        """The verdict under which it was published; None where that is not known."""

    @property
    def merged_digest(self) -> str | None:
        """Of its files; None where that is not known."""


def number(value: float | None) -> str:
    """Return a measured number for people: four significant digits, a dash for none."""
    if value is None:
        return "–"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4g}".replace("-", "−")  # a browser breaks a line at a hyphen, in the middle of 1e-15


def size(size_bytes: int) -> str:
    """Return a number of bytes for people."""
    amount, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.4g} {unit}"


def duration(seconds: float) -> str:
    """Return a duration for people."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def problems_section(problems: Sequence[Problem]) -> str:
    """Return what went wrong, why, and what to do."""
    parts = [
        f"**{prose(problem.what)}**\n\n- Why: {prose(problem.why)}\n- Fix: {prose(problem.fix)}"
        for problem in problems[:_MOST_TOLD]
    ]
    parts += [f"… and {len(problems) - _MOST_TOLD} more, in report.json."] if len(problems) > _MOST_TOLD else []
    return "\n\n".join(["### Problems" if len(problems) > 1 else "### Problem", *parts])


def release_section(release: Published) -> str:
    """Return where the release is, and how to load it."""
    if release.pull_request is not None:
        state = "Proposed" if release.created else "Proposed already, nothing was changed"
        place = _link(f"a pull request on {code(release.repo_id)}", release.pull_request)
        return f"{state}: {place}, commit {code(release.commit)}. The next run after it is merged tags it."
    state = "Published" if release.created else "Already published, nothing was changed"
    if not release.commit:
        load = f"AutoModelForCausalLM.from_pretrained({release.url!r})"
        return f"{state}: tag {code(release.tag)}, in the folder {code(release.url)}\n\n{block(load)}"
    place = _link(f"{code(release.repo_id)} at tag {code(release.tag)}", release.url)
    load = f'AutoModelForCausalLM.from_pretrained("{release.repo_id}", revision="{release.tag}")'
    return f"{state}: {place}, commit {code(release.commit)}\n\n{block(load)}"


def headline(verdict: Verdict) -> str:
    """Return the verdict as one sentence, those on weights and files, and what the user loosened."""
    text = _ONLY_QUALITY if verdict.fails_quality_only else _HEADLINES[verdict.status]
    parts, loosened = verdict.parts_text, verdict.loosened_text
    told = f"**{text}**" + (f"\n\n{parts}" if parts else "")
    return told + (f"\n\n⚠️ Loosened limits: {loosened}." if loosened else "")


def verdict_section(verdict: Verdict) -> str:
    """Return every check with its value and limit, failures in words."""
    rows = [_check_row(check) for layer in Layer for check in verdict.checks if check.layer is layer]
    parts = ["### Checks", table(("", "Layer", "Check", "Value", "Limit"), rows, numbers=2)]
    told = [check for check in verdict.checks if check.detail and check.outcome is not Outcome.PASS]
    parts += [f"- {_OUTCOMES[check.outcome]} {escape(check.name)}: {prose(check.detail)}" for check in told]
    return "\n\n".join(parts[:2]) + ("\n\n" + "\n".join(parts[2:]) if parts[2:] else "")


def diagnoses_section(diagnoses: Sequence[Diagnosis]) -> str:
    """Return what explains a failed verdict, with the evidence."""
    parts = ["### Diagnosis"]
    for item in diagnoses:
        name = item.kind.value.replace("_", " ")
        sure = "" if item.is_certain else " (likely)"
        factor = "" if item.factor is None else f" Estimated factor of the adapter's change: {number(item.factor)}."
        about = [code(tensor) for tensor in item.tensors[:3]]
        more = f" and {item.count - len(about)} more" if item.count > len(about) else ""
        where = f" Tensors: {', '.join(about)}{more}." if about else ""
        parts.append(f"- **{escape(name)}**{sure}: {prose(item.evidence)}{factor}{where}")
    return "\n\n".join([parts[0], "\n".join(parts[1:])])


def quality_section(quality: Quality) -> str:
    """Return what rounding cost, with the base beside it for comparison."""
    rows = [
        ("Share of the adapter's change that was kept", number(quality.retention), ""),
        ("KL to the unmerged model, nats per token", number(quality.kl_mean_nats), number(quality.kl_base_mean_nats)),
        ("The same, 99th percentile", number(quality.kl_p99_nats), ""),
        ("Loss on the prompts, nats per token", number(quality.nll_merged_nats), number(quality.nll_base_nats)),
        ("Same most likely token as unmerged", number(quality.top1_agreement), ""),
        ("Effect of the adapter on the logits", number(quality.effect), ""),
        ("Share of that effect that was kept", number(quality.effect_retention), ""),
        ("Error of the merge relative to that effect", number(quality.effect_error), ""),
    ]
    if quality.perplexity is not None:
        found = quality.perplexity
        rows.append(("Perplexity of your text", number(found.merged), number(found.base)))
    note = f"Over {quality.tokens} tokens; unmerged loss {number(quality.nll_unmerged_nats)}. "
    note += _native(quality.native) if quality.native else ""
    if quality.perplexity is not None:
        found, cut = quality.perplexity, ", the beginning of it" if quality.perplexity.is_cut else ""
        note += f"Your text: {found.tokens} tokens{cut}; unmerged perplexity {number(found.unmerged)}, "
        note += f"merged over unmerged {found.ratio:.5g}. "
    note += "Gates only what `quality-limits` names."
    parts = ["### Quality", table(("Over the prompts", "Merged", "Base"), rows, numbers=2), note]
    return "\n\n".join(parts)


def pictures_section(pictures: Sequence[Picture], release: Published | None, *, inline: bool) -> str:
    """Return the pictures with their texts.

    Args:
        pictures: of the verdict.
        release: where they lie on the Hub; None where nothing was published.
        inline: show them from the folder of this Markdown; else link to the release, or say where they are.
    """
    lines = []
    for picture in pictures:
        shown = f"![{escape(picture.title)}]({picture.name}.png)\n\n" if inline else ""
        lines.append(f"{shown}{escape(picture.text)}")
    is_linked = release is not None and release.commit and not release.pull_request
    where = _link("Pictures in the release", f"{release.url}/{REPORT_FOLDER}") if release and is_linked else ""
    told = where or ("" if inline else "The pictures lie in `report-dir`.")
    body = "\n\n".join([told, *lines] if told else lines)
    return f"### Pictures\n\n{body}" if inline else details("Pictures", body)


def _native(native: Native) -> str:
    if native.reason:
        return f"In {native.dtype} arithmetic the models were not run: {escape(native.reason)}. "
    return (
        f"In {native.dtype} arithmetic on {native.device}, merged {number(native.kl_merged_nats)} and unmerged "
        f"{number(native.kl_unmerged_nats)} nats from the unmerged model in float32: ρ = {number(native.ratio)}. "
    )


def modules_section(modules: Sequence[ModuleRow]) -> str:
    """Return the modules with the largest probe errors, and those that kept least."""
    worst = sorted(modules, key=lambda row: (-(_rank(row.probe_error)), row.retention))[:WORST_MODULES]
    rows = [(code(row.name), number(row.probe_error), number(row.delta_ratio), number(row.retention)) for row in worst]
    title = f"Worst {len(worst)} of {len(modules)} changed modules"
    return details(title, table(("Module", "Probe error", "‖ΔW‖/‖W‖", "Retention"), rows, numbers=3))


def continuations_section(continuations: Sequence[Continuation]) -> str:
    """Return what base, unmerged and merged model say after each prompt, side by side."""
    parts = []
    for item in continuations:
        same = "word for word the same" if item.merged == item.unmerged else "not the same"
        parts.append(f"**After** {_lines(item.prompt, _LONGEST_PROMPT)} (merged and unmerged: {same})")
        answers = [_lines(text, _LONGEST_ANSWER) for text in (item.base, item.unmerged, item.merged)]
        parts.append(table(("Base", "Unmerged", "Merged"), [answers]))
    return details(f"Continuations of {len(continuations)} prompts", "\n\n".join(parts))


def plan_section(plan: PlanSummary) -> str:
    """Return what the merge does, and what it needs."""
    rows = [
        ("Adapter", code(plan.peft_type)),
        ("Output dtype", code(plan.output_dtype)),
        ("Modules changed", str(plan.modules)),
        ("Tensors merged", f"{plan.tensors_merged}, of them added {plan.tensors_added}"),
        ("Tensors copied", str(plan.tensors_copied)),
        ("Tensors cast", str(plan.tensors_cast)),
        ("To read", size(plan.read_bytes)),
        ("To write", size(plan.write_bytes)),
        ("Disk needed", size(plan.disk_bytes)),
        ("Peak memory of the merge, estimated from above", size(plan.peak_memory_bytes)),
        ("Peak memory of the judgement, estimated from above", size(plan.judge_memory_bytes)),
    ]
    notes = "".join(f"\n- {prose(note)}" for note in plan.notes[:_MOST_TOLD])
    notes += f"\n- … and {len(plan.notes) - _MOST_TOLD} more, in report.json" if len(plan.notes) > _MOST_TOLD else ""
    return f"### Plan\n\n{table(('What', 'How much'), rows)}" + (f"\n{notes}" if notes else "")


def facts_section(title: str, facts: Mapping[str, object]) -> str:
    """Return names and values as a folded table; empty values are left out."""
    rows = [
        (escape(name), "<br>".join(code(line) for line in _written(value).splitlines()))
        for name, value in facts.items()
        if value not in ("", None)
    ]
    return details(title, table(("Name", "Value"), rows)) if rows else ""


def _written(value: object) -> str:
    """Return a value as a workflow writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def timings_section(phases: Iterable[tuple[str, float]]) -> str:
    """Return how long each phase took, as a folded table."""
    spent = list(phases)
    rows = [(escape(name), duration(seconds)) for name, seconds in spent]
    total = duration(sum(seconds for _, seconds in spent))
    return details(f"Timings: {total} in all", table(("Phase", "Time"), rows, numbers=1)) if rows else ""


def _link(text: str, url: str) -> str:
    # Only an address of the Web becomes a link; angle brackets keep everything else in it literal.
    is_address = url.startswith(("https://", "http://")) and not set(url) & set(" <>\n|\\")
    return f"[{text}](<{url}>)" if is_address else text


def _check_row(check: Check) -> tuple[str, ...]:
    mark = _OUTCOMES[check.outcome]
    return (
        mark,
        escape(check.layer.value.replace("_", " ")).replace(" ", "&nbsp;"),
        escape(check.name),
        number(check.value),
        number(check.limit),
    )


def _lines(text: str, longest: int) -> str:
    """Return a text as one table cell with its line breaks, cut."""
    shown = text if len(text) <= longest else f"{text[:longest]}…"
    return "<br>".join(escape(line) for line in shown.splitlines()) or "(nothing)"


def _rank(error: float | None) -> float:
    if error is None:
        return -1.0
    return math.inf if math.isnan(error) else error
