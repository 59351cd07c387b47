"""Plan and merge in this process, as the worker does."""

from __future__ import annotations

from pathlib import Path

from runner.protocol.combination import Several
from runner.protocol.digests import MergedCheckpoint
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from runner.worker.plan import Plan


def run_merge(
    base: Path, adapter: Path | Several, merged: Path, *, dtype: str = "auto"
) -> tuple[Plan, MergedCheckpoint]:
    """Return the plan and the finished merge of `adapter` into `base`."""
    if isinstance(adapter, Several):
        prepared = prepare(base, *adapter.paths, dtype=dtype, combination=adapter.combination)
    else:
        prepared = prepare(base, adapter, dtype=dtype)
    return prepared.plan, merge(prepared, into=merged)
