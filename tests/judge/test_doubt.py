"""A prompt on which float32 cannot tell a right merge from a wrong one is run again in float64, which can."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import runner.judge.outputs
from runner.files.layout import read_checkpoint
from runner.judge.case import open_case
from runner.judge.judge import judge
from runner.judge.outputs import BEYOND_DOUBT, LIMIT, UNROUNDED, judge_outputs
from runner.judge.prompts import make_questions
from runner.protocol.verdict import Check, Outcome, Status
from tests.judge.faults import rewrite
from tests.judge.merges import save_merge
from tests.judge.tiny import lora, save_adapter

Merged = tuple[Path, Path, Path]
OFFSET = 30_000.0


@pytest.fixture(scope="module", params=["lora", "dora"])
def cancelling(
    request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Merged:
    """Return (base, adapter, merged) of a model whose logits are small differences of large numbers."""
    root = tmp_path_factory.mktemp("cancelling")
    base = Path(shutil.copytree(bases["llama"], root / "base"))

    def offset(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][:, 0] = OFFSET

    rewrite(base, read_checkpoint(base).tensors["lm_head.weight"].file, offset)
    config = lora(target_modules="all-linear", use_dora=request.param == "dora")
    adapter = save_adapter(root / "adapter", base, config)
    return base, adapter, save_merge(root / "merged", base, adapter)


def _claim(base: Path, adapter: Path, merged: Path) -> tuple[Status, Check]:
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    return verdict.status, next(check for check in verdict.checks if check.name == UNROUNDED)


def test_a_right_merge_passes_that_float32_would_fail(cancelling: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    status, check = _claim(*cancelling)

    assert (status, check.outcome) == (Status.PASS, Outcome.PASS)
    monkeypatch.setattr(runner.judge.outputs, "BEYOND_DOUBT", LIMIT)  # no second look
    status, check = _claim(*cancelling)
    assert (status, check.outcome) == (Status.FAIL, Outcome.FAIL)
    assert check.value is not None
    assert LIMIT < check.value < BEYOND_DOUBT


def test_a_fault_in_that_range_still_fails(right_merge: Callable[[str], Merged], tmp_path: Path) -> None:
    base, adapter, merged = right_merge("lora")
    damaged = Path(shutil.copytree(merged, tmp_path / "damaged"))
    config = json.loads((damaged / "config.json").read_bytes())
    config["rms_norm_eps"] = 1.02 * config["rms_norm_eps"] + 1e-6
    (damaged / "config.json").write_text(json.dumps(config))

    with open_case(base, adapter, dtype="auto") as case:  # the whole judge stops at the config already
        found = judge_outputs(
            unmerged=case.unmerged,
            merged=damaged,
            sources=case.sources,
            targets=case.targets,
            questions=make_questions(damaged, rows=case.embedding_rows, max_tokens=100, prompts=(), seed=0),
            retention=1.0,
            device="cpu",
            on_progress=lambda _share: None,
        )
    check = next(check for check in found.checks if check.name == UNROUNDED)

    assert check.outcome is Outcome.FAIL
    assert check.value is not None
    assert LIMIT < check.value < BEYOND_DOUBT
