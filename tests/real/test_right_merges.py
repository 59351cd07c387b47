"""Right merges of a real model pass, with an adapter of strong and one of weak effect, in every dtype.

Each judgement of a right one is `mode: verify` as a process. The weak adapter is the hard case: its greedy text is the
base's, and bf16 keeps half a percent of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runner.judge.case import open_case
from runner.judge.judge import judge_merge
from runner.protocol.combination import Combination, Several
from runner.protocol.verdict import Layer, Status
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.real.conftest import STRONG, WEAK, verify

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
@pytest.mark.parametrize("adapter", [STRONG, WEAK], ids=["strong", "weak"])
def test_a_right_merge_passes(
    adapter: Path, dtype: str, base: Path, merged: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    code, report = verify(base, adapter, merged(adapter, dtype), tmp_path, dtype)

    outputs = report["outputs"]
    assert code == 0
    assert outputs["verified"] == "true"
    assert outputs["storage-violations"] == "0"
    assert float(outputs["max-probe-error"]) < 1e-8
    assert outputs["status"] == ("PASS_LOSSY" if float(outputs["retention"]) < 0.9 else "PASS")
    assert float(outputs["retention"]) == pytest.approx(1.0, abs=0.01) or adapter == WEAK


@pytest.fixture(scope="module")
def combined(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the merge of the strong adapter, less half of the weak one."""
    combination = Combination(kind="cat", weights=(1.0, -0.5))
    prepared = prepare(base, STRONG, WEAK, dtype="auto", combination=combination)
    return merge(prepared, into=tmp_path_factory.mktemp("combined") / "merged").root


def test_a_right_merge_of_two_adapters_passes(base: Path, combined: Path, tmp_path: Path) -> None:
    code, report = verify(base, f"{STRONG}\n{WEAK} -0.5", combined, tmp_path, "auto", "--combination", "cat")

    assert code == 0
    assert report["outputs"]["verified"] == "true"


def test_a_merge_of_two_adapters_with_another_weight_fails(base: Path, combined: Path) -> None:
    told = Several(paths=(STRONG, WEAK), combination=Combination(kind="cat", weights=(1.0, -0.51)))

    with open_case(base, told, dtype="auto") as case:
        verdict = judge_merge(case, combined, end_to_end=False)  # the files alone fail it

    assert verdict.status is Status.FAIL
    assert {check.layer for check in verdict.failures} == {Layer.STORAGE}
