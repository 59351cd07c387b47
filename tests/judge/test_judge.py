"""The judgement as a whole: what is run and in which order, what is told, and what is told to the reader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.judge import outputs, wrapped
from runner.judge import semantics as modules
from runner.judge.case import Case, open_case
from runner.judge.judge import GATES, LOSS, MIN_RETENTION, READABLE, _retention, judge, judge_merge
from runner.judge.numbers.comparison import Comparison
from runner.judge.quality import continuations
from runner.judge.storage import Storage
from runner.protocol.errors import CheckpointError
from runner.protocol.limits import TOLERANCES, Evaluation
from runner.protocol.verdict import Cause, Check, Layer, Outcome, Status, Verdict
from tests.judge.conftest import Maker
from tests.judge.merges import save_merge
from tests.judge.tiny import lora, save_adapter

EVERY_OTHER = "every other file is the base's, the adapter's or the release's own, and none is missing"
TEXT = "The keeper wrote down the weather, and then the weather kept the keeper. " * 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A verdict with all that the judge can be asked for, what it said on the way, and how long it took."""

    verdict: Verdict
    said: list[tuple[str, float]]
    wall_s: float


@pytest.fixture(scope="module")
def told(right_merge: Maker) -> Told:
    """Judge a right merge of a model that has 160 positions and not one more."""
    base, adapter, merged = right_merge("conv1d")
    said: list[tuple[str, float]] = []
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuations, "NEW_TOKENS", continuations.FEWEST_TOKENS)
        verdict = judge(
            base=base,
            adapter=adapter,
            merged=merged,
            dtype="auto",
            prompts=["One, two,", "a", "b"],  # one token is no text
            evaluation=Evaluation(text=TEXT),
            on_progress=lambda what, share: said.append((what, share)),
        )
    return Told(verdict=verdict, said=said, wall_s=time.monotonic() - start)


def test_every_question_is_asked_and_answered(told: Told) -> None:
    verdict = told.verdict
    assert (verdict.status, verdict.weights, verdict.files) == (Status.PASS,) * 3
    assert [(check.layer.value, check.name, check.outcome.value) for check in verdict.checks] == [
        ("structure", READABLE, "PASS"),
        ("structure", "every tensor has its name, shape and dtype, and none is extra", "PASS"),
        ("structure", "index and headers agree", "PASS"),
        ("structure", "config.json is the base's but for documented keys", "PASS"),
        ("structure", "the tie flag is true to the tensors", "PASS"),
        ("files", "no adapter and no second set of weights", "PASS"),
        ("files", "tokenizer and chat template are the base's or the adapter's", "PASS"),
        ("files", "the generation config is the base's or the adapter's", "PASS"),
        ("files", EVERY_OTHER, "PASS"),
        ("storage", "every adapter tensor is used", "PASS"),
        ("storage", "touched elements are the exact sum, rounded once", "PASS"),
        ("storage", "untouched tensors are the base's", "PASS"),
        ("storage", "no NaN or Inf that the base had not", "PASS"),
        ("storage", "the adapter's change is in the files", "PASS"),
        ("semantics", "PEFT holds the adapter exactly as stored", "PASS"),
        ("semantics", "E does what PEFT's unmerged layer does", "PASS"),
        ("quality", LOSS, "PASS"),
        ("end_to_end", "plain transformers loads the folder", "PASS"),
        ("end_to_end", "the folder computes what round(E) computes", "PASS"),
        ("end_to_end", "the un-rounded merge computes what the unmerged model computes", "PASS"),
        ("end_to_end", "the prompts can see the adapter", "PASS"),
        ("quality", "your prompts were run", "WARN"),
    ]
    assert {check.detail for check in verdict.checks if check.outcome is Outcome.PASS} == {""}
    assert verdict.checks[-1].detail == "2 of your prompts could not be used, the first: 'a'."


def test_what_is_measured_is_in_the_verdict(told: Told) -> None:
    quality = told.verdict.quality
    assert quality is not None
    assert quality.native is not None
    assert quality.perplexity is not None
    assert len(quality.prompts[0].floor) == len("One, two,")
    assert quality.tokens == sum(len(row.error) for row in quality.prompts)
    assert told.verdict.continuations[0].prompt == "One, two,"
    assert [row.name for row in told.verdict.modules] == [
        f"transformer.h.{layer}.{module}" for layer in (0, 1) for module in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    ]
    assert all(row.tensor.removesuffix(".weight").endswith(row.name[-12:]) for row in told.verdict.modules)


def test_the_limits_are_those_that_are_documented() -> None:
    assert GATES == (Layer.STRUCTURE, Layer.FILES, Layer.STORAGE, Layer.SEMANTICS, Layer.END_TO_END)
    assert {"semantics": modules.LIMIT, "end-to-end": outputs.LIMIT} == {"semantics": 1e-6, "end-to-end": 1e-4}
    assert dict(TOLERANCES) == {"semantics": 1e-6, "end-to-end": 1e-4}
    assert (MIN_RETENTION, outputs.NO_POWER, outputs.BEYOND_DOUBT) == (0.9, 1e-3, 1e-2)
    assert modules.PROBES == wrapped.PROBES == 4
    assert modules.MAX_ROWS >= 1024


