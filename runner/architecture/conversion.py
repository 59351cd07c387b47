"""Parameters that transformers computes from other stored tensors, and the way back: fused experts, joined projections.

The arithmetic is transformers' own in both directions (`WeightConverter`, `revert_weight_conversion`): it only moves
elements, so it is exact in any dtype. Nothing is assumed of it: `problem` runs it there and back on the meta device
and compares names and shapes; `parts` runs it on numbered stand-ins to learn where each stored tensor lies in a stack
of experts, so that one expert can be merged without the others.

These functions of transformers are semi-private, hence the exact pin and the tests of both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from runner.architecture.names import StoredNames

_STAND_IN = (2, 3)  # not square, so that a transposition shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Stored tensors, and the parameters that are computed from them, all of which have to be known to go back.

    Attributes:
        key: the first parameter's state-dict key, by which transformers collects the group.
        targets: keys of all its parameters.
        sources: its stored tensors, in transformers' order.
    """

    key: str
    targets: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where a stored matrix lies in a stack of experts: `parameter[expert, start : start + rows]`.

    Attributes:
        key: of the parameter, shape (experts, rows of one expert, columns).
        expert: which matrix of the stack.
        start: its first row there.
        rows: how many rows.
    """

    key: str
    expert: int
    start: int
    rows: int


class Conversion:
    """The groups of one checkpoint, and their conversion in both directions."""

    def __init__(
        self, names: StoredNames, shapes: Mapping[str, tuple[int, ...]], skeleton: Callable[[], PreTrainedModel]
    ) -> None:
        """Take the places of the stored tensors, their shapes, and what builds the model class without weights.

        `skeleton` is called once, when the first group is converted; PEFT must not have touched its model.
        """
        self._names = names
        self._shapes = shapes
        self._skeleton = skeleton
        self._parts: dict[str, dict[str, Part]] = {}
        self._converters = {
            pattern: entry
            for entry in names.transforms
            if isinstance(entry, WeightConverter)
            for pattern in entry.source_patterns
        }

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        """Every parameter that is computed, by its key, with its group."""
        groups = [self._group(key, sources) for key, sources in self._names.converted.items()]
        return {target: group for group in groups for target in group.targets}

    @cached_property
    def _by_source(self) -> Mapping[str, Group]:
        return {name: group for group in self.groups.values() for name in group.sources}

    @property
    def sources(self) -> tuple[str, ...]:
        """The stored tensors that are no parameters themselves."""
        return tuple(self._by_source)

    def group_of(self, name: str) -> Group | None:
        """Return the group of a stored tensor, or None where it is a parameter itself (or nothing that is known)."""
        return self._by_source.get(name)

    def join(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the group's parameters by key, computed from its stored tensors by name; in their dtype and device.

        Raises:
            ValueError, RuntimeError: the shapes do not fit the conversion.
        """
        return self._join(group.key, group.sources, tensors)

    def split(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return stored tensors by name, computed from whole groups of parameters by key.

        Raises:
            ValueError, RuntimeError: transformers cannot revert the conversion.
        """
        return dict(revert_weight_conversion(self._model, dict(values)))

    def problem(self, group: Group) -> str:
        """Return why the group cannot be converted there and back, or "" where it can; computes with no weight."""
        given = {name: torch.empty(self._shapes[name], device="meta") for name in group.sources}
        try:
            joined = self.join(group, given)
            wrong = [key for key in group.targets if tuple(joined[key].shape) != self._expected(key)]
            back = {name: tuple(tensor.shape) for name, tensor in self.split(joined).items()}
        except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError, IndexError) as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if wrong:
            return (
                f"it makes {list(joined[wrong[0]].shape)} of them, and the model has {list(self._expected(wrong[0]))}"
            )
        wanted = {name: tuple(tensor.shape) for name, tensor in given.items()}
        if back != wanted:
            differing = sorted(name for name in {**back, **wanted} if back.get(name) != wanted.get(name))
            return f"its way back does not give {differing[0]!r} again"
        return ""

    def part(self, name: str) -> Part | None:
        """Return where the stored tensor lies in a stack of experts, or None where it is no such matrix."""
        group = self._by_source.get(name)
        if group is None:
            return None
        if group.key not in self._parts:
            self._parts[group.key] = self.parts(group) or {}
        return self._parts[group.key].get(name)

    def parts(self, group: Group) -> dict[str, Part] | None:
        """Return where each stored matrix of the group lies in its stack of experts, or None where it is no stack.

        Found by converting numbered stand-ins of 2×3 elements there and back: every one must come out in one piece.
        """
        shapes = {self._shapes[name] for name in group.sources}
        if len(group.targets) != 1 or len(shapes) != 1 or len(next(iter(shapes))) != 2:
            return None
        size = _STAND_IN[0] * _STAND_IN[1]
        numbers = torch.arange(len(group.sources) * size, dtype=torch.float64).view(-1, *_STAND_IN)
        given = dict(zip(group.sources, numbers.clone(), strict=True))
        try:
            stack = self.join(group, given)[group.key]
            back = self.split({group.key: stack})
        except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError, IndexError):
            return None
        fits = stack.ndim == 3 and stack.shape[1] % _STAND_IN[0] == 0 and stack.shape[2] == _STAND_IN[1]
        if not fits or back.keys() != given.keys() or any(not torch.equal(back[name], given[name]) for name in given):
            return None
        rows, columns = next(iter(shapes))
        tiles = stack.reshape(stack.shape[0], -1, *_STAND_IN)  # (experts, matrices of one expert, 2, 3)
        order = (tiles[:, :, 0, 0] / size).long()
        if not torch.equal(tiles, numbers[order]):
            return None
        if self._expected(group.key) != (tiles.shape[0], tiles.shape[1] * rows, columns):
            return None
        return {
            group.sources[int(order[expert, place])]: Part(key=group.key, expert=expert, start=place * rows, rows=rows)
            for expert in range(tiles.shape[0])
            for place in range(tiles.shape[1])
        }

    def _group(self, key: str, sources: tuple[str, ...]) -> Group:
        targets: tuple[str, ...] = (key,)
        if len(self._converters[self._names.patterns[sources[0]]].target_patterns) > 1:
            given = {name: torch.empty(self._shapes[name], device="meta") for name in sources}
            try:
                targets = tuple(self._join(key, sources, given))
            except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError, IndexError):
                targets = (key,)  # `problem` says why, if anything touches it
        return Group(key=key, targets=targets, sources=sources)

    def _join(self, key: str, sources: tuple[str, ...], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = deepcopy(self._converters[self._names.patterns[sources[0]]])
        for name in sources:
            converter.add_tensor(key, name, self._names.patterns[name], tensors[name])
        made = converter.convert(key, model=self._model, config=self._model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}

    @cached_property
    def _model(self) -> PreTrainedModel:
        model = self._skeleton()
        model._weight_conversions = list(self._names.transforms)
        return model

    @cached_property
    def _keys(self) -> Mapping[str, torch.Tensor]:
        return dict(self._model.state_dict())

    def _expected(self, key: str) -> tuple[int, ...]:
        return tuple(self._keys[key].shape) if key in self._keys else ()
