"""Bounds on a model that is built from a config.json of strangers: what it is made of, held against what is stored.

torch tells of each parameter and buffer as it becomes part of a module, so that a model of a billion layers is refused
after a few thousand, on the meta device as elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

# What transformers and torch raise for a config.json that makes no sense, while they build its model.
BUILD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    StrictDataclassError,
)
ENTRY_BYTES = 64  # of a tensor in a header, at least
PARTS_PER_TENSOR = 8  # a stored tensor may be several parameters, and a class has some that are not stored
MORE_PARTS = 1024
ELEMENTS_PER_BYTE = 16  # of one parameter, in all stored bytes: 4-bit weights have 2, and a vocabulary may grow
MORE_ELEMENTS = 1 << 24
BUFFER_BYTES = 1 << 30  # of all buffers; they are computed, so a few bytes of config are enough for any size


class TooLarge(ValueError):
    """config.json asks for a model that is not the stored one."""


class _Bounds:
    def __init__(self, tensors: int, size_bytes: int, models: int) -> None:
        self._parts = models * (PARTS_PER_TENSOR * tensors + MORE_PARTS)
        self._elements = ELEMENTS_PER_BYTE * size_bytes + MORE_ELEMENTS
        self._buffers = models * (BUFFER_BYTES + ELEMENTS_PER_BYTE * size_bytes)
        self._stored = f"the weights are at most {tensors} tensors, in {size_bytes} bytes"
        self._seen = self._held = 0

    def parameter(self, module: nn.Module, name: str, value: torch.Tensor | None) -> None:
        self._count()
        if value is not None and value.numel() > self._elements:
            shape = list(value.shape)
            raise TooLarge(f"config.json asks for a {type(module).__name__} with {name} of {shape}; {self._stored}")

    def buffer(self, module: nn.Module, name: str, value: torch.Tensor | None) -> None:
        self._count()
        self._held += value.nbytes if value is not None else 0
        if self._held > self._buffers:
            raise TooLarge(
                f"config.json asks for {self._held} bytes of buffers by {name} of {type(module).__name__}; "
                f"{self._stored}"
            )

    def _count(self) -> None:
        self._seen += 1
        if self._seen > self._parts:
            raise TooLarge(f"config.json asks for a model of more than {self._parts} tensors; {self._stored}")


def _stored(root: Path) -> tuple[int, int]:
    """Return how many tensors the files in `root` can hold at most, by the length of their headers; and their bytes."""
    header_bytes = size_bytes = 0
    for path in root.glob("*.safetensors"):
        if path.is_file():
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header_bytes, size_bytes = header_bytes + min(length, size), size_bytes + size
    return header_bytes // ENTRY_BYTES, size_bytes


@contextmanager
def bounded_build(root: Path, models: int = 1) -> Iterator[None]:
    """Stop a model from being built, for as long as this lasts, that the checkpoint in `root` cannot be.

    Args:
        root: the checkpoint's folder; of its files only the sizes are read.
        models: how many are built inside.

    Raises:
        TooLarge: it is a `ValueError`, as are transformers' own for a config that makes no sense.
        OSError: a file cannot be read.
    """
    bounds = _Bounds(*_stored(root), models)
    hooks = (
        register_module_parameter_registration_hook(bounds.parameter),
        register_module_buffer_registration_hook(bounds.buffer),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
