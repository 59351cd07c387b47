"""The plan in numbers, as both processes know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """The plan in numbers, for people and reports.

    Attributes:
        peft_type: the adapter's method.
        output_dtype: of the merged tensors, for example "bfloat16"; several in a base of mixed dtypes.
        tensors_copied: bytes taken over.
        tensors_cast: only their dtype changes.
        tensors_merged: changed by the adapter; includes added ones.
        tensors_added: not stored by the base.
        modules: modules of the model that the adapter changes.
        read_bytes: of base and adapter.
        write_bytes: of the output's weights.
        disk_bytes: free space that the work folder needs.
        peak_memory_bytes: anonymous memory of the merge, runtime included; an estimate from above.
        judge_memory_bytes: the same of the judgement; a GPU holds most of it where one is used.
        notes: what the user should know.
    """

    peft_type: str
    output_dtype: str
    tensors_copied: int
    tensors_cast: int
    tensors_merged: int
    tensors_added: int
    modules: int
    read_bytes: int
    write_bytes: int
    disk_bytes: int
    peak_memory_bytes: int
    judge_memory_bytes: int
    notes: tuple[str, ...]
