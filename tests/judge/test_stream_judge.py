"""The judge on the streamed models: no 16-bit products, continuations, added tokens, the same on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runner.judge.judge import judge
from runner.judge.prompts import make_questions
from runner.judge.quality import continuations
from runner.protocol.verdict import Outcome, Status
from tests.judge.conftest import Maker
from tests.parity import structures


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in ("mm", "linear", "matmul", "attention")):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def test_no_product_is_computed_in_half_precision(right_merge: Maker) -> None:
    dtype = "float16"  # bfloat16 has a native run of its own where the processor multiplies it fast
    base, adapter, merged = right_merge("lora", dtype)
    with _Products() as products:
        verdict = judge(base=base, adapter=adapter, merged=merged, dtype=dtype)
    assert verdict.passed
    assert torch.float32 in products.dtypes
    assert not products.dtypes & {torch.float16, torch.bfloat16}


def test_continues_the_same_text_with_one_layer_in_memory(right_merge: Maker, monkeypatch: Any) -> None:
    base, adapter, merged = right_merge("lora")
    monkeypatch.setattr(continuations, "NEW_TOKENS", 24)
    wanted = judge(base=base, adapter=adapter, merged=merged, dtype="auto").continuations
    monkeypatch.setattr(continuations, "room_bytes", lambda _: 0)
    found = judge(base=base, adapter=adapter, merged=merged, dtype="auto").continuations
    assert found == wanted
    assert all(one.base for one in found)


def test_says_why_a_large_model_continues_no_text(right_merge: Maker, monkeypatch: Any) -> None:
    base, adapter, merged = right_merge("lora")
    monkeypatch.setattr(continuations, "room_bytes", lambda _: 0)
    monkeypatch.setattr(continuations, "READ_PARAMETERS", 0)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert verdict.status is Status.PASS
    assert verdict.continuations == ()
    assert [check.name for check in verdict.checks if check.outcome is Outcome.SKIPPED] == ["texts were continued"]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["lora", "dora", "saved_modules"])
def test_gives_the_same_verdict_on_a_gpu(variant: str, right_merge: Maker) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    base, adapter, merged = right_merge(variant)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto", device="cuda")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


def test_asks_every_added_token_and_random_ids(bases: dict[str, Path]) -> None:
    questions = make_questions(bases["llama"], rows=structures.VOCAB, max_tokens=100, prompts=["One,"], seed=3)
    asked = {int(number) for sequence in questions.sequences for number in sequence.ids}
    assert {0, 1} <= {int(number) for sequence in questions.sequences[-5:-4] for number in sequence.ids[-2:]}
    assert len(asked) > 0.8 * structures.VOCAB
    assert questions.sequences[0].label == "One,"
