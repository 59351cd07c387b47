"""Stochastic rounding as the judge computes it: in float64, from the definition in `runner.protocol.rounding`.

Nothing here is the merge's: the draws are made by numpy on unsigned numbers, and the neighbours by division, not by
bits. A stored value x' is right if a right float32 computation can have led to it: rounding is monotonic for a given
draw r, so x' must lie between the roundings of E − noise and E + noise with that r. Where the seed is not known, r may
be anything in [0, 1): then x' must be a neighbour of E.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from runner.judge.numbers.tensors import round_to, ulp
from runner.protocol.rounding import Rounding

_WHOLE = 2.0**-30  # r is a multiple of 2^-24 below 1; the largest that is asked for where r is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """The draws of one stored tensor.

    Attributes:
        name: of the tensor, as it is stored; of a tie that is stored on both sides, that of the other one.
        seed: None where it is not known.
    """

    name: str
    seed: int | None

    def draws(self, start: int, count: int) -> torch.Tensor:
        """Return r of the elements `start` to `start + count`: float64 in [0, 1); ½ where the seed is not known."""
        if self.seed is None:
            return torch.full((count,), 0.5, dtype=torch.float64)
        key = np.frombuffer(hashlib.sha256(f"{self.seed}\n{self.name}".encode()).digest()[:8], dtype="<u8")[0]
        index = np.arange(start, start + count, dtype=np.uint64)
        z = key + (index // np.uint64(2) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        drawn = np.where(index % np.uint64(2) == 1, z >> np.uint64(32), z & np.uint64(0xFFFFFFFF))
        return torch.from_numpy((drawn >> np.uint64(8)).astype(np.float64) * 2.0**-24)

    def round(self, exact: torch.Tensor, dtype: str, start: int) -> torch.Tensor:
        """Return float64 `exact`, whose first element has the index `start`, in `dtype`."""
        drawn = self.draws(start, exact.numel()).view(exact.shape)
        return round_to(_neighbour(exact, drawn, dtype), dtype)

    def accepts(
        self, found: torch.Tensor, exact: torch.Tensor, noise: torch.Tensor, dtype: str, start: int
    ) -> torch.Tensor:
        """Return where `found` is what a computation within `noise` of `exact` is rounded to.

        Args:
            found: values, in any float dtype.
            exact: E, float64, of the same shape.
            noise: bound on a right computation's distance from E, broadcastable.
            dtype: of the output, as safetensors spells it.
            start: index of the first element in the tensor.
        """
        sums = (exact - noise, exact + noise)
        if self.seed is None:
            lowest, highest = torch.zeros_like(exact), torch.full_like(exact, 1 - _WHOLE)
            # Towards zero and away from it: which of the two is the smaller one depends on the sign.
            ends = [_neighbour(end, r, dtype) for end in sums for r in (lowest, highest)]
        else:
            drawn = self.draws(start, exact.numel()).view(exact.shape)
            ends = [_neighbour(end, drawn, dtype) for end in sums]
        stacked = torch.stack([round_to(end, dtype).double() for end in ends])
        value = found.double()
        return (value >= stacked.amin(dim=0)) & (value <= stacked.amax(dim=0))


def chance_of(rounding: Rounding, name: str, dtype: str) -> Chance | None:
    """Return the draws of the tensor stored as `name` in `dtype`, or None where it is rounded to the nearest."""
    return Chance(name=name, seed=rounding.seed) if rounding.is_stochastic and dtype in ("BF16", "F16") else None


def _neighbour(exact: torch.Tensor, drawn: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the neighbour in `dtype` that the draws choose, float64; what is not finite stays as it is."""
    unit = ulp(exact, dtype)
    magnitude = exact.abs() / unit
    whole = magnitude.floor()
    up = (magnitude - whole + drawn >= 1.0).double()
    return torch.where(torch.isfinite(exact), torch.copysign((whole + up) * unit, exact), exact)
