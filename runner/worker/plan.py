"""What will be done to every stored tensor, decided before a weight is read.

`make_plan` takes the base's layout and the changes that an attached adapter makes (`runner.worker.model.attach`) and
gives the output's shards, byte for byte: names, dtypes, offsets, headers, index. Only sizes are computed here; no
torch. The base's layout is kept (design decision 2): same shards, order and metadata; a header is rebuilt only when a
tensor is added or changes its dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from runner.files.layout import (
    Checkpoint,
    TensorFile,
    TensorInfo,
    build_header,
    tensor_size_bytes,
)
from runner.files.sidecars.files import Companion
from runner.protocol.plan_summary import PlanSummary
from runner.worker.tensors.index import build_index

SAFETENSORS_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
NAMES: Mapping[str, str] = {stored: name for name, stored in SAFETENSORS_DTYPES.items()}
CASTABLE = tuple(NAMES)


class Action(StrEnum):
    """What happens to one output tensor."""

    COPY = "copy"  # its bytes are the base's
    CAST = "cast"  # the base's values in another dtype
    MERGE = "merge"  # comes out of a merge unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One stored tensor that the adapter changes.

    Attributes:
        unit: path of the outermost PEFT wrapper in the model; for a parameter that the adapter replaces, its own path.
        parameter: the tensor's name inside that unit, for example "weight"; the stored name of a tensor that a
            conversion makes of the unit's parameters.
    """

    unit: str
    parameter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """A tensor that the base did not store: the other side of a tie that no longer holds, or the adapter's own head.

    Attributes:
        name: its name in the output.
        beside: a stored tensor; the new one goes into the same file.
        change: how it is made, or None for a copy of `beside`.
        dtype: before an output dtype is asked for, as safetensors spells it; None for that of `beside`.
        shape: None for that of `beside`.
    """

    name: str
    beside: str
    change: Change | None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Everything that an adapter does to a base.

    Attributes:
        changed: by stored name.
        added: in the order of their names.
        shapes: of changed tensors that have another one than the base's, by stored name.
        config_edits: keys of config.json with their new values.
        modules: how many modules of the model the adapter changes.
        unit_bytes: bytes that the largest unit takes in memory while it is merged.
        adapter_bytes: bytes that the adapter takes in memory.
        judge_bytes: anonymous memory of a judgement of the merge, runtime included.
        notes: what the user should know, one sentence each.
    """

    changed: Mapping[str, Change]
    added: tuple[Added, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    modules: int = 0
    unit_bytes: int = 0
    adapter_bytes: int = 0
    judge_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One output tensor.

    Attributes:
        name: in the output.
        dtype: in the output, as safetensors spells it.
        shape: in the output.
        action: how it is made.
        source: the base's tensor that it is made from; one without bytes where the base has none.
        change: the unit that makes it; only with `Action.MERGE`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: Action
    source: TensorInfo
    change: Change | None

    @property
    def size_bytes(self) -> int:
        """Bytes in the output."""
        return tensor_size_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One output file: its header, and its tensors in the order of their data."""

    file: str
    header: bytes
    tensors: tuple[TensorPlan, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole merge as data.

    Attributes:
        base: folder of the base.
        shards: in the order in which they are written.
        index: content of the index file, or None for a single file.
        companions: files that come along.
        summary: the numbers.
    """

    base: Path
    shards: tuple[ShardPlan, ...]
    index: bytes | None
    companions: tuple[Companion, ...]
    summary: PlanSummary


# Measured: anonymous memory of a worker that has imported torch, transformers and peft and built a model on
# the meta device, plus the writer's ring (bench/merge prints it).
RUNTIME_BYTES = 640 << 20


def make_plan(
    checkpoint: Checkpoint, changes: Changes, *, companions: tuple[Companion, ...], dtype: str, peft_type: str
) -> Plan:
    """Return the plan of one merge; reads at most the base's index file.

    Args:
        checkpoint: the base.
        changes: what the adapter does to it.
        companions: files that come along.
        dtype: "auto", "bfloat16", "float16" or "float32".
        peft_type: the adapter's method, for the summary.
    """
    added = _added_by_file(checkpoint, changes)
    shards = tuple(
        _plan_shard(file, checkpoint, changes, added.get(file.name, ()), SAFETENSORS_DTYPES.get(dtype))
        for file in checkpoint.files
    )
    where = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.size_bytes for shard in shards for tensor in shard.tensors)
    index = build_index(checkpoint.root, where, total) if checkpoint.is_indexed else None
    return Plan(
        base=checkpoint.root,
        shards=shards,
        index=index,
        companions=companions,
        summary=_summary(checkpoint, changes, shards, companions, peft_type),
    )


def _added_by_file(checkpoint: Checkpoint, changes: Changes) -> dict[str, list[Added]]:
    found: dict[str, list[Added]] = {}
    for added in changes.added:
        found.setdefault(checkpoint.tensors[added.beside].file, []).append(added)
    return found


def _plan_shard(
    file: TensorFile, checkpoint: Checkpoint, changes: Changes, added: Sequence[Added], dtype: str | None
) -> ShardPlan:
    tensors = [
        _plan_tensor(tensor.name, tensor, changes.changed.get(tensor.name), dtype, changes.shapes.get(tensor.name))
        for tensor in file.tensors
    ]
    tensors += [
        _plan_tensor(new.name, _source(new, checkpoint.tensors[new.beside]), new.change, dtype) for new in added
    ]
    is_same = not added and all(
        (tensor.dtype, tensor.shape) == (tensor.source.dtype, tensor.source.shape) for tensor in tensors
    )
    header = (
        file.header
        if is_same
        else build_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), file.metadata)
    )
    return ShardPlan(file=file.name, header=header, tensors=tuple(tensors))


def _source(new: Added, beside: TensorInfo) -> TensorInfo:
    if new.dtype is None or new.shape is None:
        return beside
    return TensorInfo(name=new.name, dtype=new.dtype, shape=new.shape, file=beside.file, start=0, end=0)


def _plan_tensor(
    name: str, source: TensorInfo, change: Change | None, dtype: str | None, shape: tuple[int, ...] | None = None
) -> TensorPlan:
    output = dtype if dtype is not None and source.dtype in CASTABLE else source.dtype
    unchanged = Action.COPY if output == source.dtype else Action.CAST
    action = unchanged if change is None else Action.MERGE
    return TensorPlan(name=name, dtype=output, shape=shape or source.shape, action=action, source=source, change=change)


def _summary(
    checkpoint: Checkpoint,
    changes: Changes,
    shards: tuple[ShardPlan, ...],
    companions: tuple[Companion, ...],
    peft_type: str,
) -> PlanSummary:
    dtypes = {tensor.dtype for shard in shards for tensor in shard.tensors if tensor.action is Action.MERGE}
    actions = [tensor.action for shard in shards for tensor in shard.tensors]
    write_bytes = sum(shard.size_bytes for shard in shards)
    disk_bytes = write_bytes + sum(companion.source.stat().st_size for companion in companions)
    return PlanSummary(
        peft_type=peft_type,
        output_dtype=", ".join(sorted(NAMES[stored] for stored in dtypes)),
        tensors_copied=actions.count(Action.COPY),
        tensors_cast=actions.count(Action.CAST),
        tensors_merged=actions.count(Action.MERGE),
        tensors_added=len(changes.added),
        modules=changes.modules,
        read_bytes=checkpoint.data_bytes + changes.adapter_bytes,
        write_bytes=write_bytes,
        disk_bytes=disk_bytes,
        peak_memory_bytes=RUNTIME_BYTES + changes.adapter_bytes + changes.unit_bytes,
        judge_memory_bytes=changes.judge_bytes,
        notes=changes.notes,
    )
