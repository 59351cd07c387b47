"""Folders → everything that a merge needs: the adapter attached to the base, the merge units, and the plan.

Reads headers, configs and the adapter; of the base's weights nothing (unless the adapter's method derives its
merge from them, which the plan's notes then say).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from runner.files.adapter.combinable import check_combinable
from runner.files.adapter.folder import read_adapter
from runner.files.layout import INDEX_FILE, read_checkpoint
from runner.files.sidecars.files import find_companions, read_config, trace
from runner.files.sidecars.names import is_template, is_tokenizer
from runner.files.sidecars.notes import check_tokenizer, companion_notes
from runner.protocol.combination import Combination
from runner.protocol.digests import FileOrigins
from runner.protocol.rounding import Rounding
from runner.worker.merge.trial import check_merges
from runner.worker.merge.units import Unit, find_changes, find_units
from runner.worker.model.attach import Attached, attach
from runner.worker.plan import Plan, make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A merge that can start, or one that is only planned.

    Attributes:
        attached: base and adapter.
        units: by their paths.
        plan: what happens to every stored tensor.
        origins: what comes along beside the weights, and what is left out.
        combination: how several adapters became one; None for one.
        rounding: of the values that the adapter changes.
        is_only_planned: several adapters were put together in a quick way whose values are not those asked for.
    """

    attached: Attached
    units: Mapping[str, Unit]
    plan: Plan
    origins: FileOrigins
    combination: Combination | None
    rounding: Rounding
    is_only_planned: bool = False


def prepare(
    base: Path,
    *adapters: Path,
    dtype: str,
    combination: Combination | None = None,
    rounding: Rounding | None = None,
    only_plans: bool = False,
    pickles: bool = False,
) -> Prepared:
    """Return the merge of the adapters into `base`, planned.

    Args:
        base: folder of a transformers checkpoint.
        adapters: folders of PEFT adapters. What comes along beside the weights comes from the first.
        dtype: "auto", "bfloat16", "float16" or "float32".
        combination: how several adapters become one; None exactly when there is one.
        rounding: of the values that the adapter changes; to the nearest by default.
        only_plans: do not spend hours on the singular values of a merge that will not be made.
        pickles: whether files beside the weights may be pickles; see `find_companions`.

    Raises:
        RunnerError: either folder is damaged, or they cannot be merged exactly; see `read_checkpoint`,
            `read_adapter`, `check_combinable`, `attach`, `check_merges` and `find_changes`.
    """
    checkpoint = read_checkpoint(base)
    validated = [read_adapter(adapter) for adapter in adapters]
    if combination is not None:
        check_combinable(validated, combination)
    only_plans = only_plans and combination is not None
    attached = attach(checkpoint, *validated, combination=combination, only_plans=only_plans)
    units = find_units(attached)
    check_merges(attached, units)
    changes = find_changes(attached, units)
    edits = dict(changes.config_edits)
    if dtype != "auto":
        edits["torch_dtype" if "torch_dtype" in read_config(base) else "dtype"] = dtype
    if combination is not None:
        elements = sum(prod(tensor.shape) for adapter in validated for tensor in adapter.tensors.values())
        adapter_bytes = sum(adapter.data_bytes for adapter in validated)
        # A plan has not made their combination, whose size must not count: it is below that of all of them.
        judge_bytes = changes.judge_bytes - changes.adapter_bytes + adapter_bytes
        changes = replace(
            changes,
            adapter_bytes=adapter_bytes,
            unit_bytes=changes.unit_bytes + 2 * 4 * elements,  # the adapters and their combination, both in float32
            judge_bytes=judge_bytes + 3 * 8 * elements,  # the judge combines in float64
            notes=(*changes.notes, *_notes(adapters, combination)),
        )
    check_tokenizer(base, adapters[0], getattr(attached.model.config.get_text_config(), "vocab_size", None))
    companions = find_companions(base, adapters[0], edits, pickles=pickles)
    weights = [file.name for file in checkpoint.files] + [INDEX_FILE] * checkpoint.is_indexed
    origins = trace(base, adapters[0], companions, weights)
    changes = replace(changes, notes=(*changes.notes, *companion_notes(base, adapters[0], origins)))
    plan = make_plan(
        attached.checkpoint, changes, companions=companions, dtype=dtype, peft_type=attached.adapter.peft_type
    )
    return Prepared(
        attached=attached,
        units=units,
        plan=plan,
        origins=origins,
        combination=combination,
        rounding=rounding or Rounding(),
        is_only_planned=only_plans,
    )


def _notes(adapters: Sequence[Path], combination: Combination) -> Iterator[str]:
    weights = ", ".join(f"{weight:g}" for weight in combination.weights)
    yield f"{len(adapters)} adapters are combined first: {combination.text}, with the weights {weights}."
    first = _tokenizer(adapters[0])
    for number, adapter in enumerate(adapters[1:], start=2):
        other = _tokenizer(adapter)
        if other and other != first:
            names = ", ".join(sorted(name for name in {*first, *other} if first.get(name) != other.get(name)))
            yield f"Adapter {number} carries other tokenizer files than the first ({names}); only the first's count."


def _tokenizer(adapter: Path) -> dict[str, bytes]:
    names = (path.name for path in adapter.iterdir() if path.is_file())
    return {name: (adapter / name).read_bytes() for name in names if is_tokenizer(name) or is_template(name)}
