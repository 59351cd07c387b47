"""YAML front matter of a card, written so that every reader of YAML reads the same texts. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that some YAML parser could take for something else, such as `1e3` or `0x1F`."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def dump(fields: Mapping[str, str | Sequence[str] | None]) -> str:
    """Return the fields as YAML between two lines of `---`; those that are None or empty are left out."""
    said = {key: value if isinstance(value, str) else list(value) for key, value in fields.items() if value}
    text = yaml.dump(said, Dumper=_Dumper, sort_keys=False, allow_unicode=False, default_flow_style=False, width=10_000)
    return f"---\n{text}---"
