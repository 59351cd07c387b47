"""What comparing one tensor on disk with what it must be gives, as data."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from runner.judge.numbers.alternatives import Gauge
from runner.protocol.verdict import ERROR_BINS

MAX_BAD_ROWS = 64  # of each tensor, remembered for the diagnosis


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """One stored element that is not what it must be.

    Attributes:
        tensor: its stored name.
        index: its position in the tensor.
        expected: the right value, rounded to the output dtype.
        found: the value on disk.
        ulps: distance of `found` from the exact value, in units in the last place of the output dtype.
    """

    tensor: str
    index: tuple[int, ...]
    expected: float
    found: float
    ulps: float

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return f"{self.tensor}[{place}] is {self.found:.9g}, expected {self.expected:.9g} ({self.ulps:.3g} ulp off)"


@dataclass(slots=True, kw_only=True)
class Comparison:
    """What comparing one tensor gave; sums are over all its elements.

    Attributes:
        violations: elements outside the bound.
        worst: the one furthest off, in ulp.
        new_non_finite: elements that are NaN or Inf on disk though the exact value is finite.
        elements: how many were compared.
        kept: Σ (W' − W)·Δ.
        delta_squared: Σ Δ².
        base_squared: Σ W².
        moved_squared: Σ (W' − W)².
        changed: elements on disk that are not W rounded to their dtype.
        has_base: whether there is a W of the same shape; without one, every element counts as changed.
        errors: |x' − E| in ulp over a sample of the elements, counted in the bins of `verdict.ERROR_BINS`.
        gauge: what other dtypes would make of it.
        bad_rows: the first `MAX_BAD_ROWS` rows with a violation.
        bad_row_count: how many there are.
    """

    violations: int = 0
    worst: Deviation | None = None
    new_non_finite: int = 0
    elements: int = 0
    kept: float = 0.0
    delta_squared: float = 0.0
    base_squared: float = 0.0
    moved_squared: float = 0.0
    changed: int = 0
    has_base: bool = True
    errors: list[int] = field(default_factory=lambda: [0] * ERROR_BINS)
    gauge: Gauge = field(default_factory=Gauge)
    bad_rows: list[int] = field(default_factory=list)
    bad_row_count: int = 0

    def add(self, block: Comparison) -> None:
        """Add what comparing more rows gave."""
        self.violations += block.violations
        if block.worst is not None and (self.worst is None or block.worst.ulps > self.worst.ulps):
            self.worst = block.worst
        self.new_non_finite += block.new_non_finite
        self.elements += block.elements
        self.kept += block.kept
        self.delta_squared += block.delta_squared
        self.base_squared += block.base_squared
        self.moved_squared += block.moved_squared
        self.changed += block.changed
        self.errors = list(map(operator.add, self.errors, block.errors))
        self.gauge.add(block.gauge)
        self.bad_rows.extend(block.bad_rows[: MAX_BAD_ROWS - len(self.bad_rows)])
        self.bad_row_count += block.bad_row_count

    @property
    def retention(self) -> float:
        """<W' − W, Δ>/‖Δ‖²: what the output dtype kept of the delta; 1.0 for no delta."""
        return self.kept / self.delta_squared if self.delta_squared > 0 else 1.0

    @property
    def delta_ratio(self) -> float:
        """‖Δ‖/‖W‖; 0.0 for an all-zero base."""
        return float((self.delta_squared / self.base_squared) ** 0.5) if self.base_squared > 0 else 0.0
