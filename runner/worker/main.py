"""The worker's story: plan, merge, verify, on local folders. It holds no token, no socket, and needs no network.

It is started early, imports its libraries while the supervisor downloads, says `Ready`, and waits for one job on
standard input. Events go out on standard output; whatever a library prints is sent to standard error instead.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from runner.protocol.combination import Several
from runner.protocol.digests import FileDigest
from runner.protocol.errors import EXIT_CANCELLED, RunnerError, disk_full
from runner.protocol.events import (
    Event,
    Failed,
    Job,
    Judged,
    Merged,
    PhaseStarted,
    Planned,
    Progress,
    Ready,
    ShardReady,
    Told,
    decode_job,
    encode,
)
from runner.worker.gpu.diagnosis import GpuFacts, diagnose, has_kernels
from runner.worker.gpu.lock import take_turn
from runner.worker.libraries import leave, quick_imports

LIBRARIES = ("torch", "transformers", "peft", "safetensors")
PROGRESS_STEPS = 200

Emit = Callable[[Event], None]


def main() -> int:
    """Run one job; return the exit code of its error's family, or 0 (also for a verdict that failed)."""
    channel = _take_standard_output()

    def emit(event: Event) -> None:
        channel.write(encode(event))
        channel.flush()

    with quick_imports():
        importlib.import_module("runner.worker.merge.job")  # all of torch, transformers and peft that a plan needs, too
        ready, facts = _ready()
    emit(ready)
    line = sys.stdin.readline()
    if not line:
        return EXIT_CANCELLED  # the supervisor needs no worker after all
    threading.Thread(target=_leave_with_supervisor, daemon=True).start()
    try:
        job = decode_job(line)
        run(job, emit, _device(job, facts, emit) if job.merges or job.verifies else "cpu")
    except RunnerError as error:
        emit(Failed(family=type(error).__name__, problem=error.problem))
        return error.exit_code
    except OSError as error:
        if (full := disk_full(error)) is None:
            raise
        emit(Failed(family=type(full).__name__, problem=full.problem))
        return full.exit_code
    return 0


def run(job: Job, emit: Emit, device: str = "cpu") -> None:
    """Carry out `job`: plan always, merge and verify where it says so, the models on `device`.

    Raises:
        RunnerError: see the rooms that do the work.
    """
    import torch

    from runner.worker.merge.prepare import prepare

    emit(PhaseStarted(phase="plan"))
    prepared = prepare(
        job.base,
        *job.adapters,
        dtype=job.dtype,
        combination=job.combination,
        rounding=job.rounding,
        only_plans=not job.merges,
        pickles="pickle" in job.allow,
    )
    emit(Planned(summary=prepared.plan.summary, origins=prepared.origins))
    if job.merges:
        from runner.worker.merge.job import merge

        emit(PhaseStarted(phase="merge"))
        on_progress = _throttled("merge", sum(shard.size_bytes for shard in prepared.plan.shards), emit)
        checkpoint = merge(prepared, into=job.merged, on_progress=on_progress, on_shard=_shards(emit), device=device)
        emit(Merged(checkpoint=checkpoint, peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    del prepared  # the judge starts from the folders alone
    if job.verifies:
        from runner.judge.judge import judge

        emit(PhaseStarted(phase="verify"))
        torch.set_num_threads(os.cpu_count() or 1)
        verdict = judge(
            base=job.base,
            adapter=job.adapters[0]
            if job.combination is None
            else Several(paths=job.adapters, combination=job.combination),
            merged=job.merged,
            dtype=job.dtype,
            made_here=job.merges,
            rounding=job.rounding,
            prompts=job.prompts,
            evaluation=job.evaluation,
            limits=job.limits,
            seed=job.seed,
            device=device,
            on_progress=lambda doing, part: emit(Progress(phase="verify", done=part, total=1.0, doing=doing)),
        )
        emit(Judged(verdict=verdict))


def _shards(emit: Emit) -> Callable[[Path, FileDigest], None]:
    return lambda folder, file: emit(ShardReady(folder=folder, file=file))


def _ready() -> tuple[Ready, GpuFacts]:
    from runner.worker.gpu.device import look

    facts = look()
    problem = diagnose(facts)
    name = facts.gpus[0].name if problem is None else None
    versions = {library: version(library) for library in LIBRARIES}
    if name is not None:
        versions |= {"GPU": name, "NVIDIA driver": facts.driver or "unknown", "CUDA": facts.torch_cuda or ""}
    return Ready(versions=versions, cuda_device=name, cuda_problem=problem), facts


def _device(job: Job, facts: GpuFacts, emit: Emit) -> str:
    """Return "cuda" or "cpu", and hold the GPU from now on if it is "cuda"."""
    from runner.worker.gpu.device import use

    if job.device == "cpu" or diagnose(facts) is not None:
        return "cpu"
    usable = [gpu.uuid for gpu in facts.gpus if has_kernels(gpu.capability, facts.architectures)]
    try:
        turn = take_turn(job.gpu, usable, lambda text: emit(Told(text=text)))
        name = use(turn.uuid)
    except RunnerError as error:
        if job.device == "cuda":
            raise
        emit(Told(text=f"The run goes on on the CPU: {error.problem.what}", is_warning=True))
        return "cpu"
    emit(Told(text=f"GPU: {name} {turn.uuid}."))
    return "cuda"


def _throttled(phase: str, total: int, emit: Emit) -> Callable[[int, int], None]:
    last = -1

    def report(done: int, of: int) -> None:
        nonlocal last
        step = done * PROGRESS_STEPS // max(of, 1)
        if step != last:
            last = step
            emit(Progress(phase=phase, done=float(done), total=float(total), doing=""))

    return report


def _take_standard_output() -> TextIO:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _leave_with_supervisor() -> None:
    # The supervisor keeps the pipe open as long as it lives; its death, even by SIGKILL, ends the worker too.
    with contextlib.suppress(OSError, ValueError):
        sys.stdin.read()
    os._exit(EXIT_CANCELLED)


if __name__ == "__main__":
    leave(main())
