"""What the judge found, as data: a `Verdict` of `Check`s. No torch, so that every room may read it.

A failed verdict is a result, not an exception: it carries the full report, and the run ends with exit code 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The whole verdict."""

    PASS = "PASS"
    PASS_LOSSY = "PASS_LOSSY"  # exact, but the output dtype kept less than 0.9 of the adapter
    FAIL = "FAIL"
    NOT_VERIFIED = "NOT_VERIFIED"  # a gating layer did not run


# Rounding errors are counted in bins of this width; the last bin holds what is beyond one ulp. Rounding to the nearest
# gives at most half an ulp, rounding by chance less than one.
ERROR_BIN_ULPS = 0.05
ERROR_BINS = 21

PASSED = (Status.PASS, Status.PASS_LOSSY)  # what may be published


class Layer(StrEnum):
    """The parts of the claim, in the order in which they are judged."""

    STRUCTURE = "structure"
    STORAGE = "storage"
    SEMANTICS = "semantics"
    END_TO_END = "end_to_end"
    QUALITY = "quality"


class Outcome(StrEnum):
    """One check."""

    PASS = "PASS"
    FAIL = "FAIL"
    WARN = "WARN"  # reported, gates nothing
    SKIPPED = "SKIPPED"  # did not run; never counts as passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question with its answer.

    Attributes:
        layer: which part of the claim it belongs to.
        name: a short claim, such as "untouched tensors are the base's bytes".
        outcome: what was found.
        value: the measured number, or None where there is none.
        limit: what `value` was held against, or None.
        detail: one sentence; on a failure it names the worst tensor, index, expected and found.
        loosened_from: the built-in limit, where the user loosened it.
    """

    layer: Layer
    name: str
    outcome: Outcome
    value: float | None = None
    limit: float | None = None
    detail: str = ""
    loosened_from: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """One module that the adapter changes.

    Attributes:
        name: its path in the model.
        tensor: the stored tensor that holds its weight.
        probe_error: ‖Ex − f(x)‖/‖f(x) − Wx‖ in fp64, or None where no probe applies (copies).
        delta_ratio: ‖ΔW‖/‖W‖.
        retention: <W'−W, ΔW>/‖ΔW‖², what the output dtype kept of the delta.
    """

    name: str
    tensor: str
    probe_error: float | None
    delta_ratio: float
    retention: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What base, unmerged and merged model say after one prompt (greedy, same length)."""

    prompt: str
    base: str
    unmerged: str
    merged: str


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
    native: Native | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What storing the same merge otherwise would keep, estimated while the elements were compared.

    Attributes:
        dtype: of the output; "auto" is the one that was chosen.
        rounding: see `runner.rounding`.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judge's whole answer.

    Attributes:
        status: decided by `decide` from the checks.
        checks: in the order in which they ran.
        modules: one row per changed module.
        rounding_errors: |stored − E| over a sample of all touched elements, counted in `ERROR_BINS` bins of
            `ERROR_BIN_ULPS` units in the last place each; the last one is open. Empty where nothing was compared.
        quality: None where the outputs were not compared.
        alternatives: to the dtype and the rounding that were chosen.
        continuations: for the human reader.
        seed: of all random probes and prompts.
        wall_s: seconds the judgement took.
    """

    status: Status
    checks: tuple[Check, ...]
    modules: tuple[ModuleRow, ...]
    rounding_errors: tuple[int, ...] = ()
    quality: Quality | None
    alternatives: tuple[Alternative, ...] = ()
    continuations: tuple[Continuation, ...]
    seed: int
    wall_s: float

    @property
    def passed(self) -> bool:
        """Whether the merge may be published."""
        return self.status in PASSED

    @property
    def loosened(self) -> tuple[Check, ...]:
        """The checks whose limit the user loosened."""
        return tuple(check for check in self.checks if check.loosened_from is not None)

    @property
    def loosened_text(self) -> str:
        """Which limits the user loosened, in one line; "" for none."""
        changes = dict.fromkeys((check.layer, check.loosened_from, check.limit) for check in self.loosened)
        return ", ".join(f"{layer.value.replace('_', ' ')} from {old:g} to {new:g}" for layer, old, new in changes)

    @property
    def fails_quality_only(self) -> bool:
        """Whether the merge is right, and misses nothing but the user's limits on quality."""
        return bool(self.failures) and all(check.layer is Layer.QUALITY for check in self.failures)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome is Outcome.FAIL)
