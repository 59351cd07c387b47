"""A suspect: a tensor that failed the storage layer, and a block of its rows beside what they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runner.judge.expected.elements import Stored, is_right, rounded_rows
from runner.judge.expected.exact import Exact
from runner.judge.expected.recipe import Rule
from runner.judge.expected.targets import Target
from runner.judge.numbers.comparison import Comparison
from runner.judge.numbers.stochastic import Chance
from runner.judge.numbers.tensors import round_to, row_count, same_bits, ulp
from runner.protocol.verdict import Cause

SAMPLE_ELEMENTS = 1 << 17
NEARLY_ALL = 0.998  # of the sample; what is missing are ties that a float32 computation rounds the other way


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A tensor on disk that is not what it must be.

    Attributes:
        target: as it must be.
        found: on disk.
        exact: E.
        comparison: of the two.
        chance: the draws, where values are rounded by chance.
        rule: the adapter's closed form for it, where it has one.
    """

    target: Target
    found: Stored
    exact: Exact
    comparison: Comparison
    chance: Chance | None
    rule: Rule | None

    @property
    def name(self) -> str:
        """Its stored name."""
        return self.target.stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One way to explain one suspect.

    Attributes:
        kind: which deviation.
        tensor: stored name of the suspect.
        note: what was seen; the same text for tensors that tell the same.
        is_certain: see `Diagnosis`.
        factor: the interval that the adapter's factor must lie in, relative to the right one.
    """

    kind: Cause
    tensor: str
    note: str
    is_certain: bool = True
    factor: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some rows of a suspect; matrices of one shape (rows, width), float64 but for `stored`.

    Attributes:
        rows: the first row and the one behind the last.
        dtype: of the file, as safetensors spells it.
        stored: W', as it is on disk.
        found: W'.
        exact: E.
        base: W; None where the base has no tensor of that shape.
        noise: how far a right float32 computation may be from E.
        bad: where W' is wrong.
    """

    rows: tuple[int, int]
    dtype: str
    stored: torch.Tensor
    found: torch.Tensor
    exact: torch.Tensor
    base: torch.Tensor | None
    noise: torch.Tensor
    bad: torch.Tensor

    @property
    def delta(self) -> torch.Tensor:
        """E − W."""
        return self.exact - self.base if self.base is not None else torch.zeros_like(self.exact)

    def fits(self, value: torch.Tensor, steps: int = 1) -> torch.Tensor:
        """Return where W' is `value`, after so many float32 computations and roundings to the file's dtype."""
        room = 0.5 * ulp(value, self.dtype) + self.noise
        if steps > 1:
            room = room + (steps - 1) * (ulp(self.exact, self.dtype) + 2 * self.noise)
        return (self.found - value).abs() <= room * (1 + 2.0**-20)

    def explains(self, value: torch.Tensor, steps: int = 1) -> bool:
        """Return whether `value` explains nearly all of the sample, and nearly all of what is wrong in it."""
        fits = self.fits(value, steps)
        return share(fits) >= NEARLY_ALL and share(fits[self.bad]) >= 0.98

    def is_rounding_of(self, value: torch.Tensor) -> bool:
        """Return whether the sample has the very bits of `value` in the file's dtype."""
        same = same_bits(round_to(value, self.dtype), self.stored, self.dtype)
        return share(same) >= NEARLY_ALL and share(same[self.bad]) >= 0.98


def share(mask: torch.Tensor) -> float:
    """Return the share of a mask that is true; 0.0 of an empty one."""
    return float(mask.double().mean()) if mask.numel() else 0.0


def take_sample(suspect: Suspect) -> Sample | None:
    """Return rows of the suspect from its first wrong one on; None where the shape is not that of E, or it is empty."""
    shape = suspect.exact.shape
    if suspect.found.info.shape != shape or 0 in shape:
        return None
    rows = row_count(shape)
    width = max(1, math.prod(shape[1:]))
    step = min(rows, max(1, SAMPLE_ELEMENTS // width))
    first = suspect.comparison.bad_rows[0] if suspect.comparison.bad_rows else 0
    start = max(0, min(first, rows - step))
    return sample_rows(suspect, start, start + step)


def sample_rows(suspect: Suspect, start: int, stop: int) -> Sample:
    """Return these rows of the suspect."""
    dtype, size = suspect.found.info.dtype, (stop - start, -1)
    exact = suspect.exact.rows(start, stop)
    stored = suspect.found.rows(start, stop).view(exact.shape)
    base = suspect.target.same_shape_base
    same = same_bits(rounded_rows(exact, start, dtype, suspect.chance), stored, dtype)
    right = same | is_right(stored, suspect.exact, start, exact, dtype, suspect.chance)
    noise = suspect.exact.noise(start, stop, output_is_float32=dtype == "F32").expand(exact.shape)
    if suspect.chance is not None:  # floor or ceiling: up to a whole unit away
        noise = noise + 0.5 * ulp(exact, dtype)
    return Sample(
        rows=(start, stop),
        dtype=dtype,
        stored=stored.view(size),
        found=stored.double().view(size),
        exact=exact.view(size),
        base=base.rows(start, stop).double().view(size) if base is not None else None,
        noise=noise.reshape(size),
        bad=~right.view(size),
    )


def single_rows(suspect: Suspect, rows: Sequence[int]) -> torch.Tensor:
    """Return rows of W' as a float64 matrix (rows, width)."""
    return torch.cat([suspect.found.rows(row, row + 1).double().reshape(1, -1) for row in rows])
