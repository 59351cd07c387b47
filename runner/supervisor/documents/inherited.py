"""What a card takes over from the cards of base and adapter: licence, languages, task, datasets, tags.

The YAML front matter of a README was written by somebody whom nobody vouches for. It is read with a loader that knows
only texts, lists and maps; what is kept must be of a plain form, and the rest is dropped with a note. Nothing here
can fail a release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_README_BYTES = 4 << 20
MAX_FRONT_MATTER_CHARS = 64 << 10
MAX_VALUES = 64

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|code|multilingual")
_TASK = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9 ._+/-]{0,62}[A-Za-z0-9+]")
_DATASET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")
_LICENCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LICENCE_LINK = re.compile(r"LICEN[CS]E(\.(md|txt))?|https://[A-Za-z0-9.-]+(/[A-Za-z0-9._~%/-]*)?")
_DROPPED_TAGS = frozenset(
    {"peft", "lora", "adapter", "adapters", "merge", "mergekit", "gguf", "generated_from_trainer"}
)
_DROPPED_TAG_PREFIXES = ("base_model:", "dataset:", "license:", "region:", "arxiv:")

LICENCES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl
    apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    gemma grok2-community unknown other""".split()
)  # the identifiers that the Hub takes; another one is given as `other` with its name


_NONE: tuple[str | None, str | None, str | None] = (None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """Metadata for the new card; empty where nothing usable was found.

    Attributes:
        licence: an identifier that the Hub knows, or None.
        licence_name: of a licence that is `other`, or None.
        licence_link: a file of the repository or an https address, or None.
        languages: codes such as "en".
        pipeline_tag: the task, such as "text-generation", or None.
        datasets: ids of what the adapter was trained on.
        tags: free tags.
        notes: what was dropped, for the log.
    """

    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def inherit(base_readme: bytes | None, *adapter_readmes: bytes | None) -> Inherited:
    """Return what the cards of base and adapters say about the merged model.

    Licence, languages and task come from the base (a merged model is a copy of it); where it says nothing, from the
    first adapter that does, and the licence is `other` where adapters disagree. Datasets come from the adapters, tags
    from all.

    Args:
        base_readme: README.md of the base, or None.
        adapter_readmes: README.md of each adapter, or None.
    """
    notes: list[str] = []
    base = _front_matter(base_readme, "base", notes)
    adapters = [_front_matter(readme, "adapter", notes) for readme in adapter_readmes]
    owners = [card for card in (base, *adapters) if "license" in card]
    if "license" in base:
        owners = [base]
    licences = dict.fromkeys(_licence(owner, notes) for owner in owners)
    if len(licences) > 1:
        notes.append("The adapters have different licences, and the base names none: told as `other`.")
    licence, licence_name, licence_link = next(iter(licences), _NONE) if len(licences) < 2 else ("other", None, None)

    def first(key: str, form: re.Pattern[str]) -> tuple[str, ...]:
        found = (_values(card, key, form, notes) for card in (base, *adapters))
        return next(filter(None, found), ())

    return Inherited(
        licence=licence,
        licence_name=licence_name,
        licence_link=licence_link,
        languages=first("language", _LANGUAGE),
        pipeline_tag=next(filter(None, (_one(card, "pipeline_tag", _TASK, notes) for card in (base, *adapters))), None),
        datasets=_unique(value for card in adapters for value in _values(card, "datasets", _DATASET, notes)),
        tags=_unique(tag for card in (base, *adapters) for tag in _values(card, "tags", _TAG, notes) if _is_kept(tag)),
        notes=tuple(notes),
    )


def read_readme(root: Path) -> bytes | None:
    """Return the README.md in `root`; None where there is none, or one that is too long to be one."""
    try:
        with (root / "README.md").open("rb") as file:
            content = file.read(MAX_README_BYTES + 1)
    except OSError:
        return None
    return content if len(content) <= MAX_README_BYTES else None


def _front_matter(readme: bytes | None, whose: str, notes: list[str]) -> Mapping[str, Any]:
    if readme is None:
        return {}
    found = _FRONT.match(readme[: 2 * MAX_FRONT_MATTER_CHARS].decode("utf-8", "replace"))
    if found is None:
        return {}
    if len(found.group(1)) > MAX_FRONT_MATTER_CHARS:
        notes.append(f"The {whose}'s card has front matter of more than {MAX_FRONT_MATTER_CHARS} characters: ignored.")
        return {}
    try:
        data = yaml.load(found.group(1), Loader=yaml.BaseLoader)  # noqa: S506 (knows only texts, lists and maps)
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append(f"The {whose}'s card has front matter that is not YAML: ignored.")
        return {}
    return data if isinstance(data, dict) else {}


def _values(card: Mapping[str, Any], key: str, form: re.Pattern[str], notes: list[str]) -> tuple[str, ...]:
    raw = card.get(key)
    values = raw if isinstance(raw, list) else [raw] if isinstance(raw, str) and raw else []
    kept = _unique(value for value in values[:MAX_VALUES] if isinstance(value, str) and form.fullmatch(value))
    if len(kept) < len(values) or (raw and not values):
        notes.append(f"`{key}` of a card holds values that are not of its form, or twice: left out.")
    return kept


def _one(card: Mapping[str, Any], key: str, form: re.Pattern[str], notes: list[str]) -> str | None:
    raw = card.get(key)
    if isinstance(raw, str) and len(raw) < 500 and form.fullmatch(raw):
        return raw
    if raw:
        notes.append(f"`{key}` of a card is not of its form: left out.")
    return None


def _licence(card: Mapping[str, Any], notes: list[str]) -> tuple[str | None, str | None, str | None]:
    raw = card.get("license")
    if isinstance(raw, list) and raw:
        raw = raw[0] if len(raw) == 1 else "other"
    if not isinstance(raw, str) or not raw:
        return None, None, None
    name = _one(card, "license_name", _LICENCE_NAME, notes)
    link = _one(card, "license_link", _LICENCE_LINK, notes)
    if raw.lower() in LICENCES:
        return raw.lower(), name, link
    if _LICENCE_NAME.fullmatch(raw):
        return "other", name or raw, link
    notes.append("`license` of a card is not of its form: told as `other`.")
    return "other", name, link


def _is_kept(tag: str) -> bool:
    return tag.lower() not in _DROPPED_TAGS and not tag.lower().startswith(_DROPPED_TAG_PREFIXES)


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
