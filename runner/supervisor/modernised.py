"""An adapter as today's PEFT reads it with the weights that it was trained to: a folder in that folder's place.

Changed is what the installed PEFT would read otherwise, or not at all: the meaning of its config
(`runner.files.adapter.meanings`), ranks that are written as 8.0, a byte order mark, factors in float64. Merge and judge
see the changed folder only; most adapters need none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files.adapter.eras import Era, era_of, parse_version
from runner.files.adapter.fields import whole_ranks
from runner.files.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter
from runner.files.adapter.idle import idle_notes
from runner.files.adapter.meanings import read_config
from runner.files.layout import build_header, read_tensor_file
from runner.protocol.allow import Allow
from runner.protocol.errors import BrokenAdapter

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Modern:
    """An adapter to be merged.

    Attributes:
        adapter: read; its folder is the given one, or the changed copy.
        notes: what was changed, one sentence each.
    """

    adapter: Adapter
    notes: tuple[str, ...] = ()


def read_modern(root: Path, allow: Allow, into: Path) -> Modern:
    """Return the adapter in `root` as today's PEFT is to read it.

    Args:
        root: a folder.
        allow: may say which PEFT wrote the config, and that trained biases are lost.
        into: folder for changed copies.

    Raises:
        AdapterError: see `read_adapter`; or its config can mean different weights.
    """
    adapter = read_adapter(root)
    edits, notes = _edits(adapter, allow)
    has_mark = (root / CONFIG_FILE).read_bytes().startswith(_BOM)
    wide = [tensor.name for tensor in adapter.tensors.values() if tensor.dtype == "F64"]
    if wide:
        notes.append(
            f"{len(wide)} of {len(adapter.tensors)} adapter tensors are stored in float64, and are rounded to float32, "
            "as PEFT does when it loads them."
        )
    if not edits and not has_mark and not wide:
        return Modern(adapter=adapter, notes=tuple(notes))
    copied = _copy(adapter, {**adapter.config, **edits}, into, narrows=bool(wide))
    return Modern(adapter=read_adapter(copied), notes=tuple(notes))


def _edits(adapter: Adapter, allow: Allow) -> tuple[dict[str, Any], list[str]]:
    shapes = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    edits = whole_ranks(adapter.config)
    meaning, told, era = read_config({**adapter.config, **edits}, shapes, _chosen(allow))
    edits |= meaning
    notes = [*([told] if told else []), *idle_notes(adapter.config, shapes, era)]
    if "lost-biases" in allow and str(adapter.config.get("bias") or "none") != "none" and not _has_bias(shapes):
        edits["bias"] = "none"
        notes.append("The adapter's trained biases are not in its file; the base's are kept, as `allow` says.")
    return edits, notes


def _chosen(allow: Allow) -> Era | None:
    version = parse_version(allow.value("peft") or "")
    return era_of(version) if version else None


def _has_bias(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(name.endswith("bias") and ".lora_B." not in name for name in shapes)


def _copy(adapter: Adapter, config: Mapping[str, Any], into: Path, *, narrows: bool) -> Path:
    """Return a copy of the adapter's folder with another config, its weights in at most float32."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode()
    stamp = [(name, tensor.start, tensor.end, tensor.dtype) for name, tensor in adapter.tensors.items()]
    weights = (adapter.root / WEIGHTS_FILE).stat()
    key = repr((str(adapter.root.resolve()), weights.st_size, weights.st_mtime_ns, stamp)).encode()
    target = into / f"adapter-{hashlib.sha256(key + text).hexdigest()[:16]}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(adapter.root.rglob("*")):
        place = target / path.relative_to(adapter.root)
        if path.is_file() and path.name != CONFIG_FILE and not (narrows and path == adapter.root / WEIGHTS_FILE):
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(path, place)
    (target / CONFIG_FILE).write_bytes(text)
    if narrows:
        _narrow(adapter, target / WEIGHTS_FILE)
    return target


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _narrow(adapter: Adapter, target: Path) -> None:
    """Write the adapter's weights with float32 in place of float64."""
    import numpy as np

    file = read_tensor_file(adapter.root, WEIGHTS_FILE)
    dtypes = {tensor.name: "F32" if tensor.dtype == "F64" else tensor.dtype for tensor in file.tensors}
    header = build_header(((one.name, dtypes[one.name], one.shape) for one in file.tensors), file.metadata)
    with (adapter.root / WEIGHTS_FILE).open("rb") as source, target.open("wb") as sink:
        sink.write(header)
        for tensor in file.tensors:
            source.seek(tensor.start)
            left = tensor.size_bytes
            while left:
                block = source.read(min(_BLOCK_BYTES, left))
                left -= len(block)
                if tensor.dtype == "F64":
                    with np.errstate(over="ignore"):
                        values = np.frombuffer(block, dtype="<f8").astype("<f4")
                    if not np.isfinite(values).all():
                        raise _too_large(tensor.name)
                    block = values.tobytes()
                sink.write(block)


def _too_large(name: str) -> BrokenAdapter:
    return BrokenAdapter(
        f"The adapter tensor {name!r} holds values in float64 that float32 cannot hold.",
        why="PEFT loads adapters in float32, where they would be infinite.",
        fix="Take an earlier checkpoint of the training.",
    )
