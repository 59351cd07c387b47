"""End to end: the saved folder, through the real loader, gives the outputs that it must give.

Three claims, each on every prompt, in float32, by the worst prompt's relative error (for logits over a vocabulary,
centred rms of their difference over their standard deviation; see `runner.judge.forward` for other heads), at most
1e-4:

- plain transformers loads the folder without a missing, unexpected or mismatched key;
- what it loads computes the same as the same model with round(E) in every touched element that the storage layer would
  not pass, that is, the files hold what they should, under names and a config that bring it to the right place;
- with the un-rounded E in its place, it computes the same as the unmerged PEFT model. A folder that lies about tied
  weights, or whose config computes something else, fails here.

Right merges were measured at 8.5e-6 and below, but for one on a prompt of one word (1.3e-4); the weakest real fault at
5.3e-3. So what lies between the limit and 1e-2 is computed once more, in float64. Nothing is computed in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from runner.judge.distances import Tally
from runner.judge.expected.filling import Filling
from runner.judge.expected.sources import Sources
from runner.judge.expected.targets import Targets
from runner.judge.expected.unmerged import Unmerged
from runner.judge.forward import Errors, generates, has_decoder, outputs_of, predicts_tokens, without_common_nan
from runner.judge.prompts import Purpose, Questions, TokenSequence
from runner.judge.quality.continuations import continue_texts
from runner.judge.quality.native import Gold
from runner.judge.streaming.loader import Loaded, load_folder
from runner.judge.streaming.models import LOAD_ERRORS, first_line
from runner.judge.streaming.stream import Stream, Task
from runner.judge.variants import Models
from runner.protocol.verdict import Check, Continuation, Layer, Outcome, Quality

LIMIT = 1e-4
BEYOND_DOUBT = 1e-2  # no rounding to float32 gives that
NO_POWER = 1e-3  # an adapter that moves the logits by less than this cannot be told from rounding here
ROUNDED = "the folder computes what round(E) computes"
UNROUNDED = "the un-rounded merge computes what the unmerged model computes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What this layer found.

    Attributes:
        checks: its checks.
        quality: None where the folder could not be loaded.
        continuations: for the human reader.
        gold: sequences, and the unmerged model's logits on them.
    """

    checks: tuple[Check, ...]
    quality: Quality | None
    continuations: tuple[Continuation, ...]
    gold: Gold = ()


def judge_outputs(
    *,
    unmerged: Unmerged,
    merged: Path,
    sources: Sources,
    targets: Targets,
    questions: Questions,
    retention: float,
    device: str,
    on_progress: Callable[[float], None],
) -> Outputs:
    """Run the models and compare.

    Args:
        unmerged: the reference; runs on `device` and is back on the CPU afterwards.
        merged: the merged folder.
        sources: E of every touched parameter.
        targets: what the folder must hold.
        questions: what to run.
        retention: overall, for the quality figures.
        device: "cpu" or "cuda".
        on_progress: told the share of this layer that is done.
    """
    try:
        loaded = load_folder(merged)
    except LOAD_ERRORS as error:
        return Outputs(
            checks=(_check("plain transformers loads the folder", first_line(error)),), quality=None, continuations=()
        )
    checks = [_loading(unmerged.base, loaded, targets)]
    models = Models(unmerged=unmerged, loaded=loaded, filling=Filling(loaded, sources, targets), device=device)
    try:
        found = _compare(models, questions, lambda share: on_progress(0.7 * share))
        if not found.has_numbers:
            checks.append(_without_outputs("it computes nothing but NaN"))
            return Outputs(checks=tuple(checks), quality=None, continuations=())
        checks.append(_rounded(models, questions))
        _look_twice(models, questions, found)
        checks.append(_claim(UNROUNDED, found.exact, models.filling.misplaced))
        on_progress(0.8)
        continuations, left_out = _continue(models, questions)
        checks.extend(left_out)
    except LOAD_ERRORS as error:
        checks.append(_stopped(models, questions, first_line(error)))
        return Outputs(checks=tuple(checks), quality=None, continuations=())
    quality = found.tally.quality(retention, is_cut=questions.is_cut)
    checks.append(_power(quality.effect))
    return Outputs(checks=tuple(checks), quality=quality, continuations=continuations, gold=found.tally.gold)


@dataclass(slots=True, kw_only=True)
class _Found:
    """What one pass over all sequences gave; `has_numbers` where the base computes something else than NaN."""

    tally: Tally
    exact: Errors
    numbers: list[int] = field(default_factory=list)  # of the sequences in `exact`, in its order
    has_numbers: bool = False


