"""The merge in a memory cgroup: models several times its limit go through, and a limit too small is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig

from bench.synthetic import ALL_LINEAR, write_adapter, write_base
from runner.worker.merge.units import COPIES_IN_MEMORY
from runner.worker.plan import RUNTIME_BYTES
from tests.contract.runner_emulator import Runner
from tests.parity import models

pytestmark = [pytest.mark.docker, pytest.mark.slow]

BASE_BYTES = 3_200_000_000
SPARE_BYTES = 256 << 20
TOO_LITTLE_BYTES = 160 << 20  # less than the libraries alone
MERGE = """
import json, sys
from pathlib import Path
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
for folder in map(Path, sys.argv[1:]):
    prepared = prepare(folder / "base", folder / "adapter", dtype="auto")
    merged = merge(prepared, into=folder / "merged")
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"bytes": merged.written_bytes, "peak_kb": int(fields["VmHWM"].split()[0]),
        "plan_bytes": prepared.plan.summary.peak_memory_bytes,
        "judge_bytes": prepared.plan.summary.judge_memory_bytes}))
"""

LONG = "LORA_MERGE_LONG"
JUDGE = """
import json, sys
from pathlib import Path
from runner.judge.judge import judge
base, adapter, merged = (Path("dense") / name for name in ("base", "adapter", "merged"))
verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
print(json.dumps({"status": verdict.status, "failures": [check.detail for check in verdict.failures]}))
"""


def _limited(image: str, workspace: Path, limit_bytes: int, *command: str, before: tuple[str, ...] = ()) -> list[str]:
    limit = ["--memory", str(limit_bytes), "--memory-swap", str(limit_bytes)]  # the same: no swap
    mount = ["-v", f"{workspace}:/github/workspace", "-e", "PYTHONPATH=/app"]
    return ["docker", "run", "--network", "none", *limit, *mount, *before, image, *command]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _write_experts(folder: Path) -> int:
    """Write a base whose experts are one parameter in memory, and an adapter on it; return its elements."""
    config = transformers.MixtralConfig(
        hidden_size=2048, intermediate_size=3584, num_hidden_layers=1, num_local_experts=8, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=512, max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    models.save_base(model, folder / "base", dtype=torch.bfloat16, shard="150MB")
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    models.save_adapter(folder / "base", folder / "adapter", lora)
    return int(model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").numel())


def test_models_several_times_the_limit_are_merged(image: str, tmp_path: Path) -> None:
    dense, experts = tmp_path / "dense", tmp_path / "experts"
    shape = write_base(dense / "base", size_bytes=BASE_BYTES)
    write_adapter(dense / "adapter", base=dense / "base", shape=shape, r=16, targets=ALL_LINEAR)
    unit_bytes = 4 * max(rows * columns for rows, columns in shape.linear.values())
    limit = RUNTIME_BYTES + 2 * unit_bytes + SPARE_BYTES
    size = _size(dense / "base")
    assert size > 2.5 * limit
    fused_elements = _write_experts(experts)
    assert 4 * COPIES_IN_MEMORY * fused_elements > 2 * limit  # what PEFT's merge of the whole parameter would take
    try:
        done = subprocess.run(
            _limited(
                image, tmp_path, limit, "-c", MERGE, "dense", "experts", before=("--rm", "--entrypoint", "python")
            ),
            capture_output=True, text=True, check=False,
        )  # fmt: skip

        assert done.returncode == 0, done.stdout + done.stderr
        told, told_of_experts = map(json.loads, done.stdout.splitlines()[-2:])
        assert told["bytes"] >= size - 100_000
        assert told["peak_kb"] << 10 < limit
        assert told_of_experts["bytes"] >= _size(experts / "base") - 100_000
        assert told_of_experts["peak_kb"] << 10 < limit  # of both merges
        assert told_of_experts["plan_bytes"] < limit
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
        for folder in (dense, experts):
            for name in ("base", "merged", "merged.partial"):
                shutil.rmtree(folder / name, ignore_errors=True)


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
