"""The verdict as pictures, for the report and the release."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.protocol.verdict import ERROR_BIN_ULPS, ERROR_BINS, ModuleRow, Verdict
from runner.supervisor.documents.canvas import ACCENT, ALARM, INK, Picture, in_font, make_picture
from runner.supervisor.documents.prompt_pictures import draw_prompts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_RETENTION = 0.9
_MAX_ROWS = 48  # kinds of modules in a heat map; a model with more is cut, and the title says so
_LABEL_LENGTH = 40
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def draw(verdict: Verdict) -> tuple[Picture, ...]:
    """Return the pictures of a verdict; what it has no figures for is left out."""
    rows = [row for row in verdict.modules if math.isfinite(row.delta_ratio) and math.isfinite(row.retention)]
    pictures = []
    if rows:
        pictures += [_delta_picture(rows), _retention_picture(rows)]
    if sum(verdict.rounding_errors):
        pictures.append(_rounding_picture(verdict.rounding_errors))
    if verdict.quality is not None:
        pictures += draw_prompts(verdict.quality.prompts)
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
            _number_wholly(axes)
        else:
            axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, ax=axes, format="%.2g")

    return make_picture(
        "delta-ratio",
        title,
        f"Heat map of the norm of the change over the norm of the weight, {len(rows)} tensors. "
        f"The largest is {largest.delta_ratio:.3g}, {largest.name}.",
        (8.0, height),
        paint,
    )


def _retention_picture(rows: Sequence[ModuleRow]) -> Picture:
    placed = [(layer, row.retention) for row, (_, layer) in zip(rows, _places(rows), strict=True)]
    lowest = min(rows, key=lambda row: row.retention)
    layers = sorted({layer for layer, _ in placed})
    means = [_mean([kept for where, kept in placed if where == layer]) for layer in layers]

    def paint(axes: Axes) -> None:
        where, kept = [layer for layer, _ in placed], [share for _, share in placed]
        axes.scatter(where, kept, s=14, color=ACCENT, alpha=0.45, linewidths=0, label="one tensor")
        axes.plot(layers, means, color=INK, linewidth=1.6, label="mean of the layer")
        axes.axhline(MIN_RETENTION, color=ALARM, linewidth=1, linestyle="--", label=f"warned below {MIN_RETENTION}")
        axes.set_xlabel("layer (outside of all layers: −1)" if layers[0] < 0 else "layer")
        axes.set_ylabel("retention")
        _number_wholly(axes)
        bottom = 0.88 if lowest.retention > MIN_RETENTION else min(-0.02, 1.05 * lowest.retention)
        axes.set_ylim(bottom, max(1.01, 1.05 * max(kept) if max(kept) > 1.01 else 0))
        axes.legend(frameon=False, loc="best")

    return make_picture(
        "retention",
        "What the output dtype kept of the adapter's change",
        f"Retention of {len(rows)} tensors by layer; 1 is everything. The lowest is {lowest.retention:.3g}, "
        f"{lowest.name}.",
        (8.0, 3.4),
        paint,
    )


def _rounding_picture(counts: Sequence[int]) -> Picture:
    total = sum(counts)
    half = round(0.5 / ERROR_BIN_ULPS)
    beyond = sum(counts[half:]) / total
    # Rounding to the nearest leaves nothing beyond half a unit: then that half is shown, and one bar for what is more.
    shown = half if beyond < 0.01 else ERROR_BINS - 1
    shares = [count / total for count in (*counts[:shown], sum(counts[shown:]))]
    edges = [ERROR_BIN_ULPS * number for number in range(shown + 1)]

    def paint(axes: Axes) -> None:
        colours = [ACCENT if edge < 0.5 - 1e-9 or shown > half else ALARM for edge in edges[:-1]] + [ALARM]
        axes.bar(edges, shares, width=0.92 * ERROR_BIN_ULPS, align="edge", color=colours)
        axes.axvline(0.5, color=INK, linewidth=1, linestyle="--", label="the most that rounding to the nearest gives")
        step = 2 if shown == half else 4
        axes.set_xticks(
            [*edges[:-1:step], edges[-1] + ERROR_BIN_ULPS / 2], [*(f"{e:.1f}" for e in edges[:-1:step]), "more"]
        )
        axes.set_xlabel("|stored − exact|, in units in the last place")
        axes.set_ylabel("share of elements")
        axes.set_ylim(0, 1.25 * max(shares))
        axes.legend(frameon=False, loc="upper left")

    return make_picture(
        "rounding-error",
        "Distance of the stored elements from the exact sum",
        f"Histogram of the rounding errors of {total} sampled elements; {beyond:.3g} of them are half a unit in "
        "the last place away, or more.",
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
    """Return the rows' ratios by place; experts and other numbered parts of a layer are one row, by their mean."""
    found: dict[str, dict[int, list[float]]] = {}
    for row, (kind, layer) in zip(rows, _places(rows), strict=True):
        found.setdefault(kind, {}).setdefault(max(layer, 0), []).append(row.delta_ratio)
    kinds = sorted(found, key=lambda kind: (len(found[kind]) == 1, kind))[:_MAX_ROWS]
    layers = 1 + max(layer for kind in kinds for layer in found[kind])
    values = [[_mean(found[kind].get(layer, [math.nan])) for layer in range(layers)] for kind in kinds]
    return _Grid(kinds=tuple(kinds), layers=layers, values=values, left_out=len(found) - len(kinds))


def _places(rows: Sequence[ModuleRow]) -> list[tuple[str, int]]:
    """Return each module's kind and layer: ("self_attn.q_proj", 3), or (its path, -1) outside of all layers.

    Where layers are numbered in several places (encoder and decoder, vision and language), the place is in the kind.
    """
    matches = [_LAYER.match(row.name) for row in rows]
    stems = {match[1] for match in matches if match is not None}
    common = _common([stem.split(".") for stem in stems])
    found = []
    for row, match in zip(rows, matches, strict=True):
        if match is None:
            found.append((row.name, -1))
            continue
        kind = _NUMBER.sub(".*", f".{match[3]}")[1:]
        where = ".".join(match[1].split(".")[common:])
        found.append((f"{where}: {kind}" if len(stems) > 1 else kind, int(match[2])))
    return found


def _common(paths: Sequence[Sequence[str]]) -> int:
    """Return how many parts all paths begin with together; at least one part of each is left."""
    count = 0
    while all(len(path) > count + 1 for path in paths) and len({path[count] for path in paths}) == 1:
        count += 1
    return count


def _number_wholly(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _shortened(kind: str) -> str:
    kind = in_font(kind)
    return kind if len(kind) <= _LABEL_LENGTH else f"…{kind[1 - _LABEL_LENGTH :]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
