"""Plan and merge in this process, as the worker does."""

from __future__ import annotations

from pathlib import Path

from runner.checkpoint.digests import MergedCheckpoint
from runner.merge import merge
from runner.plan import Plan
from runner.prepare import prepare


def run_merge(base: Path, adapter: Path, merged: Path, *, dtype: str = "auto") -> tuple[Plan, MergedCheckpoint]:
    """Return the plan and the finished merge of `adapter` into `base`."""
    prepared = prepare(base, adapter, dtype=dtype)
    return prepared.plan, merge(prepared, into=merged)
