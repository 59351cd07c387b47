"""The run from preflight to release, one phase after another. It raises; the supervisor catches.

The worker is started as soon as the preflight has passed, so that its imports hide behind the download.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.files.readable import folder_problem
from runner.files.sidecars.archive import FOLDER as ARCHIVE
from runner.files.sidecars.archive import archive
from runner.protocol.digests import FileOrigins, MergedCheckpoint, digest_folder, digest_of
from runner.protocol.errors import HubError, LaunchError, PublishError
from runner.protocol.events import Event, Judged, Merged, PhaseStarted, Planned, Progress, ShardReady, Told
from runner.protocol.plan_summary import PlanSummary
from runner.protocol.verdict import Status, Verdict
from runner.supervisor.console.lines import merged_lines, plan_lines, traffic_line, verdict_lines
from runner.supervisor.console.progress import Showing
from runner.supervisor.converted import Pickles
from runner.supervisor.documents.card import CardFacts
from runner.supervisor.documents.contents import make_documents, merge_facts
from runner.supervisor.documents.inherited import inherit, read_readme
from runner.supervisor.documents.loading import read_loading
from runner.supervisor.documents.pictures import draw
from runner.supervisor.documents.provenance import CHECKSUMS, released
from runner.supervisor.github.commands import GitHub
from runner.supervisor.inputs.read import Inputs
from runner.supervisor.job_spec import worker_job, worker_wish
from runner.supervisor.launch import Worker, launch
from runner.supervisor.preflight import (
    Resolved,
    check_disks,
    fetch_base,
    fetch_merged,
    open_destination,
    open_hubs,
    resolve,
)
from runner.supervisor.publish import Destination, EarlyUpload, Release, ToPublish
from runner.supervisor.report.record import Record
from runner.supervisor.stop import Stops
from runner.supervisor.work import WorkFolder


@dataclass(slots=True, kw_only=True)
class Story:
    """One run of the action; `work` is a folder of its own, empty but for what an interrupted run left."""

    inputs: Inputs
    environ: Mapping[str, str]
    github: GitHub
    record: Record
    work: WorkFolder
    stops: Stops
    showing: Showing
    early: EarlyUpload | None = field(default=None, init=False)
    origins: FileOrigins = field(default_factory=FileOrigins, init=False)

    def run(self) -> None:
        """Do what the inputs ask for; the record says what came of it.

        Raises:
            RunnerError: see the rooms that do the work. A failed verdict raises nothing.
        """
        hubs = open_hubs(
            self.inputs,
            self.environ,
            mask=self.github.mask,
            on_download=self._on_download,
            say=self.github.info,
        )
        destination = open_destination(self.inputs, hubs)
        pickles = Pickles(
            allowed="pickle" in self.inputs.allow, into=self.work.path / "converted", environ=self.environ
        )
        cache = self.inputs.cache_dir or self.work.path / "cache"
        with self._phase("preflight"):
            if destination is not None:
                destination.inspect(self.github.info)
            resolved = resolve(self.inputs, hubs, cache, pickles, self.github.info)
            self.record.origin, self.record.notes = resolved.origin, resolved.notes
            digest = resolved.origin.input_digest()
            existing = destination.find(digest, self.github.info) if destination is not None else None
            if existing is None:
                check_disks(self.inputs, hubs, resolved, work=self.work.path, cache=cache)
        if existing is not None and destination is not None:
            self._nothing_to_do(destination, existing)
            return
        wish = worker_wish(self.inputs, self.environ, self.work, cache)
        with launch(wish, log=self._relay, say=self.github.info) as worker, self._early(destination):
            self.stops.at_once(worker.stop)
            if self.inputs.device == "cuda":  # no GPU is told before the base is downloaded, not after
                self._check_device(worker)
            with self._phase("download"):
                base = fetch_base(resolved, hubs, cache, pickles, headers_only=self.inputs.mode == "plan")
                merged = fetch_merged(self.inputs, hubs, cache) if self.inputs.mode == "verify" else None
            self.record.traffic = hubs.reading.traffic
            self._say(traffic_line(hubs.reading.traffic))
            if self.inputs.device != "cuda":
                self._check_device(worker)
            if merged is not None and not folder_problem(merged):  # else the judge says it, and nothing of it is read
                self.record.merged_digest = _digest(merged)
            worker.give(
                worker_job(
                    self.inputs, self.environ, resolved, base=base, merged=merged or self.work.merged, cache=cache
                )
            )
            self._follow(worker)
        if self.record.verdict is not None:
            self.record.pictures = draw(self.record.verdict)
        if destination is not None:
            self._publish(destination, resolved, base)

    def _check_device(self, worker: Worker) -> None:
        with self._phase("worker"):
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
        started = time.monotonic()
        for event in worker.events():
            if isinstance(event, PhaseStarted):
                self._finish_phase(phase, started)
                phase, started = event.phase, time.monotonic()
                self.record.phase = phase
                self.stops.begin_phase()
                self.showing.begin(phase)
            elif isinstance(event, Progress):
                self.showing.advance(event)
            else:
                self._take(event)
        self._finish_phase(phase, started)
        self.stops.end_phase()
        self.showing.end()

    def _finish_phase(self, phase: str | None, started: float) -> None:
        if phase is not None:
            self.record.timings.append((phase, time.monotonic() - started))

    def _take(self, event: Event) -> None:
        if isinstance(event, Told) and event.is_warning:
            self.github.warning("LoRA merge", event.text)
        elif isinstance(event, Told):
            self.github.info(event.text)
        elif isinstance(event, ShardReady) and self.early is not None:
            self.early.offer(event.folder / event.file.path, event.file)
        elif isinstance(event, Planned):
            self.origins = event.origins
            self.record.plan = replace(event.summary, notes=(*self.record.notes, *event.summary.notes))
            if self.inputs.mode == "plan":  # then it is what came of the run
                self.showing.end()
            self._say(*plan_lines(event.summary))
        elif isinstance(event, Merged):
            self.record.merged = event.checkpoint
            self.record.merged_digest = digest_of(released(event.checkpoint.files))
            self.record.peak_rss_bytes = event.peak_rss_bytes
            self.showing.end()
            self._say(*merged_lines(event))
        elif isinstance(event, Judged):
            self.record.verdict = event.verdict
            self.showing.end()
            self._say(*verdict_lines(event.verdict))

    def _publish(self, destination: Destination, resolved: Resolved, base: Path) -> None:
        record = self.record
        verdict, merged, plan = record.verdict, record.merged, record.plan
        if verdict is None or merged is None or plan is None or self.inputs.tag is None:
            raise PublishError(
                "The worker ended without a verdict.",
                why="Only a merge that was judged is published. Nothing was published.",
                fix="Look at the lines above; if this is not about your machine, report it with the log.",
            )
        if not verdict.passed and not self._is_allowed(verdict.status):
            return
        key = self.inputs.signing_key
        card = self._card_facts(destination, resolved, base, verdict, merged, plan)
        keeps_adapter = self.inputs.placement.archives_adapter
        archived = archive([adapter.root for adapter in resolved.adapters]) if keeps_adapter else ()
        with self._phase("publish"):
            documents = make_documents(card, merged.files, key=key, archived=[kept.file for kept in archived])
            if key is not None:
                self.github.info(f"Signed with the key {key.fingerprint}.")
            record.release = destination.publish(
                ToPublish(
                    folder=merged.root,
                    files=merged.files,
                    documents=documents,
                    verdict=verdict,
                    input_digest=resolved.origin.input_digest(),
                    archived=archived,
                    sent=self.early.sent() if self.early is not None else {},
                ),
                say=self.github.info,
                on_progress=self._on_upload,
            )
        release = record.release
        self._read_checksums(destination, release)
        self.github.info(f"Published {release.url}{f', commit {release.commit}' if release.commit else ''}.")

    def _card_facts(
        self,
        destination: Destination,
        resolved: Resolved,
        base: Path,
        verdict: Verdict,
        merged: MergedCheckpoint,
        plan: PlanSummary,
    ) -> CardFacts:
        key = self.inputs.signing_key
        return CardFacts(
            repo_id=destination.name,
            folder=destination.folder,
            tag=self.inputs.tag or "",
            origin=resolved.origin,
            facts=merge_facts(plan, self.record.versions, self.origins),
            merged_digest=digest_of(released(merged.files)),
            verdict=verdict,
            pictures=self.record.pictures,
            inherited=inherit(read_readme(base), *(read_readme(adapter.root) for adapter in resolved.adapters)),
            loading=read_loading(base, merged.root, (file.path for file in merged.files)),
            signed_by=key.fingerprint if key else None,
        )

    def _on_download(self, done: int, total: int, doing: str) -> None:
        self.showing.advance(Progress(phase=self.record.phase, done=done, total=total, doing=doing))

    def _on_upload(self, done: int, total: int) -> None:
        self.showing.advance(Progress(phase="publish", done=done, total=total, doing="uploading"))

    def _is_allowed(self, status: Status | None) -> bool:
        return status is Status.NOT_VERIFIED and "not-verified" in self.inputs.allow

    @contextmanager
    def _early(self, destination: Destination | None) -> Iterator[None]:
        if destination is None:
            yield
            return
        outbox = self.work.path / "outbox"
        shutil.rmtree(outbox, ignore_errors=True)  # what a killed run left would keep its shards on the disk
        self.early = destination.send_early(outbox, self.github.info)
        with self.early or nullcontext():
            yield

    def _nothing_to_do(self, destination: Destination, release: Release) -> None:
        if release.status is Status.NOT_VERIFIED and "not-verified" not in self.inputs.allow:
            raise PublishError(
                f"The tag {release.tag} of {release.repo_id} holds this merge, which was not verified.",
                why="Another run allowed that; this one does not. Nothing was written.",
                fix="Choose a new tag once the merge can be verified, or add `not-verified` to `allow`.",
            )
        self.record.release = release
        self._read_checksums(destination, release)
        self.github.info(
            f"{release.url} is there already{f', on {release.commit}' if release.commit else ''}: nothing to do."
        )

    def _read_checksums(self, destination: Destination, release: Release) -> None:
        if release.status is None:
            return  # the tag holds something else
        try:
            self.record.checksums = destination.read(release, CHECKSUMS)
        except (HubError, OSError) as error:  # the release is whole without it
            self.github.info(f"{CHECKSUMS} of the release could not be read: {error}")

    def _say(self, *lines: str) -> None:
        for line in filter(None, lines):
            self.github.info(line)

    def _relay(self, line: str) -> None:
        self.github.info(f"[worker] {line}")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with self.record.timed(name):  # named before it is shown: a signal may come while it is
            self.showing.begin(name)
            self.stops.begin_phase()
            yield
        self.stops.end_phase()
        self.showing.end()


def _digest(merged: Path) -> str:
    """Return the digest of an existing merge, without the adapter that a release may hold."""
    return digest_of(released(file for file in digest_folder(merged) if not file.path.startswith(ARCHIVE)))
