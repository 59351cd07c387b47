"""The limits that the user sets or loosens for the judgement. Plain data, no torch.

Structure and storage are exact and have no tolerance to loosen. Quality has no limit but those that are set here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Layer → its built-in limit. docs/verification.md says how these were measured.
TOLERANCES: Mapping[str, float] = MappingProxyType({"semantics": 1e-6, "end-to-end": 1e-4})
MOST_TOLERANT = 0.01  # beyond it a wrong factor of 1.02, the weakest common mistake, would pass

AT_LEAST, AT_MOST = ">=", "<="
# Figure → how it is held against its limit. All are of the merged model beside the unmerged one.
FIGURES: Mapping[str, str] = MappingProxyType(
    {
        "retention": AT_LEAST,
        "effect-retention": AT_LEAST,
        "effect-error": AT_MOST,
        "kl-mean-nats": AT_MOST,
        "kl-p99-nats": AT_MOST,
        "nll-increase-nats": AT_MOST,
        "top1-agreement": AT_LEAST,
        "perplexity-ratio": AT_MOST,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """A layer of `TOLERANCES`, and the limit that it is loosened to."""

    layer: str
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLimit:
    """One limit: `figure`, of `FIGURES`, must be at least or at most `limit`."""

    figure: str
    limit: float

    @property
    def text(self) -> str:
        """As the user wrote it."""
        return f"{self.figure}{FIGURES[self.figure]}{self.limit!r}"

    def holds(self, value: float) -> bool:
        """Return whether a measured value keeps the limit; NaN does not."""
        return value >= self.limit if FIGURES[self.figure] == AT_LEAST else value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user wants to be judged by.

    Attributes:
        tolerances: of the layers that were loosened.
        quality: limits that gate.
    """

    tolerances: tuple[Tolerance, ...] = ()
    quality: tuple[QualityLimit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What of the user's own the models are evaluated on.

    Attributes:
        text: whose perplexity is measured; "" for none.
    """

    text: str = field(default="", repr=False)
