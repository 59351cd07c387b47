"""The runs as Markdown tables, and a page with them, their plot and their raw figures."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from bench.contestants import COPY_AND_HASH, OURS, PEFT
from bench.peers import PEERS, PLOT, python_of

BEGIN, END = "<!-- bench: merge -->", "<!-- end bench -->"
PLOT_PROGRAM = Path(__file__).resolve().parent / "plot.py"
HEAD = (
    "| | runs | wall s | min–max | after imports s | CPU s | peak anonymous MB | peak resident MB | read GB "
    "| written GB | elements that differ |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def tables(document: dict[str, Any]) -> str:
    """Return one table for each case."""
    return "\n\n".join(_case(case) for case in document["cases"])


def write_page(page: Path, document: dict[str, Any]) -> None:
    """Replace what stands between the markers of `page`; the raw runs and the plot go beside it as .json and .svg.

    Raises:
        SystemExit: the page has no markers.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} needs {BEGIN} and {END}, once each.")
    raw, plot = page.with_suffix(".json"), page.with_suffix(".svg")
    raw.write_text(json.dumps(document, indent=1) + "\n")
    if python_of(PLOT).exists():
        subprocess.run([str(python_of(PLOT)), "-P", str(PLOT_PROGRAM), str(raw), str(plot)], check=True)
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{_page(document, raw.name, plot.name)}\n{END}{after}")


def _page(document: dict[str, Any], raw: str, plot: str) -> str:
    machine = document["machine"]
    parts = [
        f"```\n{document['command']}\n```",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB of memory, Linux {machine['kernel']}, "
        f"Python {machine['python']}; commit {machine['commit']}. Every run: [{raw}]({raw}).",
        f"![Wall time and peak resident memory against the size of the base]({plot})",
        "### Ratios",
        ratios(document),
        tables(document),
        "### Versions",
        _versions(machine),
    ]
    return "\n\n".join(parts)


def ratios(document: dict[str, Any]) -> str:
    """Return the targets beside what was reached, one row for each case."""
    lines = [
        "| base | ours ÷ copy and sha256, both after imports | PEFT ÷ ours, end to end | fastest other peer ÷ ours "
        "| leanest peer ÷ ours, resident | ours, peak resident MB | ours, imports and plan s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in document["cases"]:
        results = case["results"]
        ours, peft = _median(results, OURS, "wall_s"), _median(results, PEFT, "wall_s")
        after, copy = (_median(results, name, "after_imports_s") for name in (OURS, COPY_AND_HASH))
        resident = _most(results, OURS, "resident_bytes")
        peers = [peer.name for peer in PEERS]
        fastest = min((wall for name in peers if (wall := _median(results, name, "wall_s"))), default=None)
        leanest = min(
            (most for name in (PEFT, *peers) if (most := _most(results, name, "resident_bytes"))), default=None
        )
        figures = (_ratio(after, copy), _ratio(peft, ours), _ratio(fastest, ours), _ratio(leanest, resident))
        megabytes = f"{resident / 1e6:.0f}" if resident else "-"
        lines.append(f"| {_title(case)} | {' | '.join(figures)} | {megabytes} | {_start_up(results)} |")
    return "\n".join(lines)


def _case(case: dict[str, Any]) -> str:
    lines = [f"### {_title(case)}, {_count(case['shards'], 'shard')}\n", HEAD]
    for name, result in case["results"].items():
        if result.get("failure") or not result["runs"]:
            lines.append(f"| {name} | {result.get('failure', 'did not run')} | | | | | | | | | |")
        else:
            lines.append(_row(name, result))
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _title(case: dict[str, Any]) -> str:
    targets = "all linear layers" if len(case["targets"]) == 7 else " and ".join(case["targets"])
    return f"{case['base_bytes'] / 1e9:.2f} GB, r={case['r']} on {targets}"


def _row(name: str, result: dict[str, Any]) -> str:
    runs = result["runs"]
    walls = [run["wall_s"] for run in runs]
    afters = [run["after_imports_s"] for run in runs if run["after_imports_s"] is not None]
    shown = f"**{name}**" if name == OURS else name
    return (
        f"| {shown} | {len(runs)} | {statistics.median(walls):.2f} | {min(walls):.2f}–{max(walls):.2f} "
        f"| {f'{statistics.median(afters):.2f}' if afters else '-'} "
        f"| {statistics.median(run['cpu_s'] for run in runs):.1f} "
        f"| {max(run['anonymous_bytes'] for run in runs) / 1e6:.0f} "
        f"| {max(run['resident_bytes'] for run in runs) / 1e6:.0f} "
        f"| {max(run['read_bytes'] for run in runs) / 1e9:.2f} "
        f"| {max(run['written_bytes'] for run in runs) / 1e9:.2f} | {_difference(result)} |"
    )


def _difference(result: dict[str, Any]) -> str:
    difference = result.get("difference")
    if difference is None:
        return "-"
    adapted, differing = difference["adapted_elements"], difference["differing_elements"]
    share = f"{differing / adapted:.2%}" if differing and adapted else "0"
    if differing and share == "0.00%":
        share = f"{differing} of {adapted}"
    said = [
        f"{len(difference[kind])} tensors {word}" for kind, word in (("lost", "lost"), ("spoilt", "spoilt"))
        if difference[kind]
    ]  # fmt: skip
    if difference["dtypes"]:
        said.append("as " + ", ".join(difference["dtypes"]))
    return "; ".join([share, *said])


def _versions(machine: dict[str, Any]) -> str:
    lines = ["| | what runs | versions |", "|---|---|---|"]
    lines.append(f"| {OURS}, {PEFT} | `merge` of this tree; `merge_and_unload` | {_list(machine['versions'])} |")
    for peer in PEERS:
        versions = machine["peers"].get(peer.name)
        if versions:
            lines.append(f"| {peer.name} | {peer.runs} | {_list(versions)} |")
        else:
            lines.append(f"| {peer.name} | {peer.runs} | {peer.cannot or 'not set up where this was measured'} |")
    return "\n".join(lines)


def _list(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _start_up(results: dict[str, Any]) -> str:
    """Return how long ours takes until it reads the first weight."""
    runs = [run for run in results.get(OURS, {"runs": []})["runs"] if run["plan_s"] is not None]
    seconds = [run["wall_s"] - run["after_imports_s"] + run["plan_s"] for run in runs]
    return f"{statistics.median(seconds):.1f}" if seconds else "-"


def _median(results: dict[str, Any], name: str, figure: str) -> float | None:
    figures = [run[figure] for run in results.get(name, {"runs": []})["runs"] if run[figure] is not None]
    return statistics.median(figures) if figures else None


def _most(results: dict[str, Any], name: str, figure: str) -> float | None:
    return max((run[figure] for run in results.get(name, {"runs": []})["runs"]), default=None)


def _ratio(above: float | None, below: float | None) -> str:
    return f"{above / below:.2f}" if above and below else "-"
