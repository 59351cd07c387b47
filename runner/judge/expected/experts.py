"""What a `target_parameters` adapter does to a stack of experts, read from its files alone, in closed form.

For a parameter W of shape (experts, m, n) and expert e, ΔW[e] is s · B_e·A_e or its transpose, as
`runner.files.adapter.expert_layout` tells from shapes, version and marker. A_e is the e-th block of r rows of A. B_e is
the columns e, e + experts, … of B (PEFT's packing, the expert index running fastest), or, grouped by expert, the e-th
block of r columns.

This is the judge's own reading of PEFT's file format; it uses nothing of the merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from runner.files.adapter.expert_layout import Pair, read_layout
from runner.files.layout import TensorInfo
from runner.judge.expected.elements import Stored
from runner.judge.expected.exact import ExactLowRank
from runner.judge.expected.recipe import PREFIX, Recipe, scaling_of
from runner.judge.numbers.tensors import read_tensor
from runner.protocol.errors import UnsupportedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRule:
    """E[e] = W[e] + scaling · (B_e·A_e), or its transpose.

    Attributes:
        a: adapter tensor.
        b: adapter tensor.
        scaling: alpha/rank, or alpha/sqrt(rank) for rsLoRA.
        experts: how many.
        is_transposed: whether the product is transposed.
        is_grouped: whether the columns of `b` are grouped by expert.
    """

    a: str
    b: str
    scaling: float
    experts: int
    is_transposed: bool
    is_grouped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleRule:
    """E[e] = W[e] + scaling · (B_e·A_e), or its transpose, with a pair of adapter tensors for each expert.

    Attributes:
        pairs: expert → names of its A, shape (rank, in), and B, shape (out, rank); the others keep W.
        scaling: alpha/rank, or alpha/sqrt(rank) for rsLoRA.
        stack: (experts, m, n) of the parameter.
        is_transposed: whether the product is transposed, because the class stores its experts as (in, out).
    """

    pairs: Mapping[int, tuple[str, str]]
    scaling: float
    stack: tuple[int, ...]
    is_transposed: bool


class ExactExperts:
    """E of a stack that is stored as one tensor; rows are experts."""

    is_copy = False

    def __init__(self, base: Stored, rule: ExpertRule | SingleRule, recipe: Recipe):
        """Take W as stored, and the rule."""
        self.shape = base.info.shape
        self._base = base
        self._rule = rule
        self._recipe = recipe

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return experts of E in float64, shape (stop - start, m, n)."""
        base = self._base.rows(start, stop).double()
        for expert in range(start, stop):
            left, right = factors(self._rule, self._recipe, expert)
            base[expert - start] += self._rule.scaling * (left.double() @ right.double())
        return base

    def _rows_of(self, expert: int, first: int, last: int) -> torch.Tensor:
        return self._base.rows(expert, expert + 1)[0, first:last]

    def noise(self, start: int, stop: int, *, output_is_float32: bool) -> torch.Tensor:
        """Return the bound of `runner.judge.expected.exact` for each expert."""
        found = []
        for expert in range(start, stop):
            left, right = factors(self._rule, self._recipe, expert)
            one = ExactLowRank(
                base=partial(self._rows_of, expert),
                shape=self.shape[1:],
                a=right,
                b=left,
                scaling=self._rule.scaling,
            )
            found.append(one.noise(0, self.shape[1], output_is_float32=output_is_float32))
        return torch.stack(found)


def wrappers(unit: nn.Module) -> Iterator[tuple[str, Any, int]]:
    """Yield (parameter's name, PEFT's wrapper, depth) of nested wrappers of one module, from the outermost in."""
    depth, module = 0, unit
    while isinstance(module, ParamWrapper):
        yield module.parameter_name, module, depth
        module, depth = module.base_layer, depth + 1


