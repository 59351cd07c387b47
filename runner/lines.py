"""The plan, and how far a phase is, as lines of the log."""

from __future__ import annotations

from runner.events import Progress
from runner.plan import PlanSummary


def progress_line(event: Progress, elapsed_s: float) -> str:
    """Return one line with how far the phase is, its rate and when it will be done."""
    part = event.done / event.total if event.total else 1.0
    left_s = elapsed_s * (1 - part) / part if part else 0.0
    rate = "" if event.total <= 1 else f", {event.done / max(elapsed_s, 1e-9) / 1e6:.0f} MB/s"
    return f"{event.phase}: {100 * part:.0f} %{rate}, about {left_s:.0f} s left ({event.doing})"


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
