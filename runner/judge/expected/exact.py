"""The exact merged weight E of one parameter, in float64, by row blocks.

`noise` bounds how far a *right* merge, computed in float32 and rounded once, may be from E before that rounding.
With u = 2^-24 (half an ulp of float32 in relative terms) and the standard bound for a dot product of r terms in any
order, fused or not:

    |fl(Σ b·a) − Σ b·a| <= r·u·Σ|b||a|      the product B·A, always
                        <= 8·√r·u·Σ|b||a|   with probability 1 − 2·exp(−32) per element (Higham and Mary, 2019)
    two more u·|s|·Σ|b||a|                  the scaling factor as float32, and the multiplication by it
    u·|E|                                   the sum W + Δ as float32, before it is rounded to 16 bits

so noise = u·((min(r, 8√r) + 2)·|s|·Σ|b||a| + |E|), and without the last term when the output itself is float32: there
it is the one rounding to the output, which `runner.judge.expected.elements` does itself. It scales with what was
accumulated, so it neither flags a right merge of high rank nor hides a wrong one: in 16 bits it is a small part of an
ulp. In float32 it is about one ulp at rank 16, and some ulp at rank 64 or where W and Δ cancel: a change of one element
by that much cannot be told from arithmetic.

Where nothing is computed (`is_copy`: a saved module, a norm that was trained, a base's tensor) there is no noise, and
round(E) is the only right value. The same goes for single elements that a method leaves alone, such as the rows of
other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from runner.files.layout import TensorInfo
from runner.judge.expected.recipe import LowRank
from runner.judge.numbers.tensors import read_rows, read_tensor, row_blocks, ulp

UNIT = 2.0**-24 * 1.001  # u, with room for its own second-order terms
ENOUGH_ELEMENTS = 1024  # to see the largest error of a method's arithmetic; with fewer, at least `FEWEST_UNITS`
FEWEST_UNITS = 8 * UNIT
ReadRows = Callable[[int, int], torch.Tensor]


class Exact(Protocol):
    """E of one parameter."""

    shape: tuple[int, ...]

    @property
    def is_copy(self) -> bool:
        """Whether E is stored somewhere as it is, so that a right merge computes nothing."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of E: float64, shape (stop - start, ...)."""
        ...

    def noise(self, start: int, stop: int, *, output_is_float32: bool) -> torch.Tensor:
        """Return the bound on a right float32 computation's distance from these rows: float64, broadcastable."""
        ...


class ExactLowRank:
    """E = W + s·B·A, with A and B in memory and W read as needed."""

    is_copy = False

    def __init__(self, *, base: ReadRows, shape: tuple[int, ...], a: torch.Tensor, b: torch.Tensor, scaling: float):
        """Take W's reader, W's shape, and A (rank, columns) and B (rows, rank) so that E = W + scaling·(B·A)."""
        self.shape = shape
        self._base = base
        self._a = a.double()
        self._b = b.double()
        self._scaling = scaling
        self._last: dict[tuple[int, int], torch.Tensor] = {}  # the block that `noise` is asked for next

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of E in float64; not to be changed in place."""
        made = torch.addmm(
            self._base(start, stop).double().view(stop - start, -1), self._b[start:stop], self._a, alpha=self._scaling
        )
        self._last = {(start, stop): made}
        return made

    def delta_of_rounded_factors(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of s·B·A with B and A rounded to `dtype` first, in float64: what a diagnosis compares with."""
        a, b = self._a.to(dtype).double(), self._b[start:stop].to(dtype).double()
        return self._scaling * (b @ a)

    def noise(self, start: int, stop: int, *, output_is_float32: bool) -> torch.Tensor:
        """Return the bound of the module's docstring."""
        rank = self._a.shape[0]
        bound = (min(rank, 8 * math.sqrt(rank)) + 2) * abs(self._scaling) * (self._b[start:stop].abs() @ self._a.abs())
        if not output_is_float32:
            last = self._last.get((start, stop))
            bound += (self.rows(start, stop) if last is None else last).abs()
        return UNIT * bound


class ExactShift:
    """E = W + s·v for a vector: a LoRA bias. Two float32 roundings before the last one: s, and its product."""

    is_copy = False

    def __init__(self, *, base: ReadRows, shape: tuple[int, ...], vector: torch.Tensor, scaling: float):
        """Take W's reader and shape, v of the same shape, and s."""
        self.shape = shape
        self._base = base
        self._delta = vector.double() * scaling

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of E in float64."""
        return self._base(start, stop).double() + self._delta[start:stop]

    def noise(self, start: int, stop: int, *, output_is_float32: bool) -> torch.Tensor:
        """Return the bound on those roundings."""
        bound = 2 * self._delta[start:stop].abs()
        if not output_is_float32:
            bound = bound + self.rows(start, stop).abs()
        return UNIT * bound


class ExactStored:
    """E is a stored tensor; rounding it is all that may happen."""

    is_copy = True

    def __init__(self, root: Path, tensor: TensorInfo):
        """Take the folder and the tensor in it."""
        self.shape = tensor.shape
        self._root = root
        self._tensor = tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of E in float64."""
        return read_rows(self._root, self._tensor, start, stop).double()

    def noise(self, start: int, stop: int, *, output_is_float32: bool) -> torch.Tensor:
        """Return zero."""
        return torch.zeros((), dtype=torch.float64)


