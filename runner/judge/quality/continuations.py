"""Greedy continuations by base, unmerged and merged model, for the human reader; they gate nothing.

A new token takes the whole model, so a model that does not fit into memory several times is read from disk once for
each. Such a model continues fewer tokens, and none where even a few would take longer than all the rest of the
judgement. The merged model is asked for all tokens of the unmerged one's text at once, and generates only from where it
would have written something else: the same text, from one forward where the merge is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from runner.judge.forward import has_decoder
from runner.judge.prompts import Questions
from runner.judge.quality.native import free_bytes
from runner.judge.streaming.models import LOAD_ERRORS, first_line, quiet
from runner.judge.streaming.slots import put
from runner.judge.streaming.stream import Origin, Stream, Task, on_device
from runner.judge.variants import Models
from runner.protocol.verdict import Check, Continuation, Layer, Outcome

NEW_TOKENS = 24
FEWEST_TOKENS = 4
WHOLE_BYTES = 1 << 30  # of float32 weights that may be held at a time, however little memory is free
Rows = list[torch.Tensor]  # token ids, a text each
READ_PARAMETERS = 12_000_000_000  # that are read again and again for all new tokens together, of each checkpoint


def continue_texts(models: Models, questions: Questions) -> tuple[tuple[Continuation, ...], tuple[Check, ...]]:
    """Return the continuations, and, where there are none, a check that says why: they gate nothing."""
    try:
        return _continued(models, questions)
    except LOAD_ERRORS as error:
        said = first_line(error).rstrip(" .")
        return (), (_left_out(f"No text was continued, which is no fault of the merge: transformers says {said!r}."),)


def _continued(models: Models, questions: Questions) -> tuple[tuple[Continuation, ...], tuple[Check, ...]]:
    parameters = sum(parameter.numel() for parameter in models.loaded.model.parameters())
    is_small = 4 * parameters <= room_bytes(models.device)
    tokens = NEW_TOKENS if is_small else min(NEW_TOKENS, READ_PARAMETERS // parameters)
    if tokens < FEWEST_TOKENS:
        size = f"{parameters / 1e9:.1f} billion parameters"
        why = f"The model has {size}, and every new token would read them all from disk again."
        return (), (_left_out(why),)
    prompts = [sequence.ids for sequence in questions.continued]

    def run(compute: Callable[[Any], Rows], *origins: Origin) -> dict[str, Rows]:
        if is_small:
            return {name: rows for one in origins for name, rows in _in_memory(one, compute, models.device).items()}
        stream = Stream(origins=origins, device=models.device)
        return next(rows for _, rows in stream.results([Task(compute=compute, tokens=len(prompts))]))

    generate = partial(_generate, prompts=prompts, tokens=tokens, device=models.device)
    plain, attached, merged = models.alone
    made = run(generate, plain, attached) if is_small else run(generate, models.base)
    made |= run(partial(_follow, draft=made["unmerged"], prompts=prompts, tokens=tokens, device=models.device), merged)
    asked = (sequence.label for sequence in questions.continued)
    texts = zip(asked, *(questions.texts(made[name]) for name in ("base", "unmerged", "merged")), strict=True)
    return tuple(Continuation(prompt=ask, base=one, unmerged=two, merged=three) for ask, one, two, three in texts), ()


def _in_memory(origin: Origin, compute: Callable[[Any], Rows], device: str) -> dict[str, Rows]:
    """Return the tokens of an origin's variants, each in memory as a whole: an encoder is called beside the model."""
    made: dict[str, Rows] = {}
    values = origin.read(origin.variants[0].places, device)
    for variant in origin.variants:
        if variant.change is not None:
            variant.change(values)
        with put(variant.places, values), on_device(variant.model.modules(), device), quiet(), torch.no_grad():
            made[variant.name] = compute(variant.model)
    return made


def room_bytes(device: str) -> int:
    """Return the memory for one model's weights; a continuation holds little else."""
    free = free_bytes(device)
    return max(WHOLE_BYTES, free // 4) if device == "cpu" else free // 2


def _follow(model: Any, *, draft: Rows, prompts: Rows, tokens: int, device: str) -> Rows:
    """Return greedy continuations: what agrees with a draft from one forward, the rest generated from there on."""
    if has_decoder(model):
        return _generate(model, prompts=prompts, tokens=tokens, device=device)
    ends = _ends(model)
    wanted = [_until(row, ends) for row in draft]
    made = [row[: _agreeing(model, prompt, row, device)] for prompt, row in zip(prompts, wanted, strict=True)]
    left = [place for place, row in enumerate(wanted) if len(made[place]) < len(row)]
    for place in left:
        start = torch.cat([prompts[place], made[place]])
        (rest,) = _generate(model, prompts=[start], tokens=tokens - len(made[place]), device=device)
        made[place] = torch.cat([made[place], rest])
    return made


def _agreeing(model: Any, prompt: torch.Tensor, draft: torch.Tensor, device: str) -> int:
    """Return how many tokens of a draft the model would have written, too."""
    ids = torch.cat([prompt, draft[:-1]])[None].to(device)
    takes = inspect.signature(model.forward).parameters
    logits = model(input_ids=ids, **({"use_cache": False} if "use_cache" in takes else {})).logits[0]
    own = logits[len(prompt) - 1 :].argmax(-1).cpu()
    return int((own == draft).long().cumprod(0).sum())


def _until(row: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Return the tokens up to the first end mark, that one included; behind it is padding."""
    stop = next((place + 1 for place, token in enumerate(row.tolist()) if token in ends), len(row))
    return row[:stop]


def _ends(model: Any) -> tuple[int, ...]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def _generate(model: Any, *, prompts: Rows, tokens: int, device: str) -> Rows:
    """Return greedy continuations of all prompts, in one batch with padding on the left."""
    width = max(len(row) for row in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64, device=device)
    for number, row in enumerate(prompts):
        ids[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
    ends = getattr(model.generation_config, "eos_token_id", None)
    pad = ends[0] if isinstance(ends, list) else ends
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0 if pad is None else pad,
        decoder_start_token_id=_start(model),
    )
    whole = model.generate(ids, attention_mask=mask, generation_config=config)
    start = 1 if has_decoder(model) else width  # an encoder-decoder writes a text of its own, after a start mark
    return list(torch.as_tensor(whole)[:, start:].cpu())


def _start(model: Any) -> int | None:
    """Return the start mark of a decoder: what its configs say, else the pad, which T5 and its kin are trained with."""
    if not has_decoder(model):
        return None
    holders = (model.generation_config, model.config)
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    found = (getattr(holder, name, None) for name in names for holder in holders)
    return next((mark for mark in found if isinstance(mark, int)), 0)


def _left_out(why: str) -> Check:
    return Check(
        layer=Layer.QUALITY,
        name="texts were continued",
        outcome=Outcome.SKIPPED,
        detail=f"{why} Continuations gate nothing.",
    )
