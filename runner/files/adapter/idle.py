"""Entries of an adapter's config that act on nothing, such as a misspelled key: told by name, where PEFT is silent.

An entry acts where a tensor of the adapter is in the module that it names. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from runner.files.adapter.eras import Era
from runner.files.adapter.meanings import is_scaled, keys_of, modules_of, path_of

_SHOWN = 8


def idle_notes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], era: Era) -> tuple[str, ...]:
    """Return a sentence for every field that has entries without effect.

    Args:
        config: adapter_config.json.
        shapes: the adapter's tensors.
        era: whose rules the config is read by.
    """
    paths = {".".join(path[:end]) for path in map(path_of, shapes) for end in range(1, len(path) + 1)}
    found = [*_idle_keys(config, shapes, era, paths), *_idle_targets(config, paths)]
    return tuple(
        f"`{field}` of the adapter's config has entries without effect, because they match none of its modules: "
        f"{', '.join(repr(key[:200]) for key in keys[:_SHOWN])}{' …' if len(keys) > _SHOWN else ''}."
        for field, keys in found
    )


def _idle_keys(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], era: Era, paths: Collection[str]
) -> Iterator[tuple[str, list[str]]]:
    if is_scaled(config):
        pairs = [keys_of(config, era, path) for path in modules_of(str(config["peft_type"]), shapes)]
        used = {"rank_pattern": {pair[0] for pair in pairs}, "alpha_pattern": {pair[1] for pair in pairs}}
        for field, keys in used.items():
            if idle := [key for key in config.get(field) or () if key not in keys]:
                yield field, idle
        return
    if config.get("peft_type") == "ADALORA":  # its keys are tensors
        return
    others = {field: keys for field, keys in config.items() if field.endswith("_pattern") and isinstance(keys, dict)}
    for field, patterns in others.items():
        if idle := [key for key in patterns if not _matches(key, paths)]:
            yield field, idle


def _matches(key: str, paths: Iterable[str]) -> bool:
    return any(re.match(rf"(.*\.)?({key})$", path) for path in paths)


def _idle_targets(config: Mapping[str, Any], paths: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    for field in ("target_modules", "target_parameters"):
        entries = config.get(field)
        if not isinstance(entries, list):
            continue
        names = {entry: entry if field == "target_modules" else entry.rpartition(".")[0] for entry in entries}
        idle = [
            entry
            for entry, name in names.items()
            if name and not any(path == name or path.endswith(f".{name}") for path in paths)
        ]
        if idle:
            yield field, idle
