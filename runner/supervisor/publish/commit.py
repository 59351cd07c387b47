"""The one commit of a release, read back before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.protocol.errors import PublishConflict, PublishError
from runner.supervisor.hub import BRANCH, Made, Tree
from runner.supervisor.publish.run import Ground, Run
from runner.supervisor.publish.upload import PREUPLOAD_FROM_BYTES, addition_of, send

Elsewhere = Mapping[str, tuple[str, str]]


def commit(run: Run, ground: Ground, *, branch: str, elsewhere: Elsewhere | None = None) -> str:
    """Return the commit on `branch`, made on top of `ground` and seen to hold exactly the release.

    Args:
        run: what is published.
        ground: the head of `branch`.
        branch: that the commit goes to.
        elsewhere: large contents that the repository holds at some revision: sha256 → (revision, path).

    Raises:
        PublishConflict: the branch is not where it was read.
        PublishError: what the Hub holds is not what was sent.
    """
    run.standing = (
        f"The release is not on the Hub: no commit of it is known on {branch} of {run.repo_id}, "
        "the tag was not touched, and uploaded files are not visible."
    )
    stale = run.contents.stale(ground.tree, ground.manifest)

    def landed(made: Made | None) -> str | None:
        if made is not None:
            run.standing = f"Commit {made.commit} is on {branch} of {run.repo_id}, but no tag points to it."
        return _landed(run, ground, made.commit if made else None, branch=branch, gone=stale)

    return run.hub.commit(
        run.repo_id,
        operations(run, ground, branch=branch, stale=stale, elsewhere=elsewhere or {}),
        parent=ground.head,
        message=run.wanted.title,
        description=run.description,
        landed=landed,
        branch=branch,
    )


def operations(run: Run, ground: Ground, *, branch: str, stale: tuple[str, ...], elsewhere: Elsewhere) -> list[Any]:
    """Return what makes the release out of `ground`, after the large files were sent."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    contents = run.contents
    new = [path for path in contents.by_path if not contents.is_same(path, ground.tree.get(path))]
    copies, additions = [], []
    for path in new:
        file = contents.by_path[path].file
        there = elsewhere.get(file.sha256) if file.size_bytes >= PREUPLOAD_FROM_BYTES else None
        if there is not None:
            copies.append(CommitOperationCopy(there[1], path, src_revision=there[0]))
        else:
            early = run.sent.get(path)
            is_good = early is not None and early.upload_info.sha256.hex() == file.sha256
            additions.append(early if early is not None and is_good else addition_of(contents.by_path[path]))
    send(run, additions, branch=branch)
    return [*additions, *copies, *(CommitOperationDelete(path, is_folder=False) for path in stale)]


def large_files(tree: Tree, revision: str) -> dict[str, tuple[str, str]]:
    """Return where a revision holds large contents: sha256 → (revision, path)."""
    return {file.sha256: (revision, path) for path, file in tree.items() if file.sha256 is not None}


def _landed(run: Run, ground: Ground, answer: str | None, *, branch: str, gone: tuple[str, ...]) -> str | None:
    """Return the commit that holds the release; None when the branch is where it was."""
    found = answer
    if found is None:
        found = run.hub.refs(run.repo_id).branches.get(branch)
        if found == ground.head:
            return None
    reason = "the branch is gone"
    if found is not None:
        difference = run.contents.difference(run.hub.tree(run.repo_id, found), ground.tree, gone)
        if difference is None:
            return found
        reason = difference
    if answer is not None:
        raise not_what_was_sent(answer, reason, branch)
    raise PublishConflict(
        f"{branch} of {run.repo_id} is not where it was read: first {ground.head}, now {found}.",
        why="Somebody else committed during this run, or the Hub's first answer was older than its last write. The "
        "release is a commit on top of the state that was read, so nothing is overwritten.",
        fix=f"Look at commit {found}, then run again.",
    )


def not_what_was_sent(commit: str, reason: str, branch: str = BRANCH) -> PublishError:
    """Return the error for a commit that holds something else than what was sent."""
    return PublishError(
        f"Commit {commit} does not hold what was sent: {reason}.",
        why="The repository was read back and compared with the files that passed, so it was not tagged.",
        fix=f"Do not use that commit. Restore {branch} if needed, then run again.",
    )
