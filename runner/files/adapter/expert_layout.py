"""How an adapter packs the factors of a layer's experts: what its shapes, its PEFT version and its marker say.

A stack of experts W has the shape (experts, m, n). Programs have written two orientations of the factors,

    direct       A is (experts·r, n), B is (m, experts·r):  ΔW[e] = s · B_e·A_e
    transposed   A is (experts·r, m), B is (n, experts·r):  ΔW[e] = s · (B_e·A_e)ᵀ

and two orders of the columns of B: `rank_major`, PEFT's own, where B_e is every experts-th column from the e-th on, and
`grouped_by_expert`, Unsloth's before September 2026, where it is the e-th block of r columns. A_e is always the e-th
block of r rows. All have the same sizes where m = n, and the wrong one merges without a complaint.

Orientation: the shapes of any pair with m ≠ n; else the version of PEFT that wrote it (0.18 and older: transposed;
0.19.0: direct only for classes that store experts as (in, out); since then: the other way round). Order: the field
`lora_B_layout`; without it PEFT's own, unless Unsloth wrote the adapter. What cannot be told is refused, not guessed.
Only shapes and the config are looked at here; whoever merges and whoever judges each do their own arithmetic. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.protocol.errors import BrokenAdapter, UnsupportedAdapter

MARKER = "lora_B_layout"
GROUPED = "grouped_by_expert"
RANK_MAJOR = "rank_major"
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The factors of one stack of experts.

    Attributes:
        name: of the first factor in the adapter.
        a: its shape.
        b: the other's shape.
        stack: (experts, m, n) of the parameter.
        is_in_out: whether the model's class stores an expert as (in, out).
    """

    name: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    stack: tuple[int, ...]
    is_in_out: bool

    @property
    def rank(self) -> int:
        """Rows of A that belong to one expert."""
        return self.a[0] // self.stack[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How all pairs of one adapter are packed.

    Attributes:
        is_direct: whether ΔW[e] is the product, and not its transpose.
        is_grouped: whether the columns of B are grouped by expert.
    """

    is_direct: bool
    is_grouped: bool


def read_layout(config: Mapping[str, Any], pairs: Sequence[Pair]) -> Layout:
    """Return the layout of an adapter's expert factors.

    Args:
        config: adapter_config.json.
        pairs: at least one.

    Raises:
        BrokenAdapter: a pair fits its parameter in neither orientation, or two pairs in different ones.
        UnsupportedAdapter: the layout cannot be told, or is one that this version does not know.
    """
    found = {orientation: pair for pair in pairs if (orientation := _orientation(pair)) is not None}
    if len(found) > 1:
        raise _broken(found[False], f"and {found[True].name!r} fits the other way round")
    direct = next(iter(found)) if found else _by_version(config, pairs[0])
    return Layout(is_direct=direct, is_grouped=_is_grouped(config, pairs))


def _orientation(pair: Pair) -> bool | None:
    """Return whether the pair is direct, or None where it fits both ways."""
    experts, rows, columns = pair.stack
    inner = (pair.a[1], pair.b[0]) if len(pair.a) == len(pair.b) == 2 else ()
    if not inner or pair.a[0] != pair.b[1] or pair.a[0] % experts or inner not in ((columns, rows), (rows, columns)):
        raise _broken(pair, f"they do not fit a stack of {list(pair.stack)}")
    return None if rows == columns else inner == (columns, rows)


def _by_version(config: Mapping[str, Any], pair: Pair) -> bool:
    stated = str(config.get("peft_version") or "")
    match = _VERSION.match(stated)
    version = tuple(map(int, match.groups()[:3])) if match else None
    is_between = version is not None and (0, 19, 0) <= version <= (0, 19, 1) and "dev" in (match or ("",) * 5)[4]
    if version is None or is_between:
        raise UnsupportedAdapter(
            f"Nobody can tell which way round {pair.name!r} is: the experts are square, and the adapter names "
            + (f"the PEFT version {stated[:40]!r}." if stated else "no PEFT version."),
            why="PEFT 0.19.1 swapped the two factors of fused experts; both ways have the same sizes here.",
            fix="Write the `peft_version` that trained it into adapter_config.json.",
        )
    if version < (0, 19, 0):
        return False
    return pair.is_in_out if version == (0, 19, 0) else not pair.is_in_out


def _is_grouped(config: Mapping[str, Any], pairs: Sequence[Pair]) -> bool:
    marker = config.get(MARKER)
    if marker not in (None, GROUPED, RANK_MAJOR):
        raise UnsupportedAdapter(
            f"adapter_config.json sets `{MARKER}` to {str(marker)[:80]!r}.",
            why=f"The known orders of expert factors are {RANK_MAJOR!r} (PEFT's) and {GROUPED!r}.",
            fix="Use a newer release of this action, or correct the field.",
        )
    differs = [pair for pair in pairs if pair.stack[0] > 1 and pair.rank > 1]
    if marker is None and differs and _is_from_unsloth(config):
        raise UnsupportedAdapter(
            f"Unsloth wrote this adapter, and nothing says in which order the columns of {differs[0].name!r}'s "
            "partner are.",
            why="Unsloth grouped them by expert until September 2026 and follows PEFT since then; both have the same "
            "sizes, and the wrong one mixes the experts up.",
            fix=f'Write `"{MARKER}": "{GROUPED}"` (Unsloth before September 2026) or `"{MARKER}": "{RANK_MAJOR}"` into '
            "adapter_config.json.",
        )
    return marker == GROUPED


def _is_from_unsloth(config: Mapping[str, Any]) -> bool:
    mapping = config.get("auto_mapping")
    fixed = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    return fixed or str(config.get("base_model_name_or_path") or "").lower().startswith("unsloth/")


def _broken(pair: Pair, reason: str) -> BrokenAdapter:
    return BrokenAdapter(
        f"{pair.name!r} is {list(pair.a)} and its partner {list(pair.b)}: {reason}.",
        why="The adapter was trained on another base, or by a tool with a layout of its own.",
        fix="Set `base-model` to the model that the adapter was trained on; if it is that already, save the adapter "
        "again with PEFT.",
    )
