"""E in the place of what the merged folder holds, stage by stage, in the model that transformers loads of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from runner.architecture.conversion import Group
from runner.judge.expected.elements import is_right, rounded_rows
from runner.judge.expected.exact import Exact, ExactStored
from runner.judge.expected.sources import Sources
from runner.judge.expected.targets import Target, Targets
from runner.judge.numbers.tensors import row_blocks, row_count
from runner.judge.streaming.loader import Loaded

Values = dict[str, torch.Tensor]


class Filling:
    """What E puts into a loaded model.

    Attributes:
        misplaced: the first tensor that the loaded model has no place for, or "".
        differs: whether what was loaded is not round(E) anywhere so far; see `exact`.
    """

    def __init__(self, loaded: Loaded, sources: Sources, targets: Targets) -> None:
        """Take the merged folder's model, E of every touched parameter, and what the folder must hold."""
        self._sources = sources
        self._targets = targets
        self._shapes = {key: tuple(tensor.shape) for key, tensor in loaded.model.state_dict().items()}
        self._tied = _same(loaded)
        self._plain: dict[str, list[Target]] = {}
        self._groups: dict[str, Group] = {}
        self.misplaced = ""
        self.differs = False
        for target in self._wanted():
            self._place(target)

    def exact(self, values: Values) -> None:
        """Put the un-rounded E into a stage's values, in their dtype; note where they were not round(E).

        Where a tensor was only cast, the base's values come back. A value is round(E), too, where it is right by the
        bound of the storage layer: next to a tie, a right float32 computation may round the other way than E.
        """
        self._fill(values, rounded=False)

    def rounded(self, values: Values) -> None:
        """Put round(E) into a stage's values wherever they are not right by the bound of the storage layer."""
        self._fill(values, rounded=True)

    def _wanted(self) -> Iterator[Target]:
        for target in self._targets.required.values():
            is_known = bool(target.key) or self._sources.fused.group(target.stored) is not None
            is_cast = is_known and target.base is not None and target.dtype != target.base.info.dtype
            if target.is_touched or is_cast:
                yield target

    def _place(self, target: Target) -> None:
        group = self._sources.fused.group(target.stored)
        keys = (target.key,) if group is None else group.targets
        if any(key not in self._shapes for key in keys):
            self.misplaced = self.misplaced or target.stored
        elif group is not None:
            self._groups |= dict.fromkeys(keys, group)
        elif self._shapes[target.key] != target.shape:
            self.misplaced = self.misplaced or target.stored
        else:
            self._plain.setdefault(self._tied.get(target.key, target.key), []).append(target)

    def _fill(self, values: Values, *, rounded: bool) -> None:
        origins: dict[str, list[str]] = {}
        for key in values:
            origins.setdefault(self._tied.get(key, key), []).append(key)
        targets = [target for origin in origins for target in self._plain.get(origin, ())]
        # Tensors of one PEFT unit one after the other, because only one unit's E is kept.
        for target in sorted(targets, key=lambda one: (self._sources.unit_of(one.key) or "", one.key)):
            keys = origins[self._tied.get(target.key, target.key)]
            made = self._made(self._exact_of(target), target, values[keys[0]], rounded=rounded)
            values.update(dict.fromkeys(keys, made))
        for group in dict.fromkeys(group for key, group in self._groups.items() if key in values):
            self._fill_group(values, group, rounded=rounded)

    def _fill_group(self, values: Values, group: Group, *, rounded: bool) -> None:
        fused = self._sources.fused
        device, dtype = values[group.targets[0]].device, values[group.targets[0]].dtype
        is_touched = any(self._targets.required[name].is_touched for name in group.sources)
        if rounded and not is_touched:
            return
        stored: Values = {}
        # Only what the adapter touches is known to go back to its stored form.
        loaded = fused.split({key: values[key].cpu() for key in group.targets}) if is_touched else {}
        for name in group.sources:
            target = self._targets.required[name]
            exact = self._exact_of(target) if target.is_touched else self._sources.of_stored(name)
            if is_touched:
                stored[name] = self._made(exact, target, loaded.pop(name), rounded=rounded)
            else:
                stored[name] = exact.rows(0, row_count(exact.shape)).view(exact.shape).to(dtype)
        values.update({key: value.to(device) for key, value in fused.join(group, stored).items()})

    def _exact_of(self, target: Target) -> Exact:
        if target.is_touched or target.base is None:
            return self._sources.exact_of(target.key, target.base)
        return ExactStored(target.base.root, target.base.info)

    def _made(self, exact: Exact, target: Target, loaded: torch.Tensor, *, rounded: bool) -> torch.Tensor:
        """Return E, or `loaded` with round(E) wherever it is wrong: in E's shape, in the loaded dtype and device."""
        chance = self._targets.chance(target)
        held = loaded.to("cpu", torch.float32).view(exact.shape or (1,))
        values = torch.empty(exact.shape or (1,), dtype=loaded.dtype)
        for start, stop in row_blocks(exact.shape):
            wanted = exact.rows(start, stop)
            found = held[start:stop].view(wanted.shape)
            right = rounded_rows(wanted, start, target.dtype, chance).to(torch.float32)
            is_same = bool(torch.equal(right, found))
            if not is_same:
                kept = is_right(found, exact, start, wanted, target.dtype, chance)
                self.differs = self.differs or not bool(kept.all())
                right = torch.where(kept, found, right)
            made = right if rounded else wanted
            values[start:stop] = made.view(values[start:stop].shape)
        return values.view(exact.shape).to(loaded.device)


def _same(loaded: Loaded) -> Mapping[str, str]:
    """Return key → the key that all keys of its parameter go by."""
    first: dict[int, str] = {}
    same = {}
    for key, parameter in loaded.model.named_parameters(remove_duplicate=False):
        same[key] = first.setdefault(id(parameter), key)
    return same
