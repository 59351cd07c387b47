"""Units merged whole, through PEFT itself: whatever the fast path does not take.

PEFT does the arithmetic; this room only hands it the right weights, in float32, and takes the result. Where
transformers computes a unit's parameters from other stored tensors, they are made before and undone after.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from runner.architecture.conversion import Group
from runner.worker.merge.trial import unload
from runner.worker.merge.units import Unit, changed_keys, find_clusters, held_keys
from runner.worker.model.attach import Attached
from runner.worker.model.base_model import irreversible
from runner.worker.model.placed import base_tensor
from runner.worker.tensors.reader import Reader


class UnitMerger:
    """Merges one unit after another through PEFT; each starts from the base as stored."""

    def __init__(self, attached: Attached, units: Mapping[str, Unit], reader: Reader) -> None:
        self._attached = attached
        self._units = units
        self._reader = reader
        self._clusters = {cluster[0]: cluster for cluster in find_clusters(attached, units)}
        self._ready: dict[str, dict[str, torch.Tensor]] = {}
        self._checked: set[str] = set()

    def merge(self, path: str) -> dict[str, torch.Tensor]:
        """Return what the unit changes, un-rounded (float32, on the CPU).

        Keys are `Change.parameter`: names inside the unit, and stored names of what a conversion makes. Units that
        share a conversion are merged together; the first of them gives the stored tensors.

        Raises:
            UnsupportedAdapter: PEFT has no merge for this layer.
        """
        if path in self._attached.replaced and path not in self._units:
            return {"": _copy(self._attached.replaced[path])}
        if path in self._ready:
            return self._ready.pop(path)
        computed = self._attached.conversion.groups
        members = [self._units[member] for member in self._clusters[path]]
        groups = dict.fromkeys(
            computed[key] for unit in members for key in held_keys(unit, self._attached) if key in computed
        )
        bases: dict[str, torch.Tensor] = {}
        for group in groups:
            bases |= self._join(group)
        merged: dict[str, torch.Tensor] = {}
        for unit in members:
            own = self._merge_unit(unit, bases)
            merged |= {key: value for key, value in own.items() if key in computed}
            self._ready[unit.path] = {unit.relative(key): value for key, value in own.items() if key not in computed}
        result = self._ready.pop(path)
        for group in groups:
            if any(key in merged for key in group.targets):
                result |= self._attached.conversion.split(
                    {key: merged[key] if key in merged else bases[key] for key in group.targets}
                )
        self._ready = {member: values for member, values in self._ready.items() if values}
        return result

    def _merge_unit(self, unit: Unit, bases: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the unit's merged parameters by their state-dict keys."""
        # PEFT may have put another object in the place of the base's parameter (multi-head attention).
        held = {key: base_tensor(unit.module, unit.relative(key)) for key in held_keys(unit, self._attached)}
        originals = {key: tensor.data for key, tensor in held.items()}
        try:
            for key, tensor in held.items():
                tensor.data = bases[key] if key in bases else self._pristine(key, originals[key])
            merged = unload(unit.path, unit.module)
            values = {**dict(merged.named_parameters()), **dict(merged.named_buffers())}
            return {key: values[unit.relative(key)].detach() for key in changed_keys(unit, self._attached)}
        finally:
            for key, tensor in held.items():
                tensor.data = originals[key]

    def _join(self, group: Group) -> dict[str, torch.Tensor]:
        """Return the group's parameters in float32, as the base (or the adapter in its place) has them."""
        attached = self._attached
        given = {name: self._reader.read(attached.checkpoint.tensors[name]).float() for name in group.sources}
        made = attached.conversion.join(group, given)
        kind = attached.names.patterns[group.sources[0]]
        if kind not in self._checked:  # names and shapes were compared when the merge was planned, values are here
            back = attached.conversion.split(made)
            if any(not torch.equal(back[name], given[name]) for name in group.sources):
                raise irreversible(group, "the values come back changed")
            self._checked.add(kind)
        del given
        return {
            key: self._pristine(key, value) if key in attached.replaced else _copy(value) for key, value in made.items()
        }

    def _pristine(self, key: str, current: torch.Tensor) -> torch.Tensor:
        """Return a fresh copy of the base's value (or the adapter's in its place): PEFT adds to it in place."""
        if key in self._attached.replaced:
            return _copy(self._attached.replaced[key])
        if not self._attached.is_lazy:
            return _copy(current)
        if key in self._attached.own:
            return torch.zeros(current.shape)  # the adapter's own value comes in its place
        names = self._attached.names.renamed
        info = self._attached.checkpoint.tensors[names.get(key) or names[self._attached.ties[key]]]
        value = self._reader.read(info)  # freshly allocated
        return value.float() if value.is_floating_point() else value


def _copy(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of its own memory; floats in float32."""
    return value.detach().to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
