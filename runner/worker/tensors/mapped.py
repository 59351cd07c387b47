"""The tensors of an adapter as views of its file, whose pages are given back as soon as PEFT has copied them.

PEFT's parameters are one copy of the adapter; without this, the mapped file would be a second one in resident memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from runner.files.layout import TensorInfo
from runner.worker.tensors.reader import TORCH_DTYPES

PART_BYTES = 32 << 20  # of the file, resident beside the copy while it is loaded


class LoadResult(NamedTuple):
    """What `load_state_dict` says: parameters without a tensor, and tensors without a parameter."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class MappedFile:
    """Tensors of one safetensors file, mapped privately: writing to one changes no file.

    Attributes:
        tensors: by name, in their stored dtype and shape; each keeps the mapping alive.
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        with path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.tensors = {name: self._view(info) for name, info in infos.items()}

    def _view(self, info: TensorInfo) -> torch.Tensor:
        dtype = TORCH_DTYPES[info.dtype]
        if not info.size_bytes:
            return torch.empty(info.shape, dtype=dtype)
        raw = torch.frombuffer(self._pages, dtype=torch.uint8, count=info.size_bytes, offset=info.start)
        return raw.view(dtype).view(info.shape)

    def load(self, load_state_dict: Callable[..., Any], state_dict: Mapping[str, torch.Tensor]) -> LoadResult:
        """Load `state_dict`, whose tensors are views of this file, without strictness, and give the pages back.

        `PART_BYTES` or so are loaded at a time. Nothing may have been written into the views.
        """
        parts: list[dict[str, torch.Tensor]] = [{}]
        filled = 0
        for key, tensor in state_dict.items():
            if filled >= PART_BYTES:
                parts.append({})
                filled = 0
            parts[-1][key] = tensor
            filled += tensor.nbytes
        results = []
        for part in parts:
            results.append(load_state_dict(part, strict=False))
            self._pages.madvise(mmap.MADV_DONTNEED)
        return LoadResult(
            missing_keys=[key for key in results[0].missing_keys if key not in state_dict],
            unexpected_keys=[key for result in results for key in result.unexpected_keys],
        )
