"""Which stored tensors a right merge changes.

Covered: every parameter that the adapter's recipe or PEFT's own layers change, and tied weights. Where base ties two
parameters and the adapter makes them differ, a right merge stores both: that is what the unmerged model computes.
Parameters that transformers computes from other stored tensors are judged where they are stored
(`runner.judge.expected.fused`); told, not judged, where that conversion cannot be undone (`Targets.unmapped`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from runner.files.layout import Checkpoint
from runner.judge.expected.blueprint import Blueprint
from runner.judge.expected.elements import Stored, same_exact
from runner.judge.expected.exact import Exact
from runner.judge.expected.fused import keys_of
from runner.judge.expected.shapes import main_dtype
from runner.judge.expected.sources import Sources
from runner.judge.numbers.stochastic import Chance, chance_of
from runner.judge.numbers.tensors import DTYPE_NAMES, FLOATS
from runner.judge.streaming.models import LOAD_ERRORS, first_line
from runner.protocol.errors import UnsupportedAdapter
from runner.protocol.rounding import Rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One stored tensor of the merged folder, as it must be.

    Attributes:
        key: of the model's state dict; "" for a tensor that the model class does not know; for one that a parameter
            is computed from, that parameter.
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
        rounding: of the touched tensors.
        twins: stored name → the name whose draws it takes, where the base ties the two and stores both.
        copies: name → the other names of the same tie, for ties that hold: loading needs one of them.
    """

    required: Mapping[str, Target]
    optional: Mapping[str, Target]
    untied: tuple[str, ...]
    unmapped: tuple[str, ...]
    rounding: Rounding
    twins: Mapping[str, str]
    copies: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def chance(self, target: Target) -> Chance | None:
        """Return the draws of a tensor, or None where it is rounded to the nearest."""
        drawn = self.twins.get(target.stored, target.stored)
        return chance_of(self.rounding, drawn, target.dtype) if target.is_touched else None

    @property
    def touched(self) -> tuple[Target, ...]:
        """The required targets that the adapter acts on, in the order of their names."""
        return tuple(target for _, target in sorted(self.required.items()) if target.is_touched)


def find_targets(
    sources: Sources, *, base: Checkpoint, blueprint: Blueprint, dtype: str, rounding: Rounding
) -> Targets:
    """Return what the merged folder must hold.

    Args:
        sources: E of what the adapter changes.
        base: the base on disk.
        blueprint: its model class.
        dtype: "auto", "bfloat16", "float16" or "float32".
        rounding: of what the adapter changes.

    Raises:
        UnsupportedAdapter: PEFT's own merge of a tied embedding fails.
    """
    touched = sources.keys
    key_of = {name: key for key, name in blueprint.stored.items()}
    required = _heads(sources, blueprint, output_dtype(main_dtype(base, blueprint), dtype))
    for name, info in base.tensors.items():
        if name in blueprint.dropped:
            continue
        key = key_of.get(name, "")
        home = Stored(root=base.root, info=info)
        required[name] = _target(sources, key, name, home, dtype)
    required |= _computed(sources, base, dtype)
    optional: dict[str, Target] = {}
    untied: list[str] = []
    twins: dict[str, str] = {}
    held: dict[str, set[str]] = {}
    for tied, origin in sorted(blueprint.ties.items()):
        absent = tied if tied not in blueprint.stored else origin
        if not _is_tied(sources, blueprint, tied, origin):
            continue
        changed = [key for key in (tied, origin) if key in touched]
        holds = not changed or _still_equal(sources, tied, origin, changed)
        if holds:
            held.setdefault(origin, {blueprint.stored.get(origin, origin)}).add(blueprint.stored.get(tied, tied))
        else:
            untied.append(tied)
        if absent not in blueprint.stored:
            place = optional if holds else required
            place[absent] = _target(sources, absent, absent, sources.homes[absent], dtype)
        elif tied in blueprint.stored:
            twins[blueprint.stored[tied]] = blueprint.stored[origin]
    mapped = {made.key for made in (*required.values(), *optional.values())}
    return Targets(
        required=required,
        optional=optional,
        untied=tuple(untied),
        unmapped=tuple(sorted(touched - mapped - keys_of(sources.computed))),
        rounding=rounding,
        twins=twins,
        copies={name: frozenset(names - {name}) for names in held.values() for name in names},
    )


def _target(sources: Sources, key: str, name: str, home: Stored, dtype: str) -> Target:
    """Return what must be stored as `name` for the parameter `key` that has its base at `home`."""
    is_touched = key in sources.keys
    return Target(
        key=key,
        stored=name,
        dtype=output_dtype(home.info.dtype, dtype),
        shape=sources.shape(key) if is_touched else home.info.shape,
        base=home,
        is_touched=is_touched,
    )


def _computed(sources: Sources, base: Checkpoint, dtype: str) -> dict[str, Target]:
    """Return the stored tensors that touched parameters are computed from."""
    return {
        name: Target(
            key=group.key,
            stored=name,
            dtype=output_dtype(base.tensors[name].dtype, dtype),
            shape=base.tensors[name].shape,
            base=Stored(root=base.root, info=base.tensors[name]),
            is_touched=True,
        )
        for group in sources.computed
        for name in group.sources
    }


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
