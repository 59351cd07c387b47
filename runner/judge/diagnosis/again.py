"""What would PEFT's own merge give on other weights, or with another scale? For methods that do not just add.

In LoRA a wrong scale and a quantised base show in W′ − W. DoRA divides by a norm of the sum, rotations multiply: there
the only way to compute what a faulty pipeline stored is to let PEFT's layer merge once more, in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from runner.judge.case import Case
from runner.judge.diagnosis.quantised import quantisers
from runner.judge.diagnosis.sample import Reading, Sample, Suspect, share
from runner.judge.expected.exact import Exact
from runner.judge.numbers.tensors import row_count
from runner.judge.streaming.models import LOAD_ERRORS, bare, merged_copy
from runner.protocol.verdict import Cause

ROOM = 0.005  # of an estimated factor
ENOUGH = 0.97  # of the sample, where a base was rounded: quantisers differ in the last digit of a scale


def read_again(case: Case, suspect: Suspect, sample: Sample, plain: Exact | None) -> Reading | None:
    """Return the reading "merged twice", "another scale" or "a quantised base" of what only PEFT can merge, or None.

    Args:
        case: base and adapter.
        suspect: the tensor.
        sample: of it.
        plain: W + s·B·A, for DoRA.
    """
    unit = case.sources.unit_of(suspect.target.key)
    if unit is None or unit not in case.sources.by_peft or sample.base is None:
        return None
    name = suspect.target.key.removeprefix(f"{unit}.")
    try:
        with torch.no_grad(), case.unmerged.in_memory(unit):
            twin = copy.deepcopy(case.unmerged.units[unit]).double()
        return _search(suspect, sample, twin, name, plain)
    except LOAD_ERRORS:  # PEFT has no merge of it in float64
        return None


def _search(suspect: Suspect, sample: Sample, twin: nn.Module, name: str, plain: Exact | None) -> Reading | None:
    with torch.no_grad():
        twice = _merged(twin, name, sample, weight=_whole(suspect.exact))
        best, factor = _share(sample, twice), 2.0
        for scale in _scales(sample, plain):
            found = _share(sample, _merged(twin, name, sample, scale=scale))
            if found > best:
                best, factor = found, scale
        if best > 0:
            near = (factor * (1 - ROOM), factor * (1 + ROOM))
            return Reading(kind=Cause.SCALE, tensor=suspect.name, note="", factor=(min(near), max(near)))
        return _on_quantised(suspect, sample, twin, name)


def _on_quantised(suspect: Suspect, sample: Sample, twin: nn.Module, name: str) -> Reading | None:
    weight = bare(twin).get_parameter(name).detach()
    if weight.ndim != 2 or weight.shape[-1] < 32:
        return None
    for said, quantise in quantisers(weight.shape[-1]):
        value = _merged(twin, name, sample, weight=quantise(weight))
        if share(sample.fits(value, steps=2)) >= ENOUGH:
            note = f"W′ is what PEFT merges into the base after {said}"
            return Reading(kind=Cause.QUANTISED_BASE, tensor=suspect.name, note=note)
    return None


def _scales(sample: Sample, plain: Exact | None) -> Iterator[float]:
    """Yield factors of B·A that DoRA may have been merged with: those that the rows' directions tell, and −1."""
    if plain is None or sample.base is None:
        return
    yield -1.0
    estimate = _estimate(sample, plain.rows(*sample.rows).reshape(sample.exact.shape) - sample.base)
    if math.isfinite(estimate) and abs(estimate - 1) > 2 * ROOM:
        yield estimate
        yield from (float(f"{estimate:.3g}"), float(f"{estimate:.2g}"))


def _estimate(sample: Sample, delta: torch.Tensor) -> float:
    """Return t where each row of W′ is, up to a factor of its own, nearest to W + t·ΔW.

    It is the mean over rows, each with the weight of what its ΔW adds beside W.
    """
    assert sample.base is not None  # noqa: S101  (the caller asks)
    both = torch.stack([sample.base, delta], dim=-1)  # (rows, width, 2)
    solved = torch.linalg.lstsq(both, sample.found.unsqueeze(-1)).solution.squeeze(-1)
    along = (sample.base * delta).sum(dim=1).square() / sample.base.square().sum(dim=1)
    weight = delta.square().sum(dim=1) - along
    rows = (solved[:, 1] / solved[:, 0]).nan_to_num(0.0, 0.0, 0.0)
    return float((rows * weight).nansum() / weight.nansum())


def _merged(
    twin: nn.Module, name: str, sample: Sample, *, weight: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """Return the sample's rows of PEFT's merge into `weight` (the base's by default), B·A times `scale`."""
    again = copy.deepcopy(twin)
    if weight is not None:
        bare(again).get_parameter(name).data = weight.view(bare(again).get_parameter(name).shape)
    for module in again.modules():
        if isinstance(module, LoraLayer):
            held: Any = module
            held.scaling = {adapter: scale * value for adapter, value in held.scaling.items()}
    made = merged_copy(again, torch.float64).get_parameter(name).detach()
    return made[slice(*sample.rows)].reshape(sample.exact.shape)


def _share(sample: Sample, value: torch.Tensor) -> float:
    """Return which share of the sample `value` explains; 0.0 unless that is nearly all."""
    return share(sample.fits(value, steps=2)) if sample.explains(value, steps=2) else 0.0


def _whole(exact: Exact) -> torch.Tensor:
    return exact.rows(0, row_count(exact.shape))