def test_its_time_is_told(told: Told) -> None:
    assert 0.5 * told.wall_s < told.verdict.wall_s <= told.wall_s


def test_says_how_far_it_is(told: Told) -> None:
    first = dict(reversed(told.said))
    last = dict(told.said)
    assert {what: share for what, share in first.items() if what not in {"storage", "end to end"}} == {
        "reading": 0.0, "loading base and adapter": 0.02, "semantics": 0.08, "structure": 0.1, "native run": 0.95,
        "judged": 1.0,
    }  # fmt: skip
    assert 0.1 < first["storage"] < 0.2
    assert first["end to end"] == 0.4
    assert last["storage"] == pytest.approx(0.4)
    ends = [share for what, share in told.said if what == "end to end"]
    assert ends[-2:] == pytest.approx([0.4 + 0.6 * 0.7, 0.4 + 0.6 * 0.8])
    shares = [share for _, share in told.said]
    assert shares == sorted(shares)


@pytest.fixture(scope="module")
def case(right_merge: Maker) -> Iterator[Case]:
    base, adapter, _ = right_merge("lora")
    with open_case(base, adapter, dtype="auto") as case:
        yield case


def test_without_the_models_it_says_so(case: Case, right_merge: Maker) -> None:
    start = time.monotonic()
    verdict = judge_merge(case, right_merge("lora")[2], end_to_end=False)
    assert verdict.status is Status.NOT_VERIFIED
    assert [check for check in verdict.checks if check.layer is Layer.END_TO_END] == [
        Check(
            layer=Layer.END_TO_END,
            name="end_to_end was judged",
            outcome=Outcome.SKIPPED,
            detail="it was not asked for.",
        )
    ]
    assert 0.0 < verdict.wall_s <= time.monotonic() - start


def test_a_failed_verdict_is_explained_and_another_is_not(case: Case, right_merge: Maker) -> None:
    failed = judge_merge(case, case.base.root, end_to_end=False)
    assert failed.status is Status.FAIL
    assert [found.kind for found in failed.diagnoses] == [Cause.NOT_APPLIED]
    assert judge_merge(case, right_merge("lora")[2], end_to_end=False).diagnoses == ()


def test_a_folder_without_weights_fails_in_an_open_case(case: Case, tmp_path: Path) -> None:
    verdict = judge_merge(case, tmp_path)
    assert verdict.status is Status.FAIL
    assert [check.name for check in verdict.failures] == [READABLE]
    assert {check.layer for check in verdict.checks if check.outcome is Outcome.SKIPPED} == set(Layer)


def test_a_base_that_cannot_be_read_is_an_error_whatever_the_folder_is(right_merge: Maker, tmp_path: Path) -> None:
    _, adapter, merged = right_merge("lora")
    for folder in (tmp_path, merged):
        with pytest.raises(CheckpointError):
            judge(base=tmp_path, adapter=adapter, merged=folder, dtype="auto")


def test_a_row_for_every_module_that_changes_however_little(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], lora(), strength=0.02)
    path = adapter / "adapter_model.safetensors"
    still = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors = load_file(path)
    save_file(tensors | {still: torch.zeros_like(tensors[still])}, path)
    merged = save_merge(tmp_path / "merged", bases["llama"], adapter)

    with open_case(bases["llama"], adapter, dtype="auto") as case:
        verdict = judge_merge(case, merged, end_to_end=False)

    assert [row.name for row in verdict.modules] == [
        f"model.layers.{place}_proj" for place in ("0.self_attn.q", "0.self_attn.v", "1.self_attn.q")
    ]
    assert all(row.probe_error is not None and row.probe_error < 1e-9 < row.delta_ratio for row in verdict.modules)


@pytest.mark.parametrize(
    "kept, outcome", [(0.9, Outcome.PASS), (0.89, Outcome.WARN), (0.0, Outcome.WARN), (1.1, Outcome.PASS)]
)
def test_a_merge_is_lossy_below_nine_tenths(kept: float, outcome: Outcome) -> None:
    check = _retention(Storage(comparisons={"w": Comparison(kept=kept, delta_squared=1.0)}))
    assert (check.layer, check.name, check.outcome) == (Layer.QUALITY, LOSS, outcome)
    assert (check.value, check.limit) == (kept, MIN_RETENTION)
    assert (f"{kept:.1%} survived rounding" in check.detail) == (outcome is Outcome.WARN) == bool(check.detail)


def test_a_merge_without_a_change_of_weights_loses_nothing() -> None:
    assert _retention(Storage(comparisons={"w": Comparison()})).outcome is Outcome.PASS
