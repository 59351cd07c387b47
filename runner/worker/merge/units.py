"""Merge units: the outermost PEFT wrappers, each merged alone, from pristine base weights, in float32.

`find_changes` says which stored tensors a unit makes; `runner.worker.merge.whole` and `runner.worker.merge.fast` make
them.

Ties: in PEFT's unmerged model, an adapter on one side of a tied pair leaves the other side alone, so the exact
merge of a tied base is untied. A pair stays tied only when PEFT ties the adapters, too. See docs/decisions/0002.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from runner.protocol.errors import AdapterMismatch, UnsupportedCheckpoint
from runner.worker.merge.experts import expert_bytes, stack_of, wrappers
from runner.worker.merge.judge_memory import Part, judge_bytes
from runner.worker.model.attach import Attached
from runner.worker.model.base_model import irreversible
from runner.worker.plan import Added, Change, Changes
from runner.worker.tensors.reader import FLOATS
from runner.worker.tensors.view import main_dtype

# General path: base weights in fp32, the delta, its scaled copy, what the method keeps beside, and the result.
COPIES_IN_MEMORY = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One outermost PEFT wrapper.

    Attributes:
        path: of the module in the base model.
        module: PEFT's wrapper; untyped, since every tuner has its own attributes.
        keys: the base's state-dict keys below `path`.
    """

    path: str
    module: Any
    keys: tuple[str, ...]

    def relative(self, key: str) -> str:
        """Return `key` without the unit's path, as the merged module names it."""
        return key[len(self.path) + 1 :]


def find_units(attached: Attached) -> dict[str, Unit]:
    """Return the units of an attached model by path, in the model's order."""
    modules: dict[str, Any] = {}
    inside = ""
    for path, module in attached.model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            modules[path] = module
            inside = path + "."
    keys: dict[str, list[str]] = {path: [] for path in modules}
    for key in attached.parameters:
        if (path := _unit_of(key, modules)) is not None:
            keys[path].append(key)
    return {path: Unit(path=path, module=module, keys=tuple(keys[path])) for path, module in modules.items()}


def find_changes(attached: Attached, units: Mapping[str, Unit]) -> Changes:
    """Return what the units do to the stored tensors.

    Raises:
        UnsupportedCheckpoint: a touched parameter is stored in no float dtype, or transformers' conversion of it
            cannot be undone.
    """
    by_key = {
        key: Change(unit=path, parameter=unit.relative(key))
        for path, unit in units.items()
        for key in changed_keys(unit, attached)
    }
    loose = {key: Change(unit=key, parameter="") for key in attached.replaced if _unit_of(key, units) is None}
    by_key |= loose
    assert by_key  # noqa: S101  (every tensor of the adapter was placed)
    for key, change in by_key.items():
        _check_source(attached, key, change)
    changed, added, untied = _resolve_ties(attached, units, by_key)
    clusters = find_clusters(attached, units)
    changed |= _computed(attached, clusters, by_key)
    sizes = [_cluster_bytes(attached, units, cluster) for cluster in clusters]
    notes = list(attached.notes)
    if untied:
        notes.append("The adapter changes one side of tied embeddings: both sides are written, and the tie is undone.")
    if not attached.is_lazy:
        notes.append("This method derives its merge from the base's values: the base is held in memory in float32.")
        sizes.append(2 * attached.checkpoint.data_bytes)
    return Changes(
        changed=changed,
        added=tuple(sorted(added, key=lambda new: new.name)),
        shapes=_shapes(attached),
        config_edits={**attached.config_edits, **({"tie_word_embeddings": False} if untied else {})},
        modules=len(units) + len(loose),
        unit_bytes=max(sizes, default=0),
        adapter_bytes=_adapter_bytes(attached),
        judge_bytes=_judge_bytes(attached, units),
        notes=tuple(notes),
    )


