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
from typing import TextIO

from runner.combination import Several
from runner.errors import EXIT_CANCELLED, RunnerError
from runner.events import Event, Failed, Job, Judged, Merged, PhaseStarted, Planned, Progress, Ready, decode_job, encode
from runner.libraries import leave, quick_imports

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
        importlib.import_module("runner.merge")  # all of torch, transformers and peft that a plan needs, too
        ready = _ready()
    emit(ready)
    line = sys.stdin.readline()
    if not line:
        return EXIT_CANCELLED  # the supervisor needs no worker after all
    threading.Thread(target=_leave_with_supervisor, daemon=True).start()
    try:
        run(decode_job(line), emit)
    except RunnerError as error:
        emit(Failed(family=type(error).__name__, problem=error.problem))
        return error.exit_code
    return 0


def run(job: Job, emit: Emit) -> None:
    """Carry out `job`: plan always, merge and verify where it says so.

    Raises:
        RunnerError: see the rooms that do the work.
    """
    import torch

    from runner.prepare import prepare

    device = "cuda" if job.device != "cpu" and torch.cuda.is_available() else "cpu"
    emit(PhaseStarted(phase="plan"))
    prepared = prepare(
        job.base,
        *job.adapters,
        dtype=job.dtype,
        combination=job.combination,
        rounding=job.rounding,
        only_plans=not job.merges,
    )
    plan = prepared.plan
    emit(Planned(summary=plan.summary))
    if job.merges:
        from runner.merge import merge

        emit(PhaseStarted(phase="merge"))
        total = sum(shard.size_bytes for shard in plan.shards)
        on_progress = _throttled("merge", total, emit)
        checkpoint = merge(prepared, into=job.merged, on_progress=on_progress, device=device)
        emit(Merged(checkpoint=checkpoint, peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    del prepared, plan  # the judge starts from the folders alone
    if job.verifies:
        from runner.verify.judge import judge

        emit(PhaseStarted(phase="verify"))
        torch.set_num_threads(os.cpu_count() or 1)
        verdict = judge(
            base=job.base,
            adapter=job.adapters[0]
            if job.combination is None
            else Several(paths=job.adapters, combination=job.combination),
            merged=job.merged,
            dtype=job.dtype,
            rounding=job.rounding,
            prompts=job.prompts,
            evaluation=job.evaluation,
            limits=job.limits,
            seed=job.seed,
            device=device,
            on_progress=lambda doing, part: emit(Progress(phase="verify", done=part, total=1.0, doing=doing)),
        )
        emit(Judged(verdict=verdict))


def _ready() -> Ready:
    import torch

    name, problem = None, None
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    elif torch.version.cuda is None:
        problem = "the torch in this image is built without CUDA"
    else:
        problem = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no usable GPU"
    return Ready(versions={library: version(library) for library in LIBRARIES}, cuda_device=name, cuda_problem=problem)


def _throttled(phase: str, total: int, emit: Emit) -> Callable[[int, int], None]:
    last = -1

    def report(done: int, of: int) -> None:
        nonlocal last
        step = done * PROGRESS_STEPS // max(of, 1)
        if step != last:
            last = step
            emit(Progress(phase=phase, done=float(done), total=float(total), doing="merging"))

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
