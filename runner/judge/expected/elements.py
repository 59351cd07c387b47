"""Storage: every stored element, read again from disk, is the exact sum E correctly rounded.

A touched element x' passes when its bits are those of round(E), or when it lies between the roundings of E − noise and
E + noise, with the bound of `runner.judge.expected.exact` on a right float32 computation: rounding is monotonic, so no
right computation is outside. Where E is a copy, nothing is computed, and only the bits of round(E) pass. The bits are
compared first; the bound is only computed for what differs. Where values are rounded by chance, round(E) is the
neighbour of E that the draw chooses, and the bound is `runner.judge.numbers.stochastic`'s. An untouched tensor must
have the base's very bytes, or, when another output dtype was asked for, the base's values rounded once. There is no
other tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.files.layout import TensorInfo
from runner.judge.expected.exact import Exact
from runner.judge.numbers.comparison import MAX_BAD_ROWS, Comparison, Deviation
from runner.judge.numbers.stochastic import Chance
from runner.judge.numbers.tensors import (
    FLOATS,
    read_bytes,
    read_rows,
    round_to,
    row_blocks,
    rows_of,
    same_bits,
    ulp,
)
from runner.protocol.verdict import ERROR_BIN_ULPS, ERROR_BINS

SAMPLE_ELEMENTS = 1 << 16  # of each tensor, for the histogram of rounding errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor and the folder that it is in."""

    root: Path
    info: TensorInfo

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows in the stored dtype."""
        return read_rows(self.root, self.info, start, stop)


RightBlocks = dict[tuple[str, int], tuple[torch.Tensor, Comparison]]


def compare_touched(
    found: Stored,
    exact: Exact,
    base: Stored | None,
    chance: Chance | None = None,
    right: RightBlocks | None = None,
) -> Comparison:
    """Return how the stored tensor `found` (BF16, F16 or F32) compares with E, block by block.

    Args:
        found: the merged tensor; must have E's shape.
        exact: E.
        base: W, for the size of the delta; None where the base has no tensor of that shape.
        chance: the draws, where values are rounded by chance.
        right: by (stored name, first row), blocks of this very E, W and dtype that were compared before without a
            violation; one with the same bits gets the same answer. New ones are put in. For judging many folders.

    Raises:
        BrokenCheckpoint: a file ends early.
    """
    result = Comparison(has_base=base is not None)
    for start, stop in row_blocks(exact.shape):
        stored = found.rows(start, stop)
        known = right.get((found.info.name, start)) if right is not None else None
        if known is not None and bool(same_bits(stored, known[0], found.info.dtype).all()):
            result.add(known[1])
            continue
        block = _compare_rows(found.info, exact, base, start, stored, chance)
        result.add(block)
        if right is not None and not block.violations and not block.new_non_finite:
            right[found.info.name, start] = (stored, block)
    return result


def _compare_rows(
    info: TensorInfo, exact: Exact, base: Stored | None, start: int, stored: torch.Tensor, chance: Chance | None
) -> Comparison:
    result = Comparison()
    stop = start + len(stored)
    wanted = exact.rows(start, stop)
    result.elements = wanted.numel()
    stored = stored.view(wanted.shape)
    result.gauge.look(stored)
    _compare_block(result, info, exact, start, wanted, stored, chance)
    if start == 0:
        _count_errors(result, info.dtype, wanted, stored)
    if base is not None:
        _measure_delta(result, wanted, stored, base.rows(start, stop).view(wanted.shape))
    return result


def compare_untouched(found: Stored, base: Stored) -> Comparison:
    """Return how a tensor that the adapter leaves alone compares with the base's.

    Same dtype: the bytes must be equal. Other dtype: the base's values, rounded once; only of and to BF16, F16 and F32.

    Raises:
        BrokenCheckpoint: a file ends early.
    """
    result = Comparison()
    for start, stop in row_blocks(base.info.shape):
        if found.info.dtype == base.info.dtype:
            left = read_bytes(found.root, found.info, start, stop)
            if left == read_bytes(base.root, base.info, start, stop):
                if found.info.dtype in FLOATS and left:
                    result.gauge.look(rows_of(left, found.info.dtype))
                continue
        _compare_cast(result, found, base, start, stop)
    return result


def same_exact(left: Exact, right: Exact) -> bool:
    """Return whether two exact weights are equal in every element."""
    if left.shape != right.shape:
        return False
    return all(bool(torch.equal(left.rows(*block), right.rows(*block))) for block in row_blocks(left.shape))


def is_right(
    found: torch.Tensor, exact: Exact, start: int, wanted: torch.Tensor, dtype: str, chance: Chance | None = None
) -> torch.Tensor:
    """Return where `found` is what a right float32 computation of E can be rounded to; NaN for NaN is.

    Args:
        found: values, in any float dtype.
        exact: E.
        start: the first row of the block.
        wanted: the block's rows of E, float64, of the shape of `found`.
        dtype: of the output, as safetensors spells it.
        chance: the draws, where values are rounded by chance.
    """
    return _hold_against(found, exact, start, wanted, dtype, chance)[0]


def _hold_against(
    found: torch.Tensor, exact: Exact, start: int, wanted: torch.Tensor, dtype: str, chance: Chance | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `is_right` of the same arguments, and the distance from E in units in the last place."""
    error = (found - wanted).abs_().div_(ulp(wanted, dtype))  # in float64, as E is
    noise = exact.noise(start, start + len(wanted), output_is_float32=dtype == "F32")
    if chance is None:
        right = (found >= round_to(wanted - noise, dtype)) & (found <= round_to(wanted + noise, dtype))
    else:
        right = chance.accepts(found, wanted, noise, dtype, first_index(wanted, start))
    return right | (torch.isnan(wanted) & torch.isnan(found)), error