def expert_rules(
    recipe: Recipe, units: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, ExpertRule | SingleRule], frozenset[str]]:
    """Return key → rule of every stack of experts that the adapter targets, and the adapter tensors that they use.

    Args:
        recipe: the adapter.
        units: PEFT's outermost modules; which parameter a nested wrapper targets is not in the file.
        shapes: of the base's parameters by key.

    Raises:
        BrokenAdapter: a pair does not fit its parameter.
        UnsupportedAdapter: nobody can tell how the factors are packed.
    """
    pairs: dict[str, Pair] = {}
    used: dict[str, tuple[str, str]] = {}
    for path, unit in units.items():
        for parameter, wrapper, depth in wrappers(unit):
            key, under = f"{path}.{parameter}", f"{PREFIX}{path}{'.base_layer' * depth}"
            a, b = f"{under}.lora_A.weight", f"{under}.lora_B.weight"
            if len(shapes[key]) != 3 or a not in recipe.tensors or b not in recipe.tensors:
                continue
            used[key] = a, b
            pairs[key] = Pair(
                name=a,
                a=recipe.tensors[a].shape,
                b=recipe.tensors[b].shape,
                stack=shapes[key],
                is_in_out=not wrapper._did_swap_in_out_features,
            )
    rules: dict[str, ExpertRule | SingleRule] = dict(single_experts(recipe, units, shapes))
    mine = {
        name for rule in rules.values() if isinstance(rule, SingleRule) for pair in rule.pairs.values() for name in pair
    }
    if not pairs:
        return rules, frozenset(mine)
    layout = read_layout(recipe.config, list(pairs.values()))
    rules |= {
        key: ExpertRule(
            a=used[key][0],
            b=used[key][1],
            scaling=scaling_of(key, recipe.config),
            experts=pair.stack[0],
            is_transposed=not layout.is_direct,
            is_grouped=layout.is_grouped,
        )
        for key, pair in pairs.items()
    }
    return rules, frozenset(mine | {name for names in used.values() for name in names})


def single_experts(
    recipe: Recipe, units: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, SingleRule]:
    """Return key → rule of every stack whose experts have a layer each in the adapter, as gpt-oss in 4 bits has them.

    Args:
        recipe: the adapter.
        units: PEFT's outermost modules, which say how the class stores its experts.
        shapes: of the base's parameters by key.

    Raises:
        UnsupportedAdapter: the experts of one stack are scaled differently.
    """
    rules = {}
    for path, unit in units.items():
        for parameter, wrapper, _ in wrappers(unit):
            key = f"{path}.{parameter}"
            pairs = single_pairs(recipe, key, shapes[key])
            if not pairs:
                continue
            scalings = {scaling_of(f"{key}s.{expert}", recipe.config) for expert in pairs}
            if len(scalings) > 1:
                raise UnsupportedAdapter(
                    f"The adapter scales the experts of {key!r} by {min(scalings):g} to {max(scalings):g}.",
                    why="The judge holds them against PEFT's layer of the whole stack, which has one factor.",
                    fix="Release the adapter unmerged, or train all experts alike.",
                )
            rules[key] = SingleRule(
                pairs=pairs,
                scaling=scalings.pop(),
                stack=shapes[key],
                is_transposed=not wrapper._did_swap_in_out_features,
            )
    return rules


def single_pairs(recipe: Recipe, key: str, shape: tuple[int, ...]) -> dict[int, tuple[str, str]]:
    """Return expert → names of the two factors of its own layer, for a stack `key` of that shape."""
    names = {
        expert: (f"{PREFIX}{key}s.{expert}.lora_A.weight", f"{PREFIX}{key}s.{expert}.lora_B.weight")
        for expert in range(shape[0] if len(shape) == 3 else 0)
    }
    return {expert: pair for expert, pair in names.items() if all(name in recipe.tensors for name in pair)}


def factors(rule: ExpertRule | SingleRule, recipe: Recipe, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (left, right) of one expert in the stored dtype: shapes (m, rank) and (rank, n)."""
    if isinstance(rule, SingleRule):
        return _single_factors(rule, recipe, expert)
    a = _read(recipe.root, recipe.tensors[rule.a])
    b = _read(recipe.root, recipe.tensors[rule.b])
    rank = a.shape[0] // rule.experts
    own_a = a[expert * rank : (expert + 1) * rank]
    own_b = b[:, expert * rank : (expert + 1) * rank] if rule.is_grouped else b[:, expert :: rule.experts]
    return (own_a.T, own_b.T) if rule.is_transposed else (own_b, own_a)


def _single_factors(rule: SingleRule, recipe: Recipe, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    if expert not in rule.pairs:
        return torch.zeros(rule.stack[1], 1), torch.zeros(1, rule.stack[2])
    a, b = (read_tensor(recipe.root, recipe.tensors[name]) for name in rule.pairs[expert])
    return (a.T, b.T) if rule.is_transposed else (b, a)


@lru_cache(maxsize=2)
def _read(root: Path, tensor: TensorInfo) -> torch.Tensor:
    return read_tensor(root, tensor)  # asked for once for every expert
