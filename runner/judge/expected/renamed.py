"""A merged folder in the base's names: what transformers loads into the same parameter is the same tensor.

Whoever saves a merge by transformers may write other names than the base's files have: with or without the prefix of
the model inside, the names of another version. The names are mapped by transformers' own renamings, and the tensors'
values are then compared as those of every other merge. What the loader computes itself or ties need not be stored
(`may_lack`). Another file per tensor was never an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from runner.architecture.names import map_names
from runner.files.layout import Checkpoint
from runner.judge.expected.blueprint import Blueprint
from runner.judge.expected.targets import Targets

Lacking = Mapping[str, frozenset[str]]


def in_the_base_names(merged: Checkpoint, targets: Targets, blueprint: Blueprint) -> Checkpoint:
    """Return the folder with each tensor under the name that the base has for its parameter; files are as they are."""
    known = targets.required.keys() | targets.optional.keys()
    if merged.tensors.keys() <= known:
        return merged
    renamed = _renamed(merged, targets, blueprint, blueprint.empty())
    free = {name: new for name, new in renamed.items() if name not in known and new not in merged.tensors}
    tensors = {free.get(name, name): info for name, info in merged.tensors.items()}
    if len(tensors) < len(merged.tensors):  # two tensors for one parameter
        return merged
    return replace(merged, tensors={name: replace(info, name=name) for name, info in tensors.items()})


def _renamed(merged: Checkpoint, targets: Targets, blueprint: Blueprint, model: PreTrainedModel) -> dict[str, str]:
    """Return name in the merged folder → name in the base."""
    names = {target.key: name for name, target in {**targets.optional, **targets.required}.items() if target.key}
    names |= blueprint.stored
    found = map_names(model, merged.tensors)
    made = {name: names[key] for key, name in found.renamed.items() if key in names}
    for key, sources in found.converted.items():
        group = blueprint.conversion.groups.get(key)
        if group is not None and len(group.sources) == len(sources):
            made |= dict(zip(sources, group.sources, strict=True))
    return made


def may_lack(targets: Targets, blueprint: Blueprint) -> Lacking:
    """Return the tensors that loading does not need: name → those of which one must be there, or none at all.

    They are copies of a tie that holds, and values that the model computes itself though the base stores them.
    """
    computed = _computed((name for name, target in targets.required.items() if not target.key), blueprint)
    return {**targets.copies, **dict.fromkeys(computed, frozenset())}


def _computed(unknown: Iterable[str], blueprint: Blueprint) -> list[str]:
    """Return the names that end as a buffer of the model does that no file holds, as `rotary_emb.inv_freq`."""
    ends = {_end(buffer) for buffer in blueprint.buffers}
    return [name for name in unknown if _end(name) in ends]


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])
