"""Rounding float32 to the output dtype, as `runner.protocol.rounding` defines it, block by block and in place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch

from runner.protocol.rounding import Rounding

_GOLDEN, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's fraction, for normal numbers
_SMALLEST_NORMAL_F16 = 2.0**-14
_BLOCK_ELEMENTS = 1 << 16  # draws and sums stay in the second-level cache


class Rounder:
    """Rounds blocks of tensors, wherever the blocks are cut."""

    def __init__(self, rounding: Rounding, twins: Mapping[str, str] | None = None) -> None:
        """Take `twins`: stored name → the name whose draws it takes, where it is not its own."""
        self._rounding = rounding
        self._twins = twins or {}
        self._key = ("", 0)

    def round(self, exact: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        """Return the whole float32 tensor `exact`, which will be stored as `name`, in `dtype`."""
        if not self._rounding.is_stochastic:
            return exact.to(dtype)
        rounded = torch.empty(exact.shape, dtype=dtype)
        self.into(rounded, exact.contiguous(), name, 0)
        return rounded

    def into(self, rounded: torch.Tensor, exact: torch.Tensor, name: str, start: int) -> None:
        """Round `exact` into `rounded`.

        Args:
            rounded: the output, contiguous, of the output dtype.
            exact: as many elements in float32, contiguous.
            name: of the stored tensor.
            start: index of the first element in that tensor.
        """
        if not self._rounding.is_stochastic or rounded.dtype not in _DROPPED_BITS or exact.dtype is not torch.float32:
            rounded.copy_(exact)
            return
        target, source = rounded.view(-1), exact.view(-1)
        for first in range(0, source.numel(), _BLOCK_ELEMENTS):
            part = slice(first, min(first + _BLOCK_ELEMENTS, source.numel()))
            drawn = _draws(self._key_of(name), start + first, part.stop - first)
            target[part].copy_(_to_neighbour(source[part], drawn, rounded.dtype))

    def _key_of(self, name: str) -> int:
        if self._key[0] != name:
            digest = hashlib.sha256(f"{self._rounding.seed}\n{self._twins.get(name, name)}".encode()).digest()
            self._key = (name, int.from_bytes(digest[:8], "little", signed=True))
        return self._key[1]


def _draws(key: int, start: int, count: int) -> torch.Tensor:
    """Return the draws of elements `start` to `start + count`: int32, as bits."""
    first, last = start // 2, (start + count + 1) // 2
    mixed = torch.arange(first + 1, last + 1, dtype=torch.int64).mul_(_GOLDEN).add_(key)
    mixed = _shifted_in(mixed, 30).mul_(_FIRST)
    mixed = _shifted_in(mixed, 27).mul_(_SECOND)
    return _shifted_in(mixed, 31).view(torch.int32)[start - 2 * first :][:count]


def _shifted_in(bits: torch.Tensor, by: int) -> torch.Tensor:
    # torch shifts signed numbers with their sign; the mask makes a shift of unsigned ones of it.
    return bits.bitwise_xor_((bits >> by).bitwise_and_((1 << (64 - by)) - 1))


def _to_neighbour(exact: torch.Tensor, drawn: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 values of `dtype`: of the two neighbours of each element the one that its draw chooses."""
    dropped = _DROPPED_BITS[dtype]
    mask = (1 << dropped) - 1
    # Adding the draw's first bits below the last place carries into it exactly where fraction + draw >= 1.
    bits = ((drawn >> (32 - dropped)).bitwise_and_(mask)).add_(exact.view(torch.int32)).bitwise_and_(~mask)
    result = bits.view(torch.float32)
    if dtype is torch.float16:
        small = exact.abs() < _SMALLEST_NORMAL_F16
        if bool(small.any()):
            result[small] = _to_subnormal(exact[small], drawn[small])
    odd = torch.isnan(exact)
    if bool(odd.any()):
        result[odd] = math.nan
    return result


def _to_subnormal(exact: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Return the same below float16's normal numbers, where the last place is 2^-24 everywhere."""
    units = exact.abs() * 2.0**24
    whole = units.floor()
    chance = ((drawn >> 8).bitwise_and_((1 << 24) - 1)).float() * 2.0**-24
    whole += (units - whole >= 1.0 - chance).float()
    return torch.copysign(whole * 2.0**-24, exact)
