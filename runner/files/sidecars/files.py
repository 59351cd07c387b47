"""What a release carries besides weights: every file of the base, byte for byte, and what the adapter has of its own.

Each file of both sides has one fate. Of the base, all come along but the weights that are merged, the same weights in
other formats or folders, an adapter that lies in it, hidden files and its README. The adapter brings, file by file:

- its tokenizer, where it says something else than the base's (`runner.files.sidecars.tokenizers`); of the base's then
  stays what is still true; where both say the same, the base's files stay;
- its chat templates, processor and generation config, where they say something else;
- the modules of sentence-transformers that were saved with it, in the place of the base's;
- licences and notices: all of them; where both have the same name and other words, the adapter's is `adapter-NAME`.

What is left out is listed (`left_out`). config.json is edited as text only where the plan says so; nothing is ever read
into a library and written back, because that renames classes and drops fields. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files.pointers import is_pointer, pointer_problem
from runner.files.sidecars.folders import files_of, is_same, module_folders, read_object
from runner.files.sidecars.names import (
    CONFIG,
    GENERATION,
    PROCESSOR_FILES,
    comes_along,
    is_hidden,
    is_notice,
    is_own,
    is_sentence_file,
    is_template,
    is_tokenizer,
    is_weights,
    lone_pickles,
)
from runner.files.sidecars.templates import templates_of
from runner.files.sidecars.tokenizers import SPECIALS, Relation, relate, special_tokens
from runner.protocol.digests import FileOrigins, plain_name
from runner.protocol.errors import BrokenCheckpoint, UnsupportedCheckpoint
from runner.protocol.syntax import parse_json

NESTED = frozenset({"vocab_size", "tie_word_embeddings", "dtype", "torch_dtype"})  # what a text config has of its own
MAX_COMPANION_BYTES = 200_000_000
_WRITERS_KEYS = frozenset({"transformers_version", "_from_model_config"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """One file that is carried over.

    Attributes:
        path: relative to the release, with forward slashes.
        source: where its bytes are.
        edits: top-level keys of a JSON file and their new values; empty for a byte copy.
        is_adapters: whether it is the adapter's; else it is the base's.
    """

    path: str
    source: Path
    edits: Mapping[str, Any]
    is_adapters: bool = False


def read_config(root: Path) -> dict[str, Any]:
    """Return the checkpoint's config.json.

    Raises:
        BrokenCheckpoint: missing, not JSON, or not an object.
    """
    try:
        check_pointer(root / CONFIG, CONFIG)
        config = parse_json((root / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(
            f"The base's {CONFIG} cannot be read: {error.__class__.__name__}.",
            why="It says which architecture the weights belong to.",
            fix="Point `base-model` at a whole transformers checkpoint.",
        ) from error
    if not isinstance(config, dict):
        raise BrokenCheckpoint(
            f"The base's {CONFIG} is not a JSON object.",
            why="It says which architecture the weights belong to.",
            fix="Download the base again.",
        )
    return config


def find_companions(
    base: Path, adapter: Path, config_edits: Mapping[str, Any], *, pickles: bool = False
) -> tuple[Companion, ...]:
    """Return every file that comes along, sorted by path.

    Args:
        base: the base's folder.
        adapter: the adapter's folder.
        config_edits: keys of config.json to change (nested text configs follow where they hold the key).
        pickles: whether pickled weights of sentence-transformers' modules will do where there are no others.

    Raises:
        BrokenCheckpoint: a file is a Git LFS pointer.
        UnsupportedCheckpoint: a file is too large to be anything but weights, or a module has pickled weights only.
    """
    paths, modules = files_of(base), module_folders(base)
    lone = lone_pickles(paths, modules)
    found = {path: base / path for path in paths if comes_along(path, modules, lone)}
    brought = {**_of_tokenizer(base, adapter, found), **_of_modules(base, adapter, found)}
    brought |= {name: adapter / name for name in _of_configs(base, adapter)}
    for name in (path for path in files_of(adapter) if is_notice(path)):
        if name not in found or not is_same(found[name], adapter / name):
            brought[f"adapter-{name}" if name in found else name] = adapter / name
    found = {path: source for path, source in found.items() if path not in brought}
    check_pickles((path for path in lone if path in found), "base", allowed=pickles)
    both = [(path, source, False) for path, source in found.items()]
    both += [(path, source, True) for path, source in brought.items()]
    for path, source, _ in both:
        check_pointer(source, path)
        check_size(path, source.stat().st_size)
    return tuple(
        Companion(
            path=plain_name(path),
            source=source,
            edits=config_edits if path == CONFIG else {},
            is_adapters=is_adapters,
        )
        for path, source, is_adapters in sorted(both)
    )


def trace(base: Path, adapter: Path, companions: Iterable[Companion], weights: Iterable[str]) -> FileOrigins:
    """Return what came from where, and which files of both folders are in no release.

    Args:
        base: the base's folder.
        adapter: the adapter's folder.
        companions: what comes along.
        weights: the base's files that the merge reads: weights and their index.
    """
    companions = tuple(companions)
    used = {companion.source for companion in companions}
    carried = {companion.path: companion.source for companion in companions}
    merged = {base / name for name in weights}
    return FileOrigins(
        base=tuple(companion.path for companion in companions if not companion.is_adapters),
        adapter=tuple(companion.path for companion in companions if companion.is_adapters),
        edited={companion.path: tuple(sorted(companion.edits)) for companion in companions if companion.edits},
        left_of_base=_left(base, used | merged),
        left_of_adapter=tuple(
            path
            for path in _left(adapter, used)
            if not is_own(path) and not (path in carried and is_same(carried[path], adapter / path))
        ),
    )


def _left(root: Path, used: Iterable[Path]) -> tuple[str, ...]:
    kept = set(used)
    return tuple(path for path in files_of(root) if root / path not in kept and not is_hidden(path))


def check_size(path: str, size_bytes: int) -> None:
    """Refuse a file that is too large to be carried; nothing that a loader needs, but weights, is.

    Raises:
        UnsupportedCheckpoint: it is.
    """
    if size_bytes > MAX_COMPANION_BYTES and not is_weights(path):
        most = MAX_COMPANION_BYTES // 10**6
        raise UnsupportedCheckpoint(
            f"{path} has {size_bytes // 10**6} MB, and a file that is no weights may have {most}.",
            why="Every file of the base belongs in the release, and no loader needs one of that size but weights.",
            fix="If nobody needs it, give a copy of the folder without it as `base-model`.",
        )


def check_pickles(paths: Iterable[str], noun: str, *, allowed: bool) -> None:
    """Refuse pickled weights of modules that have no others, unless they are allowed.

    Raises:
        UnsupportedCheckpoint: there are some.
    """
    for path in () if allowed else paths:
        raise UnsupportedCheckpoint(
            f"{path} of the {noun} is a pickle, and there are no safetensors beside it.",
            why="modules.json names that folder, so its weights belong in the release, and unpickling can run code.",
            fix="Add `pickle` to `allow`, and the file is carried as it is; or save the model again with "
            "sentence-transformers, which writes safetensors.",
        )


def check_pointer(path: Path, name: str) -> None:
    """Refuse a Git LFS pointer, which would be read as damage or, worse, copied into the release.

    Raises:
        BrokenCheckpoint: it is one.
        OSError: it cannot be read.
    """
    if is_pointer(path):
        problem = pointer_problem(name)
        raise BrokenCheckpoint(problem.what, why=problem.why, fix=problem.fix)


def copy_companion(companion: Companion, root: Path) -> bytes:
    """Write the companion under `root` and return its bytes."""
    content = companion.source.read_bytes()
    if companion.edits:
        content = edit_json(content, companion.edits)
    target = root / companion.path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return content


def edit_json(content: bytes, edits: Mapping[str, Any]) -> bytes:
    """Return the JSON object with `edits` applied at the top level, `NESTED` ones also where a text config holds them.

    Order and all other fields stay; `None` removes a key. A key that is nowhere is added at the top level.
    """
    config = parse_json(content)
    inner = [config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)]
    for key, value in edits.items():
        owners = [holder for holder in (config, *inner) if key in holder and (holder is config or key in NESTED)]
        owners = owners or [config]
        for owner in owners:
            if value is None:
                owner.pop(key, None)
            else:
                owner[key] = value
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _of_tokenizer(base: Path, adapter: Path, found: dict[str, Path]) -> dict[str, Path]:
    """Return the adapter's files of tokenizer and templates that are taken; take what they replace out of `found`."""
    relation, theirs = relate(base, adapter), files_of(adapter)
    templates, own = templates_of(adapter), [path for path in theirs if is_template(path)]
    is_new = bool(templates) and templates != templates_of(base)
    if relation is Relation.NONE or (relation is Relation.SAME and (own or not is_new)):
        taken = own if is_new else []
    else:
        taken = [path for path in theirs if is_template(path) or is_tokenizer(path)]
    if taken:
        gone = {path for path in found if is_template(path) and (templates or relation is Relation.OTHER)}
        gone |= {path for path in found if is_tokenizer(path) and relation is Relation.OTHER}
        if relation is Relation.EXTENDED and special_tokens(base) != special_tokens(adapter):
            gone.add(SPECIALS)  # it names the base's special tokens
        for path in gone & found.keys():
            del found[path]
    return {path: adapter / path for path in taken}


