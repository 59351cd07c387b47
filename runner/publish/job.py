"""A verified merge becomes one commit and one tag, or nothing that anybody can load under that tag.

The order is: create the (private) repository if it is absent, send the large files (invisible), make one commit on top
of the head that was read, read its tree back and compare every file, put the tag on exactly that commit, read the refs
back. Commit and tag are two requests, so the tag is the publication: without it there is no release. An answer that is
lost is never guessed: the repository is read, and what is found there is adopted, repeated or reported as a conflict.

Not covered: another branch than `main`, and commits by others after the release's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoint.digests import FileDigest
from runner.errors import AccessDenied, HubError, PublishConflict, PublishError
from runner.hub import BRANCH, Hub, Target, Tree
from runner.publish.contents import Content, Contents, changed, gather
from runner.publish.existing import OnExistingTag, Release, find_existing
from runner.verify.verdict import Status, Verdict

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

UPLOAD_THREADS = 3
PREUPLOAD_FROM_BYTES = 1 << 20  # smaller files travel with the commit, or just before it


def publish(  # noqa: PLR0913 (all by name; each is a fact that only the caller has)
    hub: Hub,
    *,
    target: Target,
    folder: Path,
    files: tuple[FileDigest, ...],
    documents: Mapping[str, bytes],
    tag: str,
    verdict: Verdict,
    allow_not_verified: bool = False,
    input_digest: str,
    private: bool = True,
    on_existing_tag: OnExistingTag = "fail",
    commit_message: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> Release:
    """Return the release, after the Hub was seen to hold exactly these files under the tag.

    Args:
        hub: connected with a token that may write.
        target: what the preflight found; its refs are read again.
        folder: the merged folder.
        files: its files, with the digests that were taken while they were written.
        documents: by path: README.md, merge-manifest.json, and what lies in `merge-report/`.
        tag: name of the release.
        verdict: must have passed.
        allow_not_verified: publish, too, where a part of the judgement did not run and nothing failed.
        input_digest: of the manifest.
        private: for a repository that is created; an existing one keeps its visibility.
        on_existing_tag: what to do when the tag holds something else.
        commit_message: first line is the title; None for a default.
        on_progress: called with (bytes that are on the Hub, bytes of the release), from this thread.
        log: called with a line for the user.

    Raises:
        TagExists: the tag is taken; nothing was written.
        PublishConflict: somebody else moved the branch or the tag; the text says what is on the Hub.
        PublishError: the release is not complete; the text says what is on the Hub.
        HubError: the Hub refused or failed before anything was written.
    """
    if not verdict.passed and not (allow_not_verified and verdict.status is Status.NOT_VERIFIED):
        raise PublishError(
            f"Nothing is published: the verdict is {verdict.status.value}.",
            why="Only a merge that passed is published. Nothing was written to the Hub.",
            fix="Read the report for the check that failed.",
        )
    contents = gather(folder, files, documents=documents, input_digest=input_digest)
    job = _Job(
        hub=hub,
        target=target,
        contents=contents,
        tag=tag,
        message=commit_message or f"Release {tag}",
        private=private,
        on_existing_tag=on_existing_tag,
        status=verdict.status,
        on_progress=on_progress,
        log=log,
    )
    return job.run()


@dataclass(slots=True, kw_only=True)
class _Job:
    hub: Hub
    target: Target
    contents: Contents
    tag: str
    message: str
    private: bool
    on_existing_tag: OnExistingTag
    status: Status
    on_progress: Callable[[int, int], None] | None
    log: Callable[[str], None] | None
    standing: str = field(default="", init=False)  # what is on the Hub because of this run

    @property
    def repo_id(self) -> str:
        return self.target.repo_id

    def run(self) -> Release:
        try:
            return self._run()
        except (HubError, PublishError) as error:
            if not self.standing:
                raise
            family = PublishConflict if isinstance(error, PublishConflict) else PublishError
            problem = error.problem
            raise family(problem.what, why=f"{problem.why} {self.standing}", fix=problem.fix) from None

    def _run(self) -> Release:
        if not self.target.exists:
            self._create()
        refs = self.hub.refs(self.repo_id)
        tagged = refs.tags.get(self.tag)
        fresh = replace(self.target, tag_commit=tagged)
        found = find_existing(
            self.hub, fresh, self.tag, self.contents.input_digest, on_existing_tag=self.on_existing_tag
        )
        if found is not None:
            return found
        head = refs.branches.get(BRANCH)
        if head is None:
            raise PublishError(
                f"{self.repo_id} has no branch {BRANCH}.",
                why="A release is a commit on it.",
                fix=f"Create the branch {BRANCH}, or choose another `target-repo`.",
            )
        before = self.hub.tree(self.repo_id, head)
        manifest = self.hub.read_manifest(self.repo_id, head, before)
        if self.contents.is_adoptable(before, manifest):
            self._log(f"Commit {head} of {self.repo_id} holds this release already; only its tag is missing.")
            commit = head
        else:
            commit = self._commit(head, before, manifest)
        self.standing = (
            f"Commit {commit} on {BRANCH} of {self.repo_id} holds the whole release; {self._tagless(tagged)}."
        )
        self._tag(commit, tagged)
        return Release(
            repo_id=self.repo_id,
            tag=self.tag,
            commit=commit,
            url=self.hub.url(self.repo_id, self.tag),
            created=True,
            status=self.status,
            merged_digest=self.contents.merged_digest,
        )

    def _create(self) -> None:
        kind = "private" if self.private else "public"
        self.standing = f"The {kind} repository {self.repo_id} may have been created; it holds nothing of this release."
        try:
            self.hub.create_repo(self.repo_id, private=self.private)
        except AccessDenied:
            self.standing = ""  # a clear refusal
            raise
        self.standing = f"The {kind} repository {self.repo_id} was created; it holds nothing of this release, no tag."
        self._log(f"Created the {kind} repository {self.repo_id}.")

    def _commit(self, head: str, before: Tree, manifest: Mapping[str, Any] | None) -> str:
        from huggingface_hub import CommitOperationDelete

        self.standing = (
            f"The release is not on the Hub: no commit of it is known on {BRANCH} of {self.repo_id}, "
            "the tag was not touched, and uploaded files are not visible."
        )
        new = [path for path in self.contents.by_path if not self.contents.is_same(path, before.get(path))]
        stale = self.contents.stale(before, manifest)
        additions = [_addition(self.contents.by_path[path]) for path in new]
        self._upload(additions)
        title, _, rest = self.message.partition("\n")

        def landed(answer: str | None) -> str | None:
            if answer is not None:
                self.standing = f"Commit {answer} is on {BRANCH} of {self.repo_id}, but no tag points to it."
            return self._landed(answer, head, before, stale)

        return self.hub.commit(
            self.repo_id,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in stale)],
            parent=head,
            message=title.strip() or f"Release {self.tag}",
            description=f"{rest.strip()}\n\n{self._digests()}".strip(),
            landed=landed,
        )

    def _landed(self, answer: str | None, head: str, before: Tree, gone: Collection[str]) -> str | None:
        """Return the commit that holds the release; None when the branch is where it was."""
        commit = answer
        if commit is None:
            commit = self.hub.refs(self.repo_id).branches.get(BRANCH)
            if commit == head:
                return None
        reason = "the branch is gone"
        if commit is not None:
            difference = self.contents.difference(self.hub.tree(self.repo_id, commit), before, gone)
            if difference is None:
                return commit
            reason = difference
        if answer is not None:
            raise PublishError(
                f"Commit {answer} does not hold what was sent: {reason}.",
                why="The repository was read back and compared with the files that passed, so it was not tagged.",
                fix=f"Do not use that commit. Restore {BRANCH} if needed, then run again.",
            )
        raise PublishConflict(
            f"Somebody else committed to {self.repo_id} during this run: {BRANCH} moved from {head} to {commit}.",
            why="The release is a commit on top of the state that was read, so nothing of theirs is overwritten.",
            fix="Look at their commit, then run again.",
        )

    def _upload(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Send the large files, a few at a time; progress counts what was there already."""
        large = [addition for addition in additions if addition.upload_info.size >= PREUPLOAD_FROM_BYTES]
        total = self.contents.size_bytes
        done = total - sum(addition.upload_info.size for addition in large)
        self._progress(done, total)
        pool = ThreadPoolExecutor(max_workers=UPLOAD_THREADS, thread_name_prefix="upload")
        try:
            sent = {pool.submit(self.hub.preupload, self.repo_id, addition): addition for addition in large}
            for future in as_completed(sent):
                future.result()
                done += sent[future].upload_info.size
                self._progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)

    def _tag(self, commit: str, tagged: str | None) -> None:
        if tagged is not None and tagged != commit:
            self._log(f"Moving the tag {self.tag} of {self.repo_id} from commit {tagged} to {commit}.")
            self.hub.delete_tag(self.repo_id, self.tag, landed=lambda _answer: self._untagged(tagged))
            self.standing = (
                f"Commit {commit} on {BRANCH} of {self.repo_id} holds the whole release; the tag {self.tag} was "
                f"removed from commit {tagged}."
            )
        self.hub.create_tag(
            self.repo_id,
            self.tag,
            commit,
            message=f"{self.message.partition(chr(10))[0].strip()}\n\n{self._digests()}",
            landed=lambda _answer: self._tagged(commit),
        )

    def _tagged(self, commit: str) -> str | None:
        found = self.hub.refs(self.repo_id).tags.get(self.tag)
        if found is not None and found != commit:
            raise self._tag_taken(found)
        return found

    def _untagged(self, tagged: str) -> bool | None:
        found = self.hub.refs(self.repo_id).tags.get(self.tag)
        if found is not None and found != tagged:
            raise self._tag_taken(found)
        return True if found is None else None

    def _tag_taken(self, found: str) -> PublishConflict:
        return PublishConflict(
            f"Somebody else put the tag {self.tag} of {self.repo_id} on commit {found} during this run.",
            why="It is not moved, because it may be pinned already.",
            fix="Find out who else publishes this tag, then run again, or choose a new tag.",
        )

    def _log(self, line: str) -> None:
        if self.log is not None:
            self.log(line)

    def _progress(self, done_bytes: int, total_bytes: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done_bytes, total_bytes)

    def _tagless(self, tagged: str | None) -> str:
        return f"the tag {self.tag} does not exist" if tagged is None else f"the tag {self.tag} is still on {tagged}"

    def _digests(self) -> str:
        return f"input digest: {self.contents.input_digest}\nmerged digest: {self.contents.merged_digest}"


def _addition(content: Content) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(content.file.path, content.source)
    if addition.upload_info.size != content.file.size_bytes:
        raise changed(content.file.path)
    addition.upload_info.sha256 = bytes.fromhex(content.file.sha256)  # taken while writing: not hashed again
    return addition
