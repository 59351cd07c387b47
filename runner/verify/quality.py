"""Quality: what rounding to the output dtype costs. Reported, with numbers; gates nothing.

All logits are of float32 computations. KL is KL(unmerged ‖ other) per token, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runner.verify.verdict import Quality


def rms_and_spread(reference: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Return (centred rms of other − reference, standard deviation of the reference) of logits (tokens, vocabulary).

    Both are centred per token, because a constant added to all logits of a token changes no probability.
    """
    difference = other.double() - reference.double()
    difference -= difference.mean(dim=-1, keepdim=True)
    spread = reference.double()
    spread = spread - spread.mean(dim=-1, keepdim=True)
    return float(difference.square().mean().sqrt()), float(spread.square().mean().sqrt())


def relative(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return centred rms error over the reference's standard deviation; 0.0 for equal logits, whatever their spread."""
    rms, spread = rms_and_spread(reference, other)
    if rms == 0.0:
        return 0.0
    return rms / spread if spread > 0 else float("inf")


@dataclass(slots=True)
class Tally:
    """Sums over sequences, from which a `Quality` is made."""

    kl: list[torch.Tensor] = field(default_factory=list)
    kl_base: list[torch.Tensor] = field(default_factory=list)
    agree: int = 0
    tokens: int = 0
    effect: list[tuple[float, float]] = field(default_factory=list)
    error: list[tuple[float, float]] = field(default_factory=list)
    nll: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("base", "unmerged", "merged"), 0.0))
    predicted: int = 0

    def add(self, ids: torch.Tensor, base: torch.Tensor, unmerged: torch.Tensor, merged: torch.Tensor) -> None:
        """Count one sequence: its ids (tokens,) and the three models' logits (tokens, vocabulary)."""
        logs = {
            name: torch.log_softmax(logits.double(), dim=-1)
            for name, logits in (("base", base), ("unmerged", unmerged), ("merged", merged))
        }
        weight = logs["unmerged"].exp()
        self.kl.append((weight * (logs["unmerged"] - logs["merged"])).sum(dim=-1))
        self.kl_base.append((weight * (logs["unmerged"] - logs["base"])).sum(dim=-1))
        self.agree += int((unmerged.argmax(-1) == merged.argmax(-1)).sum())
        self.tokens += len(ids)
        self.effect.append(rms_and_spread(unmerged, base))
        self.error.append(rms_and_spread(unmerged, merged))
        self.predicted += len(ids) - 1
        for name, log in logs.items():
            self.nll[name] -= float(log[:-1].gather(1, ids[1:, None]).sum())

    def quality(self, retention: float) -> Quality:
        """Return the figures; at least one sequence must have been counted."""
        kl, kl_base = torch.cat(self.kl), torch.cat(self.kl_base)
        moved = _root_mean([rms for rms, _ in self.effect])
        spread = _root_mean([spread for _, spread in self.effect])
        off = _root_mean([rms for rms, _ in self.error])
        count = max(1, self.predicted)
        return Quality(
            retention=retention,
            effect=moved / spread if spread > 0 else 0.0,
            effect_error=off / moved if moved > 0 else 0.0,
            kl_mean_nats=float(kl.mean()),
            kl_p99_nats=float(kl.quantile(0.99)),
            kl_base_mean_nats=float(kl_base.mean()),
            top1_agreement=self.agree / max(1, self.tokens),
            nll_base_nats=self.nll["base"] / count,
            nll_unmerged_nats=self.nll["unmerged"] / count,
            nll_merged_nats=self.nll["merged"] / count,
            tokens=self.tokens,
        )


def _root_mean(values: list[float]) -> float:
    return float(sum(value * value for value in values) / len(values)) ** 0.5 if values else 0.0
