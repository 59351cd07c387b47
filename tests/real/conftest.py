"""The real model and the two real adapters: the checkpoint that `make demo` builds, merged once for each dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from demo.smollm2 import build
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent.parent
STRONG, WEAK = ROOT / "demo" / "adapter", ROOT / "demo" / "adapter-weak"


@pytest.fixture(scope="session")
def base() -> Path:
    folder = ROOT / ".demo"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "build.lock"):  # the workers of one test run share the checkpoint
        return build(folder / "smollm2", cache=folder / "cache")


@pytest.fixture(scope="session")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """Return what gives the right merge of an adapter in a dtype; each is made once."""
    folder = tmp_path_factory.mktemp("merged")

    def give(adapter: Path, dtype: str) -> Path:
        out = folder / f"{adapter.name}-{dtype}"
        return out if out.exists() else merge(prepare(base, adapter, dtype=dtype), into=out).root

    return give


def verify(
    base: Path, adapter: Path | str, merged: Path, report_dir: Path, dtype: str, *flags: str
) -> tuple[int, Mapping[str, Any]]:
    """Run `mode: verify` as a process; return its exit code and report."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "INPUT_", "GITHUB_"))}
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "entrypoint.py"), "--mode", "verify", "--dtype", dtype,
            "--adapter-path", str(adapter), "--base-model", str(base), "--merged-path", str(merged),
            "--report-dir", str(report_dir), *flags,
        ],
        env=env, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    report = json.loads((report_dir / "report.json").read_text())
    assert not report["problems"], done.stdout
    return done.returncode, report
