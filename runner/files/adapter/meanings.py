"""What an adapter's config meant to the PEFT that wrote it, where releases of PEFT differ.

The same file is another model under another PEFT (docs/decisions/0014-the-peft-that-wrote-a-config.md):

- `rank_pattern` and `alpha_pattern`: one key was looked up in both (LoRA up to 0.13, LoHa and LoKr up to 0.14), and
  keys were not in brackets, so that `^…` matched nothing and `a|b` something else (LoRA up to 0.14);
- LoKr up to 0.13 had no factor alpha/r;
- OFT's Cayley-Neumann series ended in another term in 0.16 and 0.17.

A reading is the config of today's PEFT that gives, in every bit, the weights that another release computed. Merge and
judge see only that. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from runner.files.adapter.eras import PATTERNS_AS_TODAY, TODAY, Era, eras_of, evidence, span, spell
from runner.protocol.errors import UnsupportedAdapter

_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "module"})
_PREFIX = "base_model.model."
_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# How today's releases and older ones look a module up: the expression around a key.
_BRACKETED, _BARE, _BARE_OPTIONAL = r"(.*\.)?({})$", r".*\.{}$", r"(.*\.)?{}$"
# Tensor of a module → the dimension that is its rank.
_RANK_IN = {
    "LORA": {"lora_A": 0, "lora_embedding_A": 0},
    "LOHA": {"hada_w1_b": 0},
    "LOKR": {"lokr_w2_b": 0, "lokr_w1_b": 0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What the config says of one module: `factor` multiplies the product of its factors."""

    rank: int
    alpha: float
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """One meaning of a config: that of `eras`, by module; a key of its own where it is not a factor."""

    eras: tuple[Era, ...]
    scales: Mapping[str, Scale]


def is_scaled(config: Mapping[str, Any]) -> bool:
    """Return whether the adapter's method has a rank and a factor for each module, by patterns."""
    return config.get("peft_type") in _ALPHA


def path_of(name: str) -> list[str]:
    """Return the path of an adapter tensor in the model, without what training wraps around modules."""
    return [part for part in name.removeprefix(_PREFIX).split(".") if part not in _WRAPPERS]


def modules_of(peft_type: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
    """Return the modules that have factors, by their path in the model, each with the rank of its tensors.

    Args:
        peft_type: for example "LORA".
        shapes: tensor by its name in the file → its shape.
    """
    parts = _RANK_IN.get(peft_type, {})
    found: dict[str, int | None] = {}
    for name, shape in shapes.items():
        segments = path_of(name)
        at = next((at for at, part in enumerate(segments) if part.startswith(("lora_", "hada_", "lokr_"))), None)
        if at is None:
            continue
        path, part = ".".join(segments[:at]), segments[at]
        rank = shape[parts[part]] if part in parts and len(shape) > parts[part] else None
        found[path] = found.get(path) if rank is None else rank
    return found


def meanings(config: Mapping[str, Any], ranks: Mapping[str, int | None], eras: Iterable[Era]) -> list[Meaning]:
    """Return what the config means to `eras`, alike ones in one; without those whose ranks are not the tensors'.

    Args:
        config: adapter_config.json.
        ranks: see `modules_of`.
        eras: the oldest first.
    """
    found: list[Meaning] = []
    for era in eras:
        scales = {path: _scale(config, era, path) for path in ranks}
        if any(rank is not None and scales[path].rank != rank for path, rank in ranks.items()):
            continue
        same = next((one for one in found if _factors(one.scales) == _factors(scales)), None)
        if same is None:
            found.append(Meaning(eras=(era,), scales=scales))
        else:
            found[found.index(same)] = Meaning(eras=(*same.eras, era), scales=same.scales)
    return found


def read_config(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], chosen: Era | None
) -> tuple[dict[str, Any], str, Era]:
    """Return the fields to change so that today's PEFT reads the config as its own did, why, and whose rules they are.

    Args:
        config: adapter_config.json.
        shapes: the adapter's tensors.
        chosen: the era whose rules the user asks for; None to find them out.

    Raises:
        UnsupportedAdapter: it can mean different weights and none is chosen, or those of `chosen` cannot be merged.
    """
    if config.get("peft_type") == "OFT":
        _check_series(config, shapes, chosen)
        return {}, "", TODAY
    if not is_scaled(config):
        return {}, "", TODAY
    eras = (chosen,) if chosen else eras_of(config)
    if eras == (TODAY,):
        return {}, "", TODAY
    ranks = modules_of(str(config["peft_type"]), shapes)
    found = meanings(config, ranks, eras)
    if len(found) > 1:
        raise _ambiguous(config, found)
    if not found:
        if chosen is None:
            return {}, "", TODAY  # no release's ranks are the tensors': PEFT says so, with the shapes
        raise _unfit(config, chosen)
    (meaning,) = found
    today = {path: _scale(config, TODAY, path) for path in ranks}
    if _factors(today) == _factors(meaning.scales) and _ranks(today) == _ranks(meaning.scales):
        return {}, "", TODAY
    told = _told(config, meaning, today, is_chosen=chosen is not None)
    return _edits(config, meaning.scales), told, meaning.eras[-1]


