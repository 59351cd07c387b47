"""What the user should know about the files that come along: which side they are from, and where the sides differ.

No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.companions.files import (
    GENERATION,
    PROCESSOR_FILES,
    TEMPLATES,
    TOKENIZER_FILES,
    carries_vocabulary,
    module_folders,
)
from runner.errors import AdapterMismatch
from runner.syntax import parse_json

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def check_tokenizer(base: Path, adapter: Path, rows: int | None) -> None:
    """Refuse an adapter's tokenizer whose tokens the merged embeddings do not have.

    Args:
        base: the base's folder.
        adapter: the adapter's folder.
        rows: of the merged model's embeddings, where known.

    Raises:
        AdapterMismatch: the adapter's tokenizer gives ids beyond the last row, and the base's own does not.
    """
    if rows is None or not carries_vocabulary(adapter):
        return
    tokens = _tokens(adapter)
    token, last = max(tokens.items(), key=lambda entry: entry[1], default=("", -1))
    if last >= rows > max(_tokens(base).values(), default=-1):
        raise AdapterMismatch(
            f"The adapter's tokenizer gives the id {last} to {token!r}, and the merged embeddings have {rows} rows.",
            why="Tokens were added for the training, and the rows that it gave them are not in the adapter.",
            fix="Save the adapter again with `save_embedding_layers=True`; or, if those tokens do not matter, remove "
            "the tokenizer's files from the adapter's folder, so that the base's tokenizer is released.",
        )


def companion_notes(base: Path, adapter: Path) -> Iterator[str]:
    """Yield one sentence for each group of files that is not simply the base's."""
    yield from _tokenizer(base, adapter)
    for noun, names in (("processor", sorted(PROCESSOR_FILES)), ("generation config", [GENERATION])):
        if changed := [name for name in names if _differs(base, adapter, name)]:
            yield f"The {noun} comes from the adapter ({', '.join(changed)})."
    source = adapter if (adapter / GENERATION).is_file() else base
    generation = _object(source / GENERATION)
    unused = [name for name in ("temperature", "top_p", "top_k", "min_p", "typical_p") if generation.get(name)]
    if unused and generation.get("do_sample") is False:
        yield (
            f"{GENERATION} sets `{unused[0]}` with `do_sample: false`, which transformers refuses to save; "
            "it is carried as it is."
        )
    for folder in module_folders(base):
        if any(path.suffix == ".bin" for path in (base / folder).glob("*")):
            yield f"{folder}*.bin is a pickle and is left out; sentence-transformers needs it as safetensors."


def _tokenizer(base: Path, adapter: Path) -> Iterator[str]:
    names = [name for name in sorted(TOKENIZER_FILES) if (adapter / name).is_file()]
    templates = [name for name in names if name in TEMPLATES]
    if not carries_vocabulary(adapter):
        if any(_differs(base, adapter, name) for name in templates):
            yield f"The chat template comes from the adapter ({', '.join(templates)}), the tokenizer from the base."
        if left := [name for name in names if name not in TEMPLATES and _differs(base, adapter, name)]:
            yield f"The adapter's {', '.join(left)} is left out: without a vocabulary it is no tokenizer."
        return
    gone = [name for name in sorted(TOKENIZER_FILES) if (base / name).is_file() and name not in names]
    changed = [name for name in names if _differs(base, adapter, name)]
    if not changed and not gone:
        return
    yield (
        "The tokenizer comes from the adapter. It differs from the base's in " + ", ".join(sorted(changed + gone)) + "."
    )
    ours, theirs = _tokens(base), _tokens(adapter)
    if ours and theirs:
        more, fewer = len(theirs.keys() - ours.keys()), len(ours.keys() - theirs.keys())
        moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
        if more or fewer or moved:
            text = f"Of its tokens, {more} are new, {fewer} of the base's are gone, and {len(moved)} have another id"
            yield text + (f" (such as {min(moved)!r})." if moved else ".")
    before, after = _object(base / "tokenizer_config.json"), _object(adapter / "tokenizer_config.json")
    for name in _SPECIAL:
        old, new = _content(before.get(name)), _content(after.get(name))
        if old != new:
            yield f"Its {name} is {new!r}, the base's {old!r}."


def _differs(base: Path, adapter: Path, name: str) -> bool:
    """Return whether the adapter has a file that the base has not, or with other bytes."""
    mine, theirs = adapter / name, base / name
    return mine.is_file() and not (theirs.is_file() and theirs.read_bytes() == mine.read_bytes())


def _tokens(root: Path) -> Mapping[str, int]:
    """Return token → id of a fast tokenizer; empty where there is none, or it is of a kind that lists no ids."""
    whole = _object(root / "tokenizer.json")
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        tokens = {str(token): number for token, number in vocabulary.items() if isinstance(number, int)}
    elif isinstance(vocabulary, list):  # Unigram: pieces with their scores
        tokens = {str(entry[0]): number for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    for entry in whole.get("added_tokens") or ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            tokens[str(entry.get("content"))] = entry["id"]
    return tokens


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
