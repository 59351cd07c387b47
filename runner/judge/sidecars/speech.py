"""Tokenizer and chat template of a release: the base's, or the adapter's where it brings a tokenizer of its own.

Where the adapter's tokenizer says what the base's says, either is right, and the adapter's is told, since older readers
may not load what newer libraries write. Where it says something else, the release must have it, and what it does not
replace of the base. An adapter without a vocabulary brings its templates only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runner.judge.sidecars.listing import Listing, same_bytes, shown
from runner.judge.sidecars.names import Kind, is_vocabulary, kind_of
from runner.judge.sidecars.tokenizer import SETTINGS, Relation, brings_template, load_meaning, relate, says_the_same

SPECIALS = ("special_tokens_map.json", "added_tokens.json")
Said = tuple[str, Kind, str, bool]  # path, kind, what is said, whether it is a warning


@dataclass(slots=True, kw_only=True)
class _Speech:
    """The three folders, and where each file of the merged one comes from."""

    base: Listing
    adapter: Listing
    merged: Listing
    brought: frozenset[str]  # what the adapter may bring
    relation: Relation | None  # None where the adapter brings no vocabulary
    must_be_adapters: bool
    from_base: list[str] = field(default_factory=list)  # where the adapter's is another one
    from_adapter: list[str] = field(default_factory=list)  # where the base's is another one, or none
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def expected(self) -> Listing:
        """Whose tokenizer the merged one must mean, where it has files that are of neither side."""
        takes_adapter = self.relation is not None and self.from_adapter and not self.from_base
        return self.adapter if self.must_be_adapters or takes_adapter else self.base


def judge_speech(
    base: Listing, adapter: Listing, merged: Listing, paths: Sequence[str], *, rows: int | None
) -> Iterator[Said]:
    """Yield what is wrong with the files in `paths`, which are the base's and the merged folder's of this kind.

    Raises:
        OSError: a file cannot be read.
    """
    speech = _read(base, adapter, merged, rows)
    for path in sorted({*paths, *(speech.brought if speech.must_be_adapters else ())}):
        _sort(path, speech)
    yield from _missing(speech)
    yield from _changed(speech)
    yield from _mixed(speech)


def _read(base: Listing, adapter: Listing, merged: Listing, rows: int | None) -> _Speech:
    kinds = {path: kind_of(path) for path in adapter.sizes}
    has_own = any(is_vocabulary(path) for path in kinds)
    wanted = (Kind.TOKENIZER, Kind.TEMPLATE) if has_own else (Kind.TEMPLATE,)
    brought = frozenset(path for path, kind in kinds.items() if kind in wanted)
    differs = any(kinds[path] is Kind.TOKENIZER and not same_bytes(path, adapter, base) for path in brought)
    relation = (relate(base, adapter) if differs else Relation.SAME) if has_own else None
    return _Speech(
        base=base,
        adapter=adapter,
        merged=merged,
        brought=brought,
        relation=relation,
        must_be_adapters=relation in (Relation.EXTENDED, Relation.OTHER)
        or (relation is Relation.UNKNOWN and rows is not None),
    )


def _sort(path: str, speech: _Speech) -> None:
    """Put a path where it belongs by its bytes."""
    is_brought = path in speech.brought
    if path not in speech.merged:
        speech.missing.append(path)
    elif same_bytes(path, speech.merged, speech.base):
        if is_brought and not same_bytes(path, speech.base, speech.adapter):
            speech.from_base.append(path)
    elif is_brought and same_bytes(path, speech.merged, speech.adapter):
        speech.from_adapter.append(path)
    else:
        speech.changed.append(path)


def _missing(speech: _Speech) -> Iterator[Said]:
    takes_all = speech.relation is not None and all(
        same_bytes(path, speech.merged, speech.adapter) for path in speech.brought
    )
    replaced = takes_all and speech.relation in (Relation.OTHER, Relation.UNKNOWN)
    has_template = any(kind_of(path) is Kind.TEMPLATE for path in speech.brought) or (
        takes_all and brings_template(speech.adapter)
    )
    for path in speech.missing:
        kind = kind_of(path)
        gives_way = replaced or (kind is Kind.TEMPLATE and has_template and bool(speech.from_adapter))
        # Older libraries keep the special tokens apart: those of the base are wrong beside the adapter's settings.
        gives_way = gives_way or (path in SPECIALS and takes_all and speech.must_be_adapters)
        if path in speech.brought or not gives_way:
            yield path, kind, f"{shown(path)} is missing", False


def _changed(speech: _Speech) -> Iterator[Said]:
    if not speech.changed:
        return
    expected = speech.expected
    found, wanted = load_meaning(speech.merged), load_meaning(expected, speech.base)
    alike = found is not None and found == wanted
    whose = "adapter" if expected is speech.adapter else "base"
    for path in speech.changed:
        kind, told = kind_of(path), shown(path)
        if path not in expected:
            same = alike and not is_vocabulary(path)
            yield path, kind, f"{told} is not expected{'; loading gives the same' if same else ''}", same
        elif says_the_same(path, speech.merged, expected, wanted) and (path != SETTINGS or alike):
            yield path, kind, f"{told} has other bytes than the {whose}'s and means the same", True
        else:
            yield path, kind, f"{told} is neither the base's nor the adapter's", False


def _mixed(speech: _Speech) -> Iterator[Said]:
    """Yield what is wrong with the choice between base and adapter."""
    mine = [path for path in speech.from_base if speech.must_be_adapters or kind_of(path) is Kind.TOKENIZER]
    theirs = [path for path in speech.from_adapter if kind_of(path) is Kind.TOKENIZER]
    if speech.must_be_adapters and mine:
        half = "half of the tokenizer's files are the base's and half are the adapter's: "
        all_of_it = "the tokenizer's files are the base's, which do not know what the adapter's adds or changes: "
        yield mine[0], kind_of(mine[0]), f"{half if theirs else all_of_it}{', '.join(map(shown, mine))}", False
    elif speech.relation in (Relation.OTHER, Relation.UNKNOWN) and mine and theirs:
        half = "half of the tokenizer's files are the base's and half are the adapter's: "
        yield mine[0], Kind.TOKENIZER, f"{half}{', '.join(map(shown, mine))}", False
    elif speech.relation is Relation.SAME and theirs:
        said = "are the adapter's, which mean what the base's mean; older versions of transformers may not load them"
        yield theirs[0], Kind.TOKENIZER, f"{', '.join(map(shown, theirs))} {said}", True
