"""Whether an adapter's tokenizer says what the base's says, whatever library wrote it down. No torch.

A training that saves the tokenizer beside the adapter writes it anew: merges as pairs, special tokens in other files,
no vocabulary of its own beside tokenizer.json. Compared is what decides which ids a text becomes: the vocabulary, the
rules before and after it, added tokens and special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from runner.files.sidecars.folders import MAX_JSON_BYTES, files_of, is_same, read_json, read_object
from runner.files.sidecars.names import is_tokenizer, is_vocabulary
from runner.protocol.syntax import parse_json

FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"
ADDED = "added_tokens.json"
MERGES = "merges.txt"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_SPECIALS = ("additional_special_tokens", "extra_special_tokens")
# Of tokenizer_config.json: what changes the ids of a text, beside what is in the other files.
_BEHAVIOUR = ("add_bos_token", "add_eos_token", "split_special_tokens", "do_lower_case", "src_lang", "tgt_lang")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_PANIC = "PanicException"


class Relation(Enum):
    """How the adapter's tokenizer stands to the base's."""

    NONE = "the adapter has no vocabulary"
    SAME = "the same tokens, special tokens and rules, maybe written down in another way"
    EXTENDED = "the base's vocabulary, and tokens, special tokens or rules of its own"
    OTHER = "another vocabulary, or one that cannot be compared"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fast:
    """What a tokenizer.json means.

    Attributes:
        model: the vocabulary with its merges, and how a word is split.
        rules: normalizer, pre-tokenizer, post-processor and decoder.
        added: tokens outside of the model, each with id and flags.
    """

    model: Any
    rules: Any
    added: Mapping[str, tuple[int, Any]]


def carries_vocabulary(root: Path) -> bool:
    """Return whether the folder has a tokenizer of its own."""
    return any(is_vocabulary(path) for path in files_of(root))


def relate(base: Path, adapter: Path) -> Relation:
    """Return how the tokenizer in the folder `adapter` stands to the one in `base`."""
    theirs = [path for path in files_of(adapter) if is_tokenizer(path)]
    if not any(map(is_vocabulary, theirs)):
        return Relation.NONE
    if all(is_same(base / path, adapter / path) for path in theirs):
        return Relation.SAME
    before, after = _read_fast(base), _read_fast(adapter)
    if not _same_vocabulary(base, adapter, theirs, before, after):
        return Relation.OTHER
    return _relate_the_rest(base, adapter, before, after)


def special_tokens(root: Path) -> Mapping[str, str]:
    """Return name → special token, from whichever file says it."""
    settings, others = read_object(root / SETTINGS), read_object(root / SPECIALS)
    found = {name: content(settings.get(name) or others.get(name)) for name in SPECIAL_NAMES}
    return {name: str(token) for name, token in found.items() if token is not None}


def content(token: Any) -> Any:
    """Return a special token as its text, where it is written with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def tokens_of(root: Path) -> Mapping[str, int]:
    """Return token → id of a fast tokenizer; empty where there is none, or it is of a kind that lists no ids."""
    whole = read_object(root / FAST)
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        tokens = {str(token): number for token, number in vocabulary.items() if isinstance(number, int)}
    elif isinstance(vocabulary, list):  # Unigram: pieces with their scores
        tokens = {str(entry[0]): number for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    return tokens | {token: number for token, (number, _) in _added(whole).items()}


def _relate_the_rest(base: Path, adapter: Path, before: _Fast | None, after: _Fast | None) -> Relation:
    """Return the relation of two tokenizers that have the same vocabulary."""
    ours, theirs = _all_added(base, before), _all_added(adapter, after)
    if any(token in theirs and theirs[token][0] != number for token, (number, _) in ours.items()):
        return Relation.OTHER
    if ours != theirs or special_tokens(base) != special_tokens(adapter):
        return Relation.EXTENDED
    if (before is None) != (after is None) or (before and after and before.rules != after.rules):
        return Relation.EXTENDED
    more = [set(_more_specials(root)) - _flagged(ours) for root in (base, adapter)]
    return Relation.EXTENDED if more[0] != more[1] or _behaves_otherwise(base, adapter) else Relation.SAME


def _same_vocabulary(base: Path, adapter: Path, theirs: list[str], before: _Fast | None, after: _Fast | None) -> bool:
    both = [path for path in theirs if path != FAST and (base / path).is_file()]
    if not all(_same_words(base, adapter, path) for path in both if is_vocabulary(path) or path == MERGES):
        return False
    if (base / FAST).is_file() and (adapter / FAST).is_file():
        return before is not None and after is not None and bool(before.model == after.model)
    if all(path in both for path in theirs if is_vocabulary(path)):
        return True
    words = [_plain(_words(root)) for root in (base, adapter)]
    rest = iter(words[1])
    return bool(words[0]) and all(word in rest for word in words[0])  # in the same order; ids may be shifted as a whole


def _same_words(base: Path, adapter: Path, path: str) -> bool:
    if is_same(base / path, adapter / path):
        return True
    if path.endswith(".json"):
        ours = read_json(base / path)
        return ours is not None and ours == read_json(adapter / path)
    return path.endswith(".txt") and _lines(base / path) == _lines(adapter / path)


def _lines(path: Path) -> list[str]:
    text = path.read_text("utf-8", "surrogateescape")
    return [line for line in text.split("\n") if line and not line.startswith("#version")]


def _read_fast(root: Path) -> _Fast | None:
    """Return what tokenizer.json means, as the library that it was made for reads it; None where it cannot."""
    from tokenizers import Tokenizer

    path = root / FAST
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return None
    try:
        made = Tokenizer.from_str(path.read_text("utf-8"))
        made.no_padding()
        made.no_truncation()
        whole = parse_json(made.to_str())
    except BaseException as error:
        # The library raises bare Exceptions, and panics, which are no Exceptions.
        if isinstance(error, Exception) or type(error).__name__ == _PANIC:
            return None
        raise
    parts = ("normalizer", "pre_tokenizer", "decoder")
    rules = [_without_offsets(whole.get(part)) for part in parts] + [_ids_only(whole.get("post_processor"))]
    return _Fast(model=_canonical_model(whole["model"]), rules=rules, added=_added(whole))


def _canonical_model(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value or None for key, value in model.items()}  # "" and null are both no prefix


def _without_offsets(part: Any) -> Any:
    """Return a rule without what only decides where in the text a token is said to be."""
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in part] if isinstance(part, list) else part


