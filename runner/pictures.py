"""The verdict as pictures, for the report and the release: PNG and SVG by matplotlib, nothing shown on a screen.

Equal verdicts give equal bytes: no date, no random ids. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.verify.verdict import ERROR_BIN_ULPS, ERROR_BINS, ModuleRow, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_RETENTION = 0.9
_MAX_ROWS = 48  # kinds of modules in a heat map; a model with more is cut, and the title says so
_LABEL_LENGTH = 40
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "lora-merge-action", "svg.fonttype": "path",
    "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110,
    "text.parse_math": False,  # names come from files: a $ in one must not start a formula
}  # fmt: skip
_INK, _ACCENT, _ALARM = "#30475e", "#0072b2", "#d55e00"  # the last two are told apart by colour-blind readers


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture.

    Attributes:
        name: of its files, without a suffix.
        title: what it shows.
        text: the same in words, for those who do not see it.
        png: the picture as PNG.
        svg: the picture as SVG.
    """

    name: str
    title: str
    text: str
    png: bytes
    svg: bytes


def draw(verdict: Verdict) -> tuple[Picture, ...]:
    """Return the pictures of a verdict; what it has no figures for is left out."""
    rows = [row for row in verdict.modules if math.isfinite(row.delta_ratio) and math.isfinite(row.retention)]
    pictures = []
    if rows:
        pictures += [_delta_picture(rows), _retention_picture(rows)]
    if sum(verdict.rounding_errors):
        pictures.append(_rounding_picture(verdict.rounding_errors))
    return tuple(pictures)


def picture_files(pictures: Sequence[Picture], *, under: str = "") -> dict[str, bytes]:
    """Return the files of the pictures by path, PNG and SVG; `under` is put before each name."""
    files = {f"{under}{picture.name}.png": picture.png for picture in pictures}
    return files | {f"{under}{picture.name}.svg": picture.svg for picture in pictures}


def _delta_picture(rows: Sequence[ModuleRow]) -> Picture:
    grid = _grid(rows)
    title = "How much the adapter changes each weight: ‖ΔW‖ / ‖W‖"
    if grid.left_out:
        title += f"\n(the first {len(grid.kinds)} of {len(grid.kinds) + grid.left_out} kinds of modules)"
    largest = max(rows, key=lambda row: row.delta_ratio)
    height = 1.6 + 0.32 * len(grid.kinds)

    def paint(axes: Axes) -> None:
        image = axes.imshow(grid.values, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
        axes.set_yticks(range(len(grid.kinds)), [_shortened(kind) for kind in grid.kinds])
        if grid.layers > 1:
            axes.set_xlabel("layer")
        else:
            axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, ax=axes, format="%.2g")

    return _picture(
        "delta-ratio",
        title,
        f"Heat map of the norm of the change over the norm of the weight, {len(rows)} tensors. "
        f"The largest is {largest.delta_ratio:.3g}, {largest.name}.",
        (8.0, height),
        paint,
    )


def _retention_picture(rows: Sequence[ModuleRow]) -> Picture:
    placed = [(_place(row.name)[1], row.retention) for row in rows]
    lowest = min(rows, key=lambda row: row.retention)
    layers = sorted({layer for layer, _ in placed})
    means = [_mean([kept for where, kept in placed if where == layer]) for layer in layers]

    def paint(axes: Axes) -> None:
        where, kept = [layer for layer, _ in placed], [share for _, share in placed]
        axes.scatter(where, kept, s=14, color=_ACCENT, alpha=0.45, linewidths=0, label="one tensor")
        axes.plot(layers, means, color=_INK, linewidth=1.6, label="mean of the layer")
        axes.axhline(MIN_RETENTION, color=_ALARM, linewidth=1, linestyle="--", label=f"warned below {MIN_RETENTION}")
        axes.set_xlabel("layer (outside of all layers: −1)" if layers[0] < 0 else "layer")
        axes.set_ylabel("retention")
        bottom = 0.88 if lowest.retention > MIN_RETENTION else min(-0.02, 1.05 * lowest.retention)
        axes.set_ylim(bottom, max(1.01, 1.05 * max(kept) if max(kept) > 1.01 else 0))
        axes.legend(frameon=False, loc="best")

    return _picture(
        "retention",
        "What the output dtype kept of the adapter's change",
        f"Retention of {len(rows)} tensors by layer; 1 is everything. The lowest is {lowest.retention:.3g}, "
        f"{lowest.name}.",
        (8.0, 3.4),
        paint,
    )


def _rounding_picture(counts: Sequence[int]) -> Picture:
    total = sum(counts)
    shares = [count / total for count in counts]
    beyond = shares[ERROR_BINS - 1]
    edges = [ERROR_BIN_ULPS * number for number in range(ERROR_BINS)]

    def paint(axes: Axes) -> None:
        colours = [_ACCENT] * (ERROR_BINS - 1) + [_ALARM]
        axes.bar(edges, shares, width=0.92 * ERROR_BIN_ULPS, align="edge", color=colours)
        axes.axvline(0.5, color=_INK, linewidth=1, linestyle="--")
        axes.set_xticks([*edges[::2], 0.55], [*(f"{edge:.1f}" for edge in edges[::2]), "more"])
        axes.set_xlabel("|stored − exact|, in units in the last place (rounding once gives at most 0.5)")
        axes.set_ylabel("share of elements")

    return _picture(
        "rounding-error",
        "Distance of the stored elements from the exact sum",
        f"Histogram of the rounding errors of {total} sampled elements; {beyond:.3g} of them are beyond half a unit "
        "in the last place.",
        (8.0, 3.2),
        paint,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Values by kind of module (rows) and layer (columns); NaN where there is none."""

    kinds: tuple[str, ...]
    layers: int
    values: list[list[float]]
    left_out: int


def _grid(rows: Sequence[ModuleRow]) -> _Grid:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        kind, layer = _place(row.name)
        found.setdefault(kind, {})[max(layer, 0)] = row.delta_ratio
    kinds = sorted(found, key=lambda kind: (len(found[kind]) == 1, kind))[:_MAX_ROWS]
    layers = 1 + max(layer for kind in kinds for layer in found[kind])
    values = [[found[kind].get(layer, math.nan) for layer in range(layers)] for kind in kinds]
    return _Grid(kinds=tuple(kinds), layers=layers, values=values, left_out=len(found) - len(kinds))


def _place(module: str) -> tuple[str, int]:
    """Return a module's kind and its layer: ("self_attn.q_proj", 3), or (its path, -1) outside of all layers."""
    match = _LAYER.match(module)
    if match is None:
        return module, -1
    return match[3], int(match[2])


def _shortened(kind: str) -> str:
    return kind if len(kind) <= _LABEL_LENGTH else f"…{kind[-_LABEL_LENGTH:]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _picture(
    name: str, title: str, text: str, size_inches: tuple[float, float], paint: Callable[[Axes], None]
) -> Picture:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size_inches, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", fontsize=11)
        paint(axes)
        files = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            files[kind] = buffer.getvalue()
    return Picture(name=name, title=title.partition("\n")[0], text=text, png=files["png"], svg=files["svg"])
