"""Rendered by another program, the text is there and nothing else is."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from runner.supervisor.documents.markdown import block, code, details, escape, prose, table

HOSTILE = st.lists(
    st.sampled_from(
        [*"a1|`*_[]()<>#+-=!~\\&;:@$\"' \n\r\t.^{}/", "<b>", "</pre>", "https://x.y", "&lt;", "</details>", "www.x"]
    ),
    max_size=20,
).map("".join)
ALLOWED = {"p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}


class Page(HTMLParser):
    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, value in attrs if (name, value) != ("style", "text-align:right")]  # of a number

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u200b", "")


def words(text: str) -> list[str]:
    return text.split()


@given(HOSTILE)
def test_escaped_text_is_text(text: str) -> None:
    page = Page(escape(text))

    assert set(page.tags) <= {"p"}
    assert words(page.text) == words(text)


@given(HOSTILE)
def test_prose_is_text_and_code(text: str) -> None:
    page = Page(prose(text))

    assert set(page.tags) <= {"p", "code"}
    assert "".join(words(page.text.replace("`", ""))) == "".join(words(text.replace("`", "")))


def test_prose_shows_what_is_meant_as_code() -> None:
    assert prose("`tag` is 'a*b'; set `x: <y>`, or `z`.") == (
        "<code>tag</code> is 'a\\*b'; set <code>x: &#60;y&#62;</code>, or <code>z</code>."
    )


@given(HOSTILE, HOSTILE)
def test_a_cell_stays_a_cell(left: str, right: str) -> None:
    page = Page(table(("a", "b"), [(code(left), escape(right)), ("x", "y")]))

    assert page.tags.count("td") == 4
    assert page.tags.count("tr") == 3
    assert set(page.tags) <= ALLOWED - {"p", "details", "summary", "pre"}
    assert words(page.text) == words(f"a b {left} {right} x y") or not left.strip() or not right.strip()


@given(HOSTILE)
def test_a_block_keeps_its_lines(text: str) -> None:
    page = Page(f"before\n\n{block(text)}\n\nafter")

    assert page.tags == ["p", "pre", "p"]
    assert words(page.text) == words(f"before {text} after")


@given(HOSTILE, HOSTILE)
def test_details_hold_what_they_are_given(title: str, text: str) -> None:
    page = Page(details(title, block(text)) + "\n\nafter")

    assert [tag for tag in page.tags if tag != "p"] == ["details", "summary", "pre"]
    assert words(page.text) == words(f"{title} {text} after")


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\u202eb", "a\x00b", "a\u2028b"])
def test_what_cannot_be_seen_is_shown(text: str) -> None:
    assert "\ufffd" in escape(text)
    assert "\ufffd" in block(text)


def test_nothing_becomes_a_link_or_a_mention() -> None:
    text = escape("https://evil.example www.evil.example me@evil.example @octocat #12 :tada:")

    assert not re.search(r"https?://|www\.[a-z]|@[a-z]|(?<!\\):[a-z]+:", html.unescape(text))
