"""What the prompts show, as pictures: the error along them beside the adapter's effect, and the divergence on each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runner.protocol.figures import PromptRow
from runner.supervisor.documents.canvas import ACCENT, ALARM, INK, PALE, Picture, in_font, make_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL_LENGTH = 34


def draw_prompts(rows: Sequence[PromptRow]) -> list[Picture]:
    """Return the pictures of the prompts; what there are no figures for is left out."""
    pictures = []
    if any(row.error and row.effect for row in rows):
        pictures.append(_error_picture(rows))
    known = [row for row in rows if math.isfinite(row.kl_mean_nats) and math.isfinite(row.kl_base_mean_nats)]
    if known:
        pictures.append(_divergence_picture(known))
    return pictures


def _error_picture(rows: Sequence[PromptRow]) -> Picture:
    effect, error = _median([row.effect for row in rows]), _median([row.error for row in rows])
    floor = _median([row.floor for row in rows])

    def paint(axes: Axes) -> None:
        for row in rows:
            axes.plot(_drawable(row.error), color=ACCENT, linewidth=0.7, alpha=0.3)
        axes.plot(_drawable(effect), color=PALE, linewidth=2, label="what the adapter does (base − unmerged)")
        axes.plot(_drawable(error), color=ACCENT, linewidth=2, label="error of the merge (merged − unmerged)")
        if floor:
            axes.plot(
                _drawable(floor), color=ALARM, linewidth=1.4, linestyle="--", label="noise floor of the arithmetic"
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
        axes.set_xlabel("position in the prompt")
        axes.set_ylabel("rms, over the logits' spread")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
        axes.legend(frameon=False, loc="upper right", fontsize=9)

    middle = [statistic(curve) for curve in (effect, error)]
    return make_picture(
        "prompt-error",
        f"Logit error along the prompt\n(median of {len(rows)} prompts; thin lines: each of them)",
        f"Curves over the positions of {len(rows)} prompts. In the median the adapter moves the logits by "
        f"{middle[0]:.3g} of their spread, and the merge is off by {middle[1]:.3g}"
        + (f", with a noise floor of {statistic(floor):.3g}." if floor else "."),
        (8.0, 3.8),
        paint,
    )


def _divergence_picture(rows: Sequence[PromptRow]) -> Picture:
    smallest = min([row.kl_mean_nats for row in rows if row.kl_mean_nats > 0], default=1e-12)
    worst = max(rows, key=lambda row: row.kl_mean_nats)

    def paint(axes: Axes) -> None:
        places = range(len(rows))
        axes.barh(
            [place - 0.2 for place in places], [row.kl_base_mean_nats for row in rows], 0.38, color=PALE, label="base"
        )
        axes.barh(
            [place + 0.2 for place in places], [row.kl_mean_nats for row in rows], 0.38, color=ACCENT, label="merged"
        )
        axes.set_yticks(
            list(places), [f"{_shortened(row.label)}  {number}" for number, row in enumerate(rows, start=1)]
        )
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(_plain)
        axes.set_xlim(left=smallest / 3)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("KL from the unmerged model, nats per token (log scale)")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)

    return make_picture(
        "divergence",
        "How far base and merged model are from the unmerged one\n",
        f"Bars of the KL divergence on {len(rows)} prompts. The merged model's largest is {worst.kl_mean_nats:.3g} "
        f"nats per token, where the base's is {worst.kl_base_mean_nats:.3g}.",
        (8.0, 1.5 + 0.42 * len(rows)),
        paint,
    )


def statistic(curve: Sequence[float]) -> float:
    """Return the median of the finite values; NaN for none."""
    known = sorted(value for value in curve if math.isfinite(value))
    return known[len(known) // 2] if known else math.nan


def _median(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the median at each position over those curves that reach it."""
    length = max((len(curve) for curve in curves), default=0)
    return [statistic([curve[place] for curve in curves if len(curve) > place]) for place in range(length)]


def _drawable(curve: Sequence[float]) -> list[float]:
    return [value if value > 0 else math.nan for value in curve]  # a log scale has no zero


def _plain(value: float, _place: float) -> str:
    """Return a number on a log scale without the formula that matplotlib writes, which is switched off for names."""
    return f"{value:g}"


def _shortened(label: str) -> str:
    line = in_font(" ".join(label.split()))
    if 2 * line.count("·") > len(line):
        return "(another script)"
    return line if len(line) <= _LABEL_LENGTH else f"{line[: _LABEL_LENGTH - 1]}…"
