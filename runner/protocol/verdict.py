"""What the judge found, as data: a `Verdict` of `Check`s. No torch, so that every room may read it.

A failed verdict is a result, not an exception: it carries the full report, and the run ends with exit code 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from runner.protocol.figures import Alternative, Quality

__all__ = [
    "ERROR_BINS", "ERROR_BIN_ULPS", "PASSED", "Alternative", "Check", "Continuation", "Layer", "ModuleRow", "Outcome",
    "Quality", "Status", "Verdict",
]  # fmt: skip


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
MAX_NAMED = 10  # tensors by name in a diagnosis

PASSED = (Status.PASS, Status.PASS_LOSSY)  # what may be published


class Layer(StrEnum):
    """The parts of the claim, in the order in which they are judged."""

    STRUCTURE = "structure"
    FILES = "files"  # beside the weights
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


class Cause(StrEnum):
    """What kind of wrong merge a folder is; docs/verification.md says how each is recognised."""

    FILES = "files_missing_or_damaged"
    TENSOR_MISSING = "tensor_missing"
    TENSOR_EXTRA = "tensor_not_expected"
    SHAPE = "wrong_shape"
    DTYPE = "wrong_dtype"
    INDEX = "wrong_index"
    STRAY_WEIGHTS = "other_weights_in_the_folder"
    CONFIG = "wrong_config"
    TIE_FLAG = "wrong_tie_flag"
    HEAD_LOST = "untied_head_lost"
    TOKENIZER = "wrong_tokenizer"
    CHAT_TEMPLATE = "wrong_chat_template"
    GENERATION_CONFIG = "wrong_generation_config"
    NOT_APPLIED = "adapter_not_applied"
    MODULES_SKIPPED = "modules_skipped"
    ROWS_SKIPPED = "rows_skipped"
    SAVED_IGNORED = "saved_module_ignored"
    BIAS_IGNORED = "bias_ignored"
    MAGNITUDE_IGNORED = "dora_magnitude_ignored"
    ADDED_ROWS = "added_tokens_wrong"
    SCALE = "wrong_scale"
    TWICE = "applied_twice"
    SIGN = "subtracted"
    RSLORA_AS_LORA = "rslora_read_as_lora"
    LORA_AS_RSLORA = "lora_read_as_rslora"
    PATTERN_IGNORED = "rank_or_alpha_pattern_ignored"
    PART_LEFT_OUT = "one_of_several_adapters_left_out"
    PART_REWEIGHTED = "one_of_several_adapters_reweighted"
    TRANSPOSED = "delta_transposed"
    ROUNDED_TWICE = "rounded_more_than_once"
    TRUNCATED = "rounded_toward_zero"
    HEAD_IS_EMBEDDING = "head_and_embedding_mixed_up"
    SWAPPED = "tensors_swapped"
    ROWS_MOVED = "rows_moved"
    ZEROED = "zeroed"
    NON_FINITE = "nan_or_inf"
    BIT_FLIP = "bits_flipped"
    FEW_ELEMENTS = "few_elements_off"
    QUANTISED_BASE = "quantised_base"
    OTHER_ADAPTER = "another_adapter"
    OTHER_WEIGHTS = "onto_changed_weights"
    WRONG_BASE = "another_base"
    UNUSED = "adapter_tensor_unused"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One explanation of a failed verdict. It never decides the verdict.

    Attributes:
        kind: which deviation.
        is_certain: whether every element that was looked at again is explained by it, to the bit or within the bound
            of a right computation; else it is the likeliest of what was considered.
        evidence: one or two sentences with the numbers.
        tensors: stored names that it is about, at most `MAX_NAMED`.
        count: how many tensors it is about.
        factor: estimated factor of the adapter's change; None where that is not the point.
    """

    kind: Cause
    is_certain: bool
    evidence: str
    tensors: tuple[str, ...] = ()
    count: int = 0
    factor: float | None = None


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
class Verdict:
    """The judge's whole answer.

    Attributes:
        status: decided by `decide` from the checks.
        weights: the same, of all but the files beside the weights; None where it was not told apart.
        files: the same, of the files beside the weights alone.
        checks: in the order in which they ran.
        modules: one row per changed module.
        rounding_errors: |stored − E| over a sample of all touched elements, counted in `ERROR_BINS` bins of
            `ERROR_BIN_ULPS` units in the last place each; the last one is open. Empty where nothing was compared.
        quality: None where the outputs were not compared.
        alternatives: to the dtype and the rounding that were chosen.
        continuations: for the human reader.
        diagnoses: what explains a failed verdict, the one about most tensors first; empty where nothing failed.
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
    diagnoses: tuple[Diagnosis, ...] = ()
    weights: Status | None = None
    files: Status | None = None
    seed: int
    wall_s: float

    @property
    def passed(self) -> bool:
        """Whether the merge may be published."""
        return self.status in PASSED

    @property
    def parts_text(self) -> str:
        """The verdicts on the weights and on the files beside them, in one line; "" where they were not told apart."""
        if self.weights is None or self.files is None:
            return ""
        return f"Weights: {self.weights.value}. Files: {self.files.value}."

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
