"""Wrong merges of a real model fail, each with its reason; the one never applied in `mode: verify`, as a process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from runner.judge.case import Case, open_case
from runner.judge.judge import judge_merge
from runner.protocol.verdict import Layer, Status
from tests.judge import faults
from tests.real.conftest import STRONG, WEAK, verify

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

HARD = {
    "not applied": faults.damage_adapter_not_applied,
    "scale × 1.02": faults.damage_scale,
    "one tensor skipped": faults.damage_tensor_skipped,
    "one layer skipped": faults.damage_layer_skipped,
    "applied twice": faults.damage_applied_twice,
    "rsLoRA read as LoRA": faults.damage_wrong_scaling_rule,
    "merged into an int8 base": faults.damage_int8_base,
    "two rows swapped": faults.damage_rows_swapped,
    "one mantissa bit": faults.damage_mantissa_bit,
    "a tensor zeroed": faults.damage_tensor_zeroed,
    "a missing shard": faults.damage_missing_shard,
}
CASES = [(STRONG, name) for name in HARD if name != "not applied"] + [
    (WEAK, name) for name in ("scale × 1.02", "one tensor skipped", "one mantissa bit")
]


@pytest.fixture(scope="module")
def open_cases(base: Path) -> Iterator[Callable[[Path], Case]]:
    """Return what gives the opened case of an adapter; each is opened once."""
    cases: dict[Path, Case] = {}
    with ExitStack() as stack:

        def give(adapter: Path) -> Case:
            if adapter not in cases:
                cases[adapter] = stack.enter_context(open_case(base, adapter, dtype="auto"))
            return cases[adapter]

        yield give


@pytest.mark.parametrize("adapter", [STRONG, WEAK], ids=["strong", "weak"])
def test_a_merge_that_was_never_applied_fails_the_action(
    adapter: Path, base: Path, merged: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(merged(adapter, "auto"), tmp_path / "bad")
    diagnosis = HARD["not applied"](folder, base, adapter)

    code, report = verify(base, adapter, folder, tmp_path, "auto")

    assert code == 8
    assert report["outputs"]["verified"] == "false"
    failed = [check for check in report["verdict"]["checks"] if check["outcome"] == "FAIL"]
    told = [f"{check['name']} {check['detail']}" for check in failed if Layer(check["layer"]) is diagnosis.layer]
    assert any(diagnosis.names in text for text in told), failed


@pytest.mark.parametrize("adapter,name", CASES, ids=[f"{adapter.name}-{name}" for adapter, name in CASES])
def test_a_wrong_merge_fails_with_the_right_reason(
    adapter: Path,
    name: str,
    base: Path,
    merged: Callable[[Path, str], Path],
    open_cases: Callable[[Path], Case],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(merged(adapter, "auto"), tmp_path / "bad")
    diagnosis = HARD[name](folder, base, adapter)
    assert diagnosis.layer in (Layer.STRUCTURE, Layer.STORAGE)

    # Its reason is in the files, so the models, which would take a minute, are not run.
    verdict = judge_merge(open_cases(adapter), folder, end_to_end=False)

    assert verdict.status is Status.FAIL
    told = [f"{check.name} {check.detail}" for check in verdict.failures if check.layer is diagnosis.layer]
    assert any(diagnosis.names in text for text in told), verdict.failures
