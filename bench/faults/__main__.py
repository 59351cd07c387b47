"""Run the fault suite on SmolLM2-135M and write what came out; see `python -m bench.faults --help`.

Results are appended to a file as they come, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bench.faults.adapters import RECIPES, trained
from bench.faults.good import judge_good
from bench.faults.kinds import KINDS, Kind
from bench.faults.others import judge_others
from bench.faults.report import write_report
from bench.faults.scene import Scene, set_scene
from demo.smollm2 import build
from runner.judge.case import open_case
from runner.judge.expected.elements import RightBlocks
from runner.judge.judge import judge_merge
from runner.protocol.verdict import Layer, Outcome, Verdict
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare

DTYPES = ("auto", "float16", "float32")
ROOT = Path(__file__).resolve().parent.parent.parent
# Wrong values whose size at the outputs is measured, too: for the margins of the end-to-end layer.
MEASURED = ("change × 1.02", "one layer skipped", "two rows swapped", "50 rare rows of the embedding shifted")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 where every wrong merge was caught and named, and no right one was failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="for the base, the adapters and results")
    parser.add_argument("--scratch", type=Path, help="for merged folders, 2 GB; by default in --folder")
    parser.add_argument("--adapters", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--small", action="store_true", help="only kinds that change one tensor or the folder")
    parser.add_argument("--only", nargs="+", default=[], help="kinds, by name, run again even if there is a result")
    parser.add_argument("--good", action="store_true", help="judge right merges, and nothing else")
    parser.add_argument("--others", action="store_true", help="judge merges that PEFT and the peers make, nothing else")
    parser.add_argument("--report", action="store_true", help="only write docs/ from the results that there are")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    torch.set_num_threads(1)
    results = Results(options.folder / "faults.jsonl")
    if not options.report:
        run(options, results)
    return write_report(results.entries)


class Results:
    """What was found so far, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        """Read the results in `path`, if there are any."""
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        self._found = {self._key(entry): entry for entry in map(json.loads, lines)}

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All results; of one that was run again, the last."""
        return list(self._found.values())

    def has(self, **key: str) -> bool:
        """Return whether there is a result."""
        return self._key(key) in self._found

    def add(self, entry: dict[str, Any]) -> None:
        """Write one result."""
        self._found[self._key(entry)] = entry
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @staticmethod
    def _key(entry: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(entry[name]) for name in ("adapter", "dtype", "kind"))


def run(options: argparse.Namespace, results: Results) -> None:
    """Judge every merge that has no result yet."""
    base = build(options.folder / "smollm2", cache=options.folder / "cache")
    scratch = (options.scratch or options.folder / "scratch").resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    if options.others:
        adapter = trained("strong", base, options.folder / "adapters")
        for entry in judge_others(base, adapter, scratch):
            results.add({"adapter": adapter.name, "dtype": "auto", "kind": f"made by {entry['maker']}", **entry})
        return
    for name in options.adapters:
        adapter = trained(name, base, options.folder / "adapters")
        for dtype in options.dtypes:
            right = scratch / f"{name}-{dtype}"
            if options.good:
                judge_good(base, adapter, dtype, right, results.has, results.add)
                continue
            wanted = [
                (kind, how)
                for kind, how in _wanted(name, dtype, options.only, results)
                if not (options.small and how.is_wide)
            ]
            if wanted:
                _judge_bad(base, adapter, dtype, right, wanted, results)


def _wanted(adapter: str, dtype: str, only: Sequence[str], results: Results) -> Iterator[tuple[str, Kind]]:
    for name, kind in KINDS.items():
        exists = dtype in kind.dtypes and (not kind.only or adapter in kind.only)
        done = results.has(adapter=adapter, dtype=dtype, kind=name)
        if exists and (name in only if only else not done):
            yield name, kind


def _judge_bad(
    base: Path, adapter: Path, dtype: str, right: Path, wanted: Sequence[tuple[str, Kind]], results: Results
) -> None:
    if not right.exists():
        merge(prepare(base, adapter, dtype=dtype), into=right)
    scene = set_scene(base, adapter, right, dtype)
    blocks: RightBlocks = {}
    with open_case(base, adapter, dtype=dtype) as case:
        case.sources.keeps_units = True
        first = judge_merge(case, right, end_to_end=False, right=blocks)
        if first.failures:
            raise SystemExit(f"the right merge fails: {first.failures[0]}")
        for name, kind in wanted:
            folder = right.with_name(f"{right.name}-bad")
            started = time.monotonic()
            differs = kind.make(scene, folder)
            runs_models = (kind.end_to_end or name in MEASURED) and dtype == "auto"
            verdict = judge_merge(case, folder, end_to_end=runs_models, right=blocks)
            entry = _entry(scene, name, kind, verdict, differs=differs)
            entry["wall_s"] = round(time.monotonic() - started, 2)
            results.add(entry)
            print(f"{entry['verdict']:<10} {adapter.name} {dtype} {name}: {', '.join(entry['diagnoses'])}", flush=True)


def _entry(scene: Scene, name: str, kind: Kind, verdict: Verdict, *, differs: bool) -> dict[str, Any]:
    found = [diagnosis.kind for diagnosis in verdict.diagnoses]
    caught = bool(verdict.failures)
    named = bool(set(found) & set(kind.says)) and set(found) <= {*kind.says, *kind.allows}
    values = {
        f"{check.layer.value}: {check.name}": check.value
        for check in verdict.checks
        if check.value is not None and check.outcome in (Outcome.PASS, Outcome.FAIL)
    }
    return {
        "adapter": scene.adapter.name,
        "dtype": scene.dtype,
        "kind": name,
        "verdict": "same bytes" if not differs else "named" if caught and named else "caught" if caught else "MISSED",
        "diagnoses": [str(one) for one in found],
        "certain": [one.is_certain for one in verdict.diagnoses],
        "evidence": [one.evidence for one in verdict.diagnoses],
        "factor": next((one.factor for one in verdict.diagnoses if one.factor is not None), None),
        "layers": sorted({check.layer.value for check in verdict.failures}),
        "values": values,
        "end_to_end": any(c.layer is Layer.END_TO_END and c.outcome is not Outcome.SKIPPED for c in verdict.checks),
    }


if __name__ == "__main__":
    sys.exit(main())
