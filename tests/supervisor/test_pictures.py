"""The verdict as pictures: figures land where they belong, equal verdicts give equal bytes, names do nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from runner.protocol.figures import PromptRow
from runner.protocol.verdict import ERROR_BINS, ModuleRow, Status, Verdict
from runner.supervisor.documents.pictures import _grid, draw, picture_files
from runner.supervisor.documents.prompt_pictures import _plain, _shortened, draw_prompts


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
ERRORS = (10,) * 10 + (0,) * (ERROR_BINS - 10)


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
    other = draw(_verdict(*changed, errors=(*ERRORS[:10], 3, *ERRORS[11:])))
    assert all(left.png != right.png for left, right in zip(first, other, strict=True))


def test_the_texts_name_the_extremes() -> None:
    rows = (*ROWS, _row("lm_head", delta=0.3, retention=0.25))
    texts = {picture.name: picture.text for picture in draw(_verdict(*rows, errors=(*ERRORS[:10], 100, *ERRORS[11:])))}
    assert "0.3, lm_head" in texts["delta-ratio"]
    assert "0.25, lm_head" in texts["retention"]
    assert "0.5 of them are half a unit" in texts["rounding-error"]


def test_a_verdict_without_figures_has_no_pictures() -> None:
    assert draw(_verdict()) == ()
    assert draw(_verdict(_row("a.0.b", delta=float("nan")))) == ()
    assert draw(_verdict(errors=(0,) * ERROR_BINS)) == ()


@pytest.mark.parametrize("name", ["model.layers.0.$\\frac{", "a.0.<script>alert(1)</script>", "a.0." + "x" * 300])
def test_a_hostile_name_is_only_a_label(name: str) -> None:
    (picture, _) = draw(_verdict(_row(name), *ROWS))
    assert b"<script" not in picture.svg
    assert imread(io.BytesIO(picture.png), format="png").shape[1] > 600


def test_experts_are_one_row_and_numbered_places_are_told_apart() -> None:
    experts = [_row(f"model.layers.{layer}.mlp.experts.{e}.up_proj", delta=e) for layer in range(2) for e in range(4)]
    places = [_row(f"model.{part}.layers.{layer}.fc1") for part in ("encoder", "decoder") for layer in range(3)]
    (grid, other) = (_grid(rows) for rows in (experts, places))
    assert grid.kinds == ("mlp.experts.*.up_proj",)
    assert grid.values == [[1.5, 1.5]]
    assert other.kinds == ("decoder.layers: fc1", "encoder.layers: fc1")
    assert all(len(line) == 3 for line in other.values)


def _prompt(label: str, kl: float = 1e-4) -> PromptRow:
    curve = tuple(1e-3 * (1 + place % 3) for place in range(12))
    effect, floor = tuple(100 * value for value in curve), tuple(1e-3 * value for value in curve)
    return PromptRow(label=label, kl_mean_nats=kl, kl_base_mean_nats=0.5, error=curve, effect=effect, floor=floor)


def test_the_prompts_have_their_pictures_with_the_noise_floor() -> None:
    rows = [_prompt("What is <b>this</b> $\\frac{1}?"), _prompt("昨天下午下了一场大雨", kl=2e-3)]
    error, divergence = draw_prompts(rows)
    assert (error.name, divergence.name) == ("prompt-error", "divergence")
    assert "moves the logits by 0.2" in error.text
    assert "noise floor of 2e-06" in error.text
    assert "0.002 nats per token, where the base's is 0.5" in divergence.text
    assert draw_prompts(rows) == [error, divergence]
    assert _plain(1e-4, 0) == "0.0001"
    assert _shortened("昨天下午") == "(another script)"
    bare = [replace(row, floor=(), kl_mean_nats=0.0, error=(0.0,) * 12) for row in rows]
    assert "noise floor" not in draw_prompts(bare)[0].text
    assert draw_prompts([]) == []


def test_rounding_by_chance_shows_the_whole_unit() -> None:
    nearest, chance = (draw(_verdict(errors=errors))[0] for errors in (ERRORS, (10,) * 20 + (0,)))
    assert "0 of them are half a unit" in nearest.text
    assert "0.5 of them are half a unit" in chance.text
    assert nearest.png != chance.png


def test_a_model_with_very_many_kinds_of_modules_is_cut_and_says_so() -> None:
    rows = tuple(_row(f"model.layers.0.experts{number}.w") for number in range(60))
    title = draw(_verdict(*rows))[0]
    assert imread(io.BytesIO(title.png), format="png").shape[0] < 2200