def _scale(config: Mapping[str, Any], era: Era, path: str) -> Scale:
    """Return the rank and the scaling that an era gives to one module."""
    peft_type = str(config["peft_type"])
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r_key, alpha_key = keys_of(config, era, path)
    rank, alpha = int(ranks.get(r_key, _rank(config))), alphas.get(alpha_key, config[_ALPHA[peft_type]])
    if peft_type == "LOKR" and era.last <= (0, 13):
        return Scale(rank=rank, alpha=rank, factor=1.0)
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Scale(rank=rank, alpha=alpha, factor=alpha / divisor)


def _rank(config: Mapping[str, Any]) -> int:
    return int(config.get("r") or 8)  # PEFT's default; a rank that is none of the tensors' is refused


def keys_of(config: Mapping[str, Any], era: Era, path: str) -> tuple[str, str]:
    """Return what an era looks up in `rank_pattern` and in `alpha_pattern` for one module; it need not be in there."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    is_lora = config["peft_type"] == "LORA"
    if era.last >= (0, 15):
        return _first(ranks, _BRACKETED, path) or path, _first(alphas, _BRACKETED, path) or path
    if is_lora and era.last == (0, 14):
        return _first(ranks, _BARE, path) or path, _first(alphas, _BARE, path) or path
    key = _first([*ranks, *alphas], _BARE if is_lora else _BARE_OPTIONAL, path)
    key = key or (path if is_lora else path.rpartition(".")[2])
    return key, key


def _first(keys: Iterable[str], expression: str, path: str) -> str | None:
    return next((key for key in keys if _compiled(expression, key).match(path)), None)


@lru_cache(maxsize=1 << 16)
def _compiled(expression: str, key: str) -> re.Pattern[str]:
    # `re` itself keeps 512, and a config can have a key for each of a thousand modules.
    return re.compile(expression.replace("{}", key))


def _factors(scales: Mapping[str, Scale]) -> dict[str, float]:
    return {path: scale.factor for path, scale in scales.items()}


def _ranks(scales: Mapping[str, Scale]) -> dict[str, int]:
    return {path: scale.rank for path, scale in scales.items()}


def _edits(config: Mapping[str, Any], scales: Mapping[str, Scale]) -> dict[str, Any]:
    """Return patterns of whole paths that give every module its own rank and alpha under today's rules."""
    alpha = _ALPHA[str(config["peft_type"])]
    rank = _rank(config)
    default = rank if config["peft_type"] == "LOKR" and all(s.alpha == s.rank for s in scales.values()) else None
    default = config[alpha] if default is None else default
    key: Callable[[str], str] = lambda path: f"^{re.escape(path)}"  # noqa: E731
    return {
        alpha: default,
        "rank_pattern": {key(path): one.rank for path, one in sorted(scales.items()) if one.rank != rank},
        "alpha_pattern": {key(path): one.alpha for path, one in sorted(scales.items()) if one.alpha != default},
    }


