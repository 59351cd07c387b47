"""Was the change added to a quantised base, or was the sum quantised? Common quantisers are run and compared.

int8 by rows (absmax/127), int4 in groups (symmetric, and between minimum and maximum), NF4 in blocks of 64, fp8 (e4m3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from runner.judge.diagnosis.sample import Reading, Sample, Suspect, share
from runner.judge.numbers.tensors import ulp
from runner.protocol.verdict import Cause

ENOUGH = 0.97  # of the sample must lie on the grid
Quantiser = Callable[[torch.Tensor], torch.Tensor]


def read_quantised(suspect: Suspect, sample: Sample) -> Reading | None:
    """Return the reading "the base was quantised", or None."""
    base = sample.base
    if base is None or sample.exact.shape[-1] < 32:
        return None
    for name, quantise in quantisers(base.shape[-1]):
        plain = quantise(base)
        for start in (plain, plain.bfloat16().double()):
            if _lies_on(sample, start + sample.delta):
                note = f"W′ − ΔW is the base after {name}"
                return Reading(kind=Cause.QUANTISED_BASE, tensor=suspect.name, note=note)
        if _lies_on(sample, quantise(sample.exact)):
            note = f"W′ is the exact sum after {name}"
            return Reading(kind=Cause.QUANTISED_BASE, tensor=suspect.name, note=note)
    return _read_levels(suspect, sample)


def _lies_on(sample: Sample, value: torch.Tensor) -> bool:
    room = 0.75 * ulp(value, sample.dtype) + 2.0**-20 * value.abs() + 4 * sample.noise
    return share((sample.found - value).abs() <= room) >= ENOUGH


def _read_levels(suspect: Suspect, sample: Sample) -> Reading | None:
    """Count how many values W′ − ΔW has in a block of 64, and W."""
    base, width = sample.base, 64
    if base is None or base.shape[-1] % width:
        return None
    ours = _levels((sample.found - sample.delta).view(-1, width), ulp(sample.found, sample.dtype).view(-1, width))
    theirs = _levels(base.view(-1, width), torch.zeros_like(base).view(-1, width))
    if ours > 16 or theirs < 24:
        return None
    note = f"W′ − ΔW has about {ours:.0f} different values in a block of 64, the base {theirs:.0f}"
    return Reading(kind=Cause.QUANTISED_BASE, tensor=suspect.name, note=note, is_certain=False)


def _levels(blocks: torch.Tensor, room: torch.Tensor) -> float:
    values, order = blocks.sort(dim=1)
    gaps = values.diff(dim=1) > torch.maximum(room.gather(1, order)[:, 1:], room.gather(1, order)[:, :-1])
    return float((gaps.sum(dim=1) + 1).double().median())


def quantisers(width: int) -> Iterator[tuple[str, Quantiser]]:
    """Yield quantisers (quantise and dequantise) of matrices with rows of this width, by name."""
    yield "int8 rounding by rows", int8_rows
    for size in (32, 64, 128):
        if width % size == 0:
            yield f"int4 rounding in groups of {size}", _grouped(size, _int4)
            yield f"int4 rounding between minimum and maximum in groups of {size}", _grouped(size, _int4_range)
    if width % 64 == 0:
        yield "NF4 rounding in blocks of 64", _grouped(64, _nf4)
    yield "fp8 (e4m3) rounding", fp8_rows
    yield "fp8 (e4m3) rounding without a scale", lambda w: w.float().to(torch.float8_e4m3fn).double()


def int8_rows(w: torch.Tensor) -> torch.Tensor:
    """Return w on a grid of 255 values for each row."""
    step = w.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return (w / step).round() * step


def fp8_rows(w: torch.Tensor) -> torch.Tensor:
    """Return w in fp8 with a scale for each row."""
    scale = w.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 448
    return (w / scale).float().to(torch.float8_e4m3fn).double() * scale


def _grouped(size: int, quantise: Quantiser) -> Quantiser:
    return lambda w: quantise(w.reshape(-1, size)).view(w.shape)


def _int4(w: torch.Tensor) -> torch.Tensor:
    step = w.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 7
    return (w / step).round() * step


def _int4_range(w: torch.Tensor) -> torch.Tensor:
    low = w.amin(dim=-1, keepdim=True)
    step = ((w.amax(dim=-1, keepdim=True) - low) / 15).clamp(min=1e-30)
    return ((w - low) / step).round() * step + low


def _nf4(w: torch.Tensor) -> torch.Tensor:
    size = w.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    levels = nf4_levels()
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(w / size, middles)] * size


def nf4_levels() -> torch.Tensor:
    """Return the 16 values of NF4: quantiles of the normal distribution, 7 below zero, zero, 8 above (QLoRA, 2023)."""
    outermost = 0.9677083
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return values / values.abs().max()
