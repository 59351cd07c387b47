"""docs/troubleshooting.md: every message of the program, by exit code, so that none is missing and none is stale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runner.protocol.errors import EXIT_CANCELLED, EXIT_INTERNAL, EXIT_VERDICT_FAILED, RunnerError
from runner.supervisor.documents.markdown import table
from tools.messages import GAP, Message, read_messages

SPECIAL: Mapping[int, tuple[str, Sequence[tuple[str, str, str]]]] = {
    EXIT_VERDICT_FAILED: (
        "The merge was judged, and the verdict did not pass. It is a result, not an error: the report is complete, "
        "and nothing is published.",
        (
            (
                "The status is `FAIL`.",
                "A check found what a right merge cannot have; each failed check names the worst tensor, what was "
                "expected and what was found, and where it can be told, the diagnosis names the mistake.",
                "Read the failed checks in the summary. In `mode: verify`, repair the merge; a merge of this action "
                "that fails is a bug: please report it.",
            ),
            (
                "The status is `NOT_VERIFIED`.",
                "A part of the judgement could not run; the skipped check says which, and why.",
                "Remove the reason, or add `not-verified` to `allow`: the release then says that it is not verified.",
            ),
            (
                "A limit of `quality-limits` is missed.",
                "Rounding, or the adapter, costs more than you allow.",
                "Take another `dtype`, or `rounding: stochastic`, or loosen the limit.",
            ),
        ),
    ),
    EXIT_INTERNAL: (
        "An error that nobody foresaw: our bug.",
        (
            (
                f"An error that nobody foresaw: {GAP}.",
                "This is a bug of lora-merge-action, not of your inputs.",
                "Please report it with the traceback in the log.",
            ),
        ),
    ),
    EXIT_CANCELLED: (
        "Cancelled.",
        (
            (
                f"The run was cancelled in the phase `{GAP}`.",
                "The process got SIGINT or SIGTERM: a cancelled job, a timeout, or Ctrl-C.",
                "Run again: what is on the Hub already is found and not written twice.",
            ),
        ),
    ),
}


def render_messages() -> str:
    """Return all messages as Markdown, a section for each exit code and class."""
    messages = read_messages()
    parts = {RunnerError.exit_code: _section([RunnerError], messages)}
    for family in RunnerError.__subclasses__():
        parts[family.exit_code] = _section([family, *family.__subclasses__()], messages)
    for code, (meaning, rows) in SPECIAL.items():
        parts[code] = f"## Exit code {code}\n\n{meaning}\n\n{_rows(rows)}"
    return "\n" + "\n".join(parts[code] for code in sorted(parts)) + "\n"


def _section(classes: Sequence[type[RunnerError]], messages: Sequence[Message]) -> str:
    family = classes[0]
    text = f"## Exit code {family.exit_code}\n"
    for one in classes:
        rows = sorted((m.what, m.why, m.fix) for m in messages if m.family == one.__name__)
        if one is RunnerError:
            text += "\nWhat fits no other code.\n"
        else:
            text += f"\n### `{one.__name__}`\n\n{(one.__doc__ or '').strip().partition(chr(10))[0]}\n"
        if rows:
            text += "\n" + _rows(rows)
        elif one.__subclasses__():
            text += "\nThe family of those below; by itself it is never told.\n"
    return text


def _rows(rows: Sequence[tuple[str, str, str]]) -> str:
    return table(("What happened", "Why", "What to do"), [[_cell(cell) for cell in row] for row in rows]) + "\n"


def _cell(text: str) -> str:
    if not text.strip(f"{GAP} ./"):
        return "(the message says it)"
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return flat.replace(GAP * 2, GAP)