def _fields(config: Mapping[str, Any]) -> str:
    """Return the fields whose meaning differs, as code."""
    named = [field for field in ("rank_pattern", "alpha_pattern") if config.get(field)]
    return " and ".join(f"`{field}`" for field in (["alpha"] if config["peft_type"] == "LOKR" else []) + named)


def _ambiguous(config: Mapping[str, Any], found: list[Meaning]) -> UnsupportedAdapter:
    first, *others = (meaning.scales for meaning in found)
    paths = [path for path in first if any(other[path].factor != first[path].factor for other in others)]
    shown = "; ".join(
        f"under PEFT {span(meaning.eras)} {', '.join(_shown(path, meaning.scales) for path in paths[:2])}"
        for meaning in found
    )
    ways = ", ".join(f"`peft={spell(one.eras[-1].last)}` for PEFT {span(one.eras)}" for one in found)
    return UnsupportedAdapter(
        f"What {_fields(config)} of the adapter's config asks for depends on the release of PEFT, on {len(paths)} of "
        f"{len(first)} modules: {shown}.",
        why=f"Nothing says which of them trained it. {evidence(config)}",
        fix=f"Find out which PEFT trained it, and add that to `allow`: {ways}.",
    )


def _shown(path: str, scales: Mapping[str, Scale]) -> str:
    return f"{path!r} × {scales[path].factor:.4g}"


def _told(config: Mapping[str, Any], meaning: Meaning, today: Mapping[str, Scale], *, is_chosen: bool) -> str:
    changed = sorted(path for path, scale in meaning.scales.items() if scale != today[path])
    why = "as `allow` says" if is_chosen else "the only PEFT that can have written it"
    return (
        f"The adapter's {_fields(config)} is read as PEFT {span(meaning.eras)} did ({why}): {len(changed)} of "
        f"{len(today)} modules get another factor than today's PEFT gives, the first "
        f"{_shown(changed[0], meaning.scales)} (not {today[changed[0]].factor:.4g})."
    )


def _unfit(config: Mapping[str, Any], era: Era) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"`allow` says that PEFT {span((era,))} wrote the adapter, but its {_fields(config) or '`r`'} under those "
        "rules asks for other ranks than its tensors have.",
        why="That release could not have loaded the adapter either.",
        fix="Take the `peft=` entry out of `allow`, or name the release that trained the adapter.",
    )


def _check_series(config: Mapping[str, Any], shapes: Iterable[str], chosen: Era | None) -> None:
    """Refuse an OFT adapter whose series may have ended in another term where it was trained."""
    is_series = config.get("use_cayley_neumann", True) and config.get("num_cayley_neumann_terms", 5) > 2
    if not is_series or not any(".oft_R." in name for name in shapes):  # PEFT 0.15 and earlier wrote `oft_r`
        return
    eras = (chosen,) if chosen else eras_of(config)
    if PATTERNS_AS_TODAY not in eras:
        return
    can_be_today = TODAY in eras
    ours = f"If PEFT {span((TODAY,))} trained it, add `peft={spell(TODAY.last)}` to `allow`; else merge"
    raise UnsupportedAdapter(
        "The adapter's `use_cayley_neumann` and `num_cayley_neumann_terms` "
        f"{'can mean' if can_be_today else 'mean'} rotations that only PEFT 0.16 and 0.17 compute.",
        why=f"Since PEFT 0.18 the last term of the series counts once, before that twice. {evidence(config)}",
        fix=f"{ours if can_be_today else 'Merge'} it with the PEFT that trained it, and release that.",
    )
