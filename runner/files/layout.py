"""Where every tensor of a checkpoint folder lies, from headers and index alone.

Covered: one `model.safetensors`, or the shards that `model.safetensors.index.json` names; headers that lie
(overlap, holes, sizes that contradict shapes, names twice, offsets past the end) are refused.
Not covered: pickled weights (refused), weights that no index names (ignored, as loaders ignore them).

Source: the safetensors format (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runner.files.absent import no_weights
from runner.files.counts import config_problem
from runner.files.pointers import is_pointer, pointer_problem
from runner.files.readable import folder_problem
from runner.protocol.errors import BrokenCheckpoint, CheckpointError, UnsupportedCheckpoint
from runner.protocol.syntax import parse_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_NAME_BYTES = 255  # of a file, on every file system in use
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

ITEM_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
        "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64, "C64": 64,
        "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One stored tensor.

    Attributes:
        name: its key in the file.
        dtype: as the header spells it, for example "BF16".
        shape: () for a scalar.
        file: name of the file that holds it, relative to the checkpoint's root.
        start: first byte in that file (included).
        end: last byte in that file (not included).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes the tensor takes in its file."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """One safetensors file.

    Attributes:
        name: relative to the checkpoint's root.
        header: the bytes before the data, length field included.
        metadata: the header's `__metadata__`.
        tensors: in the order of their data.
        size_bytes: of the whole file.
    """

    name: str
    header: bytes
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder that a user could load.

    Attributes:
        root: the folder.
        files: in the order of their names.
        tensors: by name, over all files.
        is_indexed: whether an index names the shards.
    """

    root: Path
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, TensorInfo]
    is_indexed: bool

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def read_checkpoint(root: Path) -> Checkpoint:
    """Return the layout of the checkpoint in `root`; only headers, the index and config.json are read.

    Raises:
        BrokenCheckpoint: no weights, a missing shard, an index and headers that contradict each other, something that
            is no file or larger than its kind ever is, a config.json with numbers that no model has.
        UnsupportedCheckpoint: an adapter, pickled weights, or another format; a dtype that is not known.
    """
    _check_readable(root)
    index = root / INDEX_FILE
    single = root / SINGLE_FILE
    if single.is_file():  # transformers prefers it, too, when a folder has both
        files: tuple[TensorFile, ...] = (read_tensor_file(root, SINGLE_FILE),)
        return Checkpoint(root=root, files=files, tensors=_by_name(files), is_indexed=False)
    if index.is_file():
        weight_map = read_weight_map(index)
        files = tuple(read_tensor_file(root, name) for name in sorted(set(weight_map.values())))
        tensors = _by_name(files)
        _check_index(index, weight_map, tensors)
        return Checkpoint(root=root, files=files, tensors=tensors, is_indexed=True)
    raise _no_weights(root)


def _check_readable(root: Path) -> None:
    if problem := folder_problem(root):
        raise BrokenCheckpoint(
            f"In the checkpoint's folder, {problem}",
            why="A pipe or a device never ends, and a file of such a size is not what its name says; nothing was read.",
            fix="Remove it, or download the checkpoint again.",
        )
    if problem := config_problem(root):
        raise BrokenCheckpoint(
            f"The checkpoint's {problem}",
            why="Its model class would be built of more parts than memory holds; nothing was built.",
            fix="Restore config.json from where the checkpoint comes from.",
        )


def read_weight_map(index: Path, *, suffix: str = ".safetensors") -> Mapping[str, str]:
    """Return tensor name → file name from an index.

    Raises:
        BrokenCheckpoint: not JSON, no `weight_map`, or a name that is not a plain file of `suffix` in the folder.
    """
    try:
        weight_map = parse_json(index.read_bytes())["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(
            f"{index.name} is not a weight index: {error!r}.",
            why="It must be a JSON object with a `weight_map` from tensor names to file names.",
            fix="Download or save the checkpoint again.",
        ) from error
    for file in sorted(set(entries.values())):
        is_name = file.isprintable() and len(file.encode()) <= MAX_NAME_BYTES
        if not is_name or Path(file).name != file or "\\" in file or not file.endswith(suffix):
            raise BrokenCheckpoint(
                f"{index.name} names the file {file[:200]!r}.",
                why=f"A shard must be a `*{suffix}` file directly inside the checkpoint's folder; "
                "any other path could read files outside it.",
                fix="Use a checkpoint from a source that you trust.",
            )
    return entries


