"""Right merges of a real model pass, with an adapter of strong and one of weak effect, in every dtype.

Each judgement is `mode: verify` as a process. The weak adapter is the hard case: its greedy text is the base's, and
bf16 keeps half a percent of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runner.combination import Combination
from runner.merge import merge
from runner.prepare import prepare
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


@pytest.mark.parametrize("weight, code", [("-0.5", 0), ("-0.51", 8)])
def test_a_right_merge_of_two_adapters_passes_and_another_weight_fails(
    weight: str, code: int, base: Path, tmp_path: Path
) -> None:
    combination = Combination(kind="cat", weights=(1.0, -0.5))
    merged = merge(prepare(base, STRONG, WEAK, dtype="auto", combination=combination), into=tmp_path / "merged").root

    found, report = verify(
        base, f"{STRONG}\n{WEAK} {weight}", merged, tmp_path / "report", "auto", "--combination", "cat"
    )

    assert found == code
    assert report["outputs"]["verified"] == str(code == 0).lower()