def find_clusters(attached: Attached, units: Mapping[str, Unit]) -> list[tuple[str, ...]]:
    """Return the units that have to be merged together because one conversion makes their tensors; most are alone."""
    computed = attached.conversion.groups
    clusters: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for path, unit in units.items():
        groups = {computed[key].key for key in changed_keys(unit, attached) if key in computed}
        leaders = sorted({owner[group] for group in groups if group in owner}, key=list(clusters).index)
        leader = leaders[0] if leaders else path
        joined = [member for other in leaders for member in clusters.pop(other)] + [path]
        clusters[leader] = joined
        owner |= {group: leader for group, other in owner.items() if other in leaders} | dict.fromkeys(groups, leader)
    return [tuple(members) for members in clusters.values()]


def held_keys(unit: Unit, attached: Attached) -> list[str]:
    """Return the unit's keys that PEFT's merge reads or writes."""
    return changed_keys(unit, attached) if wrappers(unit.module) else list(unit.keys)


def changed_keys(unit: Unit, attached: Attached) -> list[str]:
    """Return the unit's keys whose values the adapter changes."""
    targeted = wrappers(unit.module)
    if targeted:
        return [key for key in unit.keys if unit.relative(key) in targeted or key in attached.replaced]
    is_plain = isinstance(unit.module, LoraLayer) and not any(unit.module.lora_bias.values())
    if is_plain and f"{unit.path}.weight" in unit.keys:  # a bias below a LoRA layer stays, unless it was trained
        return [key for key in unit.keys if unit.relative(key) == "weight" or key in attached.replaced]
    return list(unit.keys)


def _computed(
    attached: Attached, clusters: Sequence[tuple[str, ...]], by_key: Mapping[str, Change]
) -> dict[str, Change]:
    """Return the stored tensors that a conversion makes of what is changed, given by the first unit of each cluster."""
    leaders = {path: cluster[0] for cluster in clusters for path in cluster}
    groups = attached.conversion.groups
    return {
        name: Change(unit=leaders[change.unit], parameter=name)
        for key, change in by_key.items()
        if key in groups
        for name in groups[key].sources
    }


def _unit_of(key: str, paths: Container[str]) -> str | None:
    parts = key.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in paths), None)


def _resolve_ties(
    attached: Attached, units: Mapping[str, Unit], by_key: Mapping[str, Change]
) -> tuple[dict[str, Change], list[Added], bool]:
    stored = attached.names.renamed
    changed = {stored[key]: change for key, change in by_key.items() if key in stored}
    added = [_head(attached, key, by_key[key]) for key in sorted(attached.own) if key not in stored]
    untied = False
    for target, source in attached.ties.items():
        pair = by_key.get(target), by_key.get(source)
        if not any(pair) or _adapters_are_tied(attached, units, pair):
            continue
        if not any(side and side.unit in units for side in pair) and _copies_are_equal(attached, target, source):
            continue
        untied = True
    if untied:
        for target, source in attached.ties.items():
            if target not in stored:
                added.append(_other_side(attached, target, stored[source], by_key.get(target)))
    return changed, added, untied


def _other_side(attached: Attached, key: str, beside: str, change: Change | None) -> Added:
    info, shape = attached.checkpoint.tensors[beside], tuple(attached.parameters[key].shape)
    if change is None and shape != info.shape:
        raise AdapterMismatch(
            f"The adapter was trained with {shape[0]} rows of {key!r}, the base has {info.shape[0]}.",
            why="The adapter brings the added rows of the other embedding only; these would have to be invented.",
            fix="Save the adapter again from its training with `save_embedding_layers=True`.",
        )
    if shape == info.shape:
        return Added(name=key, beside=beside, change=change)
    return Added(name=key, beside=beside, change=change, dtype=info.dtype, shape=shape)


def _copies_are_equal(attached: Attached, target: str, source: str) -> bool:
    """Return whether the adapter brings the same whole tensor for both sides, as PEFT saves a resized vocabulary."""
    pair = [attached.replaced.get(key) for key in (target, source)]
    first, second = pair
    return first is not None and second is not None and torch.equal(first, second)


def _head(attached: Attached, key: str, change: Change) -> Added:
    last = attached.checkpoint.files[-1].tensors[-1]
    shape = tuple(attached.parameters[key].shape)
    return Added(name=key, beside=last.name, change=change, dtype=main_dtype(attached.checkpoint), shape=shape)


