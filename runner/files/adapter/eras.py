"""Which PEFT wrote an adapter's config, as far as the file says, and which of PEFT's rules that version followed.

A file that PEFT 0.18 or later wrote names its version. Any other is dated by its newest field, if it has all the older
ones; that newer ones are missing proves nothing, because programs and people leave fields out. No torch.

Source: the releases 0.9 to 0.21 of peft; `tests/parity/peft_meanings.py` computes with each of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Version = tuple[int, int]

# Method → the fields that a release added to its config, for the methods that two eras read differently.
_COMMON: Mapping[str, Version] = MappingProxyType({"exclude_modules": (0, 14), "peft_version": (0, 18)})
FIELDS: Mapping[str, Mapping[str, Version]] = MappingProxyType(
    {
        "LORA": {
            **_COMMON,
            **dict.fromkeys(("lora_bias", "eva_config"), (0, 14)),
            **dict.fromkeys(("corda_config", "trainable_token_indices"), (0, 15)),
            **dict.fromkeys(("use_qalora", "qalora_group_size"), (0, 16)),
            "target_parameters": (0, 17),
            **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "ensure_weight_tying"), (0, 18)),
            **dict.fromkeys(("lora_ga_config", "use_bdlora"), (0, 19)),
            **dict.fromkeys(("monteclora_config", "velora_config"), (0, 20)),
            "kasa_config": (0, 21),
        },
        "LOHA": _COMMON,
        "LOKR": {**_COMMON, "rank_dropout_scale": (0, 14)},
        "OFT": {
            **_COMMON,
            "oft_block_size": (0, 14),
            **dict.fromkeys(("use_cayley_neumann", "num_cayley_neumann_terms"), (0, 16)),
        },
    }
)
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})(?![\d])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Era:
    """Releases of PEFT that read every config alike."""

    first: Version
    last: Version


ERAS = (
    Era(first=(0, 0), last=(0, 13)),
    Era(first=(0, 14), last=(0, 14)),
    Era(first=(0, 15), last=(0, 17)),
    Era(first=(0, 18), last=(0, 21)),
)
TODAY = ERAS[-1]
PATTERNS_AS_TODAY = ERAS[-2]  # its OFT is another, in 0.16 and 0.17


def parse_version(text: str) -> Version | None:
    """Return the release that a version such as `0.13.2` or `0.18.1.dev0@abc` belongs to; None where it is none."""
    match = _VERSION.match(text)
    return (int(match[1]), int(match[2])) if match else None


def era_of(version: Version) -> Era:
    """Return the era of a release; a newer one than any known is taken for today's."""
    return next((era for era in ERAS if version <= era.last), TODAY)


def eras_of(config: Mapping[str, Any]) -> tuple[Era, ...]:
    """Return the eras in which an adapter_config.json can have been written, the oldest first."""
    named = parse_version(str(config.get("peft_version") or ""))
    if named is not None:
        return (era_of(named),)
    oldest = _oldest(config)[0]
    return tuple(era for era in ERAS if era.last >= oldest)


def _oldest(config: Mapping[str, Any]) -> tuple[Version, str]:
    """Return the oldest release that can have written a config without `peft_version`, and what says so.

    PEFT writes every field that it has, so a field proves its release only where all that are older are there, too.
    """
    since = FIELDS.get(str(config.get("peft_type")), {})
    newest = max((field for field in since if field in config), key=lambda field: since[field], default=None)
    if newest is None:
        return (0, 0), "no field that is newer than PEFT 0.13"
    if lost := sorted(field for field in since if since[field] <= since[newest] and field not in config):
        return (0, 0), f"`{newest}` of PEFT {spell(since[newest])}, but not `{lost[0]}` of PEFT {spell(since[lost[0]])}"
    return since[newest], f"no field that is newer than `{newest}` of PEFT {spell(since[newest])}"


def evidence(config: Mapping[str, Any]) -> str:
    """Return what in the config dates it, as a sentence."""
    if parse_version(str(config.get("peft_version") or "")):
        return f"Its `peft_version` is {str(config['peft_version'])[:40]!r}."
    return f"It has no `peft_version`, and {_oldest(config)[1]}."


def spell(version: Version) -> str:
    """Return the release as people write it."""
    return f"{version[0]}.{version[1]}"


def span(eras: tuple[Era, ...]) -> str:
    """Return the releases of neighbouring eras in words: `0.13 and earlier`, `0.14`, `0.15 and later`."""
    first, last = eras[0], eras[-1]
    if first is ERAS[0]:
        return f"{spell(last.last)} and earlier"
    if last is TODAY:
        return f"{spell(first.first)} and later"
    return spell(first.first) if first.first == last.last else f"{spell(first.first)} to {spell(last.last)}"
