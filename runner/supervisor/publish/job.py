"""A verified merge becomes one commit and one tag, or nothing that anybody can load under that tag.

The order is: create the (private) repository if it is absent, send the large files (invisible), make one commit on top
of the head that was read, read its tree back and compare every file, put the tag on exactly that commit, read the refs
back. Commit and tag are two requests, so the tag is the publication: without it there is no release. An answer that is
lost is never guessed: the repository is read, and what is found there is adopted, repeated or reported as a conflict.
After the tag come, where they are wanted, the target branch of a staged release and the aliases.

Not covered: commits by others after the release's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner.files.sidecars.archive import Archived
from runner.protocol.digests import FileDigest
from runner.protocol.errors import AccessDenied, HubError, PublishConflict, PublishError
from runner.protocol.verdict import Status, Verdict
from runner.supervisor.hub import BRANCH, Hub, Refs, Target
from runner.supervisor.hub.translate import clean
from runner.supervisor.publish.commit import Elsewhere, commit, large_files
from runner.supervisor.publish.contents import gather
from runner.supervisor.publish.existing import Release, find_existing
from runner.supervisor.publish.pulls import propose
from runner.supervisor.publish.run import Ground, Run, Say
from runner.supervisor.publish.staging import promote, stage
from runner.supervisor.publish.tags import move_aliases, put_tag
from runner.supervisor.publish.wanted import Wanted

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


def publish(  # noqa: PLR0913 (all by name; each is a fact that only the caller has)
    hub: Hub,
    *,
    target: Target,
    wanted: Wanted,
    folder: Path,
    files: tuple[FileDigest, ...],
    documents: Mapping[str, bytes],
    verdict: Verdict,
    input_digest: str,
    archived: Iterable[Archived] = (),
    sent: Mapping[str, CommitOperationAdd] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    log: Say | None = None,
) -> Release:
    """Return the release, after the Hub was seen to hold exactly these files under the tag.

    Args:
        hub: connected with a login that may write.
        target: what the preflight found; its refs are read again.
        wanted: how the release is to appear.
        folder: the merged folder.
        files: its files, with the digests that were taken while they were written.
        documents: by path: README.md, merge-manifest.json, and what lies in `merge-report/`.
        verdict: must have passed, or be allowed by `wanted`.
        input_digest: of the manifest.
        archived: files of the adapters that go along.
        sent: large files that were sent while the merge went on, by path.
        on_progress: called with (bytes that are on the Hub, bytes of the release), from this thread.
        log: called with a line for the user.

    Raises:
        TagExists: the tag is taken; nothing was written.
        PublishConflict: somebody else moved the branch or the tag; the text says what is on the Hub.
        PublishError: the release is not complete; the text says what is on the Hub.
        HubError: the Hub refused or failed before anything was written.
    """
    refuse_unless_passed(verdict, wanted)
    run = Run(
        hub=hub,
        repo_id=target.repo_id,
        wanted=wanted,
        contents=gather(folder, files, documents=documents, input_digest=input_digest, archived=archived),
        sent=sent or {},
        say=log or (lambda _line: None),
        on_progress=on_progress or (lambda _done, _total: None),
    )
    try:
        return _publish(run, target, verdict)
    except (HubError, PublishError) as error:
        if not run.standing:
            raise
        family = PublishConflict if isinstance(error, PublishConflict) else PublishError
        problem = error.problem
        raise family(problem.what, why=f"{problem.why} {run.standing}", fix=problem.fix) from None


def refuse_unless_passed(verdict: Verdict, wanted: Wanted) -> None:
    """Raise `PublishError` for a verdict that did not pass, and is not allowed all the same."""
    if not verdict.passed and not (wanted.allow_not_verified and verdict.status is Status.NOT_VERIFIED):
        raise PublishError(
            f"Nothing is published: the verdict is {verdict.status.value}.",
            why="Only a merge that passed is published. Nothing can be seen where it would have gone.",
            fix="Read the report for the check that failed.",
        )


def finish(hub: Hub, release: Release, wanted: Wanted, log: Say) -> None:
    """Do what an interrupted run left undone after the tag of a release that is there: target branch and aliases.

    Nothing is done for a tag that holds something else (`on_existing_tag` is "skip").

    Raises:
        PublishError: it could not be done; the release itself is complete.
    """
    if release.status is None:
        return
    try:
        _after_tag(hub, release, wanted, log, is_new=False)
    except (HubError, PublishError) as error:
        family = PublishConflict if isinstance(error, PublishConflict) else PublishError
        problem = error.problem
        raise family(problem.what, why=f"{problem.why} {_complete(release)}", fix=problem.fix) from None


def _publish(run: Run, target: Target, verdict: Verdict) -> Release:
    hub, wanted = run.hub, run.wanted
    if not target.exists:
        _create(run)
    must_be_private = wanted.private if target.private is None else target.private
    if must_be_private:
        _refuse_public(run, "Nothing of this release was sent.")
    refs = hub.refs(run.repo_id)
    tagged = refs.tags.get(wanted.tag)
    fresh = replace(target, tag_commit=tagged)
    found = find_existing(hub, fresh, wanted, run.contents.input_digest)
    if found is not None:
        finish(hub, found, wanted, run.say)
        return found
    ground = Ground.of(hub, run.repo_id, _head(run, refs))
    release = Release(
        repo_id=run.repo_id,
        tag=wanted.tag,
        commit=ground.head,
        url=hub.url(run.repo_id, wanted.tag),
        created=True,
        status=verdict.status,
        merged_digest=run.contents.merged_digest,
    )
    if run.contents.is_adoptable(ground.tree, ground.manifest):
        run.say(f"Commit {ground.head} of {run.repo_id} holds this release already; only its tag is missing.")
    elif wanted.create_pr:
        made, page, is_new = propose(run, ground)
        return replace(release, tag="", commit=made, url=page, pull_request=page, created=is_new)
    else:
        release = replace(release, commit=_commit(run, ground, refs))
    run.standing = f"Commit {release.commit} of {run.repo_id} holds the whole release; {_tagless(run, tagged)}."
    if must_be_private:
        _refuse_public(run, "It was private when the run began.")
    _tag(run, release.commit, tagged)
    run.standing = _complete(release)
    _after_tag(hub, release, wanted, run.say, is_new=True)
    return release


def _create(run: Run) -> None:
    kind = "private" if run.wanted.private else "public"
    run.standing = f"The {kind} repository {run.repo_id} may have been created; it holds nothing of this release."
    try:
        run.hub.create_repo(run.repo_id, private=run.wanted.private)
    except AccessDenied:
        run.standing = ""  # a clear refusal
        raise
    run.standing = f"The {kind} repository {run.repo_id} was created; it holds nothing of this release, no tag."
    run.say(f"Created the {kind} repository {run.repo_id}.")


def _refuse_public(run: Run, so_far: str) -> None:
    """Refuse a repository that is not private, though this run was to create it so or found it so."""
    if not run.hub.is_private(run.repo_id):
        raise PublishConflict(
            f"{run.repo_id} is public, and must be private.",
            why=f"Somebody else created it, or made it public, during this run. {so_far}",
            fix="Make it private and run again; or, if it may be public, set `private: false` and run again.",
        )


def _head(run: Run, refs: Refs) -> str:
    """Return the head of the target branch, which is started at that of `main` where it does not exist."""
    branch = run.wanted.branch
    head = refs.branches.get(branch)
    if head is not None:
        return head
    start = refs.branches.get(BRANCH)
    if start is None or run.wanted.create_pr:
        raise PublishError(
            f"{run.repo_id} has no branch {branch if start else BRANCH}.",
            why="A release is a commit on it.",
            fix=f"Create the branch {branch}, or choose another `target-repo`.",
        )
    run.say(f"Starting the branch {branch} of {run.repo_id} at {start}, the head of {BRANCH}.")
    run.standing = f"The branch {branch} of {run.repo_id} was started; it holds nothing of this release, no tag."
    return run.hub.create_branch(
        run.repo_id, branch, start, landed=lambda _answer: run.hub.refs(run.repo_id).branches.get(branch)
    )


def _commit(run: Run, ground: Ground, refs: Refs) -> str:
    tagged, staged = refs.tags.get(run.wanted.tag), refs.branches.get(run.wanted.staging_branch)
    elsewhere: Elsewhere = large_files(ground.tree, ground.head)
    if tagged is not None:
        elsewhere = {**large_files(run.hub.tree(run.repo_id, tagged), tagged), **elsewhere}
    if run.wanted.is_staged:
        return stage(run, ground, staged=staged, elsewhere=elsewhere)
    return commit(run, ground, branch=run.wanted.branch, elsewhere=elsewhere)


def _tag(run: Run, made: str, tagged: str | None) -> None:
    tag = run.wanted.tag

    def removed() -> None:
        run.standing = (
            f"Commit {made} of {run.repo_id} holds the whole release; the tag {tag} was removed from commit {tagged}."
        )

    if tagged not in (None, made):
        _tell_replacement(run, str(tagged), made)
    message = f"{run.wanted.title}\n\n{run.digests}"
    put_tag(run.hub, run.repo_id, tag, commit=made, before=tagged, message=message, on_removed=removed)


def _tell_replacement(run: Run, tagged: str, made: str) -> None:
    old = run.hub.read_manifest(run.repo_id, tagged) or {}
    theirs = clean(old.get("merged_digest") or "not known")
    run.say(f"Moving the tag {run.wanted.tag} of {run.repo_id} from commit {tagged} to {made}.")
    run.say(f"  merged digest before: {theirs[:64]}")
    run.say(f"  merged digest now: {run.contents.merged_digest}")


def _after_tag(hub: Hub, release: Release, wanted: Wanted, say: Say, *, is_new: bool) -> None:
    if wanted.is_staged:
        promote(hub, release.repo_id, wanted=wanted, commit=release.commit, say=say)
    move_aliases(
        hub,
        release.repo_id,
        wanted.also_tags,
        commit=release.commit,
        message=f"{wanted.tag}\n\nmerged digest: {release.merged_digest}",
        say=say,
        only_forward=not is_new,
    )


def _complete(release: Release) -> str:
    return f"The release is complete: {release.repo_id} has the tag {release.tag} on commit {release.commit}."


def _tagless(run: Run, tagged: str | None) -> str:
    tag = run.wanted.tag
    return f"the tag {tag} does not exist" if tagged is None else f"the tag {tag} is still on {tagged}"
