"""Whatever the cards of base and adapter say, the new one is sound YAML, and Markdown without anything of theirs."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runner.supervisor.documents.card import make_card
from runner.supervisor.documents.inherited import Inherited, inherit
from runner.supervisor.documents.loading import Loading, read_loading
from runner.supervisor.documents.provenance import AdapterOrigin
from tests.contract.hostile import ATTACKS, CARDS, HOSTILE, VALUES, facts_of, intended, readme, split, wrong_in
from tests.supervisor.publish.world import origin


@settings(deadline=None, max_examples=150)
@given(base=CARDS, adapter=CARDS, body=HOSTILE)
def test_the_front_matter_says_what_was_inherited_and_nothing_else(
    base: dict[str, Any], adapter: dict[str, Any], body: str
) -> None:
    inherited = inherit(readme(base, body), readme(adapter, body))
    facts = replace(facts_of(inherited, "acme/base", "x"), origin=origin())

    data, _ = split(make_card(facts).decode())

    assert data == intended(facts)
    for name in (field.name for field in fields(inherited) if field.name != "notes"):
        value = getattr(inherited, name)
        for text in value if isinstance(value, tuple) else filter(None, [value]):
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+/:~%-]*", text), (name, text)


@settings(deadline=None, max_examples=150)
@given(raw=st.binary(max_size=300) | HOSTILE.map(lambda text: f"---\n{text}\n---\n".encode("utf-8", "replace")))
@example(raw=b"---\nlicense: other\nlicense_link: https://a.b/<script>\nlicense_name: a](x\n---\n")
@example(raw=b"---\ntags: ['x\\n---\\nevil: yes']\nlanguage: &a [en, *a]\n---\n")
def test_a_card_that_is_not_even_yaml_changes_nothing(raw: bytes) -> None:
    facts = replace(facts_of(inherit(raw, raw), "acme/base", "x"), origin=origin())

    data, body = split(make_card(facts).decode())

    assert data == intended(facts)
    assert wrong_in(body) == []


@settings(deadline=None, max_examples=200)
@given(text=HOSTILE, more=HOSTILE)
@example(text="https://evil.examplewww.evil.example", more="x")
def test_the_body_has_no_link_and_no_markup_but_its_own(text: str, more: str) -> None:
    facts = facts_of(Inherited(), text, more)

    data, body = split(make_card(facts).decode("utf-8", "replace"))

    assert wrong_in(body) == []
    assert set(data) == set(intended(facts))
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == ["# model", "## Use", "## Verification", "## Provenance", "## Check it yourself"]


def test_the_renderer_shows_an_injection_where_there_is_one() -> None:
    for attack in (
        "<b>x</b>",
        "[a](x)",
        "![x](https://t.example/p)",
        "<https://evil.example>",
        "<!-- x -->",
        "- x",
        "https://x.y",
        "www.x.y",
        "@x",
    ):
        assert wrong_in(f"hello\n\n{attack}\n"), attack


def test_several_hostile_adapters_stay_text() -> None:
    from tests.supervisor.test_provenance import SEVERAL

    for attack in ATTACKS:
        more = AdapterOrigin(repo_id=attack, commit=attack, digest="3" * 64)
        facts = replace(facts_of(Inherited(), "x", "y"), origin=replace(SEVERAL, more_adapters=(more,)))
        _, body = split(make_card(facts).decode("utf-8", "replace"))
        assert wrong_in(body) == [], attack


@settings(deadline=None, max_examples=100)
@given(
    content=st.binary(max_size=80)
    | VALUES.map(lambda value: json.dumps({"architectures": [value]}, default=str).encode())
)
@example(content=b'{"architectures": ["os; import os"]}')
@example(content=b'{"architectures": []}')
@example(content=b"[" * 100_000)
def test_the_class_to_load_is_a_name_whatever_the_config_says(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(content)
        loading = read_loading(Path(folder), Path(folder), ["tokenizer.json"])
    assert loading.model.isidentifier()
    assert loading.task is None


@pytest.mark.parametrize(
    "base, merged, paths, wanted",
    [
        ("LlamaForCausalLM", "LlamaForCausalLM", ["tokenizer.json"], Loading()),
        (
            "LlamaForCausalLM", "LlamaForSequenceClassification", ["tokenizer.json"],
            Loading(model="AutoModelForSequenceClassification", task="text-classification"),
        ),
        ("BertForMaskedLM", "BertModel", [], Loading(model="AutoModel", tokenizer=None, task="feature-extraction")),
        (
            "GemmaForConditionalGeneration", "GemmaForConditionalGeneration", ["processor_config.json"],
            Loading(model="GemmaForConditionalGeneration", tokenizer="AutoProcessor"),
        ),
    ],
)  # fmt: skip
def test_the_card_names_the_class_that_the_release_is_of(
    base: str, merged: str, paths: list[str], wanted: Loading, tmp_path: Path
) -> None:
    for name, architecture in (("base", base), ("merged", merged)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": [architecture]}))

    loading = read_loading(tmp_path / "base", tmp_path / "merged", paths)
    card = make_card(replace(facts_of(Inherited(pipeline_tag="fill-mask"), "x", "y"), loading=loading)).decode()

    assert loading == wanted
    assert f"model = {wanted.model}.from_pretrained" in card
    assert ("tokenizer" in card.split("## Verification")[0]) == (wanted.tokenizer == "AutoTokenizer")
    assert split(card)[0]["pipeline_tag"] == (wanted.task or "fill-mask")
