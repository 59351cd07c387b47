"""Folders whose weights are pickles: which files those are, and what they become as safetensors.

Unpickling can run code. Nothing here, and nothing that imports this, unpickles: `runner.worker.unpickle` does, in a
process of its own, and only tensors. No torch.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from runner.files.layout import INDEX_FILE, SINGLE_FILE, read_weight_map

PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_ADAPTER = "adapter_model.bin"
ADAPTER_FILE = "adapter_model.safetensors"


def pickled_weights(paths: Collection[str]) -> str | None:
    """Return the file that says where a model's pickled weights are, or None: there are none, or safetensors of it.

    Args:
        paths: files of a folder or repository. An adapter among them says nothing of the model's own weights.
    """
    if {SINGLE_FILE, INDEX_FILE} & set(paths):
        return None
    return next((name for name in (PICKLED_FILE, PICKLED_INDEX) if name in paths), None)


def pickled_adapter(paths: Collection[str]) -> str | None:
    """Return the file of an adapter's pickled weights, or None: there is none, or its safetensors are beside it.

    Args:
        paths: files of a folder. A model among them says nothing of the adapter's own weights.
    """
    return PICKLED_ADAPTER if PICKLED_ADAPTER in paths and ADAPTER_FILE not in paths else None


def pickled_files(root: Path, weights: str) -> tuple[str, ...]:
    """Return the pickled files that `weights` is or names.

    Raises:
        BrokenCheckpoint: the index is damaged, or leads outside the folder.
    """
    if weights != PICKLED_INDEX:
        return (weights,)
    return tuple(sorted(set(read_weight_map(root / weights, suffix=".bin").values())))


def converted_name(name: str) -> str:
    """Return what a pickled file is called as safetensors."""
    stem = name.removesuffix(".bin")
    return f"{stem.replace('pytorch_model', 'model', 1)}.safetensors"