def rounded_rows(wanted: torch.Tensor, start: int, dtype: str, chance: Chance | None) -> torch.Tensor:
    """Return rows of E from `start` on, rounded to `dtype` as the merge was asked to."""
    if chance is None:
        return round_to(wanted, dtype)
    return chance.round(wanted, dtype, first_index(wanted, start))


def first_index(rows: torch.Tensor, start: int) -> int:
    """Return the index in the whole tensor of the first element of `rows`, which begin at row `start`."""
    return start * rows[0].numel()


def _compare_block(  # noqa: PLR0917 (what there is to know of one block)
    result: Comparison,
    info: TensorInfo,
    exact: Exact,
    start: int,
    wanted: torch.Tensor,
    stored: torch.Tensor,
    chance: Chance | None,
) -> None:
    rounded = rounded_rows(wanted, start, info.dtype, chance)
    result.new_non_finite += int((~torch.isfinite(stored) & torch.isfinite(wanted)).sum())
    differs = ~same_bits(rounded, stored, info.dtype)
    if not bool(differs.any()):
        return
    right, distance = _hold_against(stored, exact, start, wanted, info.dtype, chance)
    if exact.is_copy and chance is None:  # not even the sign of a zero may change
        right = torch.isnan(wanted) & torch.isnan(stored)
    _record(result, info, start, _Block(bad=differs & ~right, expected=rounded, found=stored, ulps=distance))


def _compare_cast(result: Comparison, found: Stored, base: Stored, start: int, stop: int) -> None:
    source, stored = base.rows(start, stop), found.rows(start, stop)
    if base.info.dtype not in FLOATS:  # nothing is cast but floats, so both have the same dtype
        bad, distance = (_raw(source) != _raw(stored)).any(dim=-1), (source.double() - stored.double()).abs()
        _record(result, found.info, start, _Block(bad=bad, expected=source, found=stored, ulps=distance))
        return
    result.gauge.look(stored)
    if found.info.dtype == base.info.dtype:
        rounded = source  # by way of float64, a NaN may come back with other bits
        bad = ~same_bits(source, stored, found.info.dtype)
    else:
        rounded = round_to(source.double(), found.info.dtype)
        bad = ~(same_bits(rounded, stored, found.info.dtype) | (torch.isnan(rounded) & torch.isnan(stored)))
    result.new_non_finite += int((~torch.isfinite(stored) & torch.isfinite(source)).sum())
    distance = (stored.double() - source.double()).abs() / ulp(source.double(), found.info.dtype)
    _record(result, found.info, start, _Block(bad=bad, expected=rounded, found=stored, ulps=distance))


def _raw(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of each element, in one more dimension."""
    return values.contiguous().view(torch.uint8).view(*values.shape, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Rows of one comparison, all of one shape: where it failed, what was expected and found, how far apart in ulp."""

    bad: torch.Tensor
    expected: torch.Tensor
    found: torch.Tensor
    ulps: torch.Tensor


def _record(result: Comparison, info: TensorInfo, start: int, block: _Block) -> None:
    count = int(block.bad.sum())
    if not count:
        return
    result.violations += count
    rows = block.bad.reshape(len(block.bad), -1).any(dim=1).nonzero().flatten().tolist()
    result.bad_rows.extend(start + row for row in rows[: MAX_BAD_ROWS - len(result.bad_rows)])
    result.bad_row_count += len(rows)
    ulps = block.ulps.nan_to_num(nan=torch.inf)
    flat = int(ulps.masked_fill(~block.bad, -torch.inf).argmax())  # a flipped sign of zero is bad at distance 0
    distance = float(ulps.flatten()[flat])
    if result.worst is None or distance > result.worst.ulps:
        index = [int(i) for i in torch.unravel_index(torch.tensor(flat), ulps.shape)]
        index[0] += start
        result.worst = Deviation(
            tensor=info.name,
            index=tuple(index) if info.shape else (),
            expected=float(block.expected.flatten()[flat]),
            found=float(block.found.flatten()[flat]),
            ulps=distance,
        )


def _count_errors(result: Comparison, dtype: str, wanted: torch.Tensor, stored: torch.Tensor) -> None:
    step = max(1, wanted.numel() // SAMPLE_ELEMENTS)
    exact, found = wanted.flatten()[::step], stored.flatten()[::step].double()
    ulps = (found - exact).abs() / ulp(exact, dtype)
    bins = (ulps[torch.isfinite(ulps)] / ERROR_BIN_ULPS).clamp(max=ERROR_BINS - 1).to(torch.int64)
    result.errors = torch.bincount(bins, minlength=ERROR_BINS).tolist()


def _measure_delta(result: Comparison, wanted: torch.Tensor, stored: torch.Tensor, base: torch.Tensor) -> None:
    # Differences are taken in float64, where they are exact; float32 is enough for sums that are only reported.
    plain = base.to(stored.dtype)
    base = base.double()
    delta = (wanted - base).float().flatten()
    kept = stored.double().sub_(base).float().flatten()
    for sums in (delta, kept):  # rows of the base that are NaN say nothing of a change
        if not math.isfinite(float(torch.dot(sums, sums))):
            sums.nan_to_num_(0.0, 0.0, 0.0)
    result.gauge.measure(wanted, base, delta)
    result.changed += int(torch.count_nonzero((stored != plain) & ~(torch.isnan(stored) & torch.isnan(plain))))
    result.kept += float(torch.dot(kept, delta))
    result.delta_squared += float(torch.dot(delta, delta))
    result.moved_squared += float(torch.dot(kept, kept))
    base = base.float().flatten().nan_to_num_(0.0, 0.0, 0.0)
    result.base_squared += float(torch.dot(base, base))