def _of_modules(base: Path, adapter: Path, found: dict[str, Path]) -> dict[str, Path]:
    """Return the modules of sentence-transformers that the adapter has; take the base's out of `found`."""
    paths, modules = files_of(adapter), module_folders(adapter)
    own = [path for path in paths if is_sentence_file(path)]
    if not own:
        return {}
    lone = lone_pickles(paths, modules)
    own += [path for path in paths if path.startswith(modules) and comes_along(path, modules, lone)]
    if modules:
        ours = module_folders(base)
        for path in [path for path in found if is_sentence_file(path) or path.startswith((*ours, *modules))]:
            del found[path]
    return {path: adapter / path for path in own}


def _of_configs(base: Path, adapter: Path) -> list[str]:
    """Return the adapter's files of processor and generation that say something else than the base's."""
    own = [name for name in sorted({*PROCESSOR_FILES, GENERATION}) if (adapter / name).is_file()]
    return [name for name in own if not says_the_same(base / name, adapter / name)]


def says_the_same(left: Path, right: Path) -> bool:
    """Return whether two JSON files hold the same object, whoever wrote them down."""
    if is_same(left, right):
        return True
    before, after = read_object(left), read_object(right)
    return bool(before) and _plain(before) == _plain(after)


def _plain(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if key not in _WRITERS_KEYS}, sort_keys=True)
