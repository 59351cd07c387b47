"""Secrets are hidden in every spelling in which a server may echo them, and nothing else is."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.supervisor.masking import hide

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWx/+=:1"
KEY = "-----BEGIN-----\nMHcCAQEEIBsecretsecret\nabc\n-----END-----"


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


SPELLINGS = {
    "as it is": TOKEN,
    "percent": _percent(TOKEN),
    "percent where it must": quote(TOKEN, safe=""),
    "percent twice": quote(_percent(TOKEN)),
    "JSON": json.dumps(TOKEN.replace("/", "\\/"))[1:-1].replace("\\\\", "\\"),
    "JSON escapes": "".join(f"\\u{ord(char):04X}" for char in TOKEN),
    "JSON in JSON": json.dumps("".join(f"\\u{ord(char):04x}" for char in TOKEN))[1:-1],
    "program's escapes": "".join(f"\\x{ord(char):02x}" for char in TOKEN),
    "HTML": html.escape(TOKEN),
    "HTML numbers": "".join(f"&#{ord(char)};" for char in TOKEN),
    "HTML hex": "".join(f"&#x{ord(char):X};" for char in TOKEN),
    "hex": TOKEN.encode().hex(),
    "HEX": TOKEN.encode().hex().upper(),
    "hex dump": TOKEN.encode().hex(" "),
    "hex with colons": TOKEN.encode().hex(":"),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_secret_is_hidden_in_every_spelling(spelling: str) -> None:
    assert hide(f"it said <{spelling}>.", [TOKEN]) == "it said <***>."


@settings(deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=40), st.booleans(), st.booleans())
def test_base64_of_anything_that_holds_a_secret_shows_nothing_of_it(
    before: bytes, after: bytes, is_url: bool, is_wrapped: bool
) -> None:
    content = before + TOKEN.encode() + after
    encoded = (base64.urlsafe_b64encode if is_url else base64.b64encode)(content).decode()
    if is_wrapped:
        encoded = "\n".join(encoded[at : at + 20] for at in range(0, len(encoded), 20))
    shown = hide(encoded, [TOKEN]).replace("\n", "")
    assert "***" in shown
    kept_before, _, kept_after = shown.partition("***")
    # No group of four characters that is left decodes to a byte of the secret.
    assert base64.urlsafe_b64decode(_whole(kept_before)) == before[: len(_whole(kept_before)) // 4 * 3]
    assert len(kept_after.rstrip("=")) <= -(-len(after) * 8 // 6)


def _whole(encoded: str) -> str:
    return encoded.replace("+", "-").replace("/", "_")[: len(encoded) // 4 * 4]


def test_each_line_of_a_secret_is_hidden_and_a_short_one_is_no_secret() -> None:
    assert hide("abc MHcCAQEEIBsecretsecret x", [KEY, "", "x"]) == "abc *** x"


def test_a_secret_in_another_does_not_break_it_up() -> None:
    assert hide("hf_alphabet_long hf_alphabet", ["hf_alphabet", "hf_alphabet_long"]) == "*** ***"


@given(st.text(alphabet="hf_%25&#x0uAb+/=\\ ", max_size=200))
def test_a_text_without_the_secret_is_left_as_it_is(text: str) -> None:
    assert hide(text, [TOKEN]) == text
