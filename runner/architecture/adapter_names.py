"""An adapter's tensors under the names that PEFT gives them in the model at hand.

Adapters are saved by many programs and versions, and PEFT only warns about a name that it cannot place: the merge
would then equal the base. Every name is brought to PEFT's own form by a documented rule, or left as it is, for
`runner.worker.model.attach` to refuse by name:

- wrappers of distributed training and compilation are taken out of the path (`WRAPPERS`), `base_model.model.` may be
  missing or doubled, and the name of the adapter behind a LoRA factor goes;
- the path of a module that this model does not have goes through transformers' own renamings of stored tensors
  (vision-language models had other paths before transformers v5), or is read as that of a half of the model
  (`runner.architecture.halves`);
- targets that are bare names mean the modules of the half that the adapter has tensors for.

Whoever merges and whoever judges hold a name against the same model class here; neither the tensors' values nor the
way they are merged is known in this room.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from transformers import PreTrainedModel

from runner.architecture.halves import outer_half, read_half, targets_in, unplaced
from runner.architecture.names import map_names
from runner.protocol.errors import AdapterMismatch, UnsupportedAdapter

PREFIX = "base_model.model."
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
_LORA_PARTS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
_WRAPPED = frozenset({"base_layer", "modules_to_save", "original_module", "token_adapter"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How an adapter is named for one model.

    Attributes:
        names: tensor in the file → its name as PEFT saves it for this model.
        config: fields of adapter_config.json that name modules, where they have to change.
        notes: what was renamed, one sentence each.
    """

    names: Mapping[str, str]
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def is_native(self) -> bool:
        """Whether nothing had to be renamed."""
        return not self.config and all(name == own for name, own in self.names.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Name:
    """A tensor's name, taken apart: the module, what PEFT put there (or the parameter itself), the adapter's name."""

    module: str
    rest: tuple[str, ...]
    adapter: str | None = None
    is_tuner: bool = True


def name_adapter(model: PreTrainedModel, config: Mapping[str, Any], tensors: Iterable[str]) -> Naming:
    """Return how the adapter's tensors are named in `model`.

    Args:
        model: the base's class as transformers builds it, without an adapter; may be on the meta device.
        config: adapter_config.json.
        tensors: their names in the file.

    Raises:
        UnsupportedAdapter: the file holds several adapters.
        AdapterMismatch: two tensors would have the same name, or a name fits several halves of the model.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(str(config.get("peft_type")), "lora_")
    tensors = tuple(tensors)
    parts = {name: _split(name, prefix) for name in tensors if _is_of_a_module(name)}
    _check_one_adapter(parts)
    plain = {".".join((part.module, *part.rest)) for part in parts.values() if not part.is_tuner}
    parts = {name: _saved(part, plain) for name, part in parts.items()}
    moved = _moved(model, parts.values())
    half = read_half(model, unplaced(model, {part.module for part in parts.values()} - moved.keys()))
    used = {part.module: half[part.module] for part in parts.values() if part.module in half}
    names = {name: name for name in tensors}
    for name, part in parts.items():
        path = moved.get(part.module, used.get(part.module, part.module))
        names[name] = PREFIX + ".".join((*([path] if path else []), *part.rest))
    _check_distinct(names)
    moved = {old: new for old, new in moved.items() if old != new}
    paths = used | moved
    targets = {part.module for part in parts.values() if part.is_tuner}
    edits = _config(config, targets, {**half, **paths} if paths else {})
    chosen, told = _targets(model, config, targets, paths, half)
    return Naming(names=names, config=edits | chosen, notes=_notes(names, moved, used, told))


def _is_of_a_module(name: str) -> bool:
    return name.startswith(PREFIX) or not name.startswith("base_model.")  # shared vectors lie directly under base_model


def _split(name: str, prefix: str) -> _Name:
    segments = [segment for segment in name.split(".") if segment not in WRAPPERS]
    while segments[:1] == ["module"] or segments[:2] == ["base_model", "model"]:
        segments = segments[1 if segments[0] == "module" else 2 :]
    first = next((at for at, segment in enumerate(segments) if segment.startswith(prefix) or segment in _WRAPPED), None)
    if first is None:
        return _Name(module=".".join(segments[:-1]), rest=tuple(segments[-1:]), is_tuner=False)
    module, rest = ".".join(segments[:first]), segments[first:]
    factor = next((at for at, segment in enumerate(rest) if segment in _LORA_PARTS), None)
    if factor is None:
        return _Name(module=module, rest=tuple(rest))
    leaf = rest[-1:] if rest[-1] in ("weight", "bias") and len(rest) > factor + 1 else []
    inner = rest[factor + 1 : len(rest) - len(leaf)]
    return _Name(module=module, rest=(*rest[: factor + 1], *leaf), adapter=".".join(inner) or None)


def _saved(part: _Name, plain: set[str]) -> _Name:
    """Return a fully trained module's tensor under its own name, as PEFT saves it, unless that one is there, too."""
    if part.rest[0] != "modules_to_save":
        return part
    rest = part.rest[2:] if part.rest[1:2] == ("default",) else part.rest[1:]
    if not rest or ".".join((part.module, *rest)) in plain:
        return part
    return _Name(module=".".join((part.module, *rest[:-1])), rest=rest[-1:], is_tuner=False)


def _moved(model: PreTrainedModel, parts: Iterable[_Name]) -> dict[str, str]:
    """Return module path in the file → path in the model, for every path that one of transformers' renamings finds."""
    modules = {path for path, _ in model.named_modules()}
    strange = {part.module: part.rest[-1] for part in parts if part.module not in modules}
    wanted = {
        module: f"{module}.{leaf if leaf in ('weight', 'bias') else 'weight'}".removeprefix(".")
        for module, leaf in strange.items()
    }
    found = {stored: key for key, stored in map_names(model, wanted.values()).renamed.items()}
    return {
        module: found[stored].rpartition(".")[0]
        for module, stored in wanted.items()
        if stored in found and found[stored].rpartition(".")[0] in modules
    }


def _targets(
    model: PreTrainedModel, config: Mapping[str, Any], targets: set[str], paths: Mapping[str, str],
    half: Mapping[str, str],
) -> tuple[dict[str, Any], tuple[str, ...]]:  # fmt: skip
    """Return `target_modules` in full, where the config's would reach modules of another half; and a note of it."""
    mine = {paths.get(target, target) for target in targets}
    if not config.get("target_modules") or not mine:
        return {}, ()
    if half:
        inside = targets_in(model, config, half) | (mine - {*half.values()})
        return _in_full(config, inside), ()
    place = outer_half(model, mine)
    if place is None or not _are_bare(config["target_modules"]):
        return {}, ()
    meant = targets_in(model, config, {path: path for path, _ in model.named_modules()})
    inside = {path for path in meant if path.startswith(f"{place}.")}
    if not meant - inside:
        return {}, ()
    note = (
        f"`target_modules` also matches {len(meant - inside)} modules outside {place!r}, the first "
        f"{min(meant - inside)!r}; the adapter has no tensor for any of them, so they stay as they are."
    )
    return _in_full(config, inside), (note,)


def _are_bare(wanted: Any) -> bool:
    return not isinstance(wanted, str) and not any("." in str(entry) for entry in wanted)


def _in_full(config: Mapping[str, Any], modules: set[str]) -> dict[str, Any]:
    fields = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return {"target_modules": sorted(modules)} | {field: None for field in fields if config.get(field) is not None}


def _config(config: Mapping[str, Any], targets: set[str], paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that name modules by their old paths, rewritten for the new ones."""
    if not paths:
        return {}
    edits: dict[str, Any] = {}
    wanted = config.get("target_modules")
    if (isinstance(wanted, str) and wanted != "all-linear") or any("." in str(entry) for entry in wanted or ()):
        edits |= _in_full(config, {paths.get(path, path) for path in targets})
    for field in ("rank_pattern", "alpha_pattern"):
        if patterns := config.get(field):
            found = {path: _first(patterns, path) for path in sorted(targets)}
            edits[field] = {
                re.escape(paths.get(path, path)): value for path, value in found.items() if value is not None
            }
    saved = config.get("modules_to_save")
    if isinstance(saved, list) and any("." in entry for entry in saved):
        edits["modules_to_save"] = [paths.get(entry, entry) for entry in saved]
    if isinstance(tokens := config.get("trainable_token_indices"), dict):
        edits["trainable_token_indices"] = {paths.get(entry, entry): rows for entry, rows in tokens.items()}
    if isinstance(parameters := config.get("target_parameters"), list):
        edits["target_parameters"] = [_parameter(entry, paths) for entry in parameters]
    return edits


def _parameter(entry: str, paths: Mapping[str, str]) -> str:
    module, dot, name = entry.rpartition(".")
    return f"{paths.get(module, module)}{dot}{name}"


def _first(patterns: Mapping[str, Any], path: str) -> Any:
    # As PEFT: the first key that matches the end of the path.
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), None)


def _notes(
    names: Mapping[str, str], moved: Mapping[str, str], used: Mapping[str, str], told: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the notes: on renamings, on the half that the adapter was trained on, `told`, and on the packing."""
    notes = []
    if moved:
        old, new = min(moved.items())
        notes.append(
            f"The adapter names modules as an older transformers did; {len(moved)} paths were renamed through "
            f"transformers' own renamings, the first {old!r} to {new!r}."
        )
    if used:
        old, new = min(used.items())
        notes.append(
            f"The adapter was trained on a part of the base: {len(used)} of its paths can be read in one way only, "
            f"the first, {old!r}, as {new!r}."
        )
    notes += told
    paths = {**used, **moved}
    repacked = [name for name, own in names.items() if own != name and _kept(name, own, paths)]
    if repacked:
        notes.append(
            f"{len(repacked)} adapter tensors are not named as PEFT names them; the first is {repacked[0]!r}, "
            f"read as {names[repacked[0]]!r}."
        )
    return tuple(notes)


def _kept(name: str, own: str, paths: Mapping[str, str]) -> bool:
    """Return whether renaming a module's path does not account for the whole difference."""
    inner = own.removeprefix(PREFIX)
    return not any(
        inner.startswith(f"{new}.") and name == f"{PREFIX}{old}{inner.removeprefix(new)}" for old, new in paths.items()
    )


def _check_one_adapter(parts: Mapping[str, _Name]) -> None:
    owners: dict[str | None, str] = {}
    for name, part in parts.items():
        if any(segment in _LORA_PARTS for segment in part.rest):
            owners.setdefault(part.adapter, name)
    if len(owners) > 1:
        (first, one), (second, other) = list(owners.items())[:2]
        raise UnsupportedAdapter(
            f"The adapter file holds tensors of several adapters: {one!r} ({first or 'unnamed'}) and {other!r} "
            f"({second or 'unnamed'}).",
            why="One configuration describes one adapter, so nobody can say which of them is meant, or with what rank.",
            fix="Save them apart: `model.save_pretrained(folder, selected_adapters=[name])`.",
        )


def _check_distinct(names: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for name, own in names.items():
        if own in seen:
            raise AdapterMismatch(
                f"The adapter tensors {seen[own]!r} and {name!r} are both {own!r}.",
                why="They are one tensor under two names, and may differ; one of them would be dropped.",
                fix="Save the adapter again with PEFT's `save_pretrained`.",
            )
        seen[own] = name
