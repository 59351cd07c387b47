"""The one place where secrets are taken out of texts: as they are, and in every spelling in which a server echoes them.

A secret is found as it is, in percent-encoding (also twice over), with the escapes of JSON, of programs and of HTML, in
hex, and in base64 wherever it stood in what was encoded.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from functools import lru_cache

MASK = "***"
MIN_HIDDEN_CHARS = 6  # a shorter secret would black out half of the log


def hide(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with each of `secrets`, in any spelling, replaced by `***`.

    Secrets of several lines are looked for line by line; lines shorter than `MIN_HIDDEN_CHARS` are left.
    """
    lines = {line.strip() for secret in secrets for line in (secret, *secret.splitlines())}
    for line in sorted(lines, key=len, reverse=True):  # a secret inside another must not break it up
        if len(line) >= MIN_HIDDEN_CHARS:
            text = _spellings(line).sub(MASK, text)
    return text


@lru_cache(maxsize=256)
def _spellings(secret: str) -> re.Pattern[str]:
    content = secret.encode("utf-8", "replace")
    hexed = r"[\s:,-]{0,2}(?:0x|\\x)?".join(f"{byte:02x}" for byte in content)
    encoded = (_base64(content, shift) for shift in range(3))
    return re.compile("|".join(["".join(map(_spelling, secret)), f"(?i:{hexed})", *encoded]))


def _spelling(char: str) -> str:
    """Return an expression for one character, however it is escaped."""
    code = ord(char)
    percent = "".join(f"%(?:25)*{byte:02x}" for byte in char.encode("utf-8", "replace"))
    escapes = rf"{percent}|\\+u{code:04x}|\\+x{code:02x}|&\#0*{code};|&\#x0*{code:x};"
    plain = re.escape(char) if char.isalnum() else rf"\\*{re.escape(char)}"
    return f"(?:{plain}|(?i:{escapes}))"


def _base64(content: bytes, shift: int) -> str:
    """Return an expression for base64 of something that holds `content` after `shift` bytes (modulo 3).

    The characters at its ends, which their neighbours have a part in, go along.
    """
    encoded = base64.b64encode(b"\0" * shift + content).decode()
    first, last = -(-shift * 8 // 6), (shift + len(content)) * 8 // 6
    letters = {"+": "(?:[+-]|%2[Bb])", "/": r"(?:\\?/|_|%2[Ff])"}
    core = r"\s*".join(letters.get(char, char) for char in encoded[first:last])
    return rf"[A-Za-z0-9+/_-]{{0,{bool(shift):d}}}{core}[A-Za-z0-9+/_-]{{0,1}}(?:=|%3[Dd]){{0,2}}"
