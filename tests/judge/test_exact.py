"""E and the bound on a right computation of it, against the formulas written once more."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.files.layout import SINGLE_FILE, read_checkpoint
from runner.judge.expected.exact import ExactFromPeft, ExactLowRank, ExactShift, low_rank
from runner.judge.expected.recipe import LowRank
from runner.judge.numbers.tensors import ulp

U = 2.0**-24


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, rtol=2e-3, atol=0.0)  # the room in the unit for second-order terms


@pytest.mark.parametrize("rank, grows", [(1, 3), (16, 18), (64, 66), (100, 82)])  # min(r, 8·√r) + 2
@pytest.mark.parametrize("is_float32", [False, True])
def test_the_bound_of_low_rank(rank: int, grows: int, is_float32: bool) -> None:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, 5, generator=generator)
    b = torch.randn(7, rank, generator=generator)
    base = torch.randn(7, 5, generator=generator).bfloat16()
    exact = ExactLowRank(base=lambda start, stop: base[start:stop], shape=(7, 5), a=a, b=b, scaling=-0.75)
    rows = base.double() - 0.75 * (b.double() @ a.double())
    bound = grows * 0.75 * (b.double().abs() @ a.double().abs())
    wanted = U * (bound if is_float32 else bound + rows.abs())

    for start, stop in ((0, 7), (2, 6)):
        before = exact.noise(start, stop, output_is_float32=is_float32)  # also of a block that was not asked for
        assert torch.allclose(exact.rows(start, stop), rows[start:stop])
        for bound in (before, exact.noise(start, stop, output_is_float32=is_float32)):
            assert bound.shape == (stop - start, 5)
            assert _close(bound, wanted[start:stop])
        exact.rows(0, 1)  # another block than the one that `noise` is asked for next


def test_factors_that_were_rounded_first() -> None:
    a, b = torch.full((2, 3), 1.0 + 2.0**-10), torch.full((4, 2), 3.0)
    exact = ExactLowRank(base=lambda start, stop: torch.zeros(stop - start, 3), shape=(4, 3), a=a, b=b, scaling=0.5)

    assert exact.delta_of_rounded_factors(1, 3, torch.bfloat16).tolist() == [[3.0] * 3] * 2
    assert exact.delta_of_rounded_factors(0, 1, torch.float32).tolist() == [[3.0 * (1.0 + 2.0**-10)] * 3]


@pytest.mark.parametrize("is_float32", [False, True])
def test_the_bound_of_a_bias(is_float32: bool) -> None:
    base, vector = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.25, -4.0])
    exact = ExactShift(base=lambda start, stop: base[start:stop], shape=(3,), vector=vector, scaling=3.0)

    assert exact.rows(1, 3).tolist() == [-1.25, -9.0]
    sizes = torch.tensor([0.0, 0.0] if is_float32 else [1.25, 9.0], dtype=torch.float64)
    wanted = 2 * 3 * vector[1:].double().abs() + sizes
    assert _close(exact.noise(1, 3, output_is_float32=is_float32), U * wanted)


@pytest.mark.parametrize("shape", [(3, 2), (6,), ()])
def test_the_bound_of_what_peft_merges_is_measured(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    base = torch.arange(1.0, count + 1).view(shape)
    exact = (base.double() + 0.1).view(shape)
    single = (exact + 1e-3).float()
    made = ExactFromPeft(exact=exact, single=single, base=base)
    rows, stop = exact.view(shape or (1,)), shape[0] if shape else 1
    wanted = 4 * (single.double() - exact).abs().view(rows.shape)
    wanted += 2.0**-21 * (base.double().abs() + exact).view(rows.shape)

    for start in range(stop):
        assert torch.equal(made.rows(start, stop), rows[start:])
        assert torch.equal(made.noise(start, stop, output_is_float32=False), wanted[start:])


def _of_peft(base: torch.Tensor, exact: torch.Tensor, single: torch.Tensor) -> tuple[ExactFromPeft, torch.Tensor]:
    made = ExactFromPeft(exact=exact, single=single, base=base)
    return made, made.noise(0, len(exact), output_is_float32=True)


def test_the_bound_in_float32_is_what_the_method_was_off_by_twice_over() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(64, 64, generator=generator) + 4
    delta = 1e-3 * torch.randn(64, 64, generator=generator, dtype=torch.float64)
    exact, wrong = base.double() + delta, torch.zeros(64, 64, dtype=torch.float64)
    wrong[5, 7] = 3 * ulp(exact[5, 7], "F32")
    made, noise = _of_peft(base, exact, (exact + wrong).float())

    single = (exact + wrong).float().double()
    excess = ((single - exact).abs() - 0.5 * ulp(exact, "F32")).clamp(min=0)
    assert int((excess > 0).sum()) == 1
    typical = delta.square().mean().sqrt()
    units = float(excess[5, 7] / (delta[5, 7].abs() + typical))
    floor = torch.minimum(2.0**-22 * (base.double().abs() + exact.abs()), 2 * units * (delta.abs() + typical))
    assert _close(noise, 4 * excess + floor)
    assert not made.is_copy


def test_one_multiplication_is_rounded_once_and_no_more() -> None:
    generator = torch.Generator().manual_seed(4)
    base, factor = torch.randn(64, 64, generator=generator), 1 + torch.rand(64, generator=generator)
    _, noise = _of_peft(base, base.double() * factor.double(), base * factor)
    assert not bool(noise.any())


def test_a_few_elements_are_not_enough_to_see_the_largest_error() -> None:
    base = torch.tensor([1.0, 2.0])
    exact = base.double() + torch.tensor([0.1, 0.3], dtype=torch.float64)
    _, noise = _of_peft(base, exact, exact.float())
    typical = (exact - base).square().mean().sqrt()
    assert _close(noise, 16 * U * ((exact - base).abs() + typical))


def test_a_copy_and_what_is_left_alone_have_no_noise() -> None:
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    copied = torch.tensor([[1.5, 2.5], [0.1, 0.7]])
    made, noise = _of_peft(base, copied.double(), copied)
    assert made.is_copy
    assert not bool(noise.any())
    assert not bool(made.noise(0, 2, output_is_float32=False).any())
    moved = base.double() + torch.tensor([[0.0, 0.0], [0.1, 0.7]], dtype=torch.float64)
    made, noise = _of_peft(base, moved, moved.float())
    assert not made.is_copy
    assert (noise > 0).tolist() == [[False, False], [True, True]]
    odd = torch.tensor([[1.0, 2.0], [3.0, 4.0000005]])  # float32 computes what float64 does not: nothing is a copy
    _, noise = _of_peft(base, base.double(), odd)
    assert bool(noise[1, 1] > 0)


@pytest.mark.parametrize("is_embedding, flip", [(False, False), (True, False), (False, True)])
def test_the_product_lies_as_the_weight_does(tmp_path: Path, is_embedding: bool, flip: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(7, 2, generator=generator)
    save_file({"a": a, "b": b}, tmp_path / SINGLE_FILE)
    product = (b.double() @ a.double()).T if is_embedding or flip else b.double() @ a.double()
    shape = (int(product.shape[0]), int(product.shape[1]))
    base = torch.randn(shape, generator=generator)

    exact = low_rank(
        LowRank(a="a", b="b", scaling=1.5, rank=2, is_embedding=is_embedding, replaced_base=None),
        adapter=tmp_path, tensors=dict(read_checkpoint(tmp_path).tensors), shape=shape, flip=flip,
        base=lambda start, stop: base[start:stop],
    )  # fmt: skip

    assert exact.shape == shape
    assert torch.allclose(exact.rows(1, 4), (base.double() + 1.5 * product)[1:4], rtol=1e-14)
