"""A base without its weights: every file that says something about them, and headers with nothing behind them.

For `mode: plan`: a plan needs names, shapes and sizes, which are a few kilobytes of a checkpoint of any size. The
stand-in of a weight file is sparse: it has the true header and the true size, and takes no room on the disk. It must
never be merged or judged, so it lives in a folder of its own.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.protocol.errors import BrokenCheckpoint

if TYPE_CHECKING:
    from huggingface_hub.utils import SafetensorsFileMetadata


def write_stand_in(path: Path, header: SafetensorsFileMetadata, size_bytes: int) -> None:
    """Write a sparse file of `size_bytes` that starts with `header`.

    Raises:
        BrokenCheckpoint: the header describes more or less data than a file of that size has room for.
    """
    entries: dict[str, Any] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    for name, tensor in header.tensors.items():
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(tensor.data_offsets)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    data_bytes = max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
    length = size_bytes - data_bytes - 8  # of the original's JSON; ours is padded to it
    if length < len(text):
        raise BrokenCheckpoint(
            f"{path.name} announces {data_bytes} bytes of tensors and is {size_bytes} bytes long.",
            why="The header of the file on the Hub contradicts its size.",
            fix="Use another revision of the base, or tell its owner.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + text.ljust(length))
        file.truncate(size_bytes)
