"""Run the whole table of faults (tests/acceptance/cases.py), and write docs/faults.md from what came of it.

    python -m tools.faults                  all of it: about twenty minutes of one core
    python -m tools.faults --only PATTERN   those whose name fits; nothing is written
    python -m tools.faults --keep FILE      with either: note the outcomes in FILE, and take over those that are there

Each case starts the action as a process twice, against a Hub of its own on a loopback socket.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.acceptance.action import a_hub, staged
from tests.acceptance.cases import CASES, PROTOCOLS, Case, Protocol
from tests.acceptance.table import Outcome, run_case

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "faults.md"

_HEAD = """# What the publisher does when the Hub fails

{count} faults, each over LFS and over Xet. Each row is two runs of the whole action as a process against the test Hub
on a loopback socket: one with the fault, and one without it on a machine that remembers nothing. `python -m
tools.faults` runs them and writes this page; a sample is in `tests/acceptance`.

- **released**: the first run survives the fault. **refused, N**: it ends with the exit code N and there is no tag; the
  rerun then releases. **unfinished, N**: the release is whole, and the error says what comes after it and is missing;
  the rerun does that.
- In every row, afterwards: one commit, one tag on it, every file of the right digest, and the weights taken by the Hub
  at most once. What is otherwise has a note.
- A fault is one call that fails, or, without "once", every call of its step.

`ask`, `send`, `part` and `confirm` are the steps that send weights: over LFS the batch call, a PUT, a part of one and
the verification; over Xet a token of the storage, a xorb, a query for chunks and a shard.

"""


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for; return 1 where a case does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tools.faults")
    parser.add_argument("--only", default="", help="regular expression for the names of cases")
    parser.add_argument("--keep", type=Path, help="file of outcomes that hold, one JSON object a line")
    asked = parser.parse_args(arguments)
    outcomes = list(_kept(asked.keep)) if asked.keep else []
    known = {(outcome.case.name, outcome.protocol) for outcome in outcomes}
    for outcome in run(asked.only, known):
        print(f"{outcome.protocol} {outcome.case.name}: {_cell(outcome)} {'; '.join(outcome.wrong)}", flush=True)
        outcomes.append(outcome)
        if asked.keep and not outcome.wrong:
            with asked.keep.open("a") as file:
                file.write(json.dumps({**asdict(outcome), "case": outcome.case.name}) + "\n")
    failed = [outcome for outcome in outcomes if outcome.wrong]
    if len(outcomes) == sum(1 for _ in _pairs("")) and not failed:
        DOCUMENT.write_text(render(outcomes), "utf-8")
        print(f"{DOCUMENT.relative_to(ROOT)}: written")
    print(f"{len(outcomes)} runs of cases, {len(failed)} do not hold")
    return 1 if failed else 0


def run(wanted: str = "", known: Collection[tuple[str, Protocol]] = ()) -> Iterator[Outcome]:
    """Yield the outcome of every case whose name fits, over both protocols, but for those that are known."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name, staged(Path(name)) as stage:
        folder = Path(name)
        with a_hub(folder / "hub") as (hub, token):
            plain = stage.run(hub, token, folder / "plain", xet=False)
        digest = str(plain.report["outputs"]["merged-digest"])
        for number, (case, protocol) in enumerate(_pairs(wanted)):
            if (case.name, protocol) not in known:
                yield run_case(stage, case, protocol, folder / f"case-{number}", digest)
    print(f"{time.monotonic() - started:.0f} s")


def render(outcomes: Sequence[Outcome]) -> str:
    """Return the document."""
    found = {(outcome.case.name, outcome.protocol): outcome for outcome in outcomes}
    lines = ["| Step | Fault | LFS | Xet | What the user is told |", "| --- | --- | --- | --- | --- |"]
    notes: list[str] = []
    for case in CASES:
        cells = [_cell(found[case.name, protocol]) if protocol in case.only else "" for protocol in PROTOCOLS]
        told = next((found[case.name, protocol].told for protocol in case.only if found[case.name, protocol].code), "")
        if case.why:
            notes += [case.why] if case.why not in notes else []
            cells = [f"{cell} [{notes.index(case.why) + 1}]" for cell in cells]
        lines.append("| " + " | ".join([case.step, case.fault, *cells, _text(told)]) + " |")
    told_notes = [f"{number}. {note[0].upper()}{note[1:]}." for number, note in enumerate(notes, start=1)]
    return _HEAD.format(count=len(CASES)) + "\n".join([*lines, "", *told_notes]) + "\n"


def _pairs(wanted: str) -> Iterator[tuple[Case, Protocol]]:
    for case in CASES:
        if re.search(wanted, case.name):
            for protocol in case.only:
                yield case, protocol


def _kept(path: Path) -> Iterator[Outcome]:
    cases = {case.name: case for case in CASES}
    for line in path.read_text().splitlines() if path.exists() else ():
        kept = json.loads(line)
        if kept["case"] in cases:
            yield Outcome(**{**kept, "case": cases[kept["case"]], "wrong": tuple(kept["wrong"])})


def _cell(outcome: Outcome) -> str:
    if not outcome.code:
        return "released"
    return f"{outcome.case.ends_with(outcome.protocol)}, {outcome.code}"


def _text(told: str) -> str:
    return told.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
