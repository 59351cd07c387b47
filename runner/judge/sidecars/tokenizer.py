"""What the tokenizer of a folder means: two folders mean the same where loading gives the same object.

A library that saves a tokenizer writes other bytes for the same thing: other spacing, fields of its own, the special
tokens and the template in other files. So what differs in bytes is loaded by transformers and compared as loaded; and
since other readers look at the files themselves, each file is compared by its content, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from runner.judge.sidecars.listing import MAX_JSON_BYTES, Listing, canonical, json_of, same_bytes
from runner.judge.sidecars.names import CONFIG, Kind, is_vocabulary, kind_of
from runner.judge.streaming.models import LOAD_ERRORS, quiet
from runner.protocol.syntax import parse_json

FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
PANIC = "PanicException"
_ANY_TOKENIZER = ("PreTrainedTokenizerFast", "TokenizersBackend")  # of transformers 4 and 5; read tokenizer.json alone
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Of tokenizer_config.json: who wrote it, and what the loaded object is asked for instead.
_OF_THE_WRITER = frozenset(
    "is_local local_files_only backend name_or_path _name_or_path transformers_version tokenizer_class "
    "processor_class chat_template added_tokens_decoder tokenizer_file vocab_file merges_file".split()
) | frozenset(_LISTS)


class Relation(Enum):
    """How the adapter's tokenizer stands to the base's."""

    SAME = "the same tokens, special tokens and rules"
    EXTENDED = "every token of the base under its id, and something more or else"
    OTHER = "other tokens"
    UNKNOWN = "one of the two cannot be loaded, and their vocabularies have the same bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """A loaded tokenizer.

    Attributes:
        rules: how text becomes tokens: the fast tokenizer's own JSON without its vocabulary, or the class.
        tokens: token → id, added ones among them.
        added: id → added token with its flags.
        special: what each special token is.
        settings: what else it was told: the longest input, on which side it pads.
        template: of chats; "" for none.
        kind: its class, as saving it again writes it.
        saved: tokenizer.json as saving it again writes it; "" where it has none.
        told: the settings that saving it again writes.
    """

    rules: str
    tokens: Mapping[str, int]
    added: Mapping[int, str]
    special: str
    settings: str
    template: str
    kind: str = field(compare=False)
    saved: str = field(compare=False)
    told: Mapping[str, str] = field(compare=False)

    @property
    def words(self) -> tuple[Any, ...]:
        """What decides which ids a text becomes and which of them are special."""
        return (self.rules, self.tokens, self.added, self.special)


def load_meaning(folder: Listing, config: Listing | None = None) -> Meaning | None:
    """Return what the folder's tokenizer means, or None where transformers loads none from it.

    Args:
        folder: that has it.
        config: a model's folder; transformers looks at the model's config, too, and an adapter's folder has none.
    """
    from transformers import AutoTokenizer

    if any(size > MAX_JSON_BYTES for path, size in folder.sizes.items() if path in (FAST, SETTINGS)):
        return None
    with _caught() as caught, quiet(), _with_config(folder, config) as root:
        tokenizer = AutoTokenizer.from_pretrained(str(root), local_files_only=True, trust_remote_code=False)
        caught.append(_meaning(tokenizer))
    return caught[0] if caught else None


@contextmanager
def _with_config(folder: Listing, config: Listing | None) -> Iterator[Path]:
    """Give the folder, or links to its tokenizer's files beside the config of a model."""
    if config is None or CONFIG in folder or CONFIG not in config:
        yield folder.root
        return
    with tempfile.TemporaryDirectory(prefix="lora-merge-") as made:
        for path in folder.sizes:
            if kind_of(path) in (Kind.TOKENIZER, Kind.TEMPLATE) and "/" not in path:
                (Path(made) / path).symlink_to(folder.names(path).resolve())
        (Path(made) / CONFIG).symlink_to(config.names(CONFIG).resolve())
        yield Path(made)


def relate(base: Listing, adapter: Listing) -> Relation:
    """Return how the adapter's tokenizer stands to the base's."""
    ours, theirs = load_meaning(base), load_meaning(adapter, base)
    if ours is not None and theirs is not None:
        if ours.words == theirs.words:
            return Relation.SAME
        extends = ours.rules == theirs.rules and ours.tokens.items() <= theirs.tokens.items()
        return Relation.EXTENDED if extends else Relation.OTHER
    both = [path for path in adapter.sizes if path in base and is_vocabulary(path)]
    return Relation.UNKNOWN if all(same_bytes(path, base, adapter) for path in both) else Relation.OTHER


