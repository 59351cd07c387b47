"""Greedy continuations by base, unmerged and merged model, for the human reader; they gate nothing.

A new token takes the whole model, so a model that does not fit into `WHOLE_BYTES` is read from disk once for each. Such
a model continues fewer tokens, and none where even a few would take longer than all the rest of the judgement.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from runner.judge.forward import has_decoder
from runner.judge.prompts import Questions
from runner.judge.streaming.models import LOAD_ERRORS, first_line, quiet
from runner.judge.streaming.slots import put
from runner.judge.streaming.stream import Origin, Stream, Task, on_device
from runner.judge.variants import Models
from runner.protocol.verdict import Check, Continuation, Layer, Outcome

NEW_TOKENS = 24
FEWEST_TOKENS = 4
WHOLE_BYTES = 1 << 30  # of float32 weights that are held at a time
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
    is_small = 4 * parameters <= _room_bytes(models.device)
    tokens = NEW_TOKENS if is_small else min(NEW_TOKENS, READ_PARAMETERS // parameters)
    if tokens < FEWEST_TOKENS:
        size = f"{parameters / 1e9:.1f} billion parameters"
        why = f"The model has {size}, and every new token would read them all from disk again."
        return (), (_left_out(why),)
    generate = partial(_generate, questions=questions, tokens=tokens, device=models.device)
    made: dict[str, list[str]] = {}
    if is_small:
        for origin in models.alone:
            made |= _in_memory(origin, generate, models.device)
    else:
        stream = Stream(origins=(models.base, models.merged()), device=models.device)
        made |= next(texts for _, texts in stream.results([Task(compute=generate, tokens=len(questions.continued))]))
    asked = (sequence.label for sequence in questions.continued)
    texts = zip(asked, made["base"], made["unmerged"], made["merged"], strict=True)
    return tuple(Continuation(prompt=ask, base=one, unmerged=two, merged=three) for ask, one, two, three in texts), ()


def _in_memory(origin: Origin, generate: Callable[[Any], list[str]], device: str) -> dict[str, list[str]]:
    """Return the texts of an origin's variants, each in memory as a whole: an encoder is called beside the model."""
    made: dict[str, list[str]] = {}
    values = origin.read(origin.variants[0].places, device)
    for variant in origin.variants:
        if variant.change is not None:
            variant.change(values)
        with put(variant.places, values), on_device(variant.model.modules(), device), quiet(), torch.no_grad():
            made[variant.name] = generate(variant.model)
    return made


def _room_bytes(device: str) -> int:
    return WHOLE_BYTES if device == "cpu" else torch.cuda.mem_get_info()[0] // 2


def _generate(model: Any, *, questions: Questions, tokens: int, device: str) -> list[str]:
    """Return greedy continuations of all prompts, in one batch with padding on the left."""
    rows = [sequence.ids for sequence in questions.continued]
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64, device=device)
    for number, row in enumerate(rows):
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
    return questions.texts(list(torch.as_tensor(whole)[:, start:].cpu()))


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
