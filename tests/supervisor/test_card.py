"""The model card, and what it takes over from cards that nobody vouches for."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runner.protocol.verdict import Check, Layer, Outcome, Status
from runner.supervisor.documents.card import CardFacts, make_card
from runner.supervisor.documents.inherited import Inherited, inherit, read_readme
from runner.supervisor.documents.provenance import Origin
from tests.hub.cards import judge
from tests.supervisor.publish.world import FACTS, origin, verdict
from tests.supervisor.test_provenance import QUALITY, SEVERAL

EVIL = [
    "</code><script>alert(1)</script>",
    "`x` | y |\n| --- |",
    "]( javascript:alert(1) )",
    "---\nlicense: mit\n---",
    "x\r\nbase_model: evil/model",
    "@everyone ![x](http://tracker/x.png)",
    "\u202edlrow\u0000",
]


def make(inherited: Inherited | None = None, **changes: Any) -> str:
    facts = CardFacts(
        repo_id="alice/model",
        tag="v1.0.0",
        origin=origin(),
        facts=FACTS,
        merged_digest="f" * 64,
        verdict=replace(verdict(), quality=QUALITY),
        inherited=inherited or Inherited(),
    )
    return make_card(replace(facts, **changes)).decode()


def metadata(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    data = yaml.safe_load(found.group(1))
    assert isinstance(data, dict)
    return data


def readme(front: str, body: str = "# Hello") -> bytes:
    return f"---\n{textwrap.dedent(front)}\n---\n{body}\n".encode()


def test_a_card_names_its_base_as_a_finetune_and_inherits_the_rest() -> None:
    base = readme("license: apache-2.0\nlanguage: [en, no]\npipeline_tag: text-generation\ntags: [llama, peft]")
    adapter = readme("license: mit\ndatasets: [acme/chats]\ntags: [sft, 'base_model:adapter:x/y']\nbase_model: x/y")
    assert metadata(make(inherit(base, adapter))) == {
        "base_model": "acme/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": ["en", "no"],  # YAML 1.1 would read `no` as false
        "pipeline_tag": "text-generation",
        "datasets": ["acme/chats"],
        "tags": ["lora-merge", "llama", "sft"],
    }


def test_the_adapters_licence_is_used_where_the_base_names_none() -> None:
    found = inherit(None, readme("license: other\nlicense_name: my-licence\nlicense_link: LICENSE"))
    assert (found.licence, found.licence_name, found.licence_link) == ("other", "my-licence", "LICENSE")


def test_of_several_adapters_all_datasets_and_tags_count_and_a_licence_that_all_share() -> None:
    first = readme("license: mit\ndatasets: [acme/chats]\ntags: [sft]")
    second = readme("license: apache-2.0\ndatasets: [acme/code, acme/chats]\ntags: [dpo]\nlanguage: en")

    found = inherit(None, first, second, None)

    assert (found.licence, found.licence_name) == ("other", None)
    assert found.datasets == ("acme/chats", "acme/code")
    assert found.tags == ("sft", "dpo")
    assert found.languages == ("en",)
    assert any("different licences" in note for note in found.notes)
    assert inherit(None, first, first).licence == "mit"
    assert inherit(readme("license: gemma"), first, second).licence == "gemma"


def test_a_card_names_every_adapter_its_weight_and_the_combination() -> None:
    card = make(origin=SEVERAL)

    assert (
        r"2 LORA adapters (<code>dare\_ties</code>: <code>alice/adapter</code> × 1.0, <code>o/second</code> × -0.5)"
        in card
    )
    for part in ("adapter 1 digest", "adapter 2 revision", "density 0.5, seed 1", SEVERAL.digest_of_adapters):
        assert part in card
    for row in (
        f"<code>alice/adapter&#64;{'2' * 40} 1.0</code><br><code>o/second&#64;{'2' * 40} -0.5</code>",
        r"| combination | <code>dare\_ties</code> |",
        "| combination-density | <code>0.5</code> |",
        "| combination-seed | <code>1</code> |",
        "| combination-majority-sign | <code>total</code> |",
    ):
        assert row in card


def test_a_licence_that_the_hub_does_not_know_is_told_by_name() -> None:
    found = inherit(readme("license: Some-New-Licence-2.0"), None)
    assert (found.licence, found.licence_name) == ("other", "Some-New-Licence-2.0")


def test_the_body_says_what_went_in_how_to_load_it_and_how_to_check_it() -> None:
    card = make()
    for part in (
        'from_pretrained("alice/model", revision="v1.0.0")',
        origin().input_digest(),
        "1" * 40,
        "2" * 40,
        "a" * 64,
        "f" * 64,
        "**PASS**",
        "probes agree",
        "0.9999",
        "<code>verify</code>",
    ):
        assert part in card


def test_equal_facts_give_equal_bytes() -> None:
    assert make() == make(verdict=replace(verdict(), quality=QUALITY, wall_s=123.0))


def test_a_local_base_and_a_local_adapter_are_named_by_digest() -> None:
    local = Origin(
        base_repo_id=None,
        base_commit=None,
        base_digest="b" * 64,
        adapter_repo_id=None,
        adapter_commit=None,
        adapter_digest="a" * 64,
        dtype="auto",
        version="0.1.0",
    )
    card = make(origin=local)
    assert "base_model" not in metadata(card)
    assert "a local base (digest <code>" + "b" * 16 in card
    assert "None" not in card
    assert judge(card)[0] == []


@pytest.mark.parametrize("text", EVIL)
def test_hostile_text_in_the_facts_stays_text(text: str) -> None:
    evil = replace(origin(), base_repo_id=text, adapter_repo_id=text, adapter_commit=text, dtype=text)
    check = Check(layer=Layer.STRUCTURE, name=text, outcome=Outcome.PASS)
    card = make(
        origin=evil,
        facts=replace(FACTS, peft_type=text, output_dtype=text),
        verdict=replace(verdict(Status.PASS_LOSSY), checks=(check,)),
    )
    body = card.split("\n---\n", 1)[1]
    assert "<script" not in body
    assert "](" not in body.replace("\\](", "").replace("\\]\\(", "")
    assert "\n---\n" not in body
    assert metadata(card)["base_model_relation"] == "finetune"
    assert "license" not in metadata(card)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 6}


ANY_YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.sampled_from(EVIL),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = ["license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "tags", "base_model"]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), ANY_YAML), st.dictionaries(st.sampled_from(KEYS), ANY_YAML))
@example({"license": "1e3", "tags": ["1e3", "0x1F", "yes", "null"]}, {"datasets": ["a/b", 7]})
def test_whatever_the_cards_say_the_new_one_is_valid_and_has_no_key_of_theirs(
    base: dict[str, Any], adapter: dict[str, Any]
) -> None:
    card = make(inherit(readme(yaml.safe_dump(base)), readme(yaml.safe_dump(adapter))))
    errors, _ = judge(card)
    assert errors == []
    data = metadata(card)
    assert data["base_model"] == "acme/base"
    assert data["library_name"] == "transformers"
    for value in data.values():
        for text in value if isinstance(value, list) else [value]:
            assert isinstance(text, str)
            assert text.isprintable()
            assert not set(text) & set("<>|`[]()\\\"'")


@settings(deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=400).map(lambda text: f"---\n{text}\n---\n".encode()))
@example(b"---\n" + b"[" * 5_000 + b"\n---\n")
@example(b"---\n" + b"a: " * 3_000 + b"\n---\n")
@example(b"---\n!!python/object/apply:os.system ['true']\n---\n")
@example(b"---\na: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\ntags: [*c,*c]\n---\n")
@example(b"---\n? [a, b]\n: c\n---\n")
@example(b"---\nlicense: mit\n" + b"#" * 200_000 + b"\n---\n")
def test_no_card_breaks_the_reader(content: bytes) -> None:
    card = make(inherit(content, content))
    assert judge(card)[0] == []


def test_a_missing_or_enormous_readme_is_none(tmp_path: Path) -> None:
    assert read_readme(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"x" * ((4 << 20) + 1))
    assert read_readme(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"hello")
    assert read_readme(tmp_path) == b"hello"


def test_what_is_dropped_is_noted() -> None:
    found = inherit(readme("tags: [ok, '<b>']\npipeline_tag: [x]"), b"---\n: : :\n- {\n---\n")
    assert found.tags == ("ok",)
    assert len(found.notes) == 3