class ExactFromPeft:
    """E as PEFT's own layer merges it in float64, beside the same merge in float32.

    There is no closed form to derive a bound from, so the noise is measured: the distance of PEFT's float32 merge
    (the reference of a right merge) from its float64 merge, four times, plus a floor. To 16 bits the floor is
    2^-21·(|W| + |E|), 1/16384 of a bf16 ulp. When the output is float32, it is what another order of PEFT's own
    operations (more threads, another processor) can cause:

    - the last rounding is the output's own, so of each distance only what is above half an ulp counts: excess. A method
      whose merge is one multiplication (IA3) has none;
    - max over the tensor of excess / (|Δ| + rms Δ) is how many units the method's arithmetic was off by here, relative
      to the change that it computes. Another order draws from the same distribution; twice that is allowed;
    - never more than 2^-22·(|W| + |E|), two to four float32 ulp: a chain of roundings of W and E themselves, as in DoRA
      and rotations.

    Where float64 and float32 agree in every element, nothing was computed: a copy. Where both are W, the element is
    untouched, and has no noise either.
    """

    def __init__(self, *, exact: torch.Tensor, single: torch.Tensor, base: torch.Tensor):
        """Take the merge in float64 and float32, and the base, all of one shape."""
        self.shape = tuple(exact.shape)
        self._exact = exact
        self._single = single
        self._base = base

    @cached_property
    def is_copy(self) -> bool:
        """Whether float64 and float32 agree in every element."""
        single = self._single.view(self.shape or (1,))
        return all(bool((single[slice(*block)] == self.rows(*block)).all()) for block in row_blocks(self.shape))

    @cached_property
    def _units(self) -> tuple[float, float]:
        """Return (largest excess / (|Δ| + rms Δ), rms Δ); (inf, 0.0) where nothing changes and yet is computed."""
        typical = math.sqrt(sum(float(self._change(*block).square().sum()) for block in row_blocks(self.shape)))
        typical /= math.sqrt(max(1, self._exact.numel()))
        if not 0 < typical < math.inf:
            return math.inf, 0.0
        worst = max(
            float((self._excess(*block) / (self._change(*block).abs() + typical)).max())
            for block in row_blocks(self.shape)
        )
        return max(worst, FEWEST_UNITS if self._exact.numel() < ENOUGH_ELEMENTS else 0.0), typical

    def _change(self, start: int, stop: int) -> torch.Tensor:
        return self.rows(start, stop) - self._base.view(self.shape or (1,))[start:stop].double()

    def _excess(self, start: int, stop: int) -> torch.Tensor:
        exact = self.rows(start, stop)
        single = self._single.view(self.shape or (1,))[start:stop].double()
        return ((single - exact).abs() - 0.5 * ulp(exact, "F32")).clamp(min=0.0)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of E in float64."""
        return self._exact.view(self.shape or (1,))[start:stop]

    def noise(self, start: int, stop: int, *, output_is_float32: bool) -> torch.Tensor:
        """Return the measured bound."""
        exact = self.rows(start, stop)
        single = self._single.view(self.shape or (1,))[start:stop].double()
        base = self._base.view(self.shape or (1,))[start:stop].double()
        if self.is_copy:
            return torch.zeros((), dtype=torch.float64)
        if not output_is_float32:
            return 4 * (single - exact).abs() + 2.0**-21 * (base.abs() + exact.abs())
        floor = 2.0**-22 * (base.abs() + exact.abs())
        units, typical = self._units
        if math.isfinite(units):
            floor = torch.minimum(floor, 2 * units * ((exact - base).abs() + typical))
        is_untouched = (exact == base) & (single == base)
        return (4 * self._excess(start, stop) + floor).masked_fill(is_untouched, 0.0)


def low_rank(
    rule: LowRank, *, adapter: Path, tensors: dict[str, TensorInfo], base: ReadRows, shape: tuple[int, ...], flip: bool
) -> ExactLowRank:
    """Return E of a LoRA rule.

    Args:
        rule: which adapter tensors, which factor.
        adapter: the adapter's folder.
        tensors: its tensors by name.
        base: reads rows of W.
        shape: of W.
        flip: whether W is stored as (in, out), as Conv1D does.
    """
    a, b = read_tensor(adapter, tensors[rule.a]), read_tensor(adapter, tensors[rule.b])
    if rule.is_embedding or flip:  # (B·A)ᵀ = Aᵀ·Bᵀ
        a, b = b.T.contiguous(), a.T.contiguous()
    return ExactLowRank(base=base, shape=shape, a=a, b=b, scaling=rule.scaling)
