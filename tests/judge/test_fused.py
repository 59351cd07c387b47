"""E of stored tensors that parameters are computed from: the parameters' values and bounds, at the same elements."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runner.architecture.conversion import Conversion
from runner.architecture.names import map_names
from runner.files.layout import read_checkpoint
from runner.judge.expected.elements import Stored
from runner.judge.expected.exact import ExactFromPeft
from runner.judge.expected.fused import ExactConverted, ExactValue, Fused
from runner.judge.expected.recipe import Recipe
from tests.parity import models


def test_a_stored_expert_has_the_values_and_the_bounds_of_its_place_in_the_stack(tmp_path: Path) -> None:
    root = models.save_base(models.mixtral(), tmp_path / "base", dtype=torch.bfloat16)
    base = read_checkpoint(root)
    shapes = {name: info.shape for name, info in base.tensors.items()}
    conversion = Conversion(map_names(models.mixtral(), base.tensors), shapes, models.mixtral)
    generator = torch.Generator().manual_seed(1)
    state = models.mixtral().state_dict()
    made = {}
    for key in conversion.groups:
        value = torch.randn(state[key].shape, generator=generator, dtype=torch.float64)
        made[key] = ExactFromPeft(exact=value, single=value.float(), base=torch.zeros(value.shape))
    asked: list[str] = []
    plain = cast("Recipe", SimpleNamespace(stored={}))
    fused = Fused(conversion, plain, {}, lambda name: Stored(root=root, info=base.tensors[name]))

    def exact(key: str) -> ExactFromPeft:
        asked.append(key)
        return made[key]

    for group in dict.fromkeys(conversion.groups.values()):
        for name in group.sources:
            part = conversion.part(name)
            assert part is not None
            place: Any = (part.expert, slice(part.start, part.start + part.rows))
            found = fused.exact(Stored(root=root, info=base.tensors[name]), exact)
            whole = made[part.key]
            assert found.shape == shapes[name]
            assert torch.equal(found.rows(1, 5), whole.rows(0, 4)[place][1:5])
            for is_float32 in (False, True):
                bound = whole.noise(0, 4, output_is_float32=is_float32)[place]
                assert torch.equal(found.noise(1, 5, output_is_float32=is_float32), bound[1:5])
    assert sorted(asked) == sorted(conversion.groups)  # once for each parameter, not for each expert


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_values_of_any_shape_are_read_by_rows(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    rows = value.view(shape or (1,)).double()
    noises = (torch.full(shape, 2.0), torch.full(shape, 3.0))
    converted = ExactConverted(value.double(), noises)
    stop = len(rows)
    for exact in (converted, ExactValue(value)):
        assert exact.shape == shape
        assert torch.equal(exact.rows(0, stop), rows)
        assert torch.equal(exact.rows(stop - 1, stop), rows[-1:])
    for is_float32 in (False, True):
        bound = converted.noise(0, stop, output_is_float32=is_float32)
        assert torch.equal(bound, torch.full_like(rows, 3.0 if is_float32 else 2.0).float())
        assert float(ExactValue(value).noise(0, stop, output_is_float32=is_float32)) == 0.0