def _compare(models: Models, questions: Questions, on_stage: Callable[[float], None]) -> _Found:
    """Run base, unmerged, merged and un-rounded merge on every sequence; hold only what the figures need."""
    model = models.loaded.model
    is_language = predicts_tokens(model)
    reads_on = generates(model) and not has_decoder(model)
    found = _Found(tally=Tally(is_language=is_language, reads_on=reads_on), exact=Errors(is_language=is_language))
    has_text = any(sequence.is_text for sequence in questions.sequences)
    changes = () if models.filling.misplaced else ("exact",)
    stream = Stream(origins=(models.base, models.merged(*changes)), device=models.device, on_stage=on_stage)
    tasks = [
        replace(task, variants=None if one.is_text or not has_text or not changes else frozenset({"unmerged", "exact"}))
        for task, one in zip(_tasks(models, questions.sequences), questions.sequences, strict=True)
    ]  # of noise beside texts, nobody looks at what base and merged make of it
    for number, outputs in stream.results(tasks):
        sequence = questions.sequences[number]
        found.has_numbers |= not bool(next(iter(outputs.values())).isnan().all())
        made = without_common_nan(outputs)
        if changes and sequence.purpose is Purpose.COMPARISON:
            found.exact.add(made["unmerged"], made["exact"], sequence.label)
            found.numbers.append(number)
        if sequence.is_text or not has_text:
            width = min(output.shape[-1] for output in made.values())
            base, ours, theirs, *exact = (output[:, :width] for output in made.values())
            found.tally.add(sequence, base, ours, theirs, *exact)
    return found


def _look_twice(models: Models, questions: Questions, found: _Found) -> None:
    """Run sequences in doubt again, in float64: there rounding is far below the limit, and a fault is where it was.

    Where a model cancels large numbers (few tokens, massive activations), the order of float32 sums alone was measured
    to be 1.3e-4 of the logits' spread.
    """
    places = found.exact.between(LIMIT, BEYOND_DOUBT)
    if not places:
        return
    sequences = [questions.sequences[found.numbers[place]] for place in places]
    dtype = torch.float64
    stream = Stream(origins=(models.base, models.merged("exact")), device=models.device, dtype=dtype)
    for number, outputs in stream.results(_tasks(models, sequences, dtype)):
        made = without_common_nan(outputs)
        found.exact.replace(places[number], made["unmerged"], made["exact"])


def _stopped(models: Models, questions: Questions, problem: str) -> Check:
    """Return what it says that a model did not run: nothing of the folder, where the base does not run either."""
    stream = Stream(origins=(models.base,), device=models.device)
    try:
        for _ in stream.results(_tasks(models, questions.sequences)):
            pass
    except LOAD_ERRORS as error:
        return _without_outputs(first_line(error))
    return _check("the folder's model runs", problem)


def _without_outputs(reason: str) -> Check:
    return Check(
        layer=Layer.END_TO_END,
        name="the models run",
        outcome=Outcome.SKIPPED,
        detail=f"The base itself does not run on what the judge can give it: {reason}",
    )


def _rounded(models: Models, questions: Questions) -> Check:
    """Hold the folder's outputs against those of round(E): the same values give the same outputs, without a run."""
    errors = Errors(is_language=predicts_tokens(models.loaded.model))
    if models.filling.differs:
        stream = Stream(origins=(models.merged("rounded"),), device=models.device)
        for number, outputs in stream.results(_tasks(models, questions.compared)):
            made = without_common_nan(outputs)
            errors.add(made["merged"], made["rounded"], questions.compared[number].label)
    return _claim(ROUNDED, errors, models.filling.misplaced)


def _tasks(models: Models, sequences: Sequence[TokenSequence], dtype: torch.dtype = torch.float32) -> list[Task]:
    return [
        Task(compute=partial(outputs_of, sequence=one, device=models.device, dtype=dtype), tokens=len(one.ids))
        for one in sequences
    ]


def _claim(name: str, errors: Errors, misplaced: str) -> Check:
    if misplaced:
        return _check(name, f"the loaded model has no place for {misplaced}")
    worst, label = errors.worst()
    passed = worst <= LIMIT
    return Check(
        layer=Layer.END_TO_END,
        name=name,
        outcome=Outcome.PASS if passed else Outcome.FAIL,
        value=worst,
        limit=LIMIT,
        detail="" if passed else f"Relative error {worst:.3g} on the prompt {label[:60]!r}.",
    )


def _continue(models: Models, questions: Questions) -> tuple[tuple[Continuation, ...], tuple[Check, ...]]:
    """Return the continuations, or why there are none."""
    if not generates(models.loaded.model):
        return (), ()
    return continue_texts(models, questions)


def _loading(base: Loaded, loaded: Loaded, targets: Targets) -> Check:
    own = {target.key for target in targets.required.values() if target.base is None}
    problems = [f"missing {key}" for key in loaded.missing if key not in base.missing or key in own]
    problems += [f"unexpected {key}" for key in loaded.unexpected if key not in base.unexpected]
    problems += [f"mismatched {key}" for key in loaded.mismatched]
    if type(loaded.model) is not type(base.model):
        problems.append(f"it is a {type(loaded.model).__name__}, the base a {type(base.model).__name__}")
    return _check("plain transformers loads the folder", "; ".join(problems[:5]))


def _power(effect: float) -> Check:
    weak = effect < NO_POWER
    return Check(
        layer=Layer.END_TO_END,
        name="the prompts can see the adapter",
        outcome=Outcome.WARN if weak else Outcome.PASS,
        value=effect,
        detail=f"No power: the adapter moves the outputs by less than {NO_POWER:g}, so this layer cannot tell a merge "
        "from the base; storage and semantics can, and do."
        if weak
        else "",
    )


def _check(name: str, problem: str) -> Check:
    return Check(layer=Layer.END_TO_END, name=name, outcome=Outcome.FAIL if problem else Outcome.PASS, detail=problem)
