"""A release as a pull request: proposed, not tagged. Who merges it decides; the next run then finds it and tags it."""

from __future__ import annotations

from itertools import islice

from runner.supervisor.hub import Made
from runner.supervisor.publish.commit import not_what_was_sent, operations
from runner.supervisor.publish.run import Ground, Run

MAX_LOOKED_AT = 30


def propose(run: Run, ground: Ground) -> tuple[str, str, bool]:
    """Return (commit, page, whether it is new) of an open pull request that holds exactly the release.

    Args:
        run: what is published.
        ground: the head of the branch that it is proposed for.

    Raises:
        PublishError: what the Hub holds is not what was sent.
        HubError: the Hub refused.
    """
    there = _find(run, ground)
    if there is not None:
        run.say(f"The pull request {there[1]} holds this release already.")
        return (*there, False)
    run.standing = f"No pull request with this release is known on {run.repo_id}; uploaded files are not visible."
    stale = run.contents.stale(ground.tree, ground.manifest)

    def landed(made: Made | None) -> tuple[str, str] | None:
        if made is None:
            return _find(run, ground)
        run.standing = f"The pull request {made.pull_url} was opened on {run.repo_id}; it is not confirmed."
        tree = run.hub.tree(run.repo_id, made.commit)
        difference = run.contents.difference(tree, ground.tree, stale)
        if difference is not None:
            raise not_what_was_sent(made.commit, difference)
        return made.commit, str(made.pull_url)

    made = run.hub.commit(
        run.repo_id,
        operations(run, ground, branch=run.wanted.branch, stale=stale, elsewhere={}),
        parent=ground.head,
        message=run.wanted.title,
        description=run.description,
        landed=landed,
        branch=run.wanted.branch,
        create_pr=True,
    )
    return (*made, True)


def _find(run: Run, ground: Ground) -> tuple[str, str] | None:
    pulls = run.hub.open_pulls(run.repo_id)
    targets = run.hub.refs(run.repo_id, with_pulls=True).pulls if pulls else {}
    for ref, page in islice(pulls.items(), MAX_LOOKED_AT):
        commit = targets.get(ref)
        if commit is None or commit == ground.head:
            continue
        there = Ground.of(run.hub, run.repo_id, commit)
        if run.contents.is_adoptable(there.tree, there.manifest):
            return commit, page
    return None
