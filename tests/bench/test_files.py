"""Every damage of the files of ten layouts is caught and named by its file, and no untouched folder fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.faults.files import a_hub, judge_damages
from bench.faults.layouts import LAYOUTS, write_layout

FEWEST = 50  # of each layout: 500 in all
ON_A_HUB = ("Marian", "sentence-transformers")  # all ten: `python -m bench.faults.files --hub`


def test_there_are_ten_layouts() -> None:
    assert len(LAYOUTS) == 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_damage_is_caught_and_named(layout: str, tmp_path: Path) -> None:
    results = list(judge_damages(layout, write_layout(layout, tmp_path / "base"), tmp_path))
    assert [result for result in results if not (result.is_caught and result.is_named)] == []
    assert len(results) >= FEWEST


@pytest.mark.parametrize("layout", ON_A_HUB)
def test_a_repository_is_judged_as_its_folder_is(layout: str, tmp_path: Path) -> None:
    with a_hub(tmp_path) as on_hub:
        results = list(judge_damages(layout, write_layout(layout, tmp_path / "base"), tmp_path, on_hub))
    assert [result for result in results if result.problem] == []
    assert len(results) >= FEWEST
