"""Stored tensors that are not parameters themselves: what each must hold, and how parameters are made of them.

transformers' own mapping says which stored tensors make which parameter (`runner.architecture.conversion`); the merge
goes the same way, so the judge does not rest on it: the probes hold every expert, put together from the stored
tensors, against the model that transformers loaded, and the end-to-end layer loads the merged folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from runner.architecture.conversion import Conversion, Group
from runner.judge.expected.elements import Stored
from runner.judge.expected.exact import Exact, ExactLowRank
from runner.judge.expected.experts import ExpertRule, SingleRule, factors
from runner.judge.expected.recipe import LowRank, Recipe
from runner.judge.numbers.tensors import read_tensor, row_count


class ExactConverted:
    """E of a stored tensor as transformers converts E of the parameters back; whole in memory."""

    is_copy = False

    def __init__(self, exact: torch.Tensor, noises: tuple[torch.Tensor, torch.Tensor]):
        """Take E, and the bound on a right computation for a 16-bit and for a float32 output, of E's shape."""
        self.shape = tuple(exact.shape)
        self._exact = exact
        self._noises = noises

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of E in float64."""
        return self._exact.view(self.shape or (1,))[start:stop]

    def noise(self, start: int, stop: int, *, output_is_float32: bool) -> torch.Tensor:
        """Return the bound of the parameters, at the same elements."""
        return self._noises[output_is_float32].view(self.shape or (1,))[start:stop]


class ExactValue:
    """E is a value in memory that nothing changes; rounding it is all that may happen."""

    is_copy = True

    def __init__(self, value: torch.Tensor):
        """Take the value."""
        self.shape = tuple(value.shape)
        self._value = value

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of E in float64."""
        return self._value.view(self.shape or (1,))[start:stop].double()

    def noise(self, start: int, stop: int, *, output_is_float32: bool) -> torch.Tensor:
        """Return zero."""
        return torch.zeros((), dtype=torch.float64)


class Fused:
    """E of the stored tensors behind computed parameters; holds one group at a time."""

    def __init__(
        self,
        conversion: Conversion,
        recipe: Recipe,
        rules: Mapping[str, ExpertRule | SingleRule],
        stored: Callable[[str], Stored],
    ) -> None:
        """Take the base's conversion, the adapter, its rules for stacks of experts by key, and the base's tensors."""
        self._stored = stored
        self._conversion = conversion
        self._recipe = recipe
        self._rules = rules
        self._made: tuple[str, dict[str, ExactConverted]] = ("", {})

    def group(self, stored: str) -> Group | None:
        """Return the group that a stored tensor belongs to, or None where it is a parameter itself."""
        return self._conversion.group_of(stored)

    def exact(self, base: Stored, exact: Callable[[str], Exact]) -> Exact:
        """Return E of the stored tensor `base`.

        Args:
            base: as the base stores it.
            exact: E of a parameter by key, for those that are not merged expert by expert.
        """
        name = base.info.name
        part = self._conversion.part(name)
        rule = self._recipe.stored.get(name)
        if isinstance(rule, LowRank):
            a, b = (read_tensor(self._recipe.root, self._recipe.tensors[half]) for half in (rule.a, rule.b))
            return ExactLowRank(base=base.rows, shape=base.info.shape, a=a, b=b, scaling=rule.scaling)
        if part is not None and part.key in self._rules:
            found = self._rules[part.key]
            left, right = factors(found, self._recipe, part.expert)
            left = left[part.start : part.start + part.rows]
            return ExactLowRank(base=base.rows, shape=base.info.shape, a=right, b=left, scaling=found.scaling)
        group = self.group(name)
        assert group is not None  # noqa: S101  (the caller asks for grouped tensors only)
        if self._made[0] != group.key:
            self._made = (group.key, self._convert(group, exact))
        return self._made[1][name]

    def matrix(self, key: str, expert: int, exact: Callable[[str], Exact]) -> torch.Tensor | None:
        """Return one expert of E, put together from its stored matrices, in float64; None where it is no stack."""
        found = sorted(
            (part.start, name)
            for name in self._conversion.groups[key].sources
            if (part := self._conversion.part(name)) is not None and part.expert == expert
        )
        if not found:
            return None
        pieces = [self.exact(self._stored(name), exact) for _, name in found]
        return torch.cat([piece.rows(0, piece.shape[0]) for piece in pieces])

    def join(self, group: Group, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the group's parameters by key, made of its stored tensors by name."""
        return self._conversion.join(group, values)

    def split(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return stored tensors by name, made of the parameters of whole groups by key."""
        return self._conversion.split(values)

    def _convert(self, group: Group, exact: Callable[[str], Exact]) -> dict[str, ExactConverted]:
        made = {key: exact(key) for key in group.targets}
        whole = self._conversion.split(
            {key: found.rows(0, row_count(found.shape)).view(found.shape) for key, found in made.items()}
        )
        noises = [
            self._conversion.split({key: _noise(found, is_float32) for key, found in made.items()})
            for is_float32 in (False, True)
        ]
        return {name: ExactConverted(value, (noises[0][name], noises[1][name])) for name, value in whole.items()}


def _noise(exact: Exact, is_float32: bool) -> torch.Tensor:
    bound = exact.noise(0, row_count(exact.shape), output_is_float32=is_float32)
    return bound.expand(exact.shape).contiguous() if bound.ndim == 0 else bound.view(exact.shape)


def keys_of(groups: Iterable[Group]) -> set[str]:
    """Return the parameters of all groups."""
    return {key for group in groups for key in group.targets}