def read_tensor_file(root: Path, name: str) -> TensorFile:
    """Return the header of one safetensors file, checked against the file's size.

    Args:
        root: folder of the file.
        name: file name inside it.

    Raises:
        BrokenCheckpoint: missing, truncated, or a header that contradicts itself or the file.
        UnsupportedCheckpoint: a dtype that is not known.
    """
    path = root / name
    try:
        if is_pointer(path):
            problem = pointer_problem(name)
            raise BrokenCheckpoint(problem.what, why=problem.why, fix=problem.fix)
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8):
                raise _broken(name, f"it is {size_bytes} bytes long and announces a header of {length} bytes")
            text = file.read(length)
    except OSError as error:
        raise _broken(name, f"it cannot be read ({error.strerror})") from error
    entries, metadata = _parse_header(name, text)
    begin = 8 + length
    found = (_tensor(name, key, entry, begin) for key, entry in entries)
    tensors = tuple(sorted(found, key=lambda tensor: (tensor.start, tensor.end)))
    _check_cover(name, tensors, begin, size_bytes)
    return TensorFile(name=name, header=prefix + text, metadata=metadata, tensors=tensors, size_bytes=size_bytes)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes before the data of a file that holds `tensors` in the given order.

    Args:
        tensors: (name, dtype, shape) in the order of the data.
        metadata: the file's `__metadata__`; left out when empty.

    Returns:
        Length field and JSON, padded with spaces so that the data starts at a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        size_bytes = tensor_size_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many bytes a tensor of this dtype and shape takes."""
    return prod(shape) * ITEM_BITS[dtype] // 8


def _parse_header(name: str, text: bytes) -> tuple[list[tuple[str, Any]], Mapping[str, str]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            raise ValueError("a key occurs twice")
        return seen

    try:
        header = parse_json(text, object_pairs_hook=once)
    except ValueError as error:
        raise _broken(name, f"its header is not the JSON it must be ({error})") from error
    if not isinstance(header, dict):
        raise _broken(name, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(name, "its `__metadata__` is not a map from text to text")
    return list(header.items()), metadata


def _tensor(file: str, name: str, entry: Any, begin: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(file, f"the entry of {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise UnsupportedCheckpoint(
            f"{file} stores {name!r} in the dtype {str(dtype)[:40]!r}, which this version does not know.",
            why="Its size cannot be told, so neither can what else the file holds.",
            fix="Use one that is stored in bfloat16, float16 or float32, or a newer release of this action.",
        )
    numbers = (*shape, first, last)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _broken(file, f"{name!r} has a shape or offset that is not a count: {numbers}")
    if last - first != tensor_size_bytes(dtype, shape):
        raise _broken(file, f"{name!r} is {dtype} of shape {list(shape)} but has {last - first} bytes")
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=file, start=begin + first, end=begin + last)


def _check_cover(name: str, tensors: tuple[TensorInfo, ...], begin: int, size_bytes: int) -> None:
    expected = begin
    for tensor in tensors:
        if tensor.start != expected:
            raise _broken(name, f"{tensor.name!r} starts at byte {tensor.start}, the data before it ends at {expected}")
        expected = tensor.end
    if expected != size_bytes:
        raise _broken(name, f"its header describes {expected} bytes, but it has {size_bytes}")


def _by_name(files: tuple[TensorFile, ...]) -> Mapping[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in tensors:
                raise _broken(file.name, f"{tensor.name!r} is also in {tensors[tensor.name].file}")
            tensors[tensor.name] = tensor
    return tensors


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise _broken(file, f"{index.name} says that it holds {name!r}, and it does not")
    unlisted = sorted(tensors.keys() - weight_map.keys())
    if unlisted:
        raise _broken(tensors[unlisted[0]].file, f"it holds {unlisted[0]!r}, which {index.name} does not list")


def _broken(name: str, reason: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{name} is not a sound safetensors file: {reason}.",
        why="The download or the save was cut short, or the file was changed by something else.",
        fix="Delete it from the cache and download it again, or save the checkpoint again.",
    )


def _no_weights(root: Path) -> CheckpointError:
    base = None
    if (root / _ADAPTER_CONFIG).is_file():
        base = _named_base(root / _ADAPTER_CONFIG)
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return no_weights(names, named="The checkpoint", adapter_base=base)


def _named_base(path: Path) -> str | None:
    """Return the base that an adapter's config names; None where it cannot be read or names none."""
    try:
        told = parse_json(path.read_bytes()) if path.stat().st_size <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError):
        return None
    name = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    return name if isinstance(name, str) and name else None
