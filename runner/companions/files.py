"""What a release carries besides weights: config, tokenizer, processor, generation config, licence, byte for byte.

The rule, file group by file group: what the adapter carries of its own comes from the adapter, everything else from the
base, and never half of a group from each.

- tokenizer: from the adapter if it has a vocabulary (its templates with it); without one, its chat template alone is
  taken, and its other tokenizer files are leftovers of the training;
- processor, generation config: from the adapter if it has one;
- licences and notices: all of them; where both have the same name and other words, the adapter's is `adapter-NAME`;
- everything else from the base, sentence-transformers' module folders with their weights among it.

config.json is edited as text only where the plan says so; nothing is ever read into a library and written back, because
that renames classes and drops fields. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.digests import plain_name
from runner.checkpoint.layout import INDEX_FILE
from runner.checkpoint.pointers import is_pointer, pointer_problem
from runner.errors import BrokenCheckpoint
from runner.syntax import parse_json

CONFIG = "config.json"
TOKENIZER_FILES = frozenset(
    """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
    tokenizer.model spiece.model sentencepiece.bpe.model source.spm target.spm tekken.json normalizer.json
    chat_template.jinja chat_template.json""".split()
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")
MORE_TEMPLATES = "additional_chat_templates/"
# A tokenizer of one's own means a vocabulary; a lone tokenizer_config.json is a leftover of the training.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "tekken.json",
)
PROCESSOR_FILES = frozenset(
    "processor_config.json preprocessor_config.json video_preprocessor_config.json image_processor_config.json".split()
)
GENERATION = "generation_config.json"
NOTICES = ("license", "licence", "notice", "use_policy", "copying")
MODULES = "modules.json"  # of sentence-transformers: which folders make the model
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".pkl", ".npz")
LEFT_BEHIND = frozenset({"README.md", ".gitattributes", ".gitignore", INDEX_FILE, "adapter_config.json"})
NESTED = frozenset({"vocab_size", "tie_word_embeddings", "dtype", "torch_dtype"})  # what a text config has of its own
MAX_COMPANION_BYTES = 200_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """One file that is carried over.

    Attributes:
        path: relative to the release, with forward slashes.
        source: where its bytes are.
        edits: top-level keys of a JSON file and their new values; empty for a byte copy.
    """

    path: str
    source: Path
    edits: Mapping[str, Any]


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


def find_companions(base: Path, adapter: Path, config_edits: Mapping[str, Any]) -> tuple[Companion, ...]:
    """Return every file that comes along, sorted by path.

    Args:
        base: the base's folder.
        adapter: the adapter's folder.
        config_edits: keys of config.json to change (nested text configs follow where they hold the key).

    Raises:
        BrokenCheckpoint: a file is a Git LFS pointer.
    """
    found = {path: base / path for path in _files(base) if _comes_along(base, path)}
    for group in (_of_tokenizer, _of_processor, _of_generation):
        if own := group(adapter):
            found = {path: source for path, source in found.items() if not _takes_place(own, path)}
            found |= {path: adapter / path for path in own}
    for name in _notices(adapter):
        same = name in found and found[name].read_bytes() == (adapter / name).read_bytes()
        if not same:
            found[f"adapter-{name}" if name in found else name] = adapter / name
    for path, source in found.items():
        check_pointer(source, path)
    return tuple(
        Companion(path=plain_name(path), source=source, edits=config_edits if path == CONFIG else {})
        for path, source in sorted(found.items())
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


def carries_vocabulary(root: Path) -> bool:
    """Return whether the folder has a tokenizer of its own."""
    return any((root / name).is_file() for name in VOCABULARIES)


def may_come_from_adapter(path: str) -> bool:
    """Return whether a release may take this file of an adapter's folder, config.json with its labels among them."""
    is_named = path in TOKENIZER_FILES | PROCESSOR_FILES | {CONFIG, GENERATION} or path.startswith(MORE_TEMPLATES)
    return is_named or ("/" not in path and is_notice(path))


def is_notice(name: str) -> bool:
    """Return whether a file is a licence or a notice by its name."""
    return name.lower().startswith(NOTICES) and not name.endswith(WEIGHT_SUFFIXES)


def _of_tokenizer(adapter: Path) -> set[str]:
    """Return the adapter's files that take the place of the base's tokenizer, or of its templates."""
    templates = {name for name in TEMPLATES if (adapter / name).is_file()}
    templates |= {f"{MORE_TEMPLATES}{path.name}" for path in (adapter / MORE_TEMPLATES).glob("*.jinja")}
    if not carries_vocabulary(adapter):
        return templates
    return templates | {name for name in TOKENIZER_FILES if (adapter / name).is_file()}


def _of_processor(adapter: Path) -> set[str]:
    return {name for name in PROCESSOR_FILES if (adapter / name).is_file()}


def _of_generation(adapter: Path) -> set[str]:
    return {GENERATION} if (adapter / GENERATION).is_file() else set()


def _takes_place(own: set[str], path: str) -> bool:
    """Return whether a file of the base gives way to the adapter's files `own`, which are of one group."""
    if own & PROCESSOR_FILES:
        return path in PROCESSOR_FILES
    if own == {GENERATION}:
        return path == GENERATION
    is_template = path in TEMPLATES or path.startswith(MORE_TEMPLATES)
    return is_template or (bool(own & set(VOCABULARIES)) and path in TOKENIZER_FILES)


def _notices(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_file() and is_notice(path.name))


def module_folders(root: Path) -> tuple[str, ...]:
    """Return the folders that sentence-transformers loads modules from, with a slash at the end."""
    try:
        modules = parse_json((root / MODULES).read_bytes())
        paths = [str(module.get("path") or "") for module in modules]
    except (OSError, ValueError, AttributeError, TypeError):
        return ()
    return tuple(f"{path}/" for path in paths if path and "/" not in path and not path.startswith("."))


def _files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _comes_along(root: Path, path: str) -> bool:
    parts = path.split("/")
    if any(part.startswith(".") for part in parts) or path in LEFT_BEHIND:
        return False
    if path.endswith(".safetensors") and path.startswith(module_folders(root)):
        return True
    if path.endswith(WEIGHT_SUFFIXES) or path.endswith(".index.json"):
        return False
    return (root / path).stat().st_size <= MAX_COMPANION_BYTES
