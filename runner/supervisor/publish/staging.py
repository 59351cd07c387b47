"""A release by way of a branch of its own, so that the target branch moves only after the tag is set and read back.

`staging/<tag>` starts at the head of the target branch and gets the commit. When the tag is on it, the target branch
gets the same files by a commit of pointers (nothing is sent again), and the staging branch goes. As long as that branch
is there, the target branch still has to follow: that is how a rerun knows.
"""

from __future__ import annotations

from typing import Any

from runner.protocol.errors import PublishConflict
from runner.supervisor.hub import Hub, Made, Tree
from runner.supervisor.publish.commit import Elsewhere, commit, not_what_was_sent
from runner.supervisor.publish.contents import SERVER_OWNED
from runner.supervisor.publish.run import Ground, Run, Say
from runner.supervisor.publish.wanted import Wanted


def stage(run: Run, ground: Ground, *, staged: str | None, elsewhere: Elsewhere) -> str:
    """Return the commit on the staging branch that holds the release.

    Args:
        run: what is published.
        ground: the head of the target branch.
        staged: the head of the staging branch, or None where there is none.
        elsewhere: see `commit`.

    Raises:
        PublishConflict: the staging branch holds something else, or somebody else works on it.
    """
    branch = run.wanted.staging_branch
    if staged is not None and staged != ground.head:
        there = Ground.of(run.hub, run.repo_id, staged)
        if run.contents.is_adoptable(there.tree, there.manifest):
            run.say(f"Commit {staged} on {branch} of {run.repo_id} holds this release already.")
            return staged
        if staged not in {oid for oid, _ in run.hub.history(run.repo_id, ground.head)}:
            raise PublishConflict(
                f"The branch {branch} of {run.repo_id} holds other content, on commit {staged}.",
                why="Another run is releasing this tag, or one with other inputs was interrupted.",
                fix=f"If no other run is at work, delete the branch {branch}, then run again.",
            )
        _delete_branch(run.hub, run.repo_id, branch)  # left behind at an earlier head, before its commit
        staged = None
    if staged is None:
        _start_branch(run, branch, ground.head)
    return commit(run, ground, branch=branch, elsewhere=elsewhere)


def promote(hub: Hub, repo_id: str, *, wanted: Wanted, commit: str, say: Say) -> None:
    """Bring the files of a tagged commit to the target branch, and remove the staging branch.

    Nothing happens where there is no staging branch at `commit`: it was done.

    Args:
        hub: to write to.
        repo_id: `owner/name`.
        wanted: names the branches.
        commit: that the tag points to.
        say: told what is done.

    Raises:
        PublishConflict: the target branch moved since the staging branch was started.
        PublishError: it holds something else than what was sent.
        HubError: the Hub refused.
    """
    branches = hub.refs(repo_id).branches
    if branches.get(wanted.staging_branch) != commit:
        return
    head = branches.get(wanted.branch, "")
    tree = hub.tree(repo_id, commit)
    if head != commit and not _is_equal(hub.tree(repo_id, head), tree):
        parent = hub.history(repo_id, commit)[1][0]
        if head != parent:
            raise PublishConflict(
                f"{wanted.branch} of {repo_id} moved from {parent} to {head} since the release was staged.",
                why="Bringing the release there would undo what somebody else committed.",
                fix=f"Merge by hand, or leave {wanted.branch} as it is, and delete the branch {wanted.staging_branch}.",
            )
        moved = _follow(hub, repo_id, wanted=wanted, commit=commit, head=head, tree=tree)
        say(f"{wanted.branch} of {repo_id} holds the release, by commit {moved}.")
    _delete_branch(hub, repo_id, wanted.staging_branch)


def _follow(hub: Hub, repo_id: str, *, wanted: Wanted, commit: str, head: str, tree: Tree) -> str:
    before = hub.tree(repo_id, head)

    def landed(made: Made | None) -> str | None:
        found = made.commit if made is not None else hub.refs(repo_id).branches.get(wanted.branch)
        if found is None or found == head:
            return None
        if _is_equal(hub.tree(repo_id, found), tree):
            return found
        if made is not None:
            raise not_what_was_sent(found, f"its files are not those of {commit}", wanted.branch)
        raise PublishConflict(
            f"{wanted.branch} of {repo_id} is not where it was read: first {head}, now {found}.",
            why="Somebody else committed during this run, or the Hub's first answer was older than its last write. "
            "Nothing is overwritten.",
            fix=f"Look at commit {found}, then run again.",
        )

    return hub.commit(
        repo_id,
        _copies(before, tree, commit),
        parent=head,
        message=wanted.title,
        description=f"The files of {commit}, which the tag {wanted.tag} is on.",
        landed=landed,
        branch=wanted.branch,
    )


def _copies(before: Tree, after: Tree, revision: str) -> list[Any]:
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    changed = [
        path
        for path, file in after.items()
        if path != SERVER_OWNED and (path not in before or before[path].digest != file.digest)
    ]
    gone = [path for path in before if path not in after and path != SERVER_OWNED]
    return [
        *(CommitOperationCopy(path, path, src_revision=revision) for path in changed),
        *(CommitOperationDelete(path, is_folder=False) for path in gone),
    ]


def _is_equal(one: Tree, other: Tree) -> bool:
    def digests(tree: Tree) -> dict[str, str]:
        return {path: file.digest for path, file in tree.items() if path != SERVER_OWNED}

    return digests(one) == digests(other)


def _start_branch(run: Run, branch: str, head: str) -> None:
    def landed(_answer: bool | None) -> str | None:
        found = run.hub.refs(run.repo_id).branches.get(branch)
        if found not in (None, head):
            raise PublishConflict(
                f"The branch {branch} of {run.repo_id} was not there, and is now, at commit {found}.",
                why="Another run is releasing this tag, or the Hub's first answer was older than its last write.",
                fix="If another run is at work, let it end; then run again.",
            )
        return found

    run.standing = (
        f"The branch {branch} of {run.repo_id} may have been started; nothing of this release is in it, and no tag."
    )
    run.hub.create_branch(run.repo_id, branch, head, landed=landed)


def _delete_branch(hub: Hub, repo_id: str, branch: str) -> None:
    def landed(_answer: bool | None) -> bool | None:
        return True if branch not in hub.refs(repo_id).branches else None

    hub.delete_branch(repo_id, branch, landed=landed)
