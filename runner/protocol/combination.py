"""How several adapters become one: the kinds of PEFT's `add_weighted_adapter`, and what each of them needs.

Plain data, no torch: the inputs are checked against these tables before anything is downloaded. What the kinds mean is
in docs/several-adapters.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KINDS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
PRUNING = tuple(kind for kind in KINDS if kind.startswith(("ties", "dare", "magnitude")))
RANDOM = tuple(kind for kind in KINDS if kind.startswith("dare"))
VOTING = tuple(kind for kind in KINDS if "ties" in kind)
MAJORITIES = ("total", "frequency")
# Kinds that add the factors themselves, element by element, so that the factors must have one shape.
OF_EQUAL_RANKS = tuple(kind for kind in KINDS if kind != "cat" and not kind.endswith("svd"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How the adapters of one run are combined.

    Attributes:
        kind: one of `KINDS`.
        weights: of the adapters, in their order; finite, not zero, may be negative.
        density: share of each adapter's values that is kept, in (0, 1]; None for kinds that prune nothing.
        seed: of the random choice of what is kept; None for kinds without one.
        majority_sign: one of `MAJORITIES`; None for kinds without a vote.
    """

    kind: str
    weights: tuple[float, ...]
    density: float | None = None
    seed: int | None = None
    majority_sign: str | None = None

    @property
    def text(self) -> str:
        """In one line, for people: the kind and what it depends on, without the weights."""
        parts = [
            f"density {self.density:g}" if self.density is not None else "",
            f"seed {self.seed}" if self.seed is not None else "",
            f"majority sign by {self.majority_sign}" if self.majority_sign is not None else "",
        ]
        said = ", ".join(part for part in parts if part)
        return f"{self.kind} ({said})" if said else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Several:
    """Adapters on disk that are merged as one.

    Attributes:
        paths: of the adapters, at least two.
        combination: with one weight for each path.
    """

    paths: tuple[Path, ...]
    combination: Combination
