"""Tokenizers and templates of strangers run in a process of their own: bounded, and never the end of the judge."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.judge.prompts import make_questions
from runner.judge.sidecars import words as module
from runner.judge.sidecars.words import Words
from tests.judge.tiny import VOCABULARY, tokenizer

CHAT = [{"role": "user", "content": "Hello"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% if false %}x{% endif %}{% endfor %}{% endfor %}"
DOUBLING = "{% set s = namespace(t='x' * 1024) %}{% for a in range(40) %}{% set s.t = s.t ~ s.t %}{% endfor %}{{ s.t }}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def with_template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_says_what_the_tokenizer_says(saved: Path) -> None:
    words, there = Words(saved), tokenizer()

    assert words.is_there
    assert not words.problem
    ids = there("What a day, what a day")["input_ids"]
    assert words.encode("What a day, what a day", 3) == (ids[:3], len(ids), max(ids))
    assert words.decode([ids, ids[:2]]) == [
        there.decode(ids, skip_special_tokens=True),
        there.decode(ids[:2], skip_special_tokens=True),
    ]
    assert set(words.added) == set(there.get_added_vocab().values())


def test_a_template_is_rendered(folder: Path) -> None:
    with_template(folder, "{% for m in messages %}{{ m.content }}{% endfor %}")
    words = Words(folder)

    assert words.has_template
    assert words.chat(CHAT, 9) == words.encode("Hello", 9)


def test_without_a_tokenizer_no_process_is_started(tmp_path: Path) -> None:
    words = Words(tmp_path)

    assert not words.is_there
    assert words._child is None


@pytest.mark.parametrize("text, says", [(LOOP, "it took more than"), (DOUBLING, "GiB of memory")])
def test_a_template_that_does_not_end_is_told_and_the_rest_goes_on(
    text: str, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_S", {**module.CPU_S, "chat": 1 if text == LOOP else 20})
    monkeypatch.setattr(module, "MEMORY_BYTES", 1 << 29 if text == LOOP else 1 << 30)
    with_template(folder, text)
    words = Words(folder)

    assert words.chat(CHAT, 9) is None
    assert words.chat(CHAT, 9) is None  # and at once
    assert "could not put a chat into its template" in words.problem
    assert says in words.problem
    assert words.encode("Hello", 9) is not None


def test_a_normalizer_that_multiplies_a_text_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_S", {**module.CPU_S, "encode": 3})
    growth = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1000}
    edited(folder, lambda content: content.update(normalizer={"type": "Sequence", "normalizers": [growth] * 5}))
    words = Words(folder)

    assert words.encode("Hello", 9) is None
    assert "could not read a text" in words.problem


def test_a_process_that_dies_is_told(saved: Path) -> None:
    words = Words(saved)
    assert words._child is not None
    os.kill(words._child._pid, 9)

    assert words.encode("Hello", 9) is None
    assert words.problem == "the tokenizer could not read a text: it crashed (SIGKILL)"


def test_a_tokenizer_that_cannot_be_read_is_as_good_as_none(folder: Path) -> None:
    edited(folder, lambda content: content["model"].update(type="nonsense"))
    words = Words(folder)

    assert not words.is_there
    assert not words.problem


def test_its_process_ends_with_it(saved: Path) -> None:
    words = Words(saved)
    assert words._child is not None
    pid = words._child._pid
    del words

    time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_questions_are_asked_in_spite_of_a_broken_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_S", {**module.CPU_S, "chat": 1})
    with_template(folder, LOOP)
    questions = make_questions(folder, rows=VOCABULARY, max_tokens=64, prompts=(), seed=0)

    assert any(sequence.is_text for sequence in questions.sequences)
    assert questions.words.problem
    assert questions.texts([torch.tensor([5, 6])]) != []
