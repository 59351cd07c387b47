"""The status that follows from checks, and the questions that models are asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.judge.judge import GATES, LOSS, decide
from runner.judge.prompts import CHATS, TEXTS, make_questions
from runner.protocol.verdict import Check, Layer, Outcome, Status, Verdict
from tests.judge.tiny import VOCABULARY, tokenizer


def _all(outcome: Outcome = Outcome.PASS) -> list[Check]:
    return [Check(layer=layer, name="x", outcome=outcome) for layer in GATES]


def test_passes_when_every_gate_passes() -> None:
    assert decide(_all()) is Status.PASS
    assert decide([*_all(), Check(layer=Layer.QUALITY, name="x", outcome=Outcome.SKIPPED)]) is Status.PASS


@pytest.mark.parametrize("layer", list(Layer))
def test_one_failure_fails_whatever_else_passed(layer: Layer) -> None:
    assert decide([*_all(), Check(layer=layer, name="x", outcome=Outcome.FAIL)]) is Status.FAIL
    assert decide([*_all(Outcome.SKIPPED), Check(layer=layer, name="x", outcome=Outcome.FAIL)]) is Status.FAIL


@pytest.mark.parametrize("layer", GATES)
def test_a_gate_that_did_not_run_never_counts_as_passed(layer: Layer) -> None:
    without = [check for check in _all() if check.layer is not layer]
    assert decide(without) is Status.NOT_VERIFIED
    assert decide([*_all(), Check(layer=layer, name="x", outcome=Outcome.SKIPPED)]) is Status.NOT_VERIFIED


def test_nothing_judged_is_not_verified() -> None:
    assert decide([]) is Status.NOT_VERIFIED


def test_a_lossy_dtype_is_told_apart() -> None:
    lossy = Check(layer=Layer.QUALITY, name=LOSS, outcome=Outcome.WARN)
    assert decide([*_all(), lossy]) is Status.PASS_LOSSY
    assert decide([*_all()[1:], lossy]) is Status.NOT_VERIFIED


def _verdict(status: Status, *checks: Check) -> Verdict:
    return Verdict(
        status=status, checks=checks, modules=(), quality=None, continuations=(), seed=0, wall_s=1.0
    )  # fmt: skip


def test_only_a_pass_may_be_published() -> None:
    assert {status for status in Status if _verdict(status).passed} == {Status.PASS, Status.PASS_LOSSY}


def test_a_verdict_tells_its_failures_from_the_rest() -> None:
    passed, skipped, warned = (
        Check(layer=Layer.STORAGE, name="x", outcome=outcome)
        for outcome in (Outcome.PASS, Outcome.SKIPPED, Outcome.WARN)
    )
    quality = Check(layer=Layer.QUALITY, name="x", outcome=Outcome.FAIL)
    storage = Check(layer=Layer.STORAGE, name="x", outcome=Outcome.FAIL)
    loose = Check(layer=Layer.SEMANTICS, name="x", outcome=Outcome.WARN, limit=1e-3, loosened_from=1e-6)
    found = _verdict(Status.FAIL, passed, quality, skipped, storage, warned, loose)
    assert found.failures == (quality, storage)
    assert found.loosened == (loose,)
    assert found.loosened_text == "semantics from 1e-06 to 0.001"
    assert [
        _verdict(Status.FAIL, *checks).fails_quality_only
        for checks in ((quality, passed), (quality, storage), (storage,), (passed,), ())
    ] == [True, False, False, False, False]


def test_asks_texts_chats_and_random_ids_and_the_users_prompts_first(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    chat = '{"messages":[{"role":"user","content":"Who goes there?"}]}'
    questions = make_questions(tmp_path, rows=VOCABULARY, max_tokens=160, prompts=["Plain.", chat], seed=4)
    labels = [sequence.label for sequence in questions.sequences]
    assert labels[:2] == ["Plain.", "Who goes there?"]
    assert len(labels) == 2 + len(TEXTS) + len(CHATS) + 1 + 4
    assert labels[-5:] == ["added tokens 1", *(f"random ids {number}" for number in (1, 2, 3, 4))]
    chats = questions.texts([questions.sequences[1].ids])[0]
    assert chats == "<|user|>Who goes there?\n<|assistant|>"
    assert all(2 <= len(sequence.ids) <= 128 for sequence in questions.sequences)
    assert questions.skipped == ()


def test_the_seed_decides_the_random_ids(tmp_path: Path) -> None:
    first, same, other = (
        make_questions(tmp_path, rows=50, max_tokens=99, prompts=(), seed=seed).sequences for seed in (1, 1, 2)
    )
    assert [one.ids.tolist() for one in first] == [one.ids.tolist() for one in same]
    assert [one.ids.tolist() for one in first] != [one.ids.tolist() for one in other]


def test_without_a_tokenizer_only_random_ids_are_asked_and_the_users_prompts_are_told(tmp_path: Path) -> None:
    questions = make_questions(tmp_path, rows=3, max_tokens=10, prompts=["Hello"], seed=0)
    assert [len(sequence.ids) for sequence in questions.sequences] == [10] * 4
    assert max(int(sequence.ids.max()) for sequence in questions.sequences) < 3
    assert questions.skipped == ("Hello",)
    assert questions.texts([questions.sequences[0].ids[:2]])[0].split() == [
        str(int(i)) for i in questions.sequences[0].ids[:2]
    ]


def test_ids_that_the_embedding_has_no_row_for_are_not_asked(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    questions = make_questions(tmp_path, rows=40, max_tokens=160, prompts=["Hello"], seed=0)
    assert questions.skipped == ("Hello",)
    assert all(int(sequence.ids.max()) < 40 for sequence in questions.sequences)
