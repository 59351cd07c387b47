"""Draw wall time and peak resident memory against the size of the base: `python plot.py RUNS.json PLOT.svg|png`.

Runs in an environment of its own (`plot` of `python -m bench.peers setup`), so it imports nothing of this project.
Colours are those of Okabe and Ito, which people with any colour vision can tell apart; markers say it again.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

STYLES = {
    "lora-merge-action": ("#D55E00", "o"), "PEFT": ("#0072B2", "s"), "mergekit": ("#009E73", "^"),
    "axolotl": ("#CC79A7", "D"), "LLaMA-Factory": ("#E69F00", "v"), "ms-swift": ("#56B4E9", "P"),
    "unsloth": ("#000000", "X"), "copy, then sha256": ("#777777", None), "cp": ("#BBBBBB", None),
}  # fmt: skip
OURS = "lora-merge-action"
Figure = Callable[[list[dict[str, Any]]], float]


def main() -> None:
    """Read the runs and write the picture."""
    cases = [case for case in json.loads(Path(sys.argv[1]).read_text())["cases"] if len(case["targets"]) == 7]
    mpl.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "path", "font.size": 10, "axes.titlesize": 11})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    wall: Figure = lambda runs: statistics.median(run["wall_s"] for run in runs)  # noqa: E731
    resident: Figure = lambda runs: max(run["resident_bytes"] for run in runs) / 1e9  # noqa: E731
    draw(left, cases, wall, "Wall time, imports included (s)")
    draw(right, cases, resident, "Peak resident memory, file pages included (GB)", copies=False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    metadata = {"Date": None} if sys.argv[2].endswith(".svg") else {}
    figure.savefig(sys.argv[2], dpi=110, metadata=metadata)


def draw(axes: Axes, cases: list[dict[str, Any]], figure: Figure, title: str, *, copies: bool = True) -> None:
    """Draw one line for each contestant that succeeded anywhere."""
    for name, (colour, marker) in STYLES.items():
        points = [
            (case["base_bytes"] / 1e9, figure(case["results"][name]["runs"]))
            for case in cases
            if case["results"].get(name, {}).get("runs")
        ]
        if not points or (marker is None and not copies):
            continue
        ours, copy = name == OURS, marker is None
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, marker=marker, label=name,
            linewidth=2.6 if ours else 1.3, markersize=7 if ours else 5,
            linestyle="--" if copy else "-", zorder=3 if ours else 2,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="Size of the bf16 base (GB)")
    axes.set_title(title, loc="left")
    sizes = [case["base_bytes"] / 1e9 for case in cases]
    axes.set_xticks(sizes, [f"{size:.1f}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_tick_params(which="minor", length=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(visible=True, which="major", color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
