"""The probes of parameters that PEFT changes in place: stacks of experts of a few elements, and exact errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from runner.judge.expected.experts import wrappers
from runner.judge.semantics import LIMIT, Probe
from tests.judge.units import NAME, RIGHT, error_of, probe_of, unit_of


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class _Experts(nn.Module):
    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)


def _experts(up: torch.Tensor, down: torch.Tensor | None = None, **fields: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a unit whose parameters PEFT changes, stacks of one matrix for each expert, and E of each."""
    down = torch.zeros_like(up) if down is None else down
    unit = unit_of(
        _Experts(up, down), target_modules=[], target_parameters=[f"{NAME}.up", f"{NAME}.down"], **fields
    )  # fmt: skip
    exact: dict[str, Any] = {}
    for name, wrapper, _ in wrappers(unit):
        left, right, scaling = wrapper.get_delta_factors("default")
        exact[name] = wrapper.get_param().detach().double() + scaling * (left.double() @ right.double())
    assert exact.keys() == {"up", "down"}
    return unit, exact


def test_the_worst_parameter_that_peft_changes_in_place_is_named() -> None:
    unit, exact = _experts(torch.randn(2, 3, 4), torch.randn(2, 4, 3))
    assert error_of(unit, **exact) <= RIGHT
    for name in exact:
        wrong = exact | {name: exact[name].flip(0)}  # each expert is the other
        found = probe_of(unit, **wrong)
        assert found.error is not None
        assert found.error > 0.1
        assert found.detail == f"The parameter is inner.{name}."


def test_a_factor_of_an_experts_change_is_its_error() -> None:
    up = torch.randn(2, 3, 4)
    unit, exact = _experts(up, torch.randn(2, 4, 3))
    wrong = exact | {"up": up.double() + 1.02 * (exact["up"] - up.double())}
    assert error_of(unit, **wrong) == pytest.approx(0.02, rel=1e-6)
    wrong = exact | {"up": up.double() + (exact["up"] - up.double()).roll(1, dims=2)}  # inputs change places
    assert error_of(unit, **wrong) > 0.1


def test_an_expert_that_nothing_changes_is_held_against_its_matrices() -> None:
    # Four probes of ±1 on matrices of one element: ‖Mx‖ = 2·√(3² + 4²), and one that is off by d is 2·d away.
    up = torch.tensor([3.0, 4.0]).view(2, 1, 1)
    unit, exact = _experts(up, up.clone(), r=1, init_lora_weights=True)
    assert probe_of(unit, **exact) == Probe(module=NAME, error=0.0)
    for off in (0.5, 2.0**-30):
        wrong = exact | {"up": exact["up"] + torch.tensor([0.0, off]).view(2, 1, 1)}
        assert error_of(unit, **wrong) == pytest.approx(2 * off / (1e-8 * 10.0), rel=1e-12)


@pytest.mark.parametrize("off", [0.25, 0.5])
def test_experts_of_zeros_have_no_error_or_an_infinite_one(off: float) -> None:
    unit, exact = _experts(torch.zeros(2, 1, 1), r=1, init_lora_weights=True)
    assert probe_of(unit, **exact) == Probe(module=NAME, error=0.0)
    assert error_of(unit, **(exact | {"down": torch.tensor([0.0, off]).view(2, 1, 1)})) == math.inf


def test_an_expert_that_is_no_number_is_no_small_error() -> None:
    unit, exact = _experts(torch.randn(2, 3, 4), torch.randn(2, 4, 3))
    assert not error_of(unit, **(exact | {"up": exact["up"] * torch.nan})) <= LIMIT
