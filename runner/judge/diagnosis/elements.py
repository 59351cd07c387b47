"""Are only a few elements wrong? Flipped bits, NaN and Inf."""

from __future__ import annotations

import torch

from runner.judge.diagnosis.sample import Reading, Suspect, sample_rows
from runner.judge.numbers.tensors import FORMATS, round_to
from runner.protocol.verdict import Cause

FEW = 16
_INTEGERS = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}


def read_non_finite(suspect: Suspect) -> Reading | None:
    """Return the reading "NaN or Inf", or None."""
    count = suspect.comparison.new_non_finite
    if not count:
        return None
    note = f"{count} of {suspect.comparison.elements or 'its'} elements are NaN or Inf"
    if suspect.comparison.worst is not None and suspect.found.info.dtype == "F16":
        note += "; float16 ends at 65504"
    return Reading(kind=Cause.NON_FINITE, tensor=suspect.name, note=note)


def read_few(suspect: Suspect) -> Reading | None:
    """Return the reading "some bits are flipped", or "a few elements are off", or None."""
    count, rows = suspect.comparison.violations, suspect.comparison.bad_rows
    if not 0 < count <= FEW or len(rows) != suspect.comparison.bad_row_count:
        return None
    dtype = suspect.found.info.dtype
    bits: list[int] = []
    for row in rows:
        sample = sample_rows(suspect, row, row + 1)
        right = round_to(sample.exact, dtype).view(_INTEGERS[dtype])
        different = (right ^ sample.stored.view(_INTEGERS[dtype]))[sample.bad]
        bits += [int(value) & ((1 << 8 * sample.stored.element_size()) - 1) for value in different]
    if not bits or any(value & (value - 1) for value in bits):
        note = f"{count} elements are off, nothing else"
        return Reading(kind=Cause.FEW_ELEMENTS, tensor=suspect.name, note=note, is_certain=False)
    places = sorted({_place(value.bit_length() - 1, dtype) for value in bits})
    note = (
        f"{count} element{'s differ' if count > 1 else ' differs'} from the right one in one bit: {', '.join(places)}"
    )
    return Reading(kind=Cause.BIT_FLIP, tensor=suspect.name, note=note)


def _place(bit: int, dtype: str) -> str:
    fraction = FORMATS[dtype].fraction_bits
    size = 8 * torch.empty(0, dtype=_INTEGERS[dtype]).element_size()
    if bit == size - 1:
        return "the sign"
    return f"bit {bit} of the fraction" if bit < fraction else f"bit {bit - fraction} of the exponent"
