"""What is measured beside the verdict, as data: what rounding costs, and what else could be done. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """One text, and how far the models' logits are apart on it.

    The three curves have one number for each position: the rms of a difference of logits, centred, over the standard
    deviation of the unmerged model's logits on the whole text.

    Attributes:
        label: how the text begins.
        kl_mean_nats: mean KL(unmerged ‖ merged) per token.
        kl_base_mean_nats: mean KL(unmerged ‖ base) per token.
        error: merged − unmerged.
        effect: base − unmerged: what the adapter does.
        floor: un-rounded merge − unmerged: the noise of the arithmetic. Empty where it was not computed.
    """

    label: str
    kl_mean_nats: float
    kl_base_mean_nats: float
    error: tuple[float, ...]
    effect: tuple[float, ...]
    floor: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Of the user's text, in windows; exp of the mean negative log-likelihood of each token but the first of a window.

    Attributes:
        base: of the base.
        unmerged: of the unmerged model.
        merged: of the merged model.
        tokens: how many were predicted.
        is_cut: whether the text was longer.
    """

    base: float
    unmerged: float
    merged: float
    tokens: int
    is_cut: bool

    @property
    def ratio(self) -> float:
        """Merged over unmerged; below 1 where the merge predicts the text better."""
        return self.merged / self.unmerged


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """The models in the output dtype, weights and arithmetic, held against the unmerged model in float32.

    Attributes:
        dtype: of the output.
        device: where they ran, or would have.
        kl_merged_nats: mean KL(unmerged in float32 ‖ merged in 16 bits) per token; None where it did not run.
        kl_unmerged_nats: mean KL(unmerged in float32 ‖ unmerged in 16 bits) per token, likewise.
        reason: why it did not run; "" where it did.
    """

    dtype: str
    device: str
    kl_merged_nats: float | None = None
    kl_unmerged_nats: float | None = None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """ρ, the former over the latter: about 1 where merging adds nothing to the noise of 16-bit arithmetic."""
        if self.kl_merged_nats is None or not self.kl_unmerged_nats:
            return None
        return self.kl_merged_nats / self.kl_unmerged_nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What rounding to the output dtype costs; reported, gates what the user sets limits for.

    Figures about tokens are None for a model without logits over a vocabulary; the losses, for one that does not
    continue its prompt. Effects of other heads are of their outputs, not centred.

    Attributes:
        retention: over all changed tensors together; 1.0 is everything.
        effect: centred rms of unmerged − base logits over the std of the unmerged logits.
        effect_error: centred rms of merged − unmerged logits over the rms of unmerged − base.
        effect_retention: <merged − base, unmerged − base>/‖unmerged − base‖² over all logits, centred: the share of the
            adapter's effect on the outputs that was kept.
        kl_mean_nats: mean KL(unmerged ‖ merged) per token.
        kl_p99_nats: its 99th percentile.
        kl_base_mean_nats: mean KL(unmerged ‖ base), for comparison.
        top1_agreement: share of tokens with the same most likely successor.
        nll_base_nats: mean negative log-likelihood of the prompts' own tokens, base.
        nll_unmerged_nats: the same, unmerged.
        nll_merged_nats: the same, merged.
        tokens: how many rows of outputs were compared: positions, or whole texts for a head with one answer.
        perplexity: of `eval-text`; None where that was not given, or nothing is predicted.
        prompts: the first texts one by one; empty for other heads than a language model's.
        tasks: always empty; there for readers of reports that look for it.
        native: the run in the output dtype; None where the models did not run at all.
    """

    retention: float
    effect: float
    effect_error: float
    effect_retention: float
    kl_mean_nats: float | None
    kl_p99_nats: float | None
    kl_base_mean_nats: float | None
    top1_agreement: float | None
    nll_base_nats: float | None
    nll_unmerged_nats: float | None
    nll_merged_nats: float | None
    tokens: int
    perplexity: Perplexity | None = None
    prompts: tuple[PromptRow, ...] = ()
    tasks: tuple[str, ...] = ()
    native: Native | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What storing the same merge otherwise would keep, estimated while the elements were compared.

    Attributes:
        dtype: of the output; "auto" is the one that was chosen.
        rounding: see `runner.protocol.rounding`.
        retention: as in `Quality`; on average, where chance rounds. None where the dtype cannot hold the values.
        largest: magnitude of all finite values of the folder, where the range of the dtype matters; else None.
        subnormal: elements that would lie below the dtype's normal numbers, likewise.
        fits: whether the dtype holds every value.
    """

    dtype: str
    rounding: str
    retention: float | None
    largest: float | None = None
    subnormal: int | None = None
    fits: bool = True
