"""Where a release goes, a Hub or a folder, behind one face: look, find, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runner.files.sidecars.archive import Archived
from runner.protocol.digests import FileDigest
from runner.protocol.verdict import Verdict
from runner.supervisor.hub import BRANCH, Hub, Target
from runner.supervisor.publish import job
from runner.supervisor.publish.contents import gather
from runner.supervisor.publish.early import EarlyUpload
from runner.supervisor.publish.existing import Release, find_existing
from runner.supervisor.publish.folder import check_folder, find_in_folder, link_aliases, place_of, write_release
from runner.supervisor.publish.run import Say
from runner.supervisor.publish.wanted import Wanted

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToPublish:
    """What is to be published.

    Attributes:
        folder: the merged folder.
        files: its files, with the digests that were taken while they were written.
        documents: what is added, by path.
        verdict: must have passed.
        input_digest: of the manifest.
        sent: large files that are on the Hub already, by path.
        archived: files of the adapters that go along.
    """

    folder: Path
    files: tuple[FileDigest, ...]
    documents: Mapping[str, bytes]
    verdict: Verdict
    input_digest: str
    sent: Mapping[str, CommitOperationAdd]
    archived: tuple[Archived, ...] = ()


class Destination(Protocol):
    """Where a release goes."""

    @property
    def name(self) -> str:
        """What the release's card calls it."""
        ...

    @property
    def folder(self) -> str | None:
        """Path of the release as seen from beside the folder; None for a Hub."""
        ...

    def inspect(self, say: Say) -> None:
        """Refuse what can be refused before any work; nothing is written."""
        ...

    def find(self, input_digest: str, say: Say) -> Release | None:
        """Return the release that makes a run unnecessary; what was left undone after its tag is done."""
        ...

    def send_early(self, outbox: Path, say: Say) -> EarlyUpload | None:
        """Return what takes finished shards while the merge goes on; None where they have to wait."""
        ...

    def publish(self, judged: ToPublish, *, say: Say, on_progress: Progress) -> Release:
        """Return the release, after it was read back."""
        ...

    def read(self, release: Release, path: str) -> bytes | None:
        """Return a small file of the release as it is there; None where it has none."""
        ...


@dataclass(slots=True, kw_only=True)
class HubDestination:
    """A repository on a Hub; see `runner.supervisor.publish.job`. `target` is known after `inspect`."""

    hub: Hub
    repo_id: str
    wanted: Wanted
    sends_early: bool = True
    target: Target | None = None

    @property
    def name(self) -> str:
        """Its `owner/name`."""
        return self.repo_id

    @property
    def folder(self) -> str | None:
        """None: it is no folder."""
        return None

    def inspect(self, say: Say) -> None:
        """See `Hub.inspect_target`; what the user should know of the token is said."""
        self.target = self.hub.inspect_target(self.repo_id, self.wanted.tag, self.wanted.wishes)
        for note in self.target.notes:
            say(f"Note: {note}")

    def find(self, input_digest: str, say: Say) -> Release | None:
        """See `find_existing` and `finish`."""
        found = find_existing(self.hub, self._seen(), self.wanted, input_digest)
        if found is not None:
            job.finish(self.hub, found, self.wanted, say)
        return found

    def send_early(self, outbox: Path, say: Say) -> EarlyUpload | None:
        """Return what sends shards; None where the repository is yet to be made, which it is after the verdict only."""
        target = self._seen()
        if not target.exists or not self.sends_early:
            return None
        return EarlyUpload(
            self.hub,
            repo_id=self.repo_id,
            branch=target.branch if target.head is not None else BRANCH,
            create_pr=self.wanted.create_pr,
            known=target.large,
            outbox=outbox,
            say=say,
        )

    def publish(self, judged: ToPublish, *, say: Say, on_progress: Progress) -> Release:
        """See `runner.supervisor.publish.job.publish`."""
        self.hub.take_new_token()  # the one of the preflight may be near its end
        return job.publish(
            self.hub,
            target=self._seen(),
            wanted=self.wanted,
            folder=judged.folder,
            files=judged.files,
            documents=judged.documents,
            verdict=judged.verdict,
            input_digest=judged.input_digest,
            archived=judged.archived,
            sent=judged.sent,
            on_progress=on_progress,
            log=say,
        )

    def read(self, release: Release, path: str) -> bytes | None:
        """See `Hub.read_file`."""
        return self.hub.read_file(self.repo_id, path, release.commit)

    def _seen(self) -> Target:
        if self.target is None:
            raise ValueError("not inspected")
        return self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderDestination:
    """A folder; see `runner.supervisor.publish.folder`."""

    root: Path
    wanted: Wanted

    @property
    def name(self) -> str:
        """The folder's own name: a card says nothing of a machine's paths."""
        return self.root.name

    @property
    def folder(self) -> str | None:
        """Its own name and that of the tag's sub-folder."""
        return f"{self.root.name}/{place_of(self.root, self.wanted.tag).name}"

    def inspect(self, say: Say) -> None:
        """Refuse a folder that cannot be written to."""
        check_folder(self.root)

    def find(self, input_digest: str, say: Say) -> Release | None:
        """See `find_in_folder`."""
        found = find_in_folder(self.root, self.wanted, input_digest)
        if found is not None and found.status is not None:
            link_aliases(self.root, self.wanted, say, only_forward=True)
        return found

    def send_early(self, outbox: Path, say: Say) -> EarlyUpload | None:
        """Return None: copying a folder takes no time worth saving."""
        return None

    def publish(self, judged: ToPublish, *, say: Say, on_progress: Progress) -> Release:
        """See `write_release`."""
        job.refuse_unless_passed(judged.verdict, self.wanted)
        contents = gather(
            judged.folder,
            judged.files,
            documents=judged.documents,
            input_digest=judged.input_digest,
            archived=judged.archived,
        )
        found = find_in_folder(self.root, self.wanted, judged.input_digest)
        if found is None:
            found = write_release(
                self.root, self.wanted, contents, status=judged.verdict.status, say=say, on_progress=on_progress
            )
        if found.status is not None:
            link_aliases(self.root, self.wanted, say, only_forward=not found.created)
        return found

    def read(self, release: Release, path: str) -> bytes | None:
        """Return the file of the tag's sub-folder."""
        there = place_of(self.root, self.wanted.tag) / path
        return there.read_bytes() if there.is_file() else None
