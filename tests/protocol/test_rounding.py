"""Stochastic rounding: unbiased, a neighbour of the exact value, and the same bytes wherever blocks are cut."""

from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch

from runner.judge.numbers.stochastic import Chance
from runner.protocol.rounding import STOCHASTIC, Rounding
from runner.worker.merge.stochastic import Rounder

MASK = (1 << 64) - 1
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16"}


def _by_definition(value: float, *, seed: int, name: str, index: int, dtype: torch.dtype) -> float:
    """Return what `runner.protocol.rounding` says, in Python's own numbers."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8], "little")
    z = (key + (index // 2 + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    draw = (z >> 32) if index % 2 else z & 0xFFFFFFFF
    bits, smallest = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}[dtype]
    unit = 2.0 ** (max(math.frexp(value)[1] - 1, smallest) - bits)
    whole, part = divmod(abs(value) / unit, 1.0)
    return math.copysign((whole + (part + (draw >> 8) * 2.0**-24 >= 1)) * unit, value)


def _values(count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    scale = 2.0 ** torch.randint(-26 if dtype is torch.float16 else -120, 15, (count,), generator=generator)
    return torch.randn(count, generator=generator) * scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merge_and_the_judge_compute_what_the_definition_says(dtype: torch.dtype) -> None:
    exact = torch.cat([_values(997, dtype), torch.tensor([0.0, -0.0, 1.0, -(2.0**-14), 6e-8, -3e-8, 2.0**-130])])
    expected = torch.tensor(
        [
            _by_definition(value, seed=9, name="a.weight", index=number, dtype=dtype) if value else value
            for number, value in enumerate(exact.tolist())
        ]
    )

    ours = Rounder(Rounding(kind=STOCHASTIC, seed=9)).round(exact, dtype, "a.weight")
    judged = Chance(name="a.weight", seed=9).round(exact.double(), DTYPES[dtype], 0)

    assert torch.equal(ours.float(), expected)
    assert torch.equal(ours.view(torch.int16), judged.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_do_not_depend_on_the_blocks(dtype: torch.dtype) -> None:
    exact = _values(200_001, dtype)
    rounder = Rounder(Rounding(kind=STOCHASTIC, seed=1))
    whole = rounder.round(exact, dtype, "w")
    pieces = torch.empty_like(whole)
    for start, stop in ((0, 1), (1, 2), (2, 777), (777, 70_000), (70_000, 200_001)):
        rounder.into(pieces[start:stop], exact[start:stop], "w", start)

    assert torch.equal(whole.view(torch.int16), pieces.view(torch.int16))
    for other in (
        Rounder(Rounding(kind=STOCHASTIC, seed=2)).round(exact, dtype, "w"),
        rounder.round(exact, dtype, "v"),
    ):
        assert not torch.equal(whole, other)


def test_it_is_right_on_average_and_nearest_is_not() -> None:
    exact = torch.full((1 << 18,), 1.0 + 0.2 * 2**-7)
    mean = Rounder(Rounding(kind=STOCHASTIC, seed=0)).round(exact, torch.bfloat16, "w").double().mean()
    nearest = Rounder(Rounding()).round(exact, torch.bfloat16, "w").double().mean()

    # The share of elements that go up is 0.2, with a standard deviation of 8e-4.
    assert abs((float(mean) - 1) * 2**7 - 0.2) < 4e-3
    assert float(nearest) == 1.0


def test_neighbouring_draws_are_not_correlated() -> None:
    drawn = Chance(name="w", seed=3).draws(0, 1 << 18)
    for lag in (1, 2, 576):
        pairs = torch.stack([drawn[:-lag], drawn[lag:]])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.01
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    counts = torch.histc(drawn, bins=64, min=0, max=1)
    assert float(((counts - counts.mean()).square() / counts.mean()).sum()) < 120  # chi-squared, 63 degrees of freedom


def test_what_is_not_finite_and_what_fits_already_stays() -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, struct.unpack("<f", b"\xff\xff\xff\x7f")[0], 0.5, -3.0])
    for seed in range(20):
        for dtype in DTYPES:
            rounded = Rounder(Rounding(kind=STOCHASTIC, seed=seed)).round(special, dtype, "w").float()
            assert rounded[0] == math.inf
            assert rounded[1] == -math.inf
            assert rounded[2:4].isnan().all()
            assert rounded[4:].tolist() == [0.5, -3.0]
    kept = Rounder(Rounding(kind=STOCHASTIC, seed=0)).round(special[4:] + 1e-7, torch.float32, "w")
    assert torch.equal(kept, special[4:] + 1e-7)


def test_the_judge_takes_the_chosen_neighbour_and_no_other() -> None:
    exact = _values(4096, torch.bfloat16).double()
    chance = Chance(name="w", seed=4)
    right = chance.round(exact, "BF16", 0)
    noise = exact.abs() * 2.0**-24
    assert bool(chance.accepts(right, exact, noise, "BF16", 0).all())
    # The other neighbour, one unit in the last place away, is a violation; without the seed it is not.
    other = torch.where(right.double().abs() > exact.abs(), right.view(torch.int16) - 1, right.view(torch.int16) + 1)
    wrong = other.to(torch.int16).view(torch.bfloat16)
    away = (wrong.double() - exact).abs() > noise
    assert float(away.double().mean()) > 0.99
    assert float(chance.accepts(wrong, exact, noise, "BF16", 0)[away].double().mean()) < 1e-3
    unknown = Chance(name="w", seed=None)
    assert bool(unknown.accepts(right, exact, noise, "BF16", 0).all())
    assert bool(unknown.accepts(wrong, exact, noise, "BF16", 0)[away].all())
    beyond = (wrong.view(torch.int16) + torch.sign(wrong.double().abs() - exact.abs()).to(torch.int16)).view(
        torch.bfloat16
    )
    assert not bool(unknown.accepts(beyond, exact, noise, "BF16", 0)[away].any())
