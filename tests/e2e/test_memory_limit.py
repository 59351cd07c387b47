"""The merge in a memory cgroup: a model several times its limit goes through, and a limit too small is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.synthetic import ALL_LINEAR, write_adapter, write_base
from runner.plan import RUNTIME_BYTES
from tests.contract.runner_emulator import Runner

pytestmark = [pytest.mark.docker, pytest.mark.slow]

BASE_BYTES = 3_200_000_000
SPARE_BYTES = 256 << 20
TOO_LITTLE_BYTES = 160 << 20  # less than the libraries alone
MERGE = """
import json, sys
from pathlib import Path
from runner.merge import merge
from runner.prepare import prepare
prepared = prepare(Path("base"), Path("adapter"), dtype="auto")
merged = merge(prepared, into=Path("merged"))
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"digest": merged.digest, "bytes": merged.written_bytes, "peak_kb": int(fields["VmHWM"].split()[0]),
    "judge_bytes": prepared.plan.summary.judge_memory_bytes}))
"""

LONG = "LORA_MERGE_LONG"
JUDGE = """
import json, sys
from pathlib import Path
from runner.verify.judge import judge
verdict = judge(base=Path("base"), adapter=Path("adapter"), merged=Path("merged"), dtype="auto")
print(json.dumps({"status": verdict.status, "failures": [check.detail for check in verdict.failures]}))
"""


def _limited(image: str, workspace: Path, limit_bytes: int, *command: str, before: tuple[str, ...] = ()) -> list[str]:
    limit = ["--memory", str(limit_bytes), "--memory-swap", str(limit_bytes)]  # the same: no swap
    mount = ["-v", f"{workspace}:/github/workspace", "-e", "PYTHONPATH=/app"]
    return ["docker", "run", "--network", "none", *limit, *mount, *before, image, *command]


def test_a_model_several_times_the_limit_is_merged(image: str, tmp_path: Path) -> None:
    shape = write_base(tmp_path / "base", size_bytes=BASE_BYTES)
    write_adapter(tmp_path / "adapter", base=tmp_path / "base", shape=shape, r=16, targets=ALL_LINEAR)
    unit_bytes = 4 * max(rows * columns for rows, columns in shape.linear.values())
    limit = RUNTIME_BYTES + 2 * unit_bytes + SPARE_BYTES
    size = sum(path.stat().st_size for path in (tmp_path / "base").iterdir())
    assert size > 2.5 * limit
    try:
        done = subprocess.run(
            _limited(image, tmp_path, limit, "-c", MERGE, before=("--rm", "--entrypoint", "python")),
            capture_output=True, text=True, check=False,
        )  # fmt: skip

        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["bytes"] >= size - 100_000
        assert told["peak_kb"] << 10 < limit
        if os.environ.get(LONG) != "1":
            return  # the judgement of such a model takes minutes

        # What the plan says is enough for the judge, which goes through both models, and is far below what they take.
        limit = told["judge_bytes"]
        assert 2 * size > 3 * limit
        done = subprocess.run(
            _limited(image, tmp_path, limit, "-c", JUDGE, before=("--rm", "--entrypoint", "python")),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {"status": "PASS", "failures": []}
    finally:  # gigabytes, which pytest would keep for three runs
        for name in ("base", "merged", "merged.partial"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)


def test_a_limit_that_is_too_small_is_named(image: str, runner: Runner) -> None:
    name = f"lora-merge-limit-{os.getpid()}"
    flags = ["--adapter-path", "adapter", "--base-model=base", "--mode", "plan", "--device", "cpu"]
    try:
        done = subprocess.run(
            _limited(image, runner.workspace, TOO_LITTLE_BYTES, *flags, before=("--name", name)),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        asked = subprocess.run(
            ["docker", "inspect", "--format", "{{.State.OOMKilled}}", name], capture_output=True, text=True, check=True
        )
    finally:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, check=False)

    assert done.returncode == 6, done.stdout + done.stderr
    assert "The worker was killed (SIGKILL)" in done.stdout
    assert "memory" in done.stdout
    assert asked.stdout.strip() == "true"
