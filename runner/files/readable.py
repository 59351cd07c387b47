"""What may be read of a folder that anybody may have written: regular files, no larger than their kind ever is.

Asked before anything is opened: a pipe would never end, a device never be empty, and a config of a gigabyte be parsed.
A link is what it leads to. No torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

MAX_CONFIG_BYTES = 10_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_VOCABULARY_BYTES = 200_000_000

_CONFIGS = """config.json generation_config.json adapter_config.json tokenizer_config.json special_tokens_map.json
    processor_config.json preprocessor_config.json video_preprocessor_config.json image_processor_config.json
    modules.json chat_template.json chat_template.jinja params.json""".split()
_INDEXES = "model.safetensors.index.json pytorch_model.bin.index.json".split()
_VOCABULARIES = """tokenizer.json vocab.json vocab.txt merges.txt added_tokens.json normalizer.json tekken.json
    tokenizer.model spiece.model sentencepiece.model sentencepiece.bpe.model spm.model source.spm target.spm
    bpe.codes""".split()
_LARGEST: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(_CONFIGS, MAX_CONFIG_BYTES)
    | dict.fromkeys(_INDEXES, MAX_INDEX_BYTES)
    | dict.fromkeys(_VOCABULARIES, MAX_VOCABULARY_BYTES)
)
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_KERNEL = (Path("/proc"), Path("/sys"))  # regular files by their type, but what they hold is made while it is read


def folder_problem(root: Path) -> str:
    """Return what in the folder must not be read, as a sentence; "" where everything may be.

    Raises:
        OSError: the folder cannot be listed.
    """
    return next((problem for path in _files(root) if (problem := _problem(path, root))), "")


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(files))
        yield from (Path(folder) / name for name in folders if name in _LARGEST)


def _problem(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        found = path.stat()
        leads_to_kernel = path.is_symlink() and any(path.resolve().is_relative_to(folder) for folder in _KERNEL)
    except (OSError, RuntimeError):  # a link to nothing, or to itself: as good as absent, and told by who needs it
        return ""
    if stat.S_ISDIR(found.st_mode):
        return f"{name!r} is a folder, not a file." if path.name in _LARGEST else ""
    kind = next((kind for is_kind, kind in _KINDS if is_kind(found.st_mode)), "")
    if leads_to_kernel:
        kind = f"a link to {path.resolve()}, which the kernel makes up"
    if kind:
        return f"{name!r} is {kind}, not a file."
    limit = _LARGEST.get(path.name)
    if limit is not None and found.st_size > limit:
        return f"{name} is larger than {limit} bytes ({found.st_size}), which no such file is."
    return ""
