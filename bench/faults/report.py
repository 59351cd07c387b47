"""What the fault suite found, as `tests/records/faults.json`, and as tables of `docs/verification.md` made from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NUMBERS = Path(__file__).resolve().parent.parent.parent / "tests" / "records" / "faults.json"
ADAPTERS = ("strong", "dora", "saved", "mild", "tiny")
DTYPES = {"auto": "bf16", "float16": "fp16", "float32": "fp32"}
CRITERIA = {
    "storage: touched elements are the exact sum, rounded once": "storage, touched elements off",
    "storage: untouched tensors are the base's": "storage, untouched elements off",
    "end_to_end: the folder computes what round(E) computes": "end to end, folder and round(E)",
    "end_to_end: the un-rounded merge computes what the unmerged model computes": "end to end, un-rounded and unmerged",
}
LIMITS = {name: "0" if name.startswith("storage") else "1e-4" for name in CRITERIA}


def write_report(entries: Sequence[Mapping[str, Any]]) -> int:
    """Bring the record up to date; return 1 where a wrong merge was missed or misnamed, or a right one failed.

    What these results have nothing about stays: the other cells of the table, others' merges, right merges. A margin is
    the least that was seen.
    """
    others = [entry for entry in entries if "maker" in entry]
    bad = [entry for entry in entries if "diagnoses" in entry and "maker" not in entry]
    good = [entry for entry in entries if "diagnoses" not in entry]
    alarms = _alarms(good)
    content = dict(read_numbers())
    for entry in bad:
        said = ", ".join(entry["diagnoses"])
        told = f"{entry['verdict']}: {said}" if said else entry["verdict"]
        content["wrong"].setdefault(entry["kind"], {})[_place(entry)] = told
    if good:
        seeds = content["right"].get("probe seeds", 0)
        content["right"], content["alarms"] = _right(good), alarms
        content["right"]["probe seeds"] = max(seeds, content["right"]["probe seeds"])  # they take an hour of their own
    if others:
        kept = ("maker", "status", "diagnoses", "evidence")
        content["others"] = [{name: entry[name] for name in kept} for entry in others]
    content["margins"] = {name: _least(content["margins"].get(name), row) for name, row in _margins(good, bad).items()}
    NUMBERS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    counts = Counter(entry["verdict"] for entry in bad)
    print(f"{len(bad)} wrong merges: {dict(counts)}; {len(good)} right ones, {len(alarms)} alarms")
    return int(bool(alarms) or any(counts[name] for name in ("MISSED", "caught")))


def _alarms(good: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{_place(one)} {one['kind']}: {one['verdict']}" for one in good if one["verdict"].startswith("alarm")]


def _least(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the worse right merge and the less wrong one of two measurements of a criterion."""
    if before is None:
        return now
    right = [tuple(row["right"]) for row in (before, now) if row["right"]]
    wrong = [tuple(row["wrong"]) for row in (before, now) if row["wrong"]]
    return {"right": max(right, default=None), "wrong": min(wrong, default=None), "limit": now["limit"]}


def _place(entry: Mapping[str, Any]) -> str:
    return f"{entry['adapter']}/{DTYPES[entry['dtype']]}"


def _right(good: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    runs = [entry for entry in good if entry["kind"] != "semantics"]
    probes = [entry for entry in good if entry["kind"] == "semantics"]
    return {
        "judgements": len(runs),
        "probe seeds": sum(entry["seeds"] for entry in probes),
        "statuses": dict(sorted(Counter(entry["verdict"] for entry in runs).items())),
        "threads": sorted({entry["kind"].split(", ")[1] for entry in runs}),
        "attention": sorted({entry["kind"].split(", ")[2] for entry in runs}),
        "prompts": sorted({entry["kind"].split(", ")[3] for entry in runs}),
    }


def _margins(good: Sequence[Mapping[str, Any]], bad: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return for each criterion the worst right merge, and the wrong one that fails it by least."""
    margins: dict[str, Any] = {}
    for check, name in CRITERIA.items():
        right = [(entry["values"][check], _place(entry)) for entry in good if check in entry.get("values", {})]
        limit = 0.0 if check.startswith("storage") else 1e-4
        wrong = [
            (value, f"{entry['kind']}, {_place(entry)}")
            for entry in bad
            if isinstance(value := entry["values"].get(check), float | int) and value > limit
        ]
        margins[name] = {"right": max(right, default=None), "wrong": min(wrong, default=None), "limit": LIMITS[check]}
    probes = [entry for entry in good if entry["kind"] == "semantics"]
    margins["semantics, worst module"] = {
        "right": max(((entry["worst"], entry["adapter"]) for entry in probes), default=None),
        "wrong": min(
            ((entry["louder"], f"a factor read 2 % off, {entry['adapter']}") for entry in probes if entry["louder"]),
            default=None,
        ),
        "limit": "1e-6",
    }
    return margins


def read_numbers() -> Mapping[str, Any]:
    """Return the content of `tests/records/faults.json`."""
    content: Mapping[str, Any] = json.loads(NUMBERS.read_bytes())
    return content


def fault_rows() -> Iterator[tuple[str, ...]]:
    """Yield one row for each kind: its name, what was said, and in how many of the cases it was caught and named."""
    for kind, places in read_numbers()["wrong"].items():
        said = Counter(text.partition(": ")[2] for text in places.values() if not text.startswith("same bytes"))
        verdicts = Counter(text.partition(":")[0] for text in places.values())
        differ = len(places) - verdicts["same bytes"]
        names = "; ".join(f"`{name}`" + (f" ({count})" if len(said) > 1 else "") for name, count in said.most_common())
        yield kind, names, f"{differ - verdicts['MISSED']} of {differ}", f"{verdicts['named']} of {differ}"


def other_rows() -> Iterator[tuple[str, ...]]:
    """Yield one row for each merge that others made: who, the status, the diagnosis with its evidence."""
    for entry in read_numbers()["others"]:
        pairs = zip(entry["diagnoses"], entry["evidence"], strict=True)
        yield entry["maker"], entry["status"], " ".join(f"`{name}`: {text}" for name, text in pairs).replace("|", "\\|")


def margin_rows() -> Iterator[tuple[str, ...]]:
    """Yield one row for each criterion: the worst right merge, the least wrong one, the limit."""
    for name, row in sorted(read_numbers()["margins"].items()):
        right, wrong = row["right"], row["wrong"]
        yield (
            name,
            f"{right[0]:.2g} ({right[1]})" if right else "not run",
            f"{wrong[0]:.2g} ({wrong[1]})" if wrong else "not run",
            row["limit"],
        )


def right_rows() -> Iterator[tuple[str, ...]]:
    """Yield what was varied in judging right merges, and what came out."""
    content = read_numbers()
    for name, value in content["right"].items():
        shown = ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else value
        yield name, ", ".join(shown) if isinstance(shown, list) else str(shown)
    yield "false alarms", str(len(content["alarms"]))
