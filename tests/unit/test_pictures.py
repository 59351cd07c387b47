"""The verdict as pictures: figures land where they belong, equal verdicts give equal bytes, names do nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from runner.pictures import draw, picture_files
from runner.verify.verdict import ERROR_BINS, ModuleRow, Status, Verdict


def _row(name: str, *, delta: float = 0.01, retention: float = 0.99) -> ModuleRow:
    return ModuleRow(name=name, tensor=f"{name}.weight", probe_error=0.0, delta_ratio=delta, retention=retention)


def _verdict(*rows: ModuleRow, errors: tuple[int, ...] = ()) -> Verdict:
    return Verdict(
        status=Status.PASS, checks=(), modules=rows, rounding_errors=errors, quality=None, continuations=(), seed=0,
        wall_s=1.0,
    )  # fmt: skip


ROWS = tuple(
    _row(f"model.layers.{layer}.{kind}")
    for layer in range(4)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
)
ERRORS = (10,) * (ERROR_BINS - 1) + (0,)


def test_every_picture_is_a_png_and_an_svg_that_programs_can_read() -> None:
    pictures = draw(_verdict(*ROWS, errors=ERRORS))
    assert [picture.name for picture in pictures] == ["delta-ratio", "retention", "rounding-error"]
    for picture in pictures:
        height, width, _ = imread(io.BytesIO(picture.png), format="png").shape
        assert height > 200
        assert width > 600
        assert ElementTree.fromstring(picture.svg).tag.endswith("svg")  # noqa: S314  (our own bytes)
    assert set(picture_files(pictures)) == {f"{p.name}.{kind}" for p in pictures for kind in ("png", "svg")}


def test_equal_verdicts_give_equal_bytes_and_a_changed_figure_changes_them() -> None:
    first = draw(_verdict(*ROWS, errors=ERRORS))
    assert draw(_verdict(*ROWS, errors=ERRORS)) == first
    changed = (*ROWS[:-1], replace(ROWS[-1], delta_ratio=0.02, retention=0.5))
    other = draw(_verdict(*changed, errors=(*ERRORS[:-1], 3)))
    assert all(left.png != right.png for left, right in zip(first, other, strict=True))


def test_the_texts_name_the_extremes() -> None:
    rows = (*ROWS, _row("lm_head", delta=0.3, retention=0.25))
    texts = {picture.name: picture.text for picture in draw(_verdict(*rows, errors=(*ERRORS[:-1], 100)))}
    assert "0.3, lm_head" in texts["delta-ratio"]
    assert "0.25, lm_head" in texts["retention"]
    assert "0.5 of them are beyond half a unit" in texts["rounding-error"]


def test_a_verdict_without_figures_has_no_pictures() -> None:
    assert draw(_verdict()) == ()
    assert draw(_verdict(_row("a.0.b", delta=float("nan")))) == ()
    assert draw(_verdict(errors=(0,) * ERROR_BINS)) == ()


@pytest.mark.parametrize("name", ["model.layers.0.$\\frac{", "a.0.<script>alert(1)</script>", "a.0." + "x" * 300])
def test_a_hostile_name_is_only_a_label(name: str) -> None:
    (picture, _) = draw(_verdict(_row(name), *ROWS))
    assert b"<script" not in picture.svg
    assert imread(io.BytesIO(picture.png), format="png").shape[1] > 600


def test_a_model_with_very_many_kinds_of_modules_is_cut_and_says_so() -> None:
    rows = tuple(_row(f"model.layers.0.experts{number}.w") for number in range(60))
    title = draw(_verdict(*rows))[0]
    assert imread(io.BytesIO(title.png), format="png").shape[0] < 2200
