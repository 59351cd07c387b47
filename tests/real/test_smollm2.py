"""A real model and two real adapters, one of strong and one of weak effect: merged, judged, damaged, judged again.

The model is the one that `make demo` builds (SmolLM2-135M-Instruct); each judgement is `mode: verify` as a process.
The weak adapter is the hard case: its greedy text is the base's, and bf16 keeps half a percent of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from demo.smollm2 import build
from runner.merge import merge
from runner.prepare import prepare
from runner.verify.verdict import Layer
from tests.verify import faults

ROOT = Path(__file__).resolve().parent.parent.parent
STRONG, WEAK = ROOT / "demo" / "adapter", ROOT / "demo" / "adapter-weak"

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.fixture(scope="session")
def base() -> Path:
    return build(ROOT / ".demo" / "smollm2", cache=ROOT / ".demo" / "cache")


@pytest.fixture(scope="session")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """Return what gives the right merge of an adapter in a dtype; each is made once."""
    folder = tmp_path_factory.mktemp("merged")

    def give(adapter: Path, dtype: str) -> Path:
        out = folder / f"{adapter.name}-{dtype}"
        return out if out.exists() else merge(prepare(base, adapter, dtype=dtype), into=out).root

    return give


def _verify(base: Path, adapter: Path, merged: Path, report_dir: Path, dtype: str) -> tuple[int, Mapping[str, Any]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "INPUT_", "GITHUB_"))}
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "entrypoint.py"), "--mode", "verify", "--dtype", dtype,
            "--adapter-path", str(adapter), "--base-model", str(base), "--merged-path", str(merged),
            "--report-dir", str(report_dir),
        ],
        env=env, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    report = json.loads((report_dir / "report.json").read_text())
    assert not report["problems"], done.stdout
    return done.returncode, report


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
@pytest.mark.parametrize("adapter", [STRONG, WEAK], ids=["strong", "weak"])
def test_a_right_merge_passes(
    adapter: Path, dtype: str, base: Path, merged: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    code, report = _verify(base, adapter, merged(adapter, dtype), tmp_path, dtype)

    outputs = report["outputs"]
    assert code == 0
    assert outputs["verified"] == "true"
    assert outputs["storage-violations"] == "0"
    assert float(outputs["max-probe-error"]) < 1e-8
    assert outputs["status"] == ("PASS_LOSSY" if float(outputs["retention"]) < 0.9 else "PASS")
    assert float(outputs["retention"]) == pytest.approx(1.0, abs=0.01) or adapter == WEAK


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
CASES = [(STRONG, name) for name in HARD] + [
    (WEAK, name) for name in ("not applied", "scale × 1.02", "one tensor skipped", "one mantissa bit")
]


@pytest.mark.parametrize("adapter,name", CASES, ids=[f"{adapter.name}-{name}" for adapter, name in CASES])
def test_a_wrong_merge_fails_with_the_right_reason(
    adapter: Path, name: str, base: Path, merged: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(merged(adapter, "auto"), tmp_path / "bad")
    diagnosis = HARD[name](folder, base, adapter)

    code, report = _verify(base, adapter, folder, tmp_path, "auto")

    assert code == 8
    assert report["outputs"]["verified"] == "false"
    failed = [check for check in report["verdict"]["checks"] if check["outcome"] == "FAIL"]
    told = [f"{check['name']} {check['detail']}" for check in failed if Layer(check["layer"]) is diagnosis.layer]
    assert any(diagnosis.names in text for text in told), failed
