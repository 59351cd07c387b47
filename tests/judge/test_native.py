"""The run in the output dtype: made where the hardware can, told with its reason where not, and never a gate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from runner.judge.forward import outputs_of
from runner.judge.judge import judge
from runner.judge.prompts import make_questions
from runner.judge.quality import native
from runner.judge.quality.native import run_native
from runner.judge.streaming.models import load_model
from runner.protocol.verdict import Status
from tests.judge.conftest import Maker
from tests.judge.tiny import VOCABULARY


def _gold(folder: Path) -> native.Gold:
    model = load_model(folder)
    questions = make_questions(folder, rows=VOCABULARY, max_tokens=64, prompts=(), seed=0)
    return [(sequence, outputs_of(model, sequence, "cpu")) for sequence in questions.sequences[:4]]


def test_bfloat16_is_as_far_from_float32_merged_as_unmerged(
    right_merge: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, merged = right_merge("lora")
    monkeypatch.setattr(native, "_multiplies_fast", lambda: True)
    found = run_native(base=base, adapter=adapter, merged=merged, dtype="BF16", device="cpu", gold=_gold(merged))
    assert found.reason == ""
    assert found.ratio is not None
    assert 0.1 < found.ratio < 10
    # The base in the merged model's place is much further off: the run sees the adapter.
    other = run_native(base=base, adapter=adapter, merged=base, dtype="BF16", device="cpu", gold=_gold(merged))
    assert other.ratio is not None
    assert other.ratio > 10 * found.ratio


def test_what_is_not_run_has_its_reason(right_merge: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, merged = right_merge("lora")
    gold = _gold(merged)

    def reason(dtype: str = "BF16", gold: native.Gold = gold) -> str:
        found = run_native(base=base, adapter=adapter, merged=merged, dtype=dtype, device="cpu", gold=gold)
        assert (found.ratio, found.kl_merged_nats, found.kl_unmerged_nats) == (None, None, None)
        return found.reason

    monkeypatch.setattr(native, "_load", lambda *_: pytest.fail("nothing may be computed"))
    assert "never multiplied on a CPU" in reason("F16")
    assert "float32" in reason("F32")
    assert "no tokens" in reason(gold=())
    monkeypatch.setattr(native, "_multiplies_fast", lambda: False)
    assert "more slowly" in reason()
    monkeypatch.setattr(native, "free_bytes", lambda _: 1000)
    assert "memory are free" in reason()


def test_the_verdict_holds_it_and_does_not_depend_on_it(right_merge: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, merged = right_merge("lora")
    monkeypatch.setattr(native, "_divergence", lambda *_: 1e9)
    monkeypatch.setattr(native, "_multiplies_fast", lambda: True)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert verdict.status is Status.PASS
    assert verdict.quality is not None
    assert verdict.quality.native is not None
    assert verdict.quality.native.ratio == 1.0


def test_free_memory_is_a_number() -> None:
    assert 1 << 20 < native.free_bytes("cpu") < 1 << 50
    assert math.isfinite(native._seconds(torch.float32))
