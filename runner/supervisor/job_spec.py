"""What the worker is to be and to do, made of the inputs and of what they turned out to name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from runner.protocol.events import Job
from runner.protocol.gpu_wish import GpuWish
from runner.supervisor.inputs.read import Inputs
from runner.supervisor.launch import Wish
from runner.supervisor.owner import owner_of
from runner.supervisor.preflight import Resolved
from runner.supervisor.work import WorkFolder

SEED = 0
LOCKS = "locks"


def worker_wish(inputs: Inputs, environ: Mapping[str, str], work: WorkFolder, cache: Path) -> Wish:
    """Return what kind of worker is wanted, and which folders it must reach; those of locks are made."""
    local = [ref.path for ref in (*inputs.adapters, inputs.base, inputs.merged) if ref and ref.path]
    locks = _locks(inputs, cache)
    if locks is not None:
        locks.mkdir(parents=True, exist_ok=True)
    return Wish(
        executor=inputs.machine.executor,
        device="cpu" if inputs.mode == "plan" and inputs.device == "auto" else inputs.device,  # a plan computes nothing
        gpus=inputs.machine.gpus,
        environ=environ,
        work=work.path,
        lock=work.lock,
        reads=(inputs.workspace.root, *([cache] if locks else []), *local),
        writes=(work.path, locks) if locks else (work.path,),
        owner=owner_of(inputs.workspace.root),
    )


def worker_job(
    inputs: Inputs, environ: Mapping[str, str], resolved: Resolved, *, base: Path, merged: Path, cache: Path
) -> Job:
    """Return what the worker is to do.

    Args:
        inputs: what the user asked for.
        environ: of the supervisor.
        resolved: what goes in.
        base: its folder.
        merged: folder to write, or to judge.
        cache: folder of the downloads.
    """
    return Job(
        base=base,
        adapters=tuple(adapter.root for adapter in resolved.adapters),
        allow=inputs.allow,
        combination=inputs.combination,
        merged=merged,
        merges=inputs.mode == "publish",
        verifies=inputs.mode != "plan",
        dtype=inputs.dtype,
        rounding=inputs.rounding,
        device=inputs.device,
        gpu=GpuWish(
            min_free_bytes=inputs.machine.min_free_vram_bytes,
            wait_s=inputs.machine.gpu_wait_s,
            locks=_locks(inputs, cache),
            holder=holder_name(environ),
        ),
        prompts=inputs.verify_prompts,
        evaluation=inputs.evaluation,
        limits=inputs.limits,
        seed=SEED,
    )


def holder_name(environ: Mapping[str, str]) -> str:
    """Return how this run is called to others of the same host."""
    parts = [environ.get(f"GITHUB_{name}", "") for name in ("REPOSITORY", "RUN_ID", "JOB")]
    return " ".join(part for part in parts if part) or f"process {os.getpid()}"


def _locks(inputs: Inputs, cache: Path) -> Path | None:
    """Return the folder of the locks that the runs of this host share, or None where they share no cache."""
    return None if inputs.cache_dir is None else cache / LOCKS
