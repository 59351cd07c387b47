"""What may be on disk where values are rounded by chance: with the seed one neighbour of E, without it both."""

from __future__ import annotations

import pytest
import torch

from runner.judge.numbers.stochastic import Chance, chance_of
from runner.judge.numbers.tensors import ulp
from runner.protocol.rounding import STOCHASTIC, Rounding

KNOWN, UNKNOWN = Chance(name="w", seed=8), Chance(name="w", seed=None)


def _steps(values: torch.Tensor, exact: torch.Tensor, noise: float, chance: Chance) -> list[set[int]]:
    """Return for each of `values` how many units off it a right value may be, of E and a noise in such units."""
    unit = ulp(values, "BF16")
    found: list[set[int]] = [set() for _ in values]
    for step in range(-3, 4):
        accepted = chance.accepts((values + step * unit).bfloat16(), exact, noise * unit, "BF16", 0)
        for place in accepted.nonzero().flatten().tolist():
            found[place].add(step)
    return found


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "part, noise, steps",
    [
        (0.0, 0.0, {0}),  # nothing to round
        (0.1, 0.0, {0, 1}),
        (0.9, 0.0, {0, 1}),
        (0.1, 0.05, {0, 1}),
        (0.1, 0.2, {-1, 0, 1}),  # E may be below the number
        (0.9, 0.2, {0, 1, 2}),  # or beyond the next one
        (0.0, 0.2, {-1, 0, 1}),
    ],
)
def test_without_its_seed_what_is_next_to_a_possible_sum_is_right(
    sign: int, part: float, noise: float, steps: set[int]
) -> None:
    values = sign * torch.tensor([1.5, 3.0, 0.0078125 * 1.25], dtype=torch.float64)
    exact = values + sign * part * ulp(values, "BF16")
    assert _steps(values, exact, noise, UNKNOWN) == [{sign * step for step in steps}] * 3


@pytest.mark.parametrize("off, goes_up", [(-0.01, 0), (0.01, 1)])  # how far E is from where the draw turns, in units
@pytest.mark.parametrize("noise, is_open", [(0.0, False), (0.005, False), (0.02, True)])
def test_with_its_seed_a_number_is_right_that_a_possible_sum_is_drawn_to(
    off: float, goes_up: int, noise: float, is_open: bool
) -> None:
    values = torch.full((64,), 1.5, dtype=torch.float64)
    part = 1 - KNOWN.draws(0, 64) + off
    found = _steps(values, values + part * ulp(values, "BF16"), noise, KNOWN)
    inside = ((part > 0.02) & (part < 0.98)).nonzero().flatten().tolist()
    assert len(inside) > 50
    assert [found[place] for place in inside] == [{0, 1} if is_open else {goes_up}] * len(inside)


def test_a_sum_of_exactly_one_goes_up() -> None:
    values = torch.full((64,), -1.5, dtype=torch.float64)
    unit, drawn = ulp(values, "BF16"), KNOWN.draws(0, 64)
    assert torch.equal(KNOWN.round(values - (1 - drawn) * unit, "BF16", 0).double(), values - unit)


def test_without_its_seed_rounding_is_to_the_nearest() -> None:
    values = torch.tensor([1.5, -1.5, 3.0], dtype=torch.float64)
    unit = ulp(values, "BF16")
    assert UNKNOWN.draws(3, 2).tolist() == [0.5, 0.5]
    assert torch.equal(UNKNOWN.round(values, "BF16", 0).double(), values)
    assert torch.equal(UNKNOWN.round(values + 0.4 * unit, "BF16", 0).double(), values)
    assert torch.equal(UNKNOWN.round(values + 0.6 * unit, "BF16", 0).double(), values + unit)


def test_what_is_not_finite_is_right_only_as_it_is() -> None:
    exact = torch.tensor([torch.inf, -torch.inf, 1.0], dtype=torch.float64)
    noise = torch.zeros((), dtype=torch.float64)
    for chance in (KNOWN, UNKNOWN):
        assert chance.accepts(exact.bfloat16(), exact, noise, "BF16", 0).tolist() == [True] * 3
        assert chance.accepts(-exact.bfloat16(), exact, noise, "BF16", 0).tolist() == [False] * 3


@pytest.mark.parametrize("dtype, is_drawn", [("BF16", True), ("F16", True), ("F32", False), ("I8", False)])
def test_only_16_bits_are_rounded_by_chance(dtype: str, is_drawn: bool) -> None:
    by_chance = Rounding(kind=STOCHASTIC, seed=8)
    assert chance_of(by_chance, "w", dtype) == (KNOWN if is_drawn else None)
    assert chance_of(Rounding(), "w", dtype) is None
