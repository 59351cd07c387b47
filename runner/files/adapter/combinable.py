"""Which adapters can be combined without losing a part of them. Reads configs and headers only; no torch.

PEFT's `add_weighted_adapter` combines the low-rank factors and nothing else: it takes the config of the first adapter
and drops, without a word, trained biases, saved modules, trained tokens and magnitudes of all of them. Whatever it
would drop is refused here by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from runner.files.adapter.folder import CONFIG_FILE, Adapter
from runner.protocol.combination import OF_EQUAL_RANKS, Combination
from runner.protocol.errors import AdapterMismatch, UnsupportedAdapter

# Fields that say nothing about the weights, or that are already in the factors, or that are read here.
_HARMLESS = frozenset(
    """peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version r lora_alpha
    lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern
    fan_in_fan_out use_rslora init_lora_weights eva_config loftq_config runtime_config qalora_group_size
    megatron_core""".split()
)
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_LOST: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "a magnitude is relative to the adapter's own direction; PEFT would leave it at the base's norm",
        "modules_to_save": "whole modules have no low-rank factors; PEFT would put the base's in their place",
        "trainable_token_indices": "trained rows have no low-rank factors; PEFT would drop them",
        "bias": "trained biases are no low-rank factors; PEFT would keep them whole, whatever the weight",
        "lora_bias": "PEFT would drop the biases beside the factors",
        "target_parameters": "PEFT combines factors of modules only",
        "ensure_weight_tying": "PEFT would tie the combined factors anew, not as they were trained",
    }
)
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_[AB])")


def check_combinable(adapters: Sequence[Adapter], combination: Combination) -> None:
    """Refuse adapters that cannot be combined exactly as `combination` says.

    Raises:
        UnsupportedAdapter: one of them has something that is no low-rank factor.
        AdapterMismatch: they were trained on different bases, or their ranks do not fit the kind.
    """
    for number, adapter in enumerate(adapters, start=1):
        _check_method(number, adapter)
        _check_fields(number, adapter)
    _check_bases(adapters)
    if combination.kind in OF_EQUAL_RANKS:
        _check_ranks(adapters, combination.kind)


def _check_method(number: int, adapter: Adapter) -> None:
    if adapter.peft_type == "LORA":
        return
    raise UnsupportedAdapter(
        f"Adapter {number} is of type {adapter.peft_type}, and several adapters are to be combined.",
        why="PEFT combines LoRA adapters; for other methods it has no combination, or one that is not of deltas.",
        fix="Merge LoRA adapters only, or release one merge for each adapter.",
    )


def _check_fields(number: int, adapter: Adapter) -> None:
    for field, value in adapter.config.items():
        if field in _HARMLESS or not value or (field == "bias" and value == "none"):
            continue
        raise UnsupportedAdapter(
            f"Adapter {number} sets `{field}` in {CONFIG_FILE}, and several adapters are to be combined.",
            why=f"Combined, it would be lost: {_LOST.get(field, 'it is no part of the low-rank factors')}.",
            fix="Train the adapter without it, or merge it alone, and take the result as the base of the next.",
        )
    init = adapter.config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise UnsupportedAdapter(
            f"Adapter {number} was initialised with {init!r}, and several adapters are to be combined.",
            why="Such an adapter counts from a base that PEFT changes when it is loaded, and each would do so anew.",
            fix="Convert it to a plain LoRA with PEFT (`path_initial_model_for_weight_conversion`), or merge it alone.",
        )


def _check_bases(adapters: Sequence[Adapter]) -> None:
    named = [(number, adapter.base_model) for number, adapter in enumerate(adapters, start=1) if adapter.base_model]
    for number, base in named[1:]:
        first, of_first = named[0]
        if base != of_first:
            raise AdapterMismatch(
                f"Adapter {first} was trained on {of_first!r}, adapter {number} on {base!r}.",
                why="A delta that was trained on one base means nothing on another.",
                fix=f"Combine adapters of one base. If both are the same, correct `base_model_name_or_path` in one "
                f"{CONFIG_FILE}.",
            )


def _check_ranks(adapters: Sequence[Adapter], kind: str) -> None:
    fix = "Set `combination` to `cat`, which keeps every rank, or to `svd`, which reduces them to the largest."
    largest = [_largest_rank(adapter.config) for adapter in adapters]
    if len(set(largest)) > 1:
        raise AdapterMismatch(
            f"The adapters' ranks are {', '.join(map(str, largest))}, and `combination` is `{kind}`.",
            why="It adds the factors element by element, so they must have one shape.",
            fix=fix,
        )
    first: dict[str, tuple[int, int]] = {}
    for number, adapter in enumerate(adapters, start=1):
        for module, rank in _ranks(adapter).items():
            of, before = first.setdefault(module, (number, rank))
            if rank != before:
                raise AdapterMismatch(
                    f"On {module!r} adapter {of} has the rank {before} and adapter {number} the rank {rank}, "
                    f"and `combination` is `{kind}`.",
                    why="It adds the factors element by element, so they must have one shape.",
                    fix=fix,
                )


def _largest_rank(config: Mapping[str, Any]) -> int:
    # PEFT's own rule, which looks at the configs alone.
    return int(max(config.get("r", 8), *(config.get("rank_pattern") or {}).values(), 0))


def _ranks(adapter: Adapter) -> dict[str, int]:
    ranks = {}
    for name, tensor in adapter.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match and match["part"] in ("lora_A.weight", "lora_embedding_A") and tensor.shape:
            ranks[match["module"]] = tensor.shape[0]
    return ranks
