"""How much anonymous memory a judgement takes, from shapes alone; docs/memory.md explains the terms.

The judge (`runner.judge`) holds the adapter, one stage of the model in float32 (a layer, an embedding or the head),
the hidden states of four variants of the model, and logits by groups; at another time, one merge unit in float64. The
constants are what its modules do, counted from above; `tests/e2e/test_memory_limit.py` holds them against a cgroup.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

RUNTIME_BYTES = 768 << 20  # torch, transformers, peft, the skeletons of the models, blocks of 8 MiB
LOGITS_BYTES = 256 << 20  # that exist at a time, over all variants (`runner.judge.streaming.stream.GROUP_BYTES`)
VARIANTS = 4  # base, unmerged, merged, and the merged model with E
PROMPT_TOKENS = 128  # the longest prompt (`runner.judge.prompts.MAX_TOKENS`)
WAVE_TOKENS = 2048  # that go through the layers together (`runner.judge.streaming.stream.WAVE_TOKENS`)
COPIES_OF_STATES = 3  # hidden states of a run: at the stage's entrance, the residual, the stage's output
ROW_BYTES = 128  # of a logit in the comparison: float32 of four variants, float64 and temporaries
WHOLE_BYTES = 1 << 30  # a model up to this size is held whole to continue texts (`runner.judge.quality.continuations`)
TOUCHED_BYTES = 8  # of a parameter while E takes its place: as loaded, and E
CLOSED_BYTES = 12  # of a parameter of a plain LoRA unit while it is probed: as stored, and in float64
OTHER_BYTES = 56  # of any other unit's: PEFT's own merge of it in float64 and float32
FUSED_BYTES = 24  # of a computed parameter: as loaded, split, filled with E, joined again

_LAYER = re.compile(r"(?P<layer>.*?\.\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A merge unit as the judge sees it: keys of its parameters, and whether it is plain LoRA."""

    keys: tuple[str, ...]
    is_closed: bool


def judge_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    computed: Collection[str],
    units: Collection[Part],
    adapter_bytes: int,
    vocabulary: int,
    hidden: int,
    holds_base: bool,
) -> int:
    """Return the anonymous memory of a judgement, runtime included; from above.

    Args:
        shapes: of the base's parameters by key; tied ones once or twice.
        computed: keys that are computed from several stored tensors.
        units: what PEFT put in place.
        adapter_bytes: the adapter in memory.
        vocabulary: rows of the output embedding; 0 for a model without.
        hidden: width of the hidden states.
        holds_base: whether the method needs the whole base in float32.
    """
    elements = {key: prod(shape) for key, shape in shapes.items()}
    touched = {key: TOUCHED_BYTES if unit.is_closed else OTHER_BYTES for unit in units for key in unit.keys}
    sizes: dict[str, int] = defaultdict(int)
    largest: dict[str, int] = defaultdict(int)
    for key, count in elements.items():
        stage = stage_of(key)
        sizes[stage] += count * (FUSED_BYTES if key in computed else 4)
        largest[stage] = max(largest[stage], count * touched.get(key, 0))
    stage_bytes = max((sizes[stage] + largest[stage] for stage in sizes), default=0)
    states = VARIANTS * COPIES_OF_STATES * 4 * WAVE_TOKENS * hidden
    logits = LOGITS_BYTES + PROMPT_TOKENS * vocabulary * ROW_BYTES if vocabulary else 0
    total = 4 * sum(elements.values())
    unit_bytes = max(
        (
            sum(elements.get(key, 0) for key in unit.keys) * (CLOSED_BYTES if unit.is_closed else OTHER_BYTES)
            for unit in units
        ),
        default=0,
    )
    forward = max(stage_bytes + states + logits, total if total <= WHOLE_BYTES else 0)
    return RUNTIME_BYTES + adapter_bytes + max(forward, unit_bytes) + (total if holds_base else 0)


def stage_of(key: str) -> str:
    """Return the layer that a key of the state dict belongs to; outside of layers, its module."""
    layer = _LAYER.match(key)
    return layer["layer"] if layer else key.rpartition(".")[0]
