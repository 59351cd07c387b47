"""The mutation run of the judge: what is asked, what is kept, and what is told of a survivor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.mutants import ALIVE, CLASSES, MODULES, NUMBERS, Result, kind_of, result_of, results
from tools.mutations import ROOT, Mutant, code_of, mutants

WHY = "words: only the log says so"


def _find(module: str, function: str, change: str) -> Mutant:
    return next(one for one in mutants(module) if (one.function, one.change) == (function, change))


def _entry(mutant: Mutant, by: str, **fields: Any) -> Result:
    return {"by": by, "line": mutant.line, "code": mutant.code, **fields}


def test_one_run_asks_what_is_not_known_and_keeps_what_is(tmp_path: Path) -> None:
    killed = _find("tensors", "read_bytes", "condition negated")  # the file that ends too early
    unexplained, explained = _find("tensors", "row_blocks", "1 to 2"), _find("tensors", "row_blocks", "0 to 1")
    stale, open_to_all = _find("tensors", "read_rows", "condition negated"), _find("tensors", "ulp", "0 to 1")
    entries = {one.name: _entry(one, "some::test") for one in mutants("tensors") if one != killed} | {
        unexplained.name: _entry(unexplained, "survived", why="because"),
        explained.name: _entry(explained, "survived", why=WHY),
        stale.name: _entry(stale, "survived", why=WHY) | {"code": "if False:"},
        "tensors.gone #1: 1 to 2": _entry(killed, "survived", why=WHY),
    }
    file = tmp_path / "results.json"
    file.write_text(json.dumps(entries))
    options = ["--modules", "tensors", "--tests", "tensors", "--again", "--file", str(file)]

    done = subprocess.run(
        [sys.executable, "-m", "tools.mutants", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_bytes())
    assert found[killed.name]["by"].startswith("tests/judge/test_tensors.py::")
    assert found[unexplained.name]["by"] != "survived"  # its reason is of no class: it was asked again
    assert found[explained.name] == _entry(explained, "survived", why=WHY)
    assert found[stale.name]["by"].startswith("tests/judge/test_tensors.py::")
    assert found[open_to_all.name]["by"] == "some::test"
    assert found.keys() == {one.name for one in mutants("tensors")}


def test_an_explanation_lasts_as_long_as_the_mutant_survives() -> None:
    mutant = _find("judge", "decide", "condition negated")
    before = _entry(mutant, "survived", why=WHY)

    assert result_of(mutant, "not run", before) == _entry(mutant, "not run", why=WHY)
    assert result_of(mutant, "a::test", before) == _entry(mutant, "a::test")
    assert result_of(mutant, "survived", before | {"code": "other"}) == _entry(mutant, "survived")
    assert result_of(mutant, "survived", None) == _entry(mutant, "survived")


@pytest.mark.parametrize(
    "by, why, kind",
    [
        ("survived", "stricter: it fails more", "stricter"),
        ("not run", "equivalent: nothing differs", "equivalent"),
        ("survived", "weaker: it passes more", "unexplained"),
        ("survived", None, "unexplained"),
        ("a::test", None, "killed"),
        ("timeout", None, "killed"),
    ],
)
def test_a_survivor_is_explained_by_a_reason_of_a_known_class_only(by: str, why: str | None, kind: str) -> None:
    assert kind_of({"by": by} if why is None else {"by": by, "why": why}) == kind


def test_every_survivor_on_record_is_explained() -> None:
    found = results(NUMBERS)
    assert found
    for name, result in found.items():
        if result["by"] in ALIVE:
            assert kind_of(result) in CLASSES, name
            assert len(result["why"].partition(": ")[2]) > 10, name


def test_every_change_can_be_made() -> None:
    for module in MODULES:
        assert all(code_of(one).co_name == one.function.rpartition(".")[2] for one in list(mutants(module))[:5])