def _shapes(attached: Attached) -> dict[str, tuple[int, ...]]:
    stored = attached.names.renamed
    tensors = attached.checkpoint.tensors
    shapes = {stored[key]: tuple(tensor.shape) for key, tensor in attached.parameters.items() if key in stored}
    return {name: shape for name, shape in shapes.items() if shape != tensors[name].shape}


def _adapters_are_tied(
    attached: Attached, units: Mapping[str, Unit], pair: tuple[Change | None, Change | None]
) -> bool:
    target, source = pair
    if target is None or source is None or target.unit not in units or source.unit not in units:
        return False
    if attached.adapter.config.get("ensure_weight_tying"):
        return True
    own = set(_adapter_storages(attached, units[target.unit]))
    return own <= set(_adapter_storages(attached, units[source.unit]))


def _adapter_storages(attached: Attached, unit: Unit) -> Iterator[int]:
    base = {id(tensor) for tensor in attached.parameters.values()}
    for tensor in unit.module.parameters():
        if id(tensor) not in base:
            yield tensor.untyped_storage().data_ptr()


def _check_source(attached: Attached, key: str, change: Change) -> None:
    if key in attached.own:
        return
    names, group = attached.names, attached.conversion.groups.get(key)
    stored = names.renamed.get(key) or names.renamed.get(attached.ties.get(key, ""))
    if group is not None:
        reason = attached.conversion.problem(group) if change.parameter else "the adapter brings it as a whole"
        if reason:
            raise irreversible(group, reason)
    for name in group.sources if group is not None else [stored]:
        info = attached.checkpoint.tensors[name] if name else None
        if info is None or info.dtype not in FLOATS:
            raise UnsupportedCheckpoint(
                f"The adapter changes {name or key!r}, which the base "
                + (f"stores as {info.dtype}." if info else "does not store."),
                why="Only BF16, F16 and F32 weights are merged exactly.",
                fix="Set `base-model` to the 16-bit model that it was made from. If it is a counter, leave the "
                "module that has it out of `modules_to_save`.",
            )


def _cluster_bytes(attached: Attached, units: Mapping[str, Unit], cluster: tuple[str, ...]) -> int:
    """Return what merging these units takes: of a stack of experts one expert, of others all, several times."""
    groups = attached.conversion.groups
    total = 0
    for path in cluster:
        unit = units[path]
        for key in held_keys(unit, attached):
            name = groups[key].sources[0] if key in groups else unit.relative(key)
            stack = stack_of(attached, path, unit.module, name)
            whole = COPIES_IN_MEMORY * 4 * prod(attached.parameters[key].shape)
            total += whole if stack is None else expert_bytes(stack)
    return total


def _judge_bytes(attached: Attached, units: Mapping[str, Unit]) -> int:
    """Return the memory that a judgement of the merge takes."""
    sizes = {key: tuple(tensor.shape) for key, tensor in attached.parameters.items() if key not in attached.ties}
    config = attached.model.config.get_text_config()
    head = attached.model.get_output_embeddings()
    parts = [Part(keys=unit.keys, is_closed=is_plain(unit.module)) for unit in units.values()]
    return judge_bytes(
        sizes,
        computed=attached.conversion.groups.keys(),
        units=parts,
        adapter_bytes=_adapter_bytes(attached),
        vocabulary=int(getattr(config, "vocab_size", 0)) if head is not None else 0,
        hidden=int(getattr(config, "hidden_size", 0)),
        holds_base=not attached.is_lazy,
    )


def is_plain(module: Any) -> bool:
    """Return whether a unit is LoRA without variants on one module, so that its change is a product of two factors."""
    return isinstance(module, LoraLayer) and not getattr(module, "lora_variant", None)


def _adapter_bytes(attached: Attached) -> int:
    base = {id(tensor) for tensor in attached.parameters.values()}
    return sum(
        tensor.numel() * tensor.element_size() for tensor in attached.peft_model.parameters() if id(tensor) not in base
    )
