"""The run from preflight to release, one phase after another. It raises; the supervisor catches.

The worker is started as soon as the preflight has passed, so that its imports hide behind the download.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from runner.card import CardFacts
from runner.checkpoint.digests import MergedCheckpoint, digest_folder, digest_of
from runner.documents import make_documents, merge_facts
from runner.errors import LaunchError, PublishError
from runner.events import Event, Judged, Merged, PhaseStarted, Planned, Progress, Told
from runner.github import GitHub
from runner.hub import Target, Traffic
from runner.inherited import inherit, read_readme
from runner.inputs import Inputs
from runner.launch import Worker, launch
from runner.loading import read_loading
from runner.orders import worker_job, worker_wish
from runner.pictures import draw
from runner.plan import PlanSummary
from runner.preflight import (
    Hubs,
    Resolved,
    check_disks,
    fetch_base,
    fetch_merged,
    find_release,
    inspect_target,
    open_hubs,
    resolve,
)  # fmt: skip
from runner.provenance import CHECKSUMS, released
from runner.publish import Release, publish
from runner.record import Record
from runner.stop import Stops
from runner.verify.verdict import Status, Verdict
from runner.work import WorkFolder

PROGRESS_EVERY_S = 15.0


@dataclass(slots=True, kw_only=True)
class Story:
    """One run of the action; `work` is a folder of its own, empty but for what an interrupted run left."""

    inputs: Inputs
    environ: Mapping[str, str]
    github: GitHub
    record: Record
    work: WorkFolder
    stops: Stops

    def run(self) -> None:
        """Do what the inputs ask for; the record says what came of it.

        Raises:
            RunnerError: see the rooms that do the work. A failed verdict raises nothing.
        """
        hubs = open_hubs(self.inputs, self.environ)
        cache = self.inputs.cache_dir or self.work.path / "cache"
        with self._phase("preflight"):
            target = inspect_target(self.inputs, hubs)
            resolved = resolve(self.inputs, hubs, cache, self.github.info)
            self.record.origin, self.record.notes = resolved.origin, resolved.notes
            existing = find_release(self.inputs, hubs, target, resolved.origin)
            if existing is None:
                check_disks(self.inputs, hubs, resolved, work=self.work.path, cache=cache)
        if existing is not None:
            self._nothing_to_do(existing)
            return
        with launch(
            worker_wish(self.inputs, self.environ, self.work, cache), log=self._relay, say=self.github.info
        ) as worker:
            self.stops.at_once(worker.stop)
            if self.inputs.device == "cuda":  # no GPU is told before the base is downloaded, not after
                self._check_device(worker)
            with self._phase("download"):
                base = fetch_base(resolved, hubs, cache, headers_only=self.inputs.mode == "plan")
                merged = fetch_merged(self.inputs, hubs, cache) if self.inputs.mode == "verify" else None
                self._tell_traffic(hubs.reading.traffic)
            if self.inputs.device != "cuda":
                self._check_device(worker)
            if merged is not None:
                self.record.merged_digest = digest_of(released(digest_folder(merged)))
            worker.give(
                worker_job(
                    self.inputs, self.environ, resolved, base=base, merged=merged or self.work.merged, cache=cache
                )
            )
            self._follow(worker)
        if self.record.verdict is not None:
            self.record.pictures = draw(self.record.verdict)
        if target is not None:
            self._publish(hubs, target, resolved, base)

    def _tell_traffic(self, traffic: Traffic) -> None:
        self.record.traffic = traffic
        if traffic.hit_bytes or traffic.miss_bytes:
            self.github.info(
                f"Downloads: {traffic.hit_bytes / 1e6:.1f} MB were in the cache, {traffic.miss_bytes / 1e6:.1f} MB not."
            )

    def _check_device(self, worker: Worker) -> None:
        ready = worker.wait_until_ready()
        self.record.versions = dict(ready.versions)
        problem = ready.cuda_problem
        if self.inputs.device == "cuda" and problem is not None:
            raise LaunchError(
                f"`device` is cuda, but there is no GPU: {problem.what}.",
                why=f"{problem.why} This run never falls back to the CPU.",
                fix=f"{problem.fix} Or set `device: cpu`.",
            )
        uses_gpu = self.inputs.device != "cpu" and ready.cuda_device is not None
        because = f" ({problem.what})" if problem is not None and self.inputs.device == "auto" else ""
        self.github.info(
            f"Worker: {ready.cuda_device if uses_gpu else 'CPU'}{because}, torch {ready.versions.get('torch')}."
        )

    def _follow(self, worker: Worker) -> None:
        phase: str | None = None
        started = shown = time.monotonic()
        for event in worker.events():
            now = time.monotonic()
            if isinstance(event, PhaseStarted):
                self._finish_phase(phase, started)
                phase, started, shown = event.phase, now, now
                self.record.phase = phase
                self.stops.begin_phase()
                self.github.info(f"{phase.capitalize()} …")
            elif isinstance(event, Progress):
                if now - shown >= PROGRESS_EVERY_S:
                    shown = now
                    self.github.info(progress_line(event, now - started))
            else:
                self._take(event)
        self._finish_phase(phase, started)
        self.stops.end_phase()

    def _finish_phase(self, phase: str | None, started: float) -> None:
        if phase is not None:
            self.record.timings.append((phase, time.monotonic() - started))

    def _take(self, event: Event) -> None:
        if isinstance(event, Told) and event.is_warning:
            self.github.warning("LoRA merge", event.text)
        elif isinstance(event, Told):
            self.github.info(event.text)
        elif isinstance(event, Planned):
            self.record.plan = replace(event.summary, notes=(*self.record.notes, *event.summary.notes))
            for line in plan_lines(event.summary):
                self.github.info(line)
        elif isinstance(event, Merged):
            self.record.merged = event.checkpoint
            self.record.merged_digest = digest_of(released(event.checkpoint.files))
            self.record.peak_rss_bytes = event.peak_rss_bytes
            if event.checkpoint.note:
                self.github.info(event.checkpoint.note)
            rate = event.checkpoint.written_bytes / max(event.checkpoint.wall_s, 1e-9) / 1e6
            self.github.info(
                f"Merged {event.checkpoint.tensors_merged} tensors, copied {event.checkpoint.tensors_copied}, "
                f"{event.checkpoint.wall_s:.1f} s, {rate:.0f} MB/s, peak {event.peak_rss_bytes / 1e6:.0f} MB."
            )
        elif isinstance(event, Judged):
            self.record.verdict = event.verdict
            self.github.info(f"Verdict: {event.verdict.status.value}.")
            for check in event.verdict.failures:
                self.github.info(f"  FAIL {check.layer.value}: {check.name}: {check.detail}")
            for diagnosis in event.verdict.diagnoses:
                sure = "" if diagnosis.is_certain else " (likely)"
                self.github.info(f"  DIAGNOSIS {diagnosis.kind.value}{sure}: {diagnosis.evidence}")

    def _publish(self, hubs: Hubs, target: Target, resolved: Resolved, base: Path) -> None:
        record = self.record
        verdict, merged, plan = record.verdict, record.merged, record.plan
        if verdict is None or merged is None or plan is None or self.inputs.tag is None:
            raise PublishError(
                "The worker ended without a verdict.",
                why="Only a merge that was judged is published. Nothing was written to the Hub.",
                fix="Look at the lines above; if this is not about your machine, report it with the log.",
            )
        if not verdict.passed and not self._is_allowed(verdict.status):
            return
        key = self.inputs.signing_key
        card = self._card_facts(target, resolved, base, verdict, merged, plan)
        with self._phase("publish"):
            documents = make_documents(card, merged.files, key=key)
            if key is not None:
                self.github.info(f"Signed with the key {key.fingerprint}.")
            record.checksums = documents[CHECKSUMS]
            record.release = publish(
                hubs.writing,
                target=target,
                folder=merged.root,
                files=merged.files,
                documents=documents,
                tag=self.inputs.tag,
                verdict=verdict,
                allow_not_verified=self.inputs.allow_not_verified,
                input_digest=resolved.origin.input_digest(),
                private=self.inputs.private,
                on_existing_tag=self.inputs.on_existing_tag,
                commit_message=self.inputs.commit_message,
                on_progress=self._upload_progress(),
                log=self.github.info,
            )
        self.github.info(f"Published {record.release.url}, commit {record.release.commit}.")

    def _card_facts(
        self,
        target: Target,
        resolved: Resolved,
        base: Path,
        verdict: Verdict,
        merged: MergedCheckpoint,
        plan: PlanSummary,
    ) -> CardFacts:
        key = self.inputs.signing_key
        return CardFacts(
            repo_id=target.repo_id,
            tag=self.inputs.tag or "",
            origin=resolved.origin,
            facts=merge_facts(plan, self.record.versions),
            merged_digest=digest_of(released(merged.files)),
            verdict=verdict,
            pictures=self.record.pictures,
            inherited=inherit(read_readme(base), *(read_readme(adapter.root) for adapter in resolved.adapters)),
            loading=read_loading(base, merged.root, (file.path for file in merged.files)),
            signed_by=key.fingerprint if key else None,
        )

    def _upload_progress(self) -> Callable[[int, int], None]:
        started = shown = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= PROGRESS_EVERY_S:
                shown = now
                event = Progress(phase="publish", done=float(done), total=float(total), doing="uploading")
                self.github.info(progress_line(event, now - started))

        return report

    def _is_allowed(self, status: Status | None) -> bool:
        return status is Status.NOT_VERIFIED and self.inputs.allow_not_verified

    def _nothing_to_do(self, release: Release) -> None:
        if release.status is Status.NOT_VERIFIED and not self.inputs.allow_not_verified:
            raise PublishError(
                f"The tag {release.tag} of {release.repo_id} holds this merge, which was not verified.",
                why="Another run allowed that; this one does not. Nothing was written.",
                fix="Choose a new tag once the merge can be verified, or set `allow-not-verified: true`.",
            )
        self.record.release = release
        self.github.info(f"{release.repo_id} has the tag {release.tag} already, on {release.commit}: nothing to do.")

    def _relay(self, line: str) -> None:
        self.github.info(f"[worker] {line}")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.github.info(f"{name.capitalize()} …")
        self.stops.begin_phase()
        with self.record.timed(name):
            yield
        self.stops.end_phase()


def progress_line(event: Progress, elapsed_s: float) -> str:
    """Return one line with how far the phase is, its rate and when it will be done."""
    part = event.done / event.total if event.total else 1.0
    left_s = elapsed_s * (1 - part) / part if part else 0.0
    rate = "" if event.total <= 1 else f", {event.done / max(elapsed_s, 1e-9) / 1e6:.0f} MB/s"
    return f"{event.phase}: {100 * part:.0f} %{rate}, about {left_s:.0f} s left ({event.doing})"


def plan_lines(plan: PlanSummary) -> list[str]:
    """Return the plan as a few lines for people."""
    lines = [
        f"Plan: {plan.peft_type} on {plan.modules} modules, output dtype {plan.output_dtype}.",
        f"  tensors: {plan.tensors_merged} merged ({plan.tensors_added} of them added), "
        f"{plan.tensors_copied} copied, {plan.tensors_cast} cast",
        f"  reads {plan.read_bytes / 1e6:.1f} MB, writes {plan.write_bytes / 1e6:.1f} MB, "
        f"needs {plan.disk_bytes / 1e6:.1f} MB of disk and {plan.peak_memory_bytes / 1e6:.0f} MB of memory to merge",
    ]
    return [*lines, *(f"  note: {note}" for note in plan.notes)]
