"""Is the adapter's change there with another factor?

W' = round(W + s·ΔW) in every element bounds s from both sides in each of them: a file whose elements all agree on an
interval holds the change times s, however little of it the dtype kept. Least squares, <W'−W, ΔW>/‖ΔW‖², says the same
only where the dtype keeps the change: a right merge of a weak adapter has 0.1 there.
"""

from __future__ import annotations

import math

import torch

from runner.judge.diagnosis.sample import Reading, Sample, Suspect
from runner.judge.expected.recipe import LowRank, scaling_of
from runner.judge.numbers.tensors import ulp
from runner.protocol.verdict import Cause

NEARLY_ONE = 2.0**-9  # a factor as near to 1 as this is told by how it was rounded, not by its scale
Interval = tuple[float, float]


def factor_interval(sample: Sample) -> Interval | None:
    """Return the interval of factors that every element of the sample agrees on, or None."""
    if sample.base is None:
        return None
    delta = sample.delta
    mask = delta.abs() > 0
    if not bool(mask.any()) or not bool(sample.found.isfinite().all()):
        return None
    found, base, delta = sample.found[mask], sample.base[mask], delta[mask]
    room = 0.5 * ulp(found, sample.dtype) + 4 * sample.noise[mask]
    left, right = (found - room - base) / delta, (found + room - base) / delta
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    interval = (float(low.max()), float(high.min()))
    return interval if interval[0] <= interval[1] and math.isfinite(interval[0] + interval[1]) else None


def read_scale(suspect: Suspect, sample: Sample, config: dict[str, object]) -> Reading | None:
    """Return the reading "the change is there, times a factor", or None.

    Args:
        suspect: the tensor.
        sample: of it.
        config: the adapter's.
    """
    interval = factor_interval(sample)
    if interval is None or (abs(interval[0] - 1) < NEARLY_ONE and abs(interval[1] - 1) < NEARLY_ONE):
        return None
    if interval[0] <= 0.0 <= interval[1]:
        return None  # not applied, which is told apart
    plain = _factor_without_patterns(suspect, config)
    if plain is not None and interval[0] <= plain <= interval[1]:
        return Reading(
            kind=Cause.PATTERN_IGNORED,
            tensor=suspect.name,
            note="The change has the factor of `r` and `lora_alpha`, without `rank_pattern` and `alpha_pattern`",
            factor=interval,
        )
    return Reading(kind=Cause.SCALE, tensor=suspect.name, note="", factor=interval)


def _factor_without_patterns(suspect: Suspect, config: dict[str, object]) -> float | None:
    """Return the factor relative to the right one if the patterns of the config were ignored; None if that is 1."""
    if not isinstance(suspect.rule, LowRank) or not (config.get("rank_pattern") or config.get("alpha_pattern")):
        return None
    plain = scaling_of(suspect.target.key.rpartition(".")[0], {**config, "rank_pattern": None, "alpha_pattern": None})
    ratio = plain / suspect.rule.scaling if suspect.rule.scaling else 1.0
    return ratio if abs(ratio - 1) > NEARLY_ONE else None


def name_factor(interval: Interval, config: dict[str, object]) -> tuple[Cause, float, str, bool]:
    """Return what a factor in this interval means, the factor, a sentence, and whether it can mean nothing else."""
    rank, is_rslora = float(str(config.get("r") or 8)), bool(config.get("use_rslora"))
    root = math.sqrt(rank)
    known = [
        (2.0, Cause.TWICE, "That is the adapter applied twice."),
        (-1.0, Cause.SIGN, "That is the adapter subtracted."),
        *([(1 / root, Cause.RSLORA_AS_LORA, "That is alpha/r where rsLoRA means alpha/√r.")] if is_rslora else []),
        *([(root, Cause.LORA_AS_RSLORA, "That is alpha/√r where LoRA means alpha/r.")] if not is_rslora else []),
    ]
    width = interval[1] - interval[0]
    meant = [one for one in known if interval[0] <= one[0] <= interval[1] and width < 0.5 * abs(one[0])]
    if meant:
        factor, kind, _ = meant[0]
        return kind, factor, " Or: ".join(text for *_, text in meant), len(meant) == 1
    return Cause.SCALE, (interval[0] + interval[1]) / 2, "", True
