"""What came of a phase, as lines of the log."""

from __future__ import annotations

from collections.abc import Iterator

from runner.protocol.events import Merged
from runner.protocol.plan_summary import PlanSummary
from runner.protocol.verdict import Verdict
from runner.supervisor.hub import Traffic


def plan_lines(plan: PlanSummary) -> list[str]:
    """Return the plan as a few lines for people."""
    lines = [
        f"Plan: {plan.peft_type} on {plan.modules} modules, output dtype {plan.output_dtype}.",
        f"  tensors: {plan.tensors_merged} merged ({plan.tensors_added} of them added), "
        f"{plan.tensors_copied} copied, {plan.tensors_cast} cast",
        f"  reads {plan.read_bytes / 1e6:.1f} MB, writes {plan.write_bytes / 1e6:.1f} MB, "
        f"needs {plan.disk_bytes / 1e6:.1f} MB of disk and {plan.peak_memory_bytes / 1e6:.0f} MB of memory to merge, "
        f"{plan.judge_memory_bytes / 1e6:.0f} MB to verify",
    ]
    return [*lines, *(f"  note: {note}" for note in plan.notes)]


def traffic_line(traffic: Traffic) -> str:
    """Return what came from the cache and what did not; "" where nothing was asked for."""
    if not traffic.hit_bytes and not traffic.miss_bytes:
        return ""
    return f"Downloads: {traffic.hit_bytes / 1e6:.1f} MB were in the cache, {traffic.miss_bytes / 1e6:.1f} MB not."


def merged_lines(event: Merged) -> Iterator[str]:
    """Yield what was merged, in what time."""
    merged = event.checkpoint
    if merged.note:
        yield merged.note
    rate = merged.written_bytes / max(merged.wall_s, 1e-9) / 1e6
    yield (
        f"Merged {merged.tensors_merged} tensors, copied {merged.tensors_copied}, "
        f"{merged.wall_s:.1f} s, {rate:.0f} MB/s, peak {event.peak_rss_bytes / 1e6:.0f} MB."
    )


def verdict_lines(verdict: Verdict) -> Iterator[str]:
    """Yield the verdict, what failed, and why as far as that was computed."""
    yield f"Verdict: {verdict.status.value}."
    yield verdict.parts_text
    for check in verdict.failures:
        yield f"  FAIL {check.layer.value}: {check.name}: {check.detail}"
    for diagnosis in verdict.diagnoses:
        sure = "" if diagnosis.is_certain else " (likely)"
        yield f"  DIAGNOSIS {diagnosis.kind.value}{sure}: {diagnosis.evidence}"
