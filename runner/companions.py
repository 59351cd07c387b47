"""What a release carries besides weights: config, tokenizer, processor, generation config, licence, byte for byte.

The rule: everything comes from the base, except the tokenizer, which comes from the adapter when the adapter
carries its own (all of it from one side, never half of each). config.json is edited as text only where the plan
says so; nothing is ever read into a library and written back, because that renames classes and drops fields.
No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.digests import plain_name
from runner.checkpoint.layout import INDEX_FILE
from runner.errors import BrokenCheckpoint
from runner.syntax import parse_json

CONFIG = "config.json"
TOKENIZER_FILES = frozenset(
    """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
    tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json""".split()
)
# A tokenizer of one's own means a vocabulary; a lone tokenizer_config.json is a leftover of the training.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
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
    """
    found = {path: base / path for path in _files(base) if _comes_along(base, path)}
    if any((adapter / name).is_file() for name in VOCABULARIES):
        found = {path: source for path, source in found.items() if path not in TOKENIZER_FILES}
        found |= {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
    return tuple(
        Companion(path=plain_name(path), source=source, edits=config_edits if path == CONFIG else {})
        for path, source in sorted(found.items())
    )


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


def _files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _comes_along(root: Path, path: str) -> bool:
    parts = path.split("/")
    if any(part.startswith(".") for part in parts) or path in LEFT_BEHIND:
        return False
    if path.endswith(WEIGHT_SUFFIXES) or path.endswith(".index.json"):
        return False
    return (root / path).stat().st_size <= MAX_COMPANION_BYTES
