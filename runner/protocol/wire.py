"""Frozen dataclasses as JSON and back, for what crosses from the worker to the supervisor.

The types are the schema: a field that is missing, unknown or of another type is an error, never a guess. No torch.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_data(value: object) -> Any:
    """Return `value` as JSON data: dataclasses as objects, tuples as lists, paths and enums as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_data(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(entry) for entry in value]
    return value


def from_data(kind: type[T], data: Any) -> T:
    """Return the `kind` that `data` describes; the inverse of `to_data`.

    Raises:
        ValueError: `data` is not what `to_data` makes of a `kind`.
    """
    return cast("T", _decode(kind, data))


def _decode(kind: Any, data: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if data is None else _decode(inner, data)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], entry) for entry in data)
    if origin is not None and isinstance(data, dict):
        return {key: _decode(arguments[1], entry) for key, entry in data.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data)
    return _decode_plain(kind, data)


def _decode_plain(kind: Any, data: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum | Path) and isinstance(data, str):
        return kind(data)
    if kind is float and type(data) in (int, float):
        return float(data)
    if isinstance(kind, type) and type(data) is kind:
        return data
    raise ValueError(f"{data!r:.100} is not a {kind}")


def _decode_dataclass(kind: type, data: Any) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(data, dict) or data.keys() != hints.keys():
        raise ValueError(f"{data!r:.100} does not have the fields of {kind.__name__}")
    return kind(**{name: _decode(hint, data[name]) for name, hint in hints.items()})
