"""The end-to-end layer: what a folder that is wrong, odd or broken makes of its claims, and what is measured beside."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from runner.judge import outputs
from runner.judge.case import Case
from runner.judge.expected.targets import Target, Targets
from runner.judge.forward import Errors, outputs_of
from runner.judge.judge import judge
from runner.judge.outputs import (
    LIMIT,
    NO_POWER,
    ROUNDED,
    UNROUNDED,
    Outputs,
    _claim,
    _loading,
    _power,
    judge_outputs,
)
from runner.judge.prompts import Questions, TokenSequence, make_questions
from runner.judge.quality import continuations
from runner.judge.streaming.loader import Loaded
from runner.protocol.verdict import Check, Layer, Outcome, Status
from tests.judge.conftest import Maker, Opener
from tests.judge.merges import edit_config
from tests.judge.tiny import tokenizer
from tests.parity import models

LOADS = "plain transformers loads the folder"
RUNS = "the models run"


def _asked(case: Case, merged: Path, **options: Any) -> Questions:
    return make_questions(merged, rows=case.embedding_rows, max_tokens=100, prompts=(), seed=0, **options)


def _judge(case: Case, merged: Path, questions: Questions | None = None) -> tuple[Outputs, dict[str, Check]]:
    found = judge_outputs(
        unmerged=case.unmerged,
        merged=merged,
        sources=case.sources,
        targets=case.targets,
        questions=questions or _asked(case, merged),
        retention=1.0,
        device="cpu",
        on_progress=lambda _: None,
    )
    assert {check.layer for check in found.checks if check.outcome is not Outcome.SKIPPED} == {Layer.END_TO_END}
    return found, {check.name: check for check in found.checks}


def _errors(*errors: tuple[float, str]) -> Errors:
    """Return errors of logits that are as far from a reference as told."""
    made = Errors(is_language=True)
    for error, label in errors:
        reference = torch.tensor([[3.0, -3.0]]).double()
        made.add(reference, reference * (1 + error), label)
    return made


# ---- the claims


def test_the_worst_prompt_decides_and_is_quoted() -> None:
    check = _claim("x", _errors((1e-6, "fine"), (2e-3, "p" * 70), (1e-5, "good")), "")
    assert (check.layer, check.name, check.outcome, check.limit) == (Layer.END_TO_END, "x", Outcome.FAIL, LIMIT)
    assert check.value == pytest.approx(2e-3)
    assert check.detail == f"Relative error 0.002 on the prompt '{'p' * 60}'."


def test_an_error_at_the_limit_passes_and_one_above_does_not() -> None:
    errors = Errors(is_language=True)
    for value, outcome in ((LIMIT, Outcome.PASS), (math.nextafter(LIMIT, 1.0), Outcome.FAIL), (math.nan, Outcome.FAIL)):
        errors._off = [(0.0, "other"), (value, "this")]
        check = _claim("x", errors, "")
        assert check.outcome is outcome
        assert (check.detail == "") == (outcome is Outcome.PASS)


def test_a_tensor_without_a_place_fails_whatever_was_compared() -> None:
    check = _claim("x", _errors(), "a.weight")
    assert (check.outcome, check.detail) == (Outcome.FAIL, "the loaded model has no place for a.weight")


@pytest.mark.parametrize(
    "effect, outcome", [(NO_POWER, Outcome.PASS), (math.nextafter(NO_POWER, 0.0), Outcome.WARN), (0.0, Outcome.WARN)]
)
def test_an_effect_that_drowns_in_rounding_is_told(effect: float, outcome: Outcome) -> None:
    check = _power(effect)
    assert (check.layer, check.outcome, check.value) == (Layer.END_TO_END, outcome, effect)
    assert check.detail.startswith("No power: the adapter moves the outputs by less than 0.001") == bool(check.detail)
    assert bool(check.detail) == (outcome is Outcome.WARN)


# ---- what plain transformers says of the folder


def _targets(*brought: str, kept: tuple[str, ...] = ()) -> Targets:
    """Return targets of which only the adapter has some, and the base the others."""
    home: Any = object()
    required = {
        key: Target(
            key=key, stored=key, dtype="F32", shape=(1,), base=None if key in brought else home, is_touched=True
        )
        for key in (*brought, *kept)
    }
    return Targets(
        required=required, optional={}, untied=(), unmapped=(), rounding=cast("Any", None), twins={}
    )  # fmt: skip


def test_what_transformers_reports_of_the_base_too_is_not_the_folders_fault(case: Case) -> None:
    base = case.unmerged.base

    def said(folder: Loaded, base: Loaded = base, targets: Targets | None = None) -> str:
        check = _loading(base, folder, targets or _targets())
        assert (check.layer, check.name) == (Layer.END_TO_END, LOADS)
        assert check.outcome is (Outcome.FAIL if check.detail else Outcome.PASS)
        return check.detail

    assert said(base) == ""
    assert said(replace(base, missing=("a",))) == "missing a"
    assert said(replace(base, unexpected=("a",))) == "unexpected a"
    assert said(replace(base, mismatched=("a",))) == "mismatched a"
    odd = replace(base, missing=("a",), unexpected=("b",), mismatched=("c",))
    assert said(odd, odd) == "mismatched c"
    assert said(replace(odd, mismatched=()), odd, _targets("other", kept=("a",))) == ""
    # A head that the base lacks and the adapter brings must be in the folder.
    assert said(replace(odd, mismatched=()), odd, _targets("a")) == "missing a"
    many = tuple("abcdef")
    assert said(replace(base, missing=many)) == "; ".join(f"missing {key}" for key in many[:5])
    other = cast("Any", torch.nn.Linear(1, 1))
    assert said(replace(base, model=other)) == "it is a Linear, the base a LlamaForCausalLM"


@pytest.fixture(scope="module")
def case(right_merge: Maker, open_: Opener) -> Case:
    return open_(*right_merge("lora")[:2])


# ---- whole folders


def test_a_folder_that_is_the_base_does_not_compute_what_the_files_should(case: Case) -> None:
    found, checks = _judge(case, case.base.root)
    assert [check.outcome for check in found.checks] == [Outcome.PASS, Outcome.FAIL, Outcome.PASS, Outcome.PASS]
    assert (checks[ROUNDED].value or 0.0) > 100 * LIMIT
    assert found.quality is not None
    assert found.quality.effect_retention == pytest.approx(0.0, abs=1e-6)
    assert found.quality.effect_error == pytest.approx(1.0)


def test_a_right_folder_computes_both(case: Case, right_merge: Maker) -> None:
    merged = right_merge("lora")[2]
    questions = _asked(case, merged)
    found, checks = _judge(case, merged, questions)
    assert list(checks) == [LOADS, ROUNDED, UNROUNDED, "the prompts can see the adapter"]
    assert {check.outcome for check in found.checks} == {Outcome.PASS}
    assert checks[ROUNDED].value == 0.0  # nothing differs, nothing is run
    assert 0.0 < (checks[UNROUNDED].value or 0.0) < LIMIT
    assert found.quality is not None
    texts = [sequence for sequence in questions.sequences if sequence.is_text]
    assert len(texts) < len(questions.sequences)
    assert found.quality.tokens == sum(len(sequence.ids) for sequence in texts)


def test_without_a_text_the_figures_are_of_random_ids(case: Case, right_merge: Maker, tmp_path: Path) -> None:
    merged = right_merge("lora")[2]
    questions = _asked(case, tmp_path)  # no tokenizer
    found, _ = _judge(case, merged, questions)
    assert found.quality is not None
    assert found.quality.tokens == sum(len(sequence.ids) for sequence in questions.sequences) == 4 * 48


def test_a_model_without_a_place_for_a_tensor_fails_both_claims(
    open_: Opener, right_merge: Maker, tmp_path: Path
) -> None:
    base, adapter, right = right_merge("bias_lora_only")
    merged = Path(shutil.copytree(right, tmp_path / "merged"))
    edit_config(merged, architectures=["LlamaForCausalLM"], model_type="llama")  # whose attention has no biases
    found, checks = _judge(open_(base, adapter), merged)
    assert [check.outcome for check in found.checks] == [*[Outcome.FAIL] * 3, Outcome.PASS]
    place = "model.layers.0.self_attn.q_proj.bias"
    assert f"unexpected {place}" in checks[LOADS].detail
    assert checks[ROUNDED].detail == checks[UNROUNDED].detail == f"the loaded model has no place for {place}"
    assert found.quality is not None  # what it costs is told all the same


def test_a_folder_that_does_not_load_fails(case: Case, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(case.base.root, tmp_path / "merged"))
    edit_config(merged, hidden_act="no such function")
    found, checks = _judge(case, merged, _asked(case, case.base.root))
    assert list(checks) == [LOADS]
    assert checks[LOADS].outcome is Outcome.FAIL
    assert "no such function" in checks[LOADS].detail
    assert found.quality is None


# A head of three dimensions has the shapes of the weights, and no half for the rotary embedding.
NO_HALF = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 3}


def test_a_folder_whose_model_does_not_run_fails(case: Case, right_merge: Maker, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(right_merge("lora")[2], tmp_path / "merged"))
    edit_config(merged, **NO_HALF)
    found, checks = _judge(case, merged)
    assert list(checks) == [LOADS, "the folder's model runs"]
    assert [check.outcome for check in found.checks] == [Outcome.PASS, Outcome.FAIL]
    assert "size" in found.checks[1].detail
    assert (found.quality, found.continuations) == (None, ())


def test_where_the_base_does_not_run_either_nothing_is_verified(right_merge: Maker, tmp_path: Path) -> None:
    base, adapter, merged = right_merge("lora")
    base = Path(shutil.copytree(base, tmp_path / "base"))
    merged = Path(shutil.copytree(merged, tmp_path / "merged"))
    for folder in (base, merged):
        edit_config(folder, **NO_HALF)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.NOT_VERIFIED
    (check,) = [check for check in verdict.checks if check.outcome is Outcome.SKIPPED]
    assert (check.layer, check.name) == (Layer.END_TO_END, RUNS)
    assert check.detail.startswith("The base itself does not run on what the judge can give it: ")


def test_a_single_prompt_that_stops_the_base_is_not_the_folders_fault(
    case: Case, right_merge: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumbling(model: Any, sequence: TokenSequence, device: str, dtype: torch.dtype) -> torch.Tensor:
        if sequence.label == "random ids 4":
            raise ValueError("too random")
        return outputs_of(model, sequence, device, dtype)

    monkeypatch.setattr(outputs, "outputs_of", stumbling)
    found, checks = _judge(case, right_merge("lora")[2])
    assert [check.outcome for check in found.checks] == [Outcome.PASS, Outcome.SKIPPED]
    assert checks[RUNS].detail == "The base itself does not run on what the judge can give it: too random"


def test_a_model_that_reads_one_text_and_writes_another_has_no_loss_on_the_one(open_: Opener, tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=56, num_layers=1, num_heads=4, decoder_start_token_id=0
    )  # fmt: skip
    base = models.save_base(T5ForConditionalGeneration(config), tmp_path / "base", dtype=torch.bfloat16)
    tokenizer().save_pretrained(base)
    options = LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    adapter = models.save_adapter(base, tmp_path / "adapter", options)
    found, _ = _judge(open_(base, adapter), base)
    assert found.quality is not None
    assert found.quality.kl_mean_nats is not None
    assert (found.quality.nll_base_nats, found.quality.nll_merged_nats) == (None, None)


@pytest.mark.parametrize("mark", [None, 5])
def test_a_text_is_continued_where_no_config_says_what_a_decoder_starts_with(mark: int | None, tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, bos_token_id=None, pad_token_id=None,
        decoder_start_token_id=mark,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    questions = make_questions(tmp_path, rows=64, max_tokens=12, prompts=(), seed=0)

    prompts = [sequence.ids for sequence in questions.continued]

    rows = continuations._generate(model, prompts=prompts, tokens=4, device="cpu")

    assert len(rows) == len(prompts) > 0
    assert all(len(row) for row in rows)


@pytest.mark.parametrize("differs_from", [0, 1, 3, None])
@pytest.mark.parametrize("end", [None, 7])
def test_follows_a_draft_to_the_text_that_generating_gives(differs_from: int | None, end: int | None) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config).eval()
    prompts = [torch.tensor([3, 9, 27]), torch.tensor([5])]
    wanted = continuations._generate(model, prompts=prompts, tokens=6, device="cpu")
    draft = [row.clone() for row in wanted]
    if differs_from is not None:
        for row in draft:
            row[differs_from:] = (row[differs_from:] + 1) % 64

    found = continuations._follow(model, draft=draft, prompts=prompts, tokens=6, device="cpu")

    ends = () if end is None else (end,)
    assert [row.tolist() for row in found] == [continuations._until(row, ends).tolist() for row in wanted]
