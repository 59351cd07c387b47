"""Two folders → everything that a merge needs: the adapter attached to the base, the merge units, and the plan.

Reads headers, configs and the adapter; of the base's weights nothing (unless the adapter's method derives its
merge from them, which the plan's notes then say).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.adapter import read_adapter
from runner.attach import Attached, attach
from runner.checkpoint.layout import read_checkpoint
from runner.companions import find_companions, read_config
from runner.plan import Plan, make_plan
from runner.units import Unit, find_changes, find_units


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A merge that can start."""

    attached: Attached
    units: Mapping[str, Unit]
    plan: Plan


def prepare(base: Path, adapter: Path, *, dtype: str) -> Prepared:
    """Return the merge of `adapter` into `base`, planned.

    Args:
        base: folder of a transformers checkpoint.
        adapter: folder of a PEFT adapter.
        dtype: "auto", "bfloat16", "float16" or "float32".

    Raises:
        RunnerError: either folder is damaged, or they cannot be merged exactly; see `read_checkpoint`,
            `read_adapter`, `attach` and `find_changes`.
    """
    checkpoint = read_checkpoint(base)
    validated = read_adapter(adapter)
    attached = attach(checkpoint, validated)
    units = find_units(attached)
    changes = find_changes(attached, units)
    edits = dict(changes.config_edits)
    if dtype != "auto":
        edits["torch_dtype" if "torch_dtype" in read_config(base) else "dtype"] = dtype
    companions = find_companions(base, adapter, edits)
    plan = make_plan(checkpoint, changes, companions=companions, dtype=dtype, peft_type=validated.peft_type)
    return Prepared(attached=attached, units=units, plan=plan)
