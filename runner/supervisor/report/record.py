"""What is known so far: filled while the story runs, so that a run that stops anywhere can still be told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from runner.protocol.digests import MergedCheckpoint
from runner.protocol.errors import Problem
from runner.protocol.plan_summary import PlanSummary
from runner.protocol.verdict import Verdict
from runner.supervisor.documents.canvas import Picture
from runner.supervisor.documents.provenance import Origin
from runner.supervisor.hub import Traffic
from runner.supervisor.inputs.read import Inputs
from runner.supervisor.publish import Release
from runner.supervisor.report.files import Report


@dataclass(slots=True)
class Record:
    """The run under way; the one mutable noun, owned by the supervisor.

    `is_elsewhere`: the run is another container's, which tells everything itself.
    """

    inputs: Inputs | None = None
    origin: Origin | None = None
    notes: tuple[str, ...] = ()
    plan: PlanSummary | None = None
    merged: MergedCheckpoint | None = None
    merged_digest: str | None = None
    verdict: Verdict | None = None
    pictures: tuple[Picture, ...] = ()
    release: Release | None = None
    checksums: bytes | None = None
    problems: tuple[Problem, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    traffic: Traffic | None = None
    phase: str = "inputs"
    is_elsewhere: bool = False
    timings: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Name the phase that runs now, and note how long it took, however it ends."""
        self.phase = phase
        started = time.monotonic()
        try:
            yield
        finally:
            self.timings.append((phase, time.monotonic() - started))

    def standing(self) -> str:
        """Return what is on the Hub because of this run, as one sentence."""
        if self.release is not None and self.release.pull_request is not None:
            return f"The pull request was complete: {self.release.pull_request}."
        if self.release is not None and self.release.created:
            return f"The release was complete: {self.release.repo_id} has the tag {self.release.tag}."
        if self.phase == "publish":
            return "Publishing had begun: there may be a commit, but no tag was confirmed."
        return "Nothing was published."

    def report(self) -> Report:
        """Return everything known as one noun."""
        origin = self.origin
        return Report(
            inputs_public=self.inputs.public() if self.inputs else {},
            plan=self.plan,
            merged=self.merged,
            verdict=self.verdict,
            pictures=self.pictures,
            release=self.release,
            base_revision=origin.base_commit if origin else None,
            adapter_digest=origin.digest_of_adapters if origin else None,
            merged_digest=self.merged_digest,
            problems=self.problems,
            phases=tuple(self.timings),
            versions=self.versions,
            cache_bytes=(self.traffic.hit_bytes, self.traffic.miss_bytes) if self.traffic else None,
            checksums=self.checksums if self.release is not None else None,
        )
