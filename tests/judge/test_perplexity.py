"""The perplexity of the user's text is the textbook's, of all three models, and can gate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.judge.judge import judge
from runner.judge.prompts import EVAL_TOKENS, EVAL_WINDOW, Purpose, make_questions
from runner.protocol.limits import Evaluation, Limits, QualityLimit
from runner.protocol.verdict import Status
from tests.judge.conftest import Maker
from tests.judge.tiny import VOCABULARY, tokenizer
from tests.parity import models, structures
from tests.parity.pipeline import run_merge

TEXT = "The keeper wrote down the weather, and then the weather kept the keeper. " * 8


def _perplexity(folder: Path, width: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
    total, count = 0.0, 0
    for part in (ids[start : start + width] for start in range(0, len(ids), width)):
        with torch.no_grad():
            loss = model(part[None], labels=part[None]).loss
        total, count = total + float(loss) * (len(part) - 1), count + len(part) - 1
    return math.exp(total / count)


def test_is_that_of_transformers_and_gates_where_the_user_says_so(right_merge: Maker) -> None:
    base, adapter, merged = right_merge("lora")
    limits = Limits(quality=(QualityLimit(figure="perplexity-ratio", limit=0.5),))
    verdict = judge(
        base=base, adapter=adapter, merged=merged, dtype="auto", evaluation=Evaluation(text=TEXT), limits=limits
    )
    plain = judge(base=base, adapter=adapter, merged=merged, dtype="auto")

    assert verdict.quality is not None
    assert plain.quality is not None
    found = verdict.quality.perplexity
    assert found is not None
    width = 160 - 24  # the model's positions, less those that the continuations need
    assert found.base == pytest.approx(_perplexity(base, width), rel=1e-4)
    assert found.merged == pytest.approx(_perplexity(merged, width), rel=1e-4)
    assert found.unmerged == pytest.approx(found.merged, rel=0.05)
    assert not found.is_cut
    assert (verdict.status, verdict.fails_quality_only) == (Status.FAIL, True)
    assert (verdict.quality.kl_mean_nats, verdict.quality.tokens) == (plain.quality.kl_mean_nats, plain.quality.tokens)
    assert len(verdict.quality.prompts) == len(plain.quality.prompts) > 8
    assert len(verdict.quality.prompts[0].error) == len(verdict.quality.prompts[0].effect) > 4


def test_a_long_text_is_cut_and_told(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    made = [
        make_questions(tmp_path, rows=VOCABULARY, max_tokens=9999, prompts=(), seed=0, eval_text="a" * length)
        for length in (EVAL_TOKENS, EVAL_TOKENS + 1, 1)
    ]
    windows = [[s for s in questions.sequences if s.purpose is Purpose.EVALUATION] for questions in made]
    assert [len(found) for found in windows] == [EVAL_TOKENS // EVAL_WINDOW, EVAL_TOKENS // EVAL_WINDOW, 0]
    assert [questions.is_cut for questions in made] == [False, True, False]
    assert windows[0][0].ids.shape == (EVAL_WINDOW,)
    assert [s.label for s in made[0].compared] == [s.label for s in made[2].sequences]


def test_a_text_is_read_in_windows_that_a_decoder_of_sounds_can_take(tmp_path: Path) -> None:
    fields = {**structures.ENCODER_DECODERS["WhisperForConditionalGeneration"], "vocab_size": VOCABULARY}
    base = models.save_base(
        structures.build("WhisperForConditionalGeneration", fields), tmp_path / "base", dtype=torch.bfloat16
    )
    tokenizer().save_pretrained(base)
    adapter = models.save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    _, merged = run_merge(base, adapter, tmp_path / "merged")

    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto", evaluation=Evaluation(text=TEXT))

    assert verdict.failures == ()
    assert verdict.status is Status.PASS
