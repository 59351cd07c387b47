"""What another dtype would keep is what a merge in that dtype does keep, and what it cannot hold is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.judge.judge import judge
from runner.judge.numbers.alternatives import Gauge, advice, alternatives
from runner.protocol.figures import Alternative
from runner.protocol.rounding import NEAREST, STOCHASTIC
from tests.judge.merges import save_merge


@pytest.fixture(scope="module")
def found(weak: tuple[Path, Path, Path]) -> dict[tuple[str, str], Alternative]:
    base, adapter, merged = weak
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    return {(other.dtype, other.rounding): other for other in verdict.alternatives}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_estimate_is_what_a_merge_in_that_dtype_keeps(
    weak: tuple[Path, Path, Path], tmp_path: Path, found: dict[tuple[str, str], Alternative], dtype: str
) -> None:
    base, adapter, _ = weak
    merged = save_merge(tmp_path / "merged", base, adapter, dtype=dtype)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype=dtype)
    assert verdict.quality is not None
    assert found[dtype, NEAREST].retention == pytest.approx(verdict.quality.retention, abs=1e-5)
    assert verdict.alternatives == () or dtype == "float16"
    assert found["auto", STOCHASTIC].retention == 1.0


def test_the_range_is_that_of_all_tensors(
    weak: tuple[Path, Path, Path], found: dict[tuple[str, str], Alternative]
) -> None:
    from safetensors.torch import load_file

    merged = weak[2]
    values = torch.cat([t.float().flatten() for path in merged.glob("*.safetensors") for t in load_file(path).values()])
    half = found["float16", NEAREST]
    assert half.largest == float(values.abs().max())
    assert half.subnormal == int(((values.abs() < 2.0**-14) & (values != 0)).sum())


def test_a_value_beyond_float16_is_told() -> None:
    gauge = Gauge()
    gauge.look(torch.tensor([1.0, -70000.0, float("inf"), 1e-6, 0.0]))
    (half, single, drawn) = alternatives([gauge], delta_squared=1.0, dtypes=["BF16"])
    assert (half.fits, half.retention, half.largest, half.subnormal) == (False, None, 70000.0, 1)
    text = advice((half, single, drawn))
    assert "cannot hold it: 70000 is beyond 65504" in text
    assert "rounding: stochastic" in text
    assert alternatives([gauge], delta_squared=1.0, dtypes=["F32"]) == ()
