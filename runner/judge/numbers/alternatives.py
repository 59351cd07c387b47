"""What storing the same merge in another dtype would keep: measured in the pass that compares the elements anyway.

Nothing is written or read a second time. E is rounded to the other dtype, and its retention computed as for the dtype
that was chosen; of every tensor of the folder the largest magnitude and what lies below float16's normal numbers are
counted, because float16 ends at 65504 and its steps are 2^-24 below 2^-14.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from runner.protocol.figures import Alternative
from runner.protocol.rounding import NEAREST, STOCHASTIC

LARGEST_F16 = 65504.0
SMALLEST_NORMAL_F16 = 2.0**-14
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(slots=True)
class Gauge:
    """Sums over the elements of one tensor, or of several.

    Attributes:
        kept: by dtype, Σ (round(E) − W)·Δ.
        largest: magnitude of a finite value.
        subnormal: elements below float16's normal numbers that are not zero.
    """

    kept: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_DTYPES, 0.0))
    largest: float = 0.0
    subnormal: int = 0

    def measure(self, exact: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> None:
        """Count a block of E: float64, W in float64, and Δ in float32, flat."""
        single = exact.float()
        for name, dtype in _DTYPES.items():
            moved = single.to(dtype).double().sub_(base.view(single.shape)).float().flatten()
            self.kept[name] += float(torch.dot(moved.nan_to_num_(0.0, 0.0, 0.0), delta))

    def look(self, values: torch.Tensor) -> None:
        """Count the range of a block of stored values, of any float dtype."""
        size = values.abs().float().flatten()
        size = size[torch.isfinite(size)]
        if size.numel():
            self.largest = max(self.largest, float(size.max()))
            self.subnormal += int(((size < SMALLEST_NORMAL_F16) & (size > 0)).sum())

    def add(self, other: Gauge) -> None:
        """Add what another gauge counted."""
        for name, kept in other.kept.items():
            self.kept[name] += kept
        self.largest = max(self.largest, other.largest)
        self.subnormal += other.subnormal


def alternatives(gauges: Iterable[Gauge], *, delta_squared: float, dtypes: Iterable[str]) -> tuple[Alternative, ...]:
    """Return what else could be done with a delta of `delta_squared` > 0, beside storing it as it is.

    Args:
        gauges: of all tensors.
        delta_squared: Σ Δ² over all touched elements.
        dtypes: of the touched tensors as stored, as safetensors spells them.
    """
    total = Gauge()
    for gauge in gauges:
        total.add(gauge)
    stored = set(dtypes)
    found = []
    if stored <= {"BF16"}:
        fits = total.largest <= LARGEST_F16
        found.append(
            Alternative(
                dtype="float16", rounding=NEAREST, retention=total.kept["float16"] / delta_squared if fits else None,
                largest=total.largest, subnormal=total.subnormal, fits=fits,
            )
        )  # fmt: skip
    if stored != {"F32"}:
        kept = total.kept["float32"] / delta_squared
        found.append(Alternative(dtype="float32", rounding=NEAREST, retention=kept if math.isfinite(kept) else None))
        # On average each element is E itself, so that the delta is kept; what it costs is up to a whole step of noise.
        found.append(Alternative(dtype="auto", rounding=STOCHASTIC, retention=1.0))
    return tuple(found)


def advice(found: Iterable[Alternative]) -> str:
    """Return the alternatives as sentences."""
    parts = []
    for other in found:
        kept = f"{other.retention:.1%}" if other.retention is not None else "nothing"
        if other.rounding == STOCHASTIC:
            parts.append("`rounding: stochastic` would keep all of it on average, with noise of up to a whole step.")
        elif not other.fits:
            parts.append(f"`dtype: float16` cannot hold it: {other.largest:g} is beyond {LARGEST_F16:g}.")
        elif other.dtype == "float16":
            parts.append(
                f"`dtype: float16` would keep {kept} (largest value {other.largest:.4g} of {LARGEST_F16:g}; "
                f"{other.subnormal} elements would be subnormal, in steps of 2^-24)."
            )
        else:
            parts.append(f"`dtype: {other.dtype}` would keep {kept}, in files of twice the size.")
    return " ".join(parts)
