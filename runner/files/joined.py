"""An adapter whose weights are in several files, as a folder in which they are in one, as PEFT writes and reads it.

Some trainers save an adapter as they save a model: `adapter_model-00001-of-00002.safetensors` and so on, with an index.
Headers are rewritten, data is copied. No torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from runner.files.layout import TensorFile, build_header, read_tensor_file, read_weight_map
from runner.protocol.errors import BrokenCheckpoint

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_INDEX = "adapter_model.safetensors.index.json"


def is_sharded(root: Path) -> bool:
    """Return whether the folder holds an adapter in several files."""
    return (root / ADAPTER_INDEX).is_file() and not (root / ADAPTER_FILE).is_file()


def shards_of(root: Path) -> tuple[str, ...]:
    """Return the names of the files that the index names, sorted.

    Raises:
        BrokenCheckpoint: the index is damaged, or leads outside the folder.
    """
    return tuple(sorted(set(read_weight_map(root / ADAPTER_INDEX).values())))


def join_shards(root: Path, target: Path) -> None:
    """Write the folder `target`: the weights in one file, and copies of the other files.

    Checkpoints of the training (`checkpoint-*`) are left out.

    Raises:
        BrokenCheckpoint: a shard is missing or damaged, or index and shards contradict each other.
    """
    stated = read_weight_map(root / ADAPTER_INDEX)
    files = [read_tensor_file(root, name) for name in shards_of(root)]
    _check(stated, files)
    target.mkdir(parents=True)
    header = build_header(
        ((tensor.name, tensor.dtype, tensor.shape) for file in files for tensor in file.tensors), files[0].metadata
    )
    with (target / ADAPTER_FILE).open("wb") as joined:
        joined.write(header)
        for file in files:
            with (root / file.name).open("rb") as shard:
                shard.seek(len(file.header))
                shutil.copyfileobj(shard, joined)
    left = {ADAPTER_INDEX, *(file.name for file in files)}
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith("checkpoint-"):
            shutil.copytree(path, target / path.name)
        elif path.is_file() and path.name not in left:
            shutil.copyfile(path, target / path.name)


def _check(stated: Mapping[str, str], files: list[TensorFile]) -> None:
    found = [(tensor.name, file.name) for file in files for tensor in file.tensors]
    if len(found) == len(stated) and dict(found) == stated:
        return
    wrong = sorted({*found} ^ {*stated.items()}) or [next(pair for pair in found if found.count(pair) > 1)]
    raise BrokenCheckpoint(
        f"{ADAPTER_INDEX} and the shards contradict each other over {wrong[0][0]!r} in {wrong[0][1]}.",
        why="The adapter was not saved, or not copied, as a whole.",
        fix="Save or download the adapter again.",
    )
