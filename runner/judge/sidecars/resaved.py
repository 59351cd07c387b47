"""Configs that a library has saved again: other keys and spelling, and the same object when they are loaded.

A config is loaded only if no number in it is one that would make loading it slow: transformers builds lists as long as
the model has layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.judge.sidecars.listing import canonical
from runner.judge.streaming.models import LOAD_ERRORS, quiet

MAX_NUMBER = 1 << 24
_OF_THE_WRITER = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype", "_commit_hash"})
_GENERATION = frozenset({"transformers_version", "_from_model_config", "_commit_hash"})


def loads_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether transformers makes the same config of both; dtype is left to others."""
    kind = before.get("model_type")
    if kind != after.get("model_type") or any(_is_unsafe(config) for config in (before, after)):
        return False
    if before.get("auto_map") != after.get("auto_map"):  # code of the base, which is not run here
        return False
    made = [_loaded(str(kind), config) for config in (before, after)]
    return made[0] is not None and made[0] == made[1]


def generates_alike(before: Mapping[str, Any] | None, after: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether two generation configs mean the same; without one, transformers takes it from the model's config.

    Args:
        before: what is expected; None where there is no file.
        after: what was found.
        config: of the model.
    """
    found = _told(after)
    if before is not None:
        return found == _told(before)
    inner = config.get("text_config")
    known = {**(inner if isinstance(inner, dict) else {}), **config}
    return after.get("_from_model_config") is True and all(
        key in known and canonical(known[key]) == value for key, value in found.items()
    )


def _told(generation: Mapping[str, Any]) -> dict[str, str]:
    return {key: canonical(value) for key, value in generation.items() if key not in _GENERATION and value is not None}


def _loaded(kind: str, config: Mapping[str, Any]) -> str | None:
    from transformers import CONFIG_MAPPING

    try:
        with quiet():
            made = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
            return canonical(_bare(made))
    except LOAD_ERRORS:
        return None


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _bare(inner) for key, inner in value.items() if key not in _OF_THE_WRITER}
    if isinstance(value, list | tuple):
        return [_bare(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _is_unsafe(value: Any) -> bool:
    return any(abs(number) > MAX_NUMBER for number in _numbers(value))


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, int):
        yield value
