"""The fields of an adapter_config.json that decide a merge: each of the type that PEFT means, or refused by name.

PEFT takes what it finds; a rank that is text, a pattern that is a list or an expression that does not compile shows
as an error deep inside it, and a scaling that is NaN does not show at all. What no field of this table says is left to
PEFT. No torch.

Source: `peft.PeftConfig`, `LoraConfig` and their subclasses in peft 0.21.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from runner.protocol.errors import BrokenAdapter

_EXPRESSIONS = ("target_modules", "exclude_modules")  # an expression where they are text, else a list of names
_PATTERNS = ("rank_pattern", "alpha_pattern")  # their keys are expressions
_MAX_KEYS = 20_000
# Method → the fields that its change is multiplied by; every PEFT writes them.
_STRENGTHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("LORA", "ADALORA"), ("lora_alpha",)),
        **dict.fromkeys(("LOHA", "LOKR", "GRALORA"), ("alpha",)),
        **dict.fromkeys(("FOURIERFT", "WAVEFT", "PEANUT"), ("scaling",)),
        "RANDLORA": ("randlora_alpha",),
        "PSOFT": ("psoft_alpha",),
    }
)


def check_fields(config: Mapping[str, Any]) -> None:
    """Check every field that this room knows.

    Raises:
        BrokenAdapter: a field has a value that PEFT cannot mean.
    """
    own = _OF_ADALORA if config.get("peft_type") == "ADALORA" else {}
    for field, (is_right, wanted) in {**_FIELDS, **own}.items():
        value = config.get(field)
        if value is not None and not is_right(value):
            raise _wrong(field, value, f"It must be {wanted}.")
    for field in _STRENGTHS.get(str(config.get("peft_type")), ()):
        if config.get(field) is None:
            raise BrokenAdapter(
                f"The adapter's config has no `{field}`.",
                why="Nothing else says how strong its change is; PEFT would take its default, which is a guess.",
                fix=f"Write `{field}` into adapter_config.json, with the value that the adapter was trained with.",
            )
    for field in _PATTERNS:
        if len(config.get(field) or ()) > _MAX_KEYS:
            raise _wrong(field, f"{len(config[field])} keys", f"More than {_MAX_KEYS} keys are not looked up.")
    for field, expression in _expressions(config):
        try:
            re.compile(expression)
        except re.error as error:
            raise _wrong(field, expression, f"As a regular expression it is broken: {error}.") from error


def whole_ranks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ranks that are written as 8.0, as whole numbers: PEFT makes tensors of these shapes."""
    edits: dict[str, Any] = {}
    if isinstance(config.get("r"), float):
        edits["r"] = int(config["r"])
    ranks = config.get("rank_pattern")
    if isinstance(ranks, dict) and any(isinstance(rank, float) for rank in ranks.values()):
        edits["rank_pattern"] = {key: int(rank) if isinstance(rank, float) else rank for key, rank in ranks.items()}
    return edits


def check_rank(config: Mapping[str, Any], shapes: Iterable[tuple[int, ...]]) -> None:
    """Check that the ranks of a LoRA adapter can be those of its tensors, and that those of LoHa and LoKr are not 0.

    PEFT makes room for the ranks before it looks at the tensors, so a rank of a billion would take all memory.

    Raises:
        BrokenAdapter: a rank is 0, or above every dimension of every tensor.
    """
    if config.get("peft_type") not in ("LORA", "LOHA", "LOKR"):
        return
    largest = max((size for shape in shapes for size in shape), default=0)
    ranks = {"r": config.get("r"), **(config.get("rank_pattern") or {})}
    for name, rank in ranks.items():
        if rank == 0:
            raise _wrong(name, rank, "A rank of 0 has no change.")
        if config["peft_type"] == "LORA" and _is_rank(rank) and rank > largest:
            field = "r" if name == "r" else f"rank_pattern[{name[:80]!r}]"
            raise _wrong(field, rank, f"No tensor of the adapter has a dimension above {largest}.")


def _expressions(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for field in _EXPRESSIONS:
        if isinstance(config.get(field), str):
            yield field, config[field]
    for field in _PATTERNS:
        yield from ((field, f"(.*\\.)?({key})$") for key in config.get(field) or ())  # as PEFT puts it together


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_count(value: object) -> bool:
    return (type(value) is int and value >= 0) or (type(value) is float and value.is_integer() and value >= 0)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_list_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(check(entry) for entry in value)


def _is_map_to(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(check(entry) for entry in value.values())


def _or(*checks: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: any(check(value) for check in checks)


_NAMES = (_or(_is_text, _is_list_of(_is_text)), "text or a list of names")
_FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = MappingProxyType(
    {
        "peft_type": (_is_text, "the name of a method, such as LORA"),
        "task_type": (_is_text, "the name of a task, such as CAUSAL_LM"),
        "base_model_name_or_path": (_is_text, "text"),
        "revision": (_is_text, "text"),
        "r": (_is_count, "a whole number, not below 0"),  # OFT's is 0 where its block size is set
        "lora_alpha": (_is_number, "a finite number"),
        "alpha": (_is_number, "a finite number"),
        "rank_pattern": (_is_map_to(_is_rank), "an object of whole numbers above 0"),
        "alpha_pattern": (_is_map_to(_is_number), "an object of finite numbers"),
        "target_modules": _NAMES,
        "exclude_modules": _NAMES,
        "layers_pattern": _NAMES,
        "modules_to_save": (_is_list_of(_is_text), "a list of names"),
        "target_parameters": (_is_list_of(_is_text), "a list of names"),
        "use_rslora": (_is_flag, "true or false"),
        "use_dora": (_is_flag, "true or false"),
        "fan_in_fan_out": (_is_flag, "true or false"),
        "lora_bias": (_is_flag, "true or false"),
        "bias": (_is_text, "text"),
    }
)

# AdaLoRA keeps the singular values that are left of each module there.
_OF_ADALORA: Mapping[str, tuple[Callable[[object], bool], str]] = MappingProxyType(
    {"rank_pattern": (_is_map_to(_is_list_of(_is_flag)), "an object of lists of true and false")}
)


def _wrong(field: str, value: object, why: str) -> BrokenAdapter:
    return BrokenAdapter(
        f"The adapter's config sets `{field}` to {str(value)[:200]!r}.",
        why=why,
        fix="Save the adapter again with PEFT; if its config was written by hand, correct that field.",
    )
