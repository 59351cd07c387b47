"""Was one of several adapters left out, or given another weight? For `cat` and `linear`, whose sums have a closed form.

A right merge is W + Σ c·P with every c = 1: P are the adapters' own changes for `cat`, and for `linear`, which
multiplies sums of factors, the products of every B with every A. The c that fit the file best are told where they
explain it.
"""

from __future__ import annotations

import math

import torch

from runner.judge.case import Case
from runner.judge.diagnosis.sample import Reading, Sample, Suspect
from runner.judge.expected.combined import Part
from runner.judge.expected.recipe import LowRank
from runner.judge.numbers.tensors import read_tensor
from runner.protocol.verdict import Cause

SAME = 0.02  # a weight as near to the right one as this, of it, is the right one: rounding moves the fit


def read_combination(case: Case, suspect: Suspect, sample: Sample) -> Reading | None:
    """Return the reading "an adapter was left out" or "has another weight", or None."""
    if len(case.parts) < 2 or sample.base is None:
        return None
    flip = suspect.target.key.rpartition(".")[0] in case.blueprint.transposed
    products = _products(case, suspect, sample, flip=flip)
    basis = torch.stack([product.flatten() for product in products.values()], dim=1)
    fitted = torch.linalg.lstsq(basis, (sample.found - sample.base).flatten()[:, None]).solution.flatten()
    found = dict(zip(products, map(float, fitted), strict=True))
    weights = {number: found[number, number] for number in range(len(case.parts)) if (number, number) in found}
    if max(weights.values()) - min(weights.values()) <= SAME:
        return None  # all alike: a wrong scale, which is told apart
    told = {number: _snapped(weight) for number, weight in weights.items()}
    value = sample.base + sum(_share(told, pair) * product for pair, product in products.items())
    if not sample.explains(value) and not sample.explains(sample.base + (basis @ fitted).view(sample.base.shape)):
        return None
    return _reading(suspect, case.parts, told)


def _reading(suspect: Suspect, parts: tuple[Part, ...], told: dict[int, float]) -> Reading:
    lost = [number for number, weight in told.items() if weight == 0.0]
    if lost:
        names = ", ".join(f"adapter {number + 1} of {len(parts)}" for number in lost)
        note = f"The change of {names} is missing, the others' is there"
        return Reading(kind=Cause.PART_LEFT_OUT, tensor=suspect.name, note=note)
    wrong = [
        f"adapter {number + 1} of {len(parts)} has weight {weight * parts[number].weight:.3g} instead of "
        f"{parts[number].weight:.3g}"
        for number, weight in told.items()
        if weight != 1.0
    ]
    return Reading(kind=Cause.PART_REWEIGHTED, tensor=suspect.name, note="; ".join(wrong))


def _snapped(weight: float) -> float:
    for exact in (0.0, 1.0):
        if abs(weight - exact) <= SAME:
            return exact
    return float(f"{weight:.3g}")


def _share(told: dict[int, float], pair: tuple[int, int]) -> float:
    left, right = told[pair[0]], told[pair[1]]
    return left if pair[0] == pair[1] else math.copysign(math.sqrt(abs(left * right)), right)


def _products(case: Case, suspect: Suspect, sample: Sample, *, flip: bool) -> dict[tuple[int, int], torch.Tensor]:
    """Return (number of B's adapter, number of A's) → rows of the product with the weights of a right merge."""
    sides = {}
    for number, part in enumerate(case.parts):
        rule = part.recipe.rules.get(suspect.target.key)
        if isinstance(rule, LowRank):
            a, b = (read_tensor(part.recipe.root, part.recipe.tensors[name]).double() for name in (rule.a, rule.b))
            sides[number] = (b, a, part.weight * rule.scaling, rule.is_embedding or flip)
    made = {}
    for left, (b, _, share_of_b, turned) in sides.items():
        for right, (_, a, share_of_a, _) in sides.items():
            if left != right and not case.parts[left].crosses:
                continue
            root = math.copysign(math.sqrt(abs(share_of_b * share_of_a)), share_of_a)
            whole = root * ((b @ a).T if turned else b @ a)
            made[left, right] = whole[slice(*sample.rows)].reshape(sample.exact.shape)
    return made
