"""Which files of a repository a snapshot holds. Pure: names in, names out.

Of a base all are taken but other weights than those that are merged: pickles (unless the user allows them and there are
no others), other formats (GGUF, ONNX …), duplicates (`original/`, `consolidated*`), checkpoints of the training. Of an
adapter what a release may need, of a merged model all but weights that are not the model's. What is not taken is seen
by name (`seen_only`). Python files are taken, because a model that needs them is useless without; none is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

from runner.files.absent import OPT_IN, no_weights
from runner.files.joined import ADAPTER_INDEX
from runner.files.layout import INDEX_FILE, SINGLE_FILE
from runner.files.pickled import PICKLED_ADAPTER, pickled_weights
from runner.files.sidecars.names import (
    CARD,
    comes_along,
    is_hidden,
    is_own,
    is_pickle,
    is_weights,
    lone_pickles,
    may_come_from_adapter,
)
from runner.protocol.errors import BrokenAdapter, BrokenCheckpoint, UnsupportedAdapter

Kind = Literal["adapter", "base", "merged"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_ARCHIVE = "adapter/"  # of a release that keeps its adapter
_MODULE = re.compile(r"\d+_[^/]+/")  # as sentence-transformers names the folder of a module


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
    if ADAPTER_CONFIG not in present and "config.json" in present:
        raise BrokenAdapter(
            f"{named} has no {ADAPTER_CONFIG}: it holds a whole model.",
            why="An adapter is merged into a model, not a model into another.",
            fix="Set `adapter-path` to the adapter. A model that is merged already is judged with `mode: verify` and "
            "`merged-path`.",
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


def companions(
    paths: Collection[str], kind: Kind, modules: tuple[str, ...] = (), *, pickles: bool = False
) -> tuple[str, ...]:
    """Return what is taken beside a base's weights, or for an adapter everything, sorted.

    Args:
        paths: every file of the repository.
        kind: what the repository is used as.
        modules: the folders of sentence-transformers' modules, each with a slash at the end.
        pickles: whether pickled weights of those modules are taken where there are no others.
    """
    lone = lone_pickles(paths, modules) if pickles else ()
    return tuple(sorted(path for path in paths if is_inside(path) and _is_taken(path, kind, modules, lone)))


def seen_only(paths: Iterable[str], kind: Kind, taken: Collection[str]) -> tuple[str, ...]:
    """Return the files that are not downloaded, and must be seen by name nevertheless: to be told, refused or judged.

    Args:
        paths: every file of the repository.
        kind: what the repository is used as.
        taken: what is downloaded.
    """
    others = (path for path in paths if path not in taken and is_inside(path))
    return tuple(sorted(path for path in others if kind == "merged" or not is_hidden(path)))


def is_inside(path: str) -> bool:
    """Return whether a path that a server lists stays in the folder that it is put under."""
    return not any(part in ("", ".", "..") for part in path.split("/")) and "\0" not in path


def _is_taken(path: str, kind: Kind, modules: tuple[str, ...], lone: Collection[str]) -> bool:
    if path.startswith(modules):
        return not is_hidden(path) and (not is_pickle(path) or path in lone)
    if kind == "adapter":
        return is_own(path) or path == CARD or may_come_from_adapter(path)
    if kind == "base":
        return path == CARD or comes_along(path, modules, lone)
    # A merge may have lost modules.json; the weights of its modules are judged nevertheless.
    is_nested = path.startswith(_ARCHIVE) or _MODULE.match(path) is not None
    return not is_weights(path) or (is_nested and not is_pickle(path))
