"""Which files of a repository a snapshot holds. Pure: names in, names out.

Never taken: pickled weights (unless the user allows them and there are no others), other formats (GGUF, ONNX …),
duplicates (`original/`, `consolidated*`), checkpoints of the training. Python files of a base are taken, because a
model that needs them is useless without; none is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from runner.checkpoint.absent import OPT_IN, no_weights
from runner.checkpoint.joined import ADAPTER_INDEX
from runner.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from runner.checkpoint.pickled import PICKLED_ADAPTER, PICKLED_INDEX, pickled_weights
from runner.errors import BrokenAdapter, BrokenCheckpoint, UnsupportedAdapter

Kind = Literal["adapter", "base", "merged"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")
_NOTICES = ("license", "licence", "notice", "use_policy", "copying")
_NOTICE_SUFFIXES = ("", "txt", "md", "pdf", "rst", "html")
_TEMPLATES = "additional_chat_templates/"
# The folders of sentence-transformers' modules, which are as much the model as its body.
_MODULE_FILE = re.compile(r"\d+_[A-Za-z]+/[^/]+\.(?:json|txt|model|safetensors)")


def weights_or_index(paths: Iterable[str], *, named: str, pickles: bool = False) -> str:
    """Return the file that says where a base's weights are: the single file, else the index.

    Args:
        paths: every file of the repository.
        named: the repository, for errors.
        pickles: whether pickled weights will do where there are no others.

    Raises:
        UnsupportedCheckpoint: an adapter, pickled weights only, or another format.
        BrokenCheckpoint: no config, or no weights at all.
    """
    present = set(paths)
    has_config = "config.json" in present
    if not has_config and not present.isdisjoint((SINGLE_FILE, INDEX_FILE)):
        raise BrokenCheckpoint(
            f"{named} has no config.json.",
            why="It says which architecture the weights belong to.",
            fix="Check `base-model` (for `verify`: `merged-path`) and its revision.",
        )
    for name in (SINGLE_FILE, INDEX_FILE):  # the order in which transformers looks
        if name in present:
            return name
    if has_config and pickles and (pickled := pickled_weights(present)):
        return pickled
    raise no_weights(present, named=named)


def check_adapter(paths: Iterable[str], *, named: str, pickles: bool = False) -> str:
    """Return the weight file of an adapter; refuse a repository that is none, before anything is downloaded.

    Raises:
        BrokenAdapter: no config, or no weights.
        UnsupportedAdapter: pickled weights only.
    """
    present = set(paths)
    if ADAPTER_CONFIG not in present and (inside := subfolders(present)):
        raise BrokenAdapter(
            f"{named} has no {ADAPTER_CONFIG}, but its subfolders have: {', '.join(inside[:5])}.",
            why="Which of them is the adapter is not guessed: the last checkpoint of a training need not be its best.",
            fix=f"Download it, and point `adapter-path` at the subfolder that you want, for example {inside[-1]}.",
        )
    if ADAPTER_CONFIG not in present:
        raise BrokenAdapter(
            f"{named} has no {ADAPTER_CONFIG}.",
            why="It is not a PEFT adapter.",
            fix="Check `adapter-path` and its revision.",
        )
    for name in (ADAPTER_WEIGHTS, ADAPTER_INDEX):
        if name in present:
            return name
    if PICKLED_ADAPTER in present:
        if pickles:
            return PICKLED_ADAPTER
        raise UnsupportedAdapter(
            f"{named} has pickled weights only ({PICKLED_ADAPTER}).",
            why="Unpickling can run code, so only safetensors are read.",
            fix=OPT_IN,
        )
    raise BrokenAdapter(
        f"{named} has no {ADAPTER_WEIGHTS}.",
        why="The config is there, but the weights are not.",
        fix="Upload the whole adapter, then run again.",
    )


def subfolders(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the folders that hold an adapter of their own, in the order of a training's steps."""
    suffix = f"/{ADAPTER_CONFIG}"
    found = (path.removesuffix(suffix) for path in paths if path.endswith(suffix))
    return tuple(sorted(found, key=lambda path: (int("0" + re.sub(r"\D", "", path)), path)))


def companions(paths: Iterable[str], kind: Kind) -> tuple[str, ...]:
    """Return what is taken beside a base's weights, or for an adapter everything, sorted.

    Args:
        paths: every file of the repository.
        kind: what the repository is used as.
    """
    return tuple(sorted(path for path in paths if _is_taken(path, kind)))


def _is_taken(path: str, kind: Kind) -> bool:
    if path.startswith(_TEMPLATES):
        return path.endswith(".jinja") and path.count("/") == 1
    if kind != "adapter" and _MODULE_FILE.fullmatch(path):
        return True
    is_foreign = kind != "adapter" and path == ADAPTER_CONFIG  # an adapter that lies beside the model
    if "/" in path or path.startswith(".") or is_foreign or path in (INDEX_FILE, PICKLED_INDEX):
        return False
    lower = path.lower()
    if kind == "adapter" and path.endswith(".safetensors"):
        return path.startswith("adapter")  # some repositories keep a merged model beside the adapter
    if lower.endswith(".index.json") or lower.startswith("consolidated"):
        return False
    stem, _, suffix = lower.partition(".")
    is_notice = stem.startswith(_NOTICES) and suffix in _NOTICE_SUFFIXES
    is_code = path.endswith(".py") and kind != "adapter"
    return is_notice or is_code or path == "README.md" or path.endswith(_TEXT_SUFFIXES)
