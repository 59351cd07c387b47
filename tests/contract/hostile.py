"""What strangers may write, and how a card is read back: by a YAML parser, and by a CommonMark renderer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import yaml
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from runner.protocol.verdict import Check, Layer, Outcome
from runner.supervisor.documents.canvas import Picture
from runner.supervisor.documents.card import CardFacts
from runner.supervisor.documents.inherited import Inherited
from tests.supervisor.publish.world import FACTS, origin, verdict

ATTACKS = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))",
    "![x](https://t.example/p)",
    "<https://evil.example>", "https://evil.example", "www.evil.example", "me@evil.example", "@everyone", "#1", "GH-1",
    "| a | b |\n| --- | --- |", "`", "```", "\n```\n", "~~~", "---", "\n---\nlicense: mit\n---\n", "...", "\n# Big",
    "&lt;b&gt;", "</code>", "</td></tr></table>", "\\", "*a*", "__a__", "\u202e", "\u0000", "\u2028", "\r\n",
    "license: mit", "- x", "!!python/object/apply:os.system ['true']", "&a [*a]", "'", '"', "%0A::error::x",
    "::error::x", "##[error]x", "$(id)", "${{ secrets.X }}", "; id", "{{ x }}", "[x]: https://evil.example",
    "<!-- x", "]]>", "$x$",
)  # fmt: skip
HOSTILE = st.lists(st.sampled_from(ATTACKS) | st.text(max_size=8), min_size=1, max_size=4).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "tags", "base_model",
    "base_model_relation", "library_name", "model-index", "extra_gated_prompt", "widget", "inference",
)  # fmt: skip
CARDS = st.dictionaries(st.sampled_from(KEYS) | HOSTILE, VALUES, max_size=8)
# What a card may hold: its own headings, tables and code, its own pictures, and nothing that leads away.
TAGS = {"h1", "h2", "p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "strong", "br", "img"}
PICTURES = re.compile(r"merge-report/[a-z]+\.png")


class Page(HTMLParser):
    """A card, rendered as the Hub and GitHub render it: CommonMark with tables, strikethrough and raw HTML."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.text = ""
        renderer = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
        self.feed(renderer.render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in TAGS:
            self.wrong.append(f"<{tag}>")
        elif tag == "img":
            if not PICTURES.fullmatch(found.get("src") or "") or set(found) != {"src", "alt"}:
                self.wrong.append(f"<img {attrs}>")
        elif tag == "code" and set(found) <= {"class"}:
            if found.get("class", "language-sh") not in ("language-sh", "language-python"):
                self.wrong.append(f"<code {attrs}>")
        elif found and set(found) != {"style"}:  # the alignment of a table's column
            self.wrong.append(f"<{tag} {attrs}>")

    def handle_comment(self, data: str) -> None:
        self.wrong.append(f"<!--{data}-->")

    def handle_decl(self, decl: str) -> None:
        self.wrong.append(f"<!{decl}>")

    def handle_pi(self, data: str) -> None:
        self.wrong.append(f"<?{data}>")

    def unknown_decl(self, data: str) -> None:
        self.wrong.append(f"<![{data}]>")

    def handle_data(self, data: str) -> None:
        self.text += data


def wrong_in(body: str) -> list[str]:
    """Return what a card's body has that it must not: foreign markup, or what GitHub would turn into a link."""
    text = re.sub(r"^```(?:sh|python)\n.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"(?<!\\)://|(?i:www)\.|@", text)
    return Page(body).wrong + [f"{link!r} is not escaped" for link in links]


def facts_of(inherited: Inherited, text: str, more: str) -> CardFacts:
    base = origin()
    check = Check(layer=Layer.STRUCTURE, name=text, outcome=Outcome.PASS, detail=more)
    return CardFacts(
        repo_id="alice/model",
        tag="v1.0.0",
        origin=replace(
            base, base_repo_id=text, base_commit=more, adapter_repo_id=more, adapter_commit=text, dtype=text
        ),
        facts=replace(FACTS, peft_type=text, output_dtype=more),
        merged_digest="f" * 64,
        verdict=replace(verdict(), checks=(check,)),
        pictures=(Picture(name="delta", title=text, text=more, png=b"", svg=b""),),
        inherited=inherited,
        signed_by="e" * 64,
    )


def split(card: str) -> tuple[dict[str, Any], str]:
    """Return front matter and body, as a reader of cards splits them: at the first line that is `---` alone."""
    found = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    assert found is not None
    data = yaml.safe_load(found[1])
    assert isinstance(data, dict)
    return data, found[2]


def intended(facts: CardFacts) -> dict[str, Any]:
    inherited = facts.inherited
    said = {
        "base_model": facts.origin.base_repo_id,
        "base_model_relation": "finetune" if facts.origin.base_repo_id else None,
        "library_name": "transformers",
        "license": inherited.licence,
        "license_name": inherited.licence_name,
        "license_link": inherited.licence_link,
        "language": list(inherited.languages),
        "pipeline_tag": inherited.pipeline_tag,
        "datasets": list(inherited.datasets),
        "tags": ["lora-merge", *(tag for tag in inherited.tags if tag != "lora-merge")],
    }
    return {key: value for key, value in said.items() if value}


def readme(front: Mapping[str, Any], body: str) -> bytes:
    text = yaml.safe_dump(dict(front), allow_unicode=True, sort_keys=False)
    return f"---\n{text}---\n{body}\n".encode("utf-8", "replace")
