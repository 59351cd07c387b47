"""End to end: the saved folder, through the real loader, gives the outputs that it must give.

Three claims, each on every prompt, in float32, by the worst prompt's relative error (for logits over a vocabulary,
centred rms of their difference over their standard deviation; see `runner.verify.forward` for other heads), at most
1e-4:

- plain transformers loads the folder without a missing, unexpected or mismatched key;
- what it loads computes the same as the same model with round(E) in every touched element that the storage layer would
  not pass, that is, the files hold what they should, under names and a config that bring it to the right place;
- with the un-rounded E in its place, it computes the same as the unmerged PEFT model. A folder that lies about tied
  weights, or whose config computes something else, fails here.

Right merges were measured at 8.5e-6 and below, the weakest real fault at 5.3e-3. Nothing is computed in 16 bits.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from runner.checkpoint.conversion import Group
from runner.verify.chance import Chance
from runner.verify.elements import is_right, rounded_rows
from runner.verify.exact import Exact, ExactStored
from runner.verify.forward import error_of, generates, has_decoder, outputs_of, predicts_tokens
from runner.verify.models import LOAD_ERRORS, Loaded, Unmerged, first_line, load_folder, quiet
from runner.verify.native import Gold
from runner.verify.prompts import Purpose, Questions
from runner.verify.quality import Tally
from runner.verify.sources import Sources
from runner.verify.targets import Target, Targets
from runner.verify.tensors import row_blocks
from runner.verify.verdict import Check, Continuation, Layer, Outcome, Quality

LIMIT = 1e-4
NO_POWER = 1e-3  # an adapter that moves the logits by less than this cannot be told from rounding here
NEW_TOKENS = 24


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
    model = loaded.model.to(device)
    unmerged.model.to(device)
    try:
        tally, ours, theirs = _compare(unmerged, model, questions)
        on_progress(0.5)
        continuations = _continue(unmerged, model, questions) if generates(model) else ()
        on_progress(0.7)
        unmerged.model.to("cpu")
        gc.collect()
        put = _fill(model, sources, targets, rounded=True)
        checks.append(_worst("the folder computes what round(E) computes", model, theirs, questions, put))
        on_progress(0.85)
        put = _fill(model, sources, targets, rounded=False)
        checks.append(
            _worst("the un-rounded merge computes what the unmerged model computes", model, ours, questions, put)
        )
    except LOAD_ERRORS as error:
        checks.append(_check("the folder's model runs", first_line(error)))
        return Outputs(checks=tuple(checks), quality=None, continuations=())
    finally:
        unmerged.model.to("cpu")
    quality = tally.quality(retention, is_cut=questions.is_cut)
    checks.append(_power(quality.effect))
    return Outputs(checks=tuple(checks), quality=quality, continuations=continuations, gold=tally.gold)


def _compare(
    unmerged: Unmerged, model: PreTrainedModel, questions: Questions
) -> tuple[Tally, list[torch.Tensor], list[torch.Tensor]]:
    reference = unmerged.model.get_base_model()
    reads_on = generates(model) and not has_decoder(model)
    tally = Tally(is_language=predicts_tokens(model), reads_on=reads_on)
    unmerged_kept: list[torch.Tensor] = []
    merged_kept: list[torch.Tensor] = []
    has_text = any(sequence.is_text for sequence in questions.sequences)
    for sequence in questions.sequences:
        ours, theirs = outputs_of(reference, sequence), outputs_of(model, sequence)
        if sequence.purpose is Purpose.COMPARISON:
            unmerged_kept.append(ours)
            merged_kept.append(theirs)
        with quiet(), unmerged.model.disable_adapter():
            plain = outputs_of(reference, sequence)
        if sequence.is_text or not has_text:
            width = min(found.shape[-1] for found in (plain, ours, theirs))
            tally.add(sequence, plain[:, :width], ours[:, :width], theirs[:, :width])
    return tally, unmerged_kept, merged_kept


def _worst(
    name: str, model: PreTrainedModel, wanted: list[torch.Tensor], questions: Questions, misplaced: str
) -> Check:
    if misplaced:
        return _check(name, f"the loaded model has no place for {misplaced}")
    worst, label = 0.0, ""
    is_language = predicts_tokens(model)
    for number, sequence in enumerate(questions.compared):
        error = error_of(wanted, outputs_of(model, sequence), number, is_language=is_language)
        if not error <= worst:  # a NaN is the worst there is
            worst, label = error, sequence.label
        if math.isnan(worst):
            break
    passed = worst <= LIMIT
    return Check(
        layer=Layer.END_TO_END,
        name=name,
        outcome=Outcome.PASS if passed else Outcome.FAIL,
        value=worst,
        limit=LIMIT,
        detail="" if passed else f"Relative error {worst:.3g} on the prompt {label[:60]!r}.",
    )


def _fill(model: PreTrainedModel, sources: Sources, targets: Targets, *, rounded: bool) -> str:
    """Put E into the model; return the name of the first tensor that has no place in it, or "".

    Un-rounded also means that tensors which were only cast get the base's values back.
    """
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    groups: dict[Group, None] = {}
    for target in _by_unit(sources, targets):
        exact = _wanted(target, sources, rounded=rounded)
        group = sources.fused.group(target.stored)
        if exact is None:
            continue
        if group is not None:
            groups[group] = None
        else:
            loaded = places.get(target.key) if rounded else None
            keep = loaded if loaded is not None and tuple(loaded.shape) == exact.shape else None
            chance = targets.chance(target) if rounded else None
            if not _put(places, target.key, _values(exact, target.dtype if rounded else "F32", chance, keep)):
                return target.stored
    for group in groups:
        stored = {}
        for name in group.sources:
            target = targets.required[name]
            exact = _wanted(target, sources, rounded=rounded) or sources.of_stored(name)
            chance = targets.chance(target) if rounded else None
            stored[name] = _values(exact, target.dtype if rounded else "F32", chance)
        for key, value in sources.fused.join(group, stored).items():
            if not _put(places, key, value):
                return group.sources[0]
    return ""


def _wanted(target: Target, sources: Sources, *, rounded: bool) -> Exact | None:
    """Return E of a tensor whose loaded value is not to be kept, else None."""
    if target.is_touched:
        return sources.exact_of(target.key, target.base)
    is_known = bool(target.key) or sources.fused.group(target.stored) is not None
    if is_known and not rounded and target.base is not None and target.dtype != target.base.info.dtype:
        return ExactStored(target.base.root, target.base.info)
    return None


def _put(places: Mapping[str, torch.Tensor], key: str, value: torch.Tensor) -> bool:
    place = places.get(key)
    if place is None or place.shape != value.shape:
        return False
    # New memory, because the loader may have given the parameter a view of the file.
    place.data = value.to(place.device)
    return True


def _values(exact: Exact, dtype: str, chance: Chance | None, loaded: torch.Tensor | None = None) -> torch.Tensor:
    """Return E, rounded to `dtype`, as float32 in E's shape.

    Elements of `loaded` (of that shape) that are right by the bound of the storage layer stay: next to a tie, a right
    float32 computation may round the other way than E, and a small model's outputs would show it.
    """
    values = torch.empty(exact.shape or (1,), dtype=torch.float32)
    old = loaded.to("cpu", torch.float32).view(values.shape) if loaded is not None else None
    for start, stop in row_blocks(exact.shape):
        wanted = exact.rows(start, stop)
        values[start:stop] = rounded_rows(wanted, start, dtype, chance).to(torch.float32)
        if old is not None and not torch.equal(values[start:stop], old[start:stop]):
            found, rounded = old[start:stop], values[start:stop]
            right = is_right(found.view(wanted.shape), exact, start, wanted, dtype, chance).view(rounded.shape)
            values[start:stop] = torch.where(right, found, rounded)
    return values.view(exact.shape)


def _by_unit(sources: Sources, targets: Targets) -> Iterator[Target]:
    # Tensors of one PEFT unit one after the other, because only one unit's E is kept.
    yield from sorted(targets.required.values(), key=lambda target: (sources.unit_of(target.key) or "", target.key))


def _continue(unmerged: Unmerged, model: PreTrainedModel, questions: Questions) -> tuple[Continuation, ...]:
    reference = unmerged.model.get_base_model()
    ours = _generate(reference, questions)
    theirs = _generate(model, questions)
    with unmerged.model.disable_adapter():
        plain = _generate(reference, questions)
    asked = (sequence.label for sequence in questions.continued)
    return tuple(
        Continuation(prompt=prompt, base=base, unmerged=mine, merged=found)
        for prompt, base, mine, found in zip(asked, plain, ours, theirs, strict=True)
    )


def _generate(model: PreTrainedModel, questions: Questions) -> list[str]:
    """Return greedy continuations of all prompts, in one batch with padding on the left."""
    rows = [sequence.ids for sequence in questions.continued]
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64, device=next(model.parameters()).device)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
    ends = getattr(model.generation_config, "eos_token_id", None)
    pad = ends[0] if isinstance(ends, list) else ends
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0 if pad is None else pad
    )
    with torch.no_grad(), quiet():
        whole = model.generate(ids, attention_mask=mask, generation_config=config)
    start = 1 if has_decoder(model) else width  # an encoder-decoder writes a text of its own, after a start mark
    return [questions.text(row) for row in torch.as_tensor(whole)[:, start:].cpu()]


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
