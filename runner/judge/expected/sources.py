"""E, the exact merged weight, of every parameter that an adapter acts on.

In closed form where the adapter's files give one (`runner.judge.expected.recipe`, `runner.judge.expected.experts`),
else from PEFT's own layer computed in float64.
"""

from __future__ import annotations

from functools import cached_property

import torch

from runner.architecture.conversion import Group
from runner.files.layout import Checkpoint
from runner.judge.expected.blueprint import Blueprint
from runner.judge.expected.elements import Stored
from runner.judge.expected.exact import Exact, ExactFromPeft, ExactShift, ExactStored, ReadRows, low_rank
from runner.judge.expected.experts import ExactExperts, expert_rules
from runner.judge.expected.fused import ExactValue, Fused
from runner.judge.expected.recipe import Copy, Recipe, Rule, Shift
from runner.judge.expected.unmerged import Unmerged
from runner.judge.numbers.tensors import FLOATS, read_tensor, row_blocks
from runner.judge.streaming.models import merged_copy, own_state


class Sources:
    """E of every parameter that the adapter acts on, made when it is asked for; holds one PEFT unit at a time."""

    def __init__(self, *, base: Checkpoint, blueprint: Blueprint, recipe: Recipe, unmerged: Unmerged) -> None:
        """Take the base on disk, its model class, the adapter's recipe, and the unmerged model."""
        self._base = base
        self._blueprint = blueprint
        self._recipe = recipe
        self._unmerged = unmerged
        self.peft_type = recipe.peft_type
        self._merged: dict[str, dict[str, ExactFromPeft]] = {}
        self.keeps_units = False  # True costs 16 bytes an element that only PEFT can merge, and saves merging it again
        self._experts, self._used = expert_rules(recipe, unmerged.units, blueprint.keys)
        self.fused = Fused(blueprint.conversion, recipe, self._experts, self._stored)
        fused = {group.key for name in recipe.stored if (group := self.fused.group(name)) is not None}
        self._mine = frozenset({*recipe.rules, *self._experts, *fused})
        self.homes = self._find_homes()
        self.by_peft = {path for path in unmerged.units if not self.is_closed(path)}
        self.replaced = self._find_replaced()
        peft = {f"{path}.{name}" for path in self.by_peft for name in own_state(unmerged.units[path])}
        self.keys = frozenset(peft | self._mine | self.replaced)  # every key that the adapter may change

    @cached_property
    def computed(self) -> tuple[Group, ...]:
        """The groups of stored tensors that touched parameters are computed from, where that can be undone."""
        groups = dict.fromkeys(group for key, group in self._blueprint.conversion.groups.items() if key in self.keys)
        return tuple(group for group in groups if not self._blueprint.conversion.problem(group))

    def is_closed(self, unit: str) -> bool:
        """Return whether the judge's own closed form covers all that the adapter does to this unit."""
        under = f"{unit}."
        mine = any(key.startswith(under) for key in self._mine)
        return mine and not any(f".{under}" in f".{name}" for name in self._recipe.others if name not in self._used)

    def exact_of(self, key: str, base: Stored | None) -> Exact:
        """Return E of the stored tensor that is the parameter `key`, or that it is computed from.

        Args:
            key: of the parameter.
            base: as the base stores it; None where the base has no such tensor.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: PEFT's own merge of it fails.
        """
        if base is None or self.fused.group(base.info.name) is None:
            return self.exact(key)
        return self.fused.exact(base, self.exact)

    def of_stored(self, name: str) -> Exact:
        """Return a stored tensor of the base as it is."""
        return ExactStored(self._base.root, self._base.tensors[name])

    def matrix(self, key: str, expert: int) -> torch.Tensor:
        """Return one matrix of a parameter's E in float64; of a parameter of two dimensions, all of it."""
        made = None if key in self.homes else self.fused.matrix(key, expert, self.exact)
        if made is None:
            exact = self.exact(key)
            made = exact.rows(expert, expert + 1)[0] if len(exact.shape) == 3 else exact.rows(0, exact.shape[0])
        return made

    def exact(self, key: str) -> Exact:
        """Return E of the parameter `key`.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: PEFT's own merge of it fails.
        """
        unit = self.unit_of(key)
        if unit in self.by_peft and unit is not None:
            return self._from_peft(unit)[key]
        rule = self._recipe.rules.get(key)
        if rule is not None:
            return self._closed(key, rule)
        if key in self._experts and key in self.homes:
            return ExactExperts(self.homes[key], self._experts[key], self._recipe)
        if key in self.replaced:
            value = self._unmerged.value(key)
            return ExactFromPeft(exact=value.double(), single=value, base=value)
        return self.of_base(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of E without computing it."""
        rule = self._recipe.rules.get(key)
        if isinstance(rule, Copy) and self.unit_of(key) not in self.by_peft:
            return self._recipe.tensors[rule.tensor].shape
        return self._unmerged.shape(key)

    def of_base(self, key: str) -> Exact:
        """Return W of `key` as the base stores it."""
        if key not in self.homes:
            return ExactValue(self._unmerged.value(key))
        home = self.homes[key]
        return ExactStored(home.root, home.info)

    def unit_of(self, key: str) -> str | None:
        """Return the path of the PEFT unit that holds `key`, or None."""
        path = key
        while "." in path:
            path = path.rpartition(".")[0]
            if path in self._unmerged.units:
                return path
        return None

    def _closed(self, key: str, rule: Rule) -> Exact:
        tensors = dict(self._recipe.tensors)
        root = self._recipe.root
        if isinstance(rule, Copy):
            return ExactStored(root, tensors[rule.tensor])
        base, shape = self._base_rows(key)
        if isinstance(rule, Shift):
            vector = read_tensor(root, tensors[rule.tensor])
            return ExactShift(base=base, shape=shape, vector=vector, scaling=rule.scaling)
        if rule.replaced_base is not None:
            own = Stored(root=root, info=tensors[rule.replaced_base])
            base, shape = own.rows, own.info.shape
        flip = key.rpartition(".")[0] in self._blueprint.transposed
        return low_rank(rule, adapter=root, tensors=tensors, base=base, shape=shape, flip=flip)

    def _base_rows(self, key: str) -> tuple[ReadRows, tuple[int, ...]]:
        if key in self.replaced or key not in self.homes:
            value = self._unmerged.value(key)
            return (lambda start, stop: value[start:stop]), tuple(value.shape)
        home = self.homes[key]
        return home.rows, home.info.shape

    def _from_peft(self, unit: str) -> dict[str, ExactFromPeft]:
        if unit not in self._merged:
            module = self._unmerged.units[unit]
            with torch.no_grad(), self._unmerged.in_memory(unit):
                exact = merged_copy(module, torch.float64).state_dict()
                single = merged_copy(module, torch.float32).state_dict()
                base = own_state(module)
            made = {
                f"{unit}.{name}": ExactFromPeft(exact=exact[name].double(), single=single[name], base=base[name])
                for name in base
            }
            self._merged = {**self._merged, unit: made} if self.keeps_units else {unit: made}
        return self._merged[unit]

    def _find_homes(self) -> dict[str, Stored]:
        """Return the stored base tensor of every key, through ties where the key itself is not stored."""
        stored = self._blueprint.stored
        homes = {key: self._stored(name) for key, name in stored.items()}
        for target, source in self._blueprint.ties.items():
            for key, other in ((target, source), (source, target)):
                if key not in stored and other in stored:
                    homes[key] = self._stored(stored[other])
        return homes

    def _find_replaced(self) -> set[str]:
        """Return the keys whose base value PEFT changed when it attached the adapter, as `bias` and PiSSA do."""
        changed = set()
        for key, home in self.homes.items():
            known = key in self._unmerged.places and key not in self._unmerged.on_disk
            if not known or home.info.dtype not in FLOATS:
                continue
            value = self._unmerged.value(key)
            if tuple(value.shape) != home.info.shape or not _same_values(value, home):
                changed.add(key)
        return changed

    def _stored(self, name: str) -> Stored:
        return Stored(root=self._base.root, info=self._base.tensors[name])


def _same_values(value: torch.Tensor, home: Stored) -> bool:
    shape = home.info.shape
    return all(
        torch.equal(value.view(shape or (1,))[start:stop].float(), home.rows(start, stop).float())
        for start, stop in row_blocks(shape)
    )
