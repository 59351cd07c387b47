"""What the worker says, one JSON object a line: its phases, its progress, its results, and why it failed.

The supervisor alone turns them into log lines, outputs and publishing. No torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from runner.protocol.allow import Allow
from runner.protocol.combination import Combination
from runner.protocol.digests import FileDigest, FileOrigins, MergedCheckpoint
from runner.protocol.errors import Problem
from runner.protocol.gpu_wish import GpuWish
from runner.protocol.limits import Evaluation, Limits
from runner.protocol.plan_summary import PlanSummary
from runner.protocol.rounding import Rounding
from runner.protocol.verdict import Verdict
from runner.protocol.wire import from_data, to_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the worker is to do; the one thing that it is told. Local folders only, no token, no address.

    Attributes:
        base: folder of the base.
        adapters: folders of the adapters, at least one.
        allow: what is refused unless it is allowed by name.
        combination: how several adapters become one; None exactly when there is one.
        merged: folder to write, or to judge when `merges` is False.
        merges: whether to merge.
        verifies: whether to judge.
        dtype: "auto", "bfloat16", "float16" or "float32".
        rounding: of the values that the adapter changes.
        device: "auto", "cuda" or "cpu".
        gpu: what has to be free of a GPU before it is used.
        prompts: the user's own, added to the built-in ones.
        evaluation: on a text of the user's own.
        limits: of the judgement, loosened or set.
        seed: of every random probe.
    """

    base: Path
    adapters: tuple[Path, ...]
    allow: Allow = field(default_factory=Allow)
    combination: Combination | None
    merged: Path
    merges: bool
    verifies: bool
    dtype: str
    rounding: Rounding
    device: str
    gpu: GpuWish = field(default_factory=GpuWish)
    prompts: tuple[str, ...]
    evaluation: Evaluation
    limits: Limits
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker has imported its libraries.

    Attributes:
        versions: library → version, and those of the GPU's driver where there is one.
        cuda_device: name of the GPU it can compute on, or None.
        cuda_problem: why it cannot: `what` in the middle of a sentence. None exactly where there is a device.
    """

    versions: dict[str, str]
    cuda_device: str | None
    cuda_problem: Problem | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Something that the user should know now, such as what is waited for."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStarted:
    """The worker begins a phase: "plan", "merge" or "verify"."""

    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a phase is: `done` of `total` (bytes in "merge", parts of 1 in "verify"), and what is done now."""

    phase: str
    done: float
    total: float
    doing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan is made, and nothing was read but headers.

    Attributes:
        summary: the plan in numbers.
        origins: of the files beside the weights.
    """

    summary: PlanSummary
    origins: FileOrigins


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReady:
    """A shard is finished and does not change any more; the folder that it is in may get another name.

    Attributes:
        folder: where it is now.
        file: its path in the folder, size and sha256.
    """

    folder: Path
    file: FileDigest


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The merged folder is complete.

    Attributes:
        checkpoint: what is in it.
        peak_rss_bytes: highest resident memory of the worker so far, file pages included.
    """

    checkpoint: MergedCheckpoint
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The judge has spoken."""

    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The worker gives up, with the name of the error's class."""

    family: str
    problem: Problem


Event = Ready | Told | PhaseStarted | Progress | Planned | ShardReady | Merged | Judged | Failed
_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Ready, Told, PhaseStarted, Progress, Planned, ShardReady, Merged, Judged, Failed)
}


def encode(event: Event | Job) -> str:
    """Return the event as one line of JSON, line feed included."""
    return json.dumps({"event": type(event).__name__, "data": to_data(event)}) + "\n"


def decode(line: str) -> Event:
    """Return the event in `line`.

    Raises:
        ValueError: it is none.
    """
    message = json.loads(line)
    if not isinstance(message, dict) or message.get("event") not in _KINDS:
        raise ValueError(f"not an event: {line[:100]!r}")
    return from_data(_KINDS[message["event"]], message["data"])


def decode_job(line: str) -> Job:
    """Return the job in `line`.

    Raises:
        ValueError: it is none.
    """
    return from_data(Job, json.loads(line)["data"])
