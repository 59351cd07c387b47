"""What the user should know about the files that come along: which side they are from, and where the sides differ.

No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from runner.files.sidecars.folders import files_of, is_same, read_object
from runner.files.sidecars.names import CARD, GENERATION, PROCESSOR_FILES, is_sentence_file, is_template, is_tokenizer
from runner.files.sidecars.templates import templates_of
from runner.files.sidecars.tokenizers import (
    SETTINGS,
    SPECIAL_NAMES,
    carries_vocabulary,
    special_tokens,
    tokens_of,
)
from runner.protocol.digests import FileOrigins
from runner.protocol.errors import AdapterMismatch

MAX_NAMED = 12
_UNTOLD = frozenset({CARD, ".gitattributes", ".gitignore"})  # the card takes over what it says
_SETTINGS = ("padding_side", "truncation_side", "model_max_length")


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
    tokens = tokens_of(adapter)
    token, last = max(tokens.items(), key=lambda entry: entry[1], default=("", -1))
    if last >= rows > max(tokens_of(base).values(), default=-1):
        raise AdapterMismatch(
            f"The adapter's tokenizer gives the id {last} to {token!r}, and the merged embeddings have {rows} rows.",
            why="Tokens were added for the training, and the rows that it gave them are not in the adapter.",
            fix="Save the adapter again with `save_embedding_layers=True`; or, if those tokens do not matter, remove "
            "the tokenizer's files from the adapter's folder, so that the base's tokenizer is released.",
        )


def companion_notes(base: Path, adapter: Path, origins: FileOrigins) -> Iterator[str]:
    """Yield one sentence for each group of files that is not simply the base's, and for what is left out.

    Args:
        base: the base's folder.
        adapter: the adapter's folder.
        origins: what came from where.
    """
    yield from _tokenizer(base, adapter, origins)
    for noun, names in (("processor", PROCESSOR_FILES), ("generation config", {GENERATION})):
        if changed := [name for name in origins.adapter if name in names]:
            yield f"The {noun} comes from the adapter ({', '.join(changed)})."
    if modules := [path for path in origins.adapter if is_sentence_file(path)]:
        yield f"The modules of sentence-transformers come from the adapter ({', '.join(modules)})."
    source = adapter if GENERATION in origins.adapter else base
    generation = read_object(source / GENERATION)
    unused = [name for name in ("temperature", "top_p", "top_k", "min_p", "typical_p") if generation.get(name)]
    if unused and generation.get("do_sample") is False:
        yield (
            f"{GENERATION} sets `{unused[0]}` with `do_sample: false`, which transformers refuses to save; "
            "it is carried as it is."
        )
    own = {path for path in origins.left_of_adapter if is_tokenizer(path) or is_template(path)}
    for noun, paths in (("base", origins.left_of_base), ("adapter", origins.left_of_adapter)):
        told = _UNTOLD | (own if noun == "adapter" else set(origins.adapter))  # replaced, which is told
        if listed := _short(path for path in paths if path not in told):
            yield f"Left out of the {noun}'s files: {listed}."


def _short(paths: Iterable[str]) -> str:
    """Return the paths in one line, each folder with the number of its files."""
    counts: dict[str, int] = {}
    for path in paths:
        top = path.partition("/")[0] + ("/" if "/" in path else "")
        counts[top] = counts.get(top, 0) + 1
    names = [f"{name} ({count} files)" if count > 1 else name for name, count in sorted(counts.items())]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names[:MAX_NAMED]) + more


def _tokenizer(base: Path, adapter: Path, origins: FileOrigins) -> Iterator[str]:
    names = [path for path in files_of(adapter) if is_tokenizer(path) or is_template(path)]
    taken = [name for name in names if name in origins.adapter]
    left = [name for name in names if name in origins.left_of_adapter]
    templates = [name for name in taken if is_template(name)]
    if templates == taken and taken:
        yield f"The chat template comes from the adapter ({', '.join(templates)}), the tokenizer from the base."
    if not carries_vocabulary(adapter):
        if left := [name for name in left if not is_template(name)]:
            yield f"The adapter's {', '.join(left)} is left out: without a vocabulary it is no tokenizer."
    elif templates == taken and left:
        yield (
            f"The adapter's tokenizer ({', '.join(left)}) says what the base's says, in other words: the base's stays."
        )
        yield from _settings(base, adapter)
    elif taken != templates:
        yield from _taken(base, adapter, origins, taken)


def _settings(base: Path, adapter: Path) -> Iterator[str]:
    before, after = read_object(base / SETTINGS), read_object(adapter / SETTINGS)
    for name in _SETTINGS:
        old, new = before.get(name), after.get(name)
        if new is not None and new != old:
            yield f"Its {name} is {new!r}, the base's {old!r}; the base's is released."


def _taken(base: Path, adapter: Path, origins: FileOrigins, taken: list[str]) -> Iterator[str]:
    ours = {path for path in files_of(base) if is_tokenizer(path) or is_template(path)}
    kept = sorted(ours & set(origins.base))
    gone = sorted(ours & set(origins.left_of_base) - set(taken))
    changed = [name for name in taken if not is_same(base / name, adapter / name)]
    if not changed and not gone:
        return
    differing = ", ".join(sorted(changed + gone))
    yield f"The tokenizer comes from the adapter. It differs from the base's in {differing}."
    if kept:
        yield f"Of the base's tokenizer is kept what the adapter does not replace: {', '.join(kept)}."
    if templates_of(base) and not templates_of(adapter) and not any(map(is_template, kept)):
        yield "The adapter's tokenizer has no chat template, and the base's is not carried over to it."
    yield from _tokens(base, adapter)


def _tokens(base: Path, adapter: Path) -> Iterator[str]:
    ours, theirs = tokens_of(base), tokens_of(adapter)
    if ours and theirs:
        more, fewer = len(theirs.keys() - ours.keys()), len(ours.keys() - theirs.keys())
        moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
        if more or fewer or moved:
            text = f"Of its tokens, {more} are new, {fewer} of the base's are gone, and {len(moved)} have another id"
            yield text + (f" (such as {min(moved)!r})." if moved else ".")
    before, after = special_tokens(base), special_tokens(adapter)
    for name in SPECIAL_NAMES:
        old, new = before.get(name), after.get(name)
        if old != new:
            yield f"Its {name} is {new!r}, the base's {old!r}."
