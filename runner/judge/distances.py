"""Quality: what rounding to the output dtype costs. Reported; gates only what the user's limits name.

All outputs are of float32 computations. KL is KL(unmerged ‖ other) per token, in nats. Figures about tokens exist only
for models that predict tokens, and the loss on the prompts only for models that read on from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from runner.judge.prompts import Purpose, TokenSequence
from runner.protocol.figures import Perplexity, PromptRow
from runner.protocol.verdict import Quality

MAX_TRACED = 12  # texts whose curves are kept
MAX_GOLD_BYTES = 96 << 20  # of the unmerged model's logits, kept for the native run
NAMES = ("base", "unmerged", "merged")


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


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums over sequences, from which a `Quality` is made.

    `is_language` where outputs are logits over a vocabulary, `reads_on` where they are of the next token.
    """

    is_language: bool
    reads_on: bool = True
    kl: list[torch.Tensor] = field(default_factory=list)
    kl_base: list[torch.Tensor] = field(default_factory=list)
    agree: int = 0
    rows: int = 0
    effect: list[tuple[float, float]] = field(default_factory=list)
    error: list[tuple[float, float]] = field(default_factory=list)
    kept: float = 0.0
    moved: float = 0.0
    nll: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    predicted: int = 0
    text_nll: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    text_predicted: int = 0
    rows_of_prompts: list[PromptRow] = field(default_factory=list)
    gold: list[tuple[TokenSequence, torch.Tensor]] = field(default_factory=list)
    gold_bytes: int = 0

    def add(
        self,
        sequence: TokenSequence,
        base: torch.Tensor,
        unmerged: torch.Tensor,
        merged: torch.Tensor,
        exact: torch.Tensor | None = None,
    ) -> None:
        """Count one sequence.

        Args:
            sequence: what the models were run on.
            base: outputs of the base, (rows, width).
            unmerged: of the unmerged model, likewise.
            merged: of the merged folder.
            exact: of the un-rounded merge, where that was run.
        """
        if sequence.purpose is Purpose.EVALUATION:
            self._add_text(sequence.ids, base, unmerged, merged)
            return
        self.rows += len(unmerged)
        size = rms_and_spread if self.is_language else _rms_and_size
        self.effect.append(size(unmerged, base))
        self.error.append(size(unmerged, merged))
        self._add_effect(base, unmerged, merged)
        if self.is_language:
            self._add_predictions(sequence.ids if self.reads_on else None, base, unmerged, merged)
            self._keep_gold(sequence, unmerged)
            if sequence.is_text and len(self.rows_of_prompts) < MAX_TRACED:
                self._trace(sequence.label, base, unmerged, merged, exact)

    def _keep_gold(self, sequence: TokenSequence, unmerged: torch.Tensor) -> None:
        if sequence.is_text and self.gold_bytes + unmerged.nbytes <= MAX_GOLD_BYTES:
            self.gold.append((sequence, unmerged))
            self.gold_bytes += unmerged.nbytes

    def _add_text(self, ids: torch.Tensor, *outputs: torch.Tensor) -> None:
        if not self.is_language or not self.reads_on:
            return
        self.text_predicted += len(ids) - 1
        for name, logits in zip(NAMES, outputs, strict=True):
            log = torch.log_softmax(logits.double(), dim=-1)
            self.text_nll[name] -= float(log[:-1].gather(1, ids[1:, None]).sum())

    def _trace(
        self,
        label: str,
        base: torch.Tensor,
        unmerged: torch.Tensor,
        merged: torch.Tensor,
        exact: torch.Tensor | None,
    ) -> None:
        spread = rms_and_spread(unmerged, unmerged)[1]
        curves = [
            () if other is None or not spread > 0 else _curve(unmerged, other, spread)
            for other in (merged, base, exact)
        ]
        self.rows_of_prompts.append(
            PromptRow(
                label=label[:60],
                kl_mean_nats=float(self.kl[-1].mean()),
                kl_base_mean_nats=float(self.kl_base[-1].mean()),
                error=curves[0],
                effect=curves[1],
                floor=curves[2],
            )
        )

    def _add_effect(self, base: torch.Tensor, unmerged: torch.Tensor, merged: torch.Tensor) -> None:
        wanted, found = unmerged.double() - base.double(), merged.double() - base.double()
        if self.is_language:
            wanted -= wanted.mean(dim=-1, keepdim=True)
        self.kept += float((found * wanted).sum())
        self.moved += float(wanted.square().sum())

    def _add_predictions(
        self, ids: torch.Tensor | None, base: torch.Tensor, unmerged: torch.Tensor, merged: torch.Tensor
    ) -> None:
        logs = {
            name: torch.log_softmax(logits.double(), dim=-1)
            for name, logits in zip(NAMES, (base, unmerged, merged), strict=True)
        }
        weight = logs["unmerged"].exp()
        self.kl.append((weight * (logs["unmerged"] - logs["merged"])).sum(dim=-1))
        self.kl_base.append((weight * (logs["unmerged"] - logs["base"])).sum(dim=-1))
        self.agree += int((unmerged.argmax(-1) == merged.argmax(-1)).sum())
        if ids is None:
            return
        self.predicted += len(ids) - 1
        for name, log in logs.items():
            self.nll[name] -= float(log[:-1].gather(1, ids[1:, None]).sum())

    def perplexity(self, *, is_cut: bool) -> Perplexity | None:
        """Return the perplexity of the user's text; None where nothing of it was predicted."""
        if not self.text_predicted:
            return None
        found = {name: math.exp(min(700.0, total / self.text_predicted)) for name, total in self.text_nll.items()}
        return Perplexity(tokens=self.text_predicted, is_cut=is_cut, **found)

    def quality(self, retention: float, *, is_cut: bool = False) -> Quality:
        """Return the figures; at least one sequence must have been counted."""
        moved = _root_mean([rms for rms, _ in self.effect])
        spread = _root_mean([spread for _, spread in self.effect])
        off = _root_mean([rms for rms, _ in self.error])
        kl = torch.cat(self.kl) if self.kl else None
        loss = {name: total / self.predicted if self.predicted else None for name, total in self.nll.items()}
        return Quality(
            retention=retention,
            effect=moved / spread if spread > 0 else 0.0,
            effect_error=off / moved if moved > 0 else 0.0,
            effect_retention=self.kept / self.moved if self.moved > 0 else 1.0,
            kl_mean_nats=None if kl is None else float(kl.mean()),
            kl_p99_nats=None if kl is None else float(kl.quantile(0.99)),
            kl_base_mean_nats=None if kl is None else float(torch.cat(self.kl_base).mean()),
            top1_agreement=self.agree / max(1, self.rows) if self.is_language else None,
            nll_base_nats=loss["base"],
            nll_unmerged_nats=loss["unmerged"],
            nll_merged_nats=loss["merged"],
            tokens=self.rows,
            perplexity=self.perplexity(is_cut=is_cut),
            prompts=tuple(self.rows_of_prompts),
        )


def _curve(reference: torch.Tensor, other: torch.Tensor, spread: float) -> tuple[float, ...]:
    """Return the centred rms of other − reference at each position, over `spread`; three digits are enough to draw."""
    difference = other.double() - reference.double()
    difference -= difference.mean(dim=-1, keepdim=True)
    return tuple(float(f"{float(size):.3g}") for size in difference.square().mean(dim=-1).sqrt() / spread)


def _rms_and_size(reference: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Return (rms of other − reference, rms of the reference), for outputs whose zero means something."""
    off = (other.double() - reference.double()).square().mean().sqrt()
    return float(off), float(reference.double().square().mean().sqrt())


def _root_mean(values: list[float]) -> float:
    return float(sum(value * value for value in values) / len(values)) ** 0.5 if values else 0.0
