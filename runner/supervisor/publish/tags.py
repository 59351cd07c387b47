"""Tags: put on a commit, or moved to it, and read back. The Hub has no move, so a moved tag is absent for a moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runner.protocol.errors import PublishConflict
from runner.supervisor.hub import Hub
from runner.supervisor.publish.run import Say


def put_tag(
    hub: Hub,
    repo_id: str,
    tag: str,
    *,
    commit: str,
    before: str | None,
    message: str,
    on_removed: Callable[[], None] = lambda: None,
) -> None:
    """Make `tag` point to `commit`.

    Args:
        hub: to write to.
        repo_id: `owner/name`.
        tag: its name.
        commit: 40 hex digits.
        before: the commit that it is moved from; None where it must not exist.
        message: of the tag.
        on_removed: called between the removal of a moved tag and its creation.

    Raises:
        PublishConflict: it is somewhere else meanwhile; it is not touched then.
        HubError: the Hub refused.
    """

    def current() -> str | None:
        found = hub.refs(repo_id).tags.get(tag)
        if found not in (None, commit, before):
            raise _taken(repo_id, tag, str(found))
        return found

    if before == commit:
        return
    if before is not None:
        hub.delete_tag(repo_id, tag, landed=lambda _answer: None if current() == before else True)
        on_removed()
    # The old tag may still be shown for a moment: then it is neither there nor in the way.
    hub.create_tag(
        repo_id, tag, commit, message=message, landed=lambda _answer: commit if current() == commit else None
    )


def move_aliases(
    hub: Hub, repo_id: str, aliases: Sequence[str], *, commit: str, message: str, say: Say, only_forward: bool
) -> None:
    """Make every alias point to `commit`, one after the other, each read back.

    Args:
        hub: to write to.
        repo_id: `owner/name`.
        aliases: names of tags.
        commit: 40 hex digits.
        message: of the tags.
        say: told what is moved, and what is not.
        only_forward: leave an alias on a commit that is not older; for a release that was there before this run,
            so that a rerun of an old release does not take `latest` back.

    Raises:
        PublishConflict: as `put_tag`.
        HubError: the Hub refused.
    """
    for alias in aliases:
        before = hub.refs(repo_id).tags.get(alias)
        if before == commit:
            continue
        if before is not None and only_forward and not _is_older(hub, repo_id, before, commit):
            say(f"The tag {alias} of {repo_id} stays on commit {before}, which is not older than this release.")
            continue
        say(f"The tag {alias} of {repo_id} goes {f'from commit {before} ' if before else ''}to {commit}.")
        put_tag(hub, repo_id, alias, commit=commit, before=before, message=message)


def _is_older(hub: Hub, repo_id: str, one: str, other: str) -> bool:
    return hub.history(repo_id, one)[0][1] < hub.history(repo_id, other)[0][1]


def _taken(repo_id: str, tag: str, found: str) -> PublishConflict:
    return PublishConflict(
        f"The tag {tag} of {repo_id} is not where it was read: it is on commit {found} now.",
        why="Somebody else put it there during this run, or the Hub's first answer was older than its last write. "
        "It is not moved, because it may be pinned already.",
        fix="Find out who else publishes this tag, then run again, or choose a new tag.",
    )
