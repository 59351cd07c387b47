"""docs/coverage.md is what the tests' case tables and the method table say, and its check notices when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.files.adapter.methods import METHODS
from tools import coverage
from tools.suites import read_suites


def test_the_page_is_up_to_date() -> None:
    assert coverage.main(["--check"]) == 0


def test_a_page_that_lacks_a_case_or_a_number_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = coverage.PAGE.read_text("utf-8")
    monkeypatch.setattr(coverage, "PAGE", tmp_path / "coverage.md")
    assert coverage.main(["--check"]) == 1
    coverage.PAGE.write_text(text.replace("| `dora` |", "| `other` |"), "utf-8")
    assert coverage.main(["--check"]) == 1
    coverage.PAGE.write_text(text, "utf-8")
    monkeypatch.setattr(coverage, "NUMBERS", tmp_path / "exactness.json")
    assert coverage.main(["--check"]) == 1


def test_every_suite_with_a_case_table_and_every_refused_method_is_on_the_page() -> None:
    text = coverage.PAGE.read_text("utf-8")
    suites = read_suites()
    assert sum(len(suite.cases) for suite in suites) > 150
    for suite in suites:
        assert f"### {suite.file}\n" in text
        assert all(f"| `{name}` |" in text for name in suite.cases)
    for name, method in METHODS.items():
        assert (f"| `peft_type`: `{name}` | {method.refusal} |" in text) == bool(method.refusal)