def says_the_same(path: str, folder: Listing, expected: Listing, meaning: Meaning | None) -> bool:
    """Return whether a changed file of a tokenizer holds what the expected one holds, though in other bytes.

    Args:
        path: of the file.
        folder: where it is changed.
        expected: where it is right.
        meaning: of the expected tokenizer, where it can be loaded: what saving it again writes is right, too.
    """
    if path == FAST:
        found, wanted = (_fast(side) for side in (folder, expected))
        return found is not None and found in (wanted, meaning.saved if meaning is not None else None)
    found, wanted = (json_of(path, side) for side in (folder, expected))
    if found is None or wanted is None:
        return False
    if path == SETTINGS and isinstance(found, dict) and isinstance(wanted, dict):
        known = {key: canonical(_bare(value)) for key, value in wanted.items()}
        known = {**(meaning.told if meaning is not None else {}), **known}
        classes = [wanted.get("tokenizer_class"), meaning.kind if meaning is not None else None]
        return _is_one_of(found.get("tokenizer_class"), classes) and all(
            canonical(_bare(found[key])) == known.get(key) for key in found.keys() - _OF_THE_WRITER
        )
    return canonical(_bare(found)) == canonical(_bare(wanted))


def _is_one_of(found: Any, classes: Sequence[Any]) -> bool:
    """Return whether a tokenizer's class is one of these, its fast or slow twin, or one that reads any tokenizer."""
    stems = [str(name).removesuffix("Fast") for name in classes if name is not None]
    return found in (None, *_ANY_TOKENIZER, *stems, *(f"{stem}Fast" for stem in stems))


def brings_template(adapter: Listing) -> bool:
    """Return whether the adapter's tokenizer config has a chat template in it."""
    settings = json_of(SETTINGS, adapter)
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _meaning(tokenizer: Any) -> Meaning:
    added = {int(number): repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
    rules = _rules(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else type(tokenizer).__name__
    special = {name: _bare(value) for name, value in tokenizer.special_tokens_map.items() if name not in _LISTS}
    sides = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names")
    template = getattr(tokenizer, "chat_template", None)
    return Meaning(
        rules=rules,
        tokens=tokenizer.get_vocab(),
        added=added,
        special=canonical([special, sorted(map(str, tokenizer.all_special_tokens))]),
        settings=canonical({name: getattr(tokenizer, name, None) for name in sides}),
        template=canonical(template) if template else "",
        kind=type(tokenizer).__name__,
        saved=_without_limits(tokenizer.backend_tokenizer) if tokenizer.is_fast else "",
        told={str(key): canonical(_bare(value)) for key, value in tokenizer.init_kwargs.items()},
    )


def _rules(text: str) -> str:
    content = parse_json(text)
    model = {key: value for key, value in content.get("model", {}).items() if key != "vocab"}
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return canonical([model, *(content.get(part) for part in parts)])


def _fast(folder: Listing) -> str | None:
    """Return tokenizer.json as the library writes it today, without what the last caller set; None where it cannot."""
    from tokenizers import Tokenizer

    if not 0 < folder.sizes.get(FAST, 0) <= MAX_JSON_BYTES:
        return None
    with _caught() as caught:
        caught.append(_without_limits(Tokenizer.from_str(folder.names(FAST).read_text())))
    return str(caught[0]) if caught else None


def _without_limits(made: Any) -> str:
    made.no_padding()
    made.no_truncation()
    return str(made.to_str())


def _bare(value: Any) -> Any:
    """Return a special token as its text, where it is written with its flags; in maps and lists, too."""
    if isinstance(value, dict):
        if "content" in value:
            return value["content"]
        return {key: _bare(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_bare(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@contextmanager
def _caught() -> Iterator[list[Any]]:
    """Give a list for the result, which stays empty where the folder is what a library cannot read."""
    made: list[Any] = []
    try:
        yield made
    except BaseException as error:
        # The tokenizers library raises bare Exceptions, and panics, which are no Exceptions.
        if not (isinstance(error, LOAD_ERRORS) or type(error) is Exception or type(error).__name__ == PANIC):
            raise
        made.clear()
