"""Which stored tensors a right merge changes, and the exact weight of each.

Covered: every parameter that the adapter's recipe or PEFT's own layers change, and tied weights. Where base ties two
parameters and the adapter makes them differ, a right merge stores both: that is what the unmerged model computes.
Told, not judged: changed parameters that transformers computes from several stored tensors (`Targets.unmapped`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from runner.checkpoint.layout import Checkpoint
from runner.errors import UnsupportedAdapter
from runner.verify.blueprint import Blueprint
from runner.verify.elements import Stored, same_exact
from runner.verify.exact import Exact, ExactFromPeft, ExactShift, ExactStored, ReadRows, low_rank
from runner.verify.models import LOAD_ERRORS, Unmerged, bare, base_values, first_line, merged_copy
from runner.verify.recipe import Copy, Recipe, Rule, Shift
from runner.verify.shapes import main_dtype
from runner.verify.tensors import DTYPE_NAMES, FLOATS, read_tensor, row_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One stored tensor of the merged folder, as it must be.

    Attributes:
        key: of the model's state dict; "" for a tensor that the model class does not know.
        stored: its name in the merged folder.
        dtype: in the merged folder.
        shape: in the merged folder.
        base: the base's tensor that it is made from; None for a head that only the adapter has.
        is_touched: whether the adapter acts on it.
    """

    key: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    base: Stored | None
    is_touched: bool

    @property
    def same_shape_base(self) -> Stored | None:
        """W, where it has the shape of the result."""
        return self.base if self.base is not None and self.base.info.shape == self.shape else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Everything that the merged folder must hold.

    Attributes:
        required: by stored name.
        optional: copies of a tie that still holds: need not be stored, but if they are, they must be right.
        untied: keys that the base ties and the merge must not.
        unmapped: changed parameters whose stored form this judge cannot tell.
    """

    required: Mapping[str, Target]
    optional: Mapping[str, Target]
    untied: tuple[str, ...]
    unmapped: tuple[str, ...]

    @property
    def touched(self) -> tuple[Target, ...]:
        """The required targets that the adapter acts on, in the order of their names."""
        return tuple(target for _, target in sorted(self.required.items()) if target.is_touched)


class Sources:
    """E of every parameter that the adapter acts on, made when it is asked for; holds one PEFT unit at a time."""

    def __init__(self, *, base: Checkpoint, blueprint: Blueprint, recipe: Recipe, unmerged: Unmerged) -> None:
        """Take the base on disk, its model class, the adapter's recipe, and the unmerged model."""
        self._base = base
        self._blueprint = blueprint
        self._recipe = recipe
        self._unmerged = unmerged
        self.peft_type = recipe.peft_type
        self._values = base_values(unmerged)
        self._merged: tuple[str, dict[str, ExactFromPeft]] = ("", {})
        self.homes = self._find_homes()
        self.by_peft = {path for path in unmerged.units if not self.is_closed(path)}
        self.replaced = self._find_replaced()
        peft = {f"{path}.{name}" for path in self.by_peft for name in bare(unmerged.units[path]).state_dict()}
        self.keys = frozenset(peft | set(recipe.rules) | self.replaced)  # every key that the adapter may change

    def is_closed(self, unit: str) -> bool:
        """Return whether the judge's own closed form covers all that the adapter does to this unit."""
        under = f"{unit}."
        mine = any(key.startswith(under) for key in self._recipe.rules)
        return mine and not any(f".{under}" in f".{name}" for name in self._recipe.others)

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
        if key in self.replaced:
            value = self._values[key]
            return ExactFromPeft(exact=value.double(), single=value, base=value)
        return self.of_base(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of E without computing it."""
        rule = self._recipe.rules.get(key)
        if isinstance(rule, Copy) and self.unit_of(key) not in self.by_peft:
            return self._recipe.tensors[rule.tensor].shape
        return tuple(self._values[key].shape)

    def of_base(self, key: str) -> Exact:
        """Return W of `key` as the base stores it."""
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
        if key in self.replaced:
            value = self._values[key]
            return (lambda start, stop: value[start:stop]), tuple(value.shape)
        home = self.homes[key]
        return home.rows, home.info.shape

    def _from_peft(self, unit: str) -> dict[str, ExactFromPeft]:
        if self._merged[0] != unit:
            module = self._unmerged.units[unit]
            with torch.no_grad():
                exact = merged_copy(module, torch.float64).state_dict()
                single = merged_copy(module, torch.float32).state_dict()
            base = bare(module).state_dict()
            made = {
                f"{unit}.{name}": ExactFromPeft(exact=exact[name].double(), single=single[name], base=base[name])
                for name in base
            }
            self._merged = (unit, made)
        return self._merged[1]

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
            if key not in self._values or key in self._blueprint.converted or home.info.dtype not in FLOATS:
                continue
            value = self._values[key]
            if tuple(value.shape) != home.info.shape or not _same_values(value, home):
                changed.add(key)
        return changed

    def _stored(self, name: str) -> Stored:
        return Stored(root=self._base.root, info=self._base.tensors[name])


def find_targets(sources: Sources, *, base: Checkpoint, blueprint: Blueprint, dtype: str) -> Targets:
    """Return what the merged folder must hold.

    Args:
        sources: E of what the adapter changes.
        base: the base on disk.
        blueprint: its model class.
        dtype: "auto", "bfloat16", "float16" or "float32".

    Raises:
        UnsupportedAdapter: PEFT's own merge of a tied embedding fails.
    """
    touched = sources.keys
    key_of = {name: key for key, name in blueprint.stored.items()}

    def target(key: str, name: str, home: Stored, *, is_touched: bool) -> Target:
        shape = sources.shape(key) if is_touched else home.info.shape
        return Target(
            key=key,
            stored=name,
            dtype=output_dtype(home.info.dtype, dtype),
            shape=shape,
            base=home,
            is_touched=is_touched,
        )

    required = _heads(sources, blueprint, output_dtype(main_dtype(base, blueprint), dtype))
    for name, info in base.tensors.items():
        if name in blueprint.dropped:
            continue
        key = key_of.get(name, "")
        home = Stored(root=base.root, info=info)
        required[name] = target(key, name, home, is_touched=key in touched)
    optional: dict[str, Target] = {}
    untied: list[str] = []
    for tied, origin in sorted(blueprint.ties.items()):
        absent = tied if tied not in blueprint.stored else origin
        if not _is_tied(sources, blueprint, tied, origin):
            continue
        changed = [key for key in (tied, origin) if key in touched]
        holds = not changed or _still_equal(sources, tied, origin, changed)
        if not holds:
            untied.append(tied)
        if absent not in blueprint.stored:
            place = optional if holds else required
            place[absent] = target(absent, absent, sources.homes[absent], is_touched=absent in touched)
    mapped = {made.key for made in (*required.values(), *optional.values())}
    return Targets(
        required=required,
        optional=optional,
        untied=tuple(untied),
        unmapped=tuple(sorted(touched - mapped)),
    )


def _heads(sources: Sources, blueprint: Blueprint, dtype: str) -> dict[str, Target]:
    """Return the tensors that no base tensor is behind: stored under their keys, in the dtype that the base has."""
    return {
        key: Target(key=key, stored=key, dtype=dtype, shape=sources.shape(key), base=None, is_touched=True)
        for key in sorted(blueprint.heads)
    }


def output_dtype(base: str, dtype: str) -> str:
    """Return the dtype that a base tensor has in the output, as safetensors spells it."""
    return base if dtype == "auto" or base not in FLOATS else DTYPE_NAMES[dtype]


def _is_tied(sources: Sources, blueprint: Blueprint, tied: str, origin: str) -> bool:
    """Return whether the base's loader ties the two: not when both are stored and differ."""
    stored = blueprint.stored
    if tied in stored and origin in stored:
        return same_exact(sources.of_base(tied), sources.of_base(origin))
    return tied in stored or origin in stored


def _still_equal(sources: Sources, tied: str, origin: str, changed: list[str]) -> bool:
    try:
        return same_exact(_now(sources, tied, changed), _now(sources, origin, changed))
    except LOAD_ERRORS as error:
        raise UnsupportedAdapter(
            f"PEFT's own merge of {tied} or {origin} fails: {first_line(error)}",
            why="Without it, nobody can say what the merged embeddings must be.",
            fix="Release the adapter unmerged, or train one that PEFT can merge.",
        ) from error


def _now(sources: Sources, key: str, changed: list[str]) -> Exact:
    return sources.exact(key) if key in changed else sources.of_base(key)


def _same_values(value: torch.Tensor, home: Stored) -> bool:
    shape = home.info.shape
    return all(
        torch.equal(value.view(shape or (1,))[start:stop].float(), home.rows(start, stop).float())
        for start, stop in row_blocks(shape)
    )
