"""One picture as PNG and SVG by matplotlib, nothing shown on a screen.

Equal figures give equal bytes: no date, no random ids. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "lora-merge-action", "svg.fonttype": "path",
    "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110,
    "text.parse_math": False,  # names come from files: a $ in one must not start a formula
}  # fmt: skip
INK, ACCENT, ALARM, PALE = "#30475e", "#0072b2", "#d55e00", "#9aa5b1"  # told apart by colour-blind readers


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


def in_font(text: str) -> str:
    """Return a text as the font of the pictures can show it, which has no Chinese, say: what it has not is a dot."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont(_STYLE["font.family"])).get_charmap()
    return "".join(letter if ord(letter) in known else "·" for letter in text)


def make_picture(
    name: str, title: str, text: str, size_inches: tuple[float, float], paint: Callable[[Axes], None]
) -> Picture:
    """Return a picture.

    Args:
        name: of its files.
        title: shown above it; after a line break, what does not belong in a link.
        text: the same in words.
        size_inches: width and height.
        paint: draws on the axes.
    """
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