def _ids_only(processor: Any) -> Any:
    """Return a post-processor without the steps that only move offsets; None where nothing remains."""
    if not isinstance(processor, dict) or processor.get("type") == "ByteLevel":
        return None
    if processor.get("type") == "Sequence":
        steps = [step for inner in processor.get("processors") or [] if (step := _ids_only(inner)) is not None]
        return steps[0] if len(steps) == 1 else (steps or None)
    return _without_offsets(processor)


def _added(whole: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    entries = whole.get("added_tokens")
    found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {
        str(entry.get("content")): (entry["id"], [bool(entry.get(flag)) for flag in _FLAGS])
        for entry in found
        if isinstance(entry.get("id"), int)
    }


def _all_added(root: Path, fast: _Fast | None) -> Mapping[str, tuple[int, Any]]:
    """Return added token → (id, flags), from whichever file names it first."""
    decoder = read_object(root / SETTINGS).get("added_tokens_decoder")
    listed = [
        {**token, "id": int(number)}
        for number, token in (decoder.items() if isinstance(decoder, dict) else ())
        if isinstance(token, dict) and str(number).isdecimal()
    ]
    return {**_added({"added_tokens": listed}), **(fast.added if fast else {})}


def _flagged(added: Mapping[str, tuple[int, Any]]) -> set[str]:
    return {token for token, (_, flags) in added.items() if flags[-1]}


def _more_specials(root: Path) -> Iterator[str]:
    settings, others = read_object(root / SETTINGS), read_object(root / SPECIALS)
    for name in _MORE_SPECIALS:
        found = settings.get(name) or others.get(name) or []
        yield from (str(content(token)) for token in (found.values() if isinstance(found, dict) else found))


def _behaves_otherwise(base: Path, adapter: Path) -> bool:
    before, after = read_object(base / SETTINGS), read_object(adapter / SETTINGS)
    pairs = [(before.get(name), after.get(name)) for name in _BEHAVIOUR]
    return any(old is not None and new is not None and old != new for old, new in pairs)


def _plain(words: list[str]) -> list[str]:
    """Return the words that are none of a tokenizer's own signs, which each format numbers in its own way."""
    return [word for word in words if not word.startswith(("<", "["))]


def _words(root: Path) -> list[str]:
    """Return the words of a vocabulary in the order of their ids, from whichever file has them."""
    tokens = tokens_of(root) or read_object(root / "vocab.json")
    if tokens:
        return [token for token, number in sorted(tokens.items(), key=lambda entry: str(entry[1]).zfill(12))]
    if (root / "vocab.txt").is_file():
        return _lines(root / "vocab.txt")
    models = sorted(path for path in root.glob("*.model") if is_vocabulary(path.name))
    return [piece for path in models[:1] for piece in _pieces(path.read_bytes())]


def _pieces(data: bytes) -> Iterator[str]:
    """Yield the pieces of a sentencepiece model: field 1 of each field 1 of the message."""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            yield from (
                inner.decode("utf-8", "replace")
                for key, inner in _fields(value)
                if key == 1 and isinstance(inner, bytes)
            )


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of a protocol buffer's fields, until its end or to where it is damaged."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 2:
            length, at = _varint(data, at)
            yield key >> 3, data[at : at + length]
            at += length
        elif key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            return


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80 or shift > 63:
            break
    return value, at
