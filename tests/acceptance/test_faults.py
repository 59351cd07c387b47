"""A sample of the table of faults, run as in docs/faults.md: the whole action as a process, over real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.action import Stage
from tests.acceptance.cases import CASES, PROTOCOLS, SAMPLE, Protocol
from tests.acceptance.table import run_case
from tests.acceptance.warmth import ROOT

BY_NAME = {case.name: case for case in CASES}


def test_the_table_has_at_least_forty_faults_for_each_protocol() -> None:
    assert len(BY_NAME) == len(CASES)
    for protocol in PROTOCOLS:
        assert sum(protocol in case.only for case in CASES) >= 40


def test_the_document_has_a_row_for_every_case_and_none_besides() -> None:
    lines = (ROOT / "docs" / "faults.md").read_text("utf-8").splitlines()
    rows = [tuple(line.split(" | ")[:2]) for line in lines if line.startswith("| ")][2:]

    assert rows == [(f"| {case.step}", case.fault) for case in CASES], "run `python -m tools.faults`"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_fault_ends_in_the_release_or_in_a_clear_error_and_a_rerun_releases(
    name: str, protocol: Protocol, stage: Stage, merged_digest: str, tmp_path: Path
) -> None:
    assert run_case(stage, BY_NAME[name], protocol, tmp_path / "case", merged_digest).wrong == ()
